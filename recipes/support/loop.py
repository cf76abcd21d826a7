"""What the loop without a Trainer keeps track of: its options, its progress, its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import Optimizer
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_padam.optim.schedules import check_schedule
from hf_padam.resuming.checkpoints import (
    CheckpointError,
    loading,
    resolve_checkpoint,
    rotate_checkpoints,
    staged_checkpoint,
)
from hf_padam.resuming.settings import check_decayed, check_world_size, hyperparameters, warn_of_other_settings
from hf_padam.training.distillation import Distillation, check_distillation_options, shifts_labels
from hf_padam.training.distilling_trainer import check_teacher
from hf_padam.training.options import PAdamOptions, check_target, has_target, with_defaults
from hf_padam.training.teacher import Teacher

from .errors import UsageError

PROGRESS_FILE = "custom_checkpoint_0.pkl"
"""Where accelerate saves the first object that is registered with it: the `Progress`."""


@dataclass
class LoopArguments(PAdamOptions):
    """The training options of the loop: PAdam's, and some whose names and meanings are those of TrainingArguments."""

    output_dir: str = field(default="trainer_output", metadata={"help": "Where everything is written."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "Strength of the L2 decay."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the data, unless max_steps is set."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sequences per process and micro-batch."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Same, for evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Name of a Transformers schedule."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm; 0: not."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between logs."})
    save_strategy: str = field(
        default="no", metadata={"help": "Whether to save checkpoints.", "choices": ["no", "steps"]}
    )
    save_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=None, metadata={"help": "How many checkpoints to keep."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "Replaced by parse_arguments."})
    report_to: str = field(default="none", metadata={"help": "A tracker that accelerate knows, e.g. tensorboard."})
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bar."})
    seed: int = field(default=42, metadata={"help": "Seed of data order and dropout."})

    def __post_init__(self) -> None:
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in (*sizes, "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} is too small: it must be at least 1")
        try:
            super().__post_init__()
            check_target(with_defaults(vars(self)))
            check_schedule(self.p_norm_start, self.p_norm_schedule_share, self.p_norm_schedule)
            check_distillation_options(self)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def saves_at(self, step: int, last: bool) -> bool:
        """Whether a checkpoint is due after a step."""
        return self.save_strategy == "steps" and (last or step % self.save_steps == 0)


def make_distillation(
    args: LoopArguments, model: Any, tokenizer: Any, teacher: tuple[Any, Any] | None, accelerator: Accelerator
) -> Distillation | None:
    """Return what distils as the arguments say; None if they do not.

    Args:
        args: The arguments.
        model: The model to train, neither wrapped nor loaded from a checkpoint yet.
        tokenizer: Its tokenizer.
        teacher: What `load_teacher` has returned.
        accelerator: Says where it runs, and in which precision.

    Raises:
        UsageError: If the model cannot be distilled.
    """
    if args.distill_from is None:
        return None
    if is_deepspeed_zero3_enabled():
        raise UsageError(f"--distill_from {args.distill_from} under ZeRO-3, which shards the teacher too: use FSDP2")
    options: Any = dict(dtype=args.distill_dtype, device=accelerator.device, autocast=accelerator.autocast)
    try:
        shifts_labels(model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if teacher is None:
        found = Teacher.copied(model, tokenizer, **options)
    else:
        found = Teacher(*teacher, name=args.distill_from, **options)
    return Distillation(found, args.distill_weight, args.distill_temperature)


class Progress:
    """How far a run has come; accelerate saves and loads it beside model, optimizer, schedule and random state.

    Args:
        accelerator: Of the run.
        args: Its options.
        distillation: What it distils with, if anything.
        rows: How many there are to train on, where that is known.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: LoopArguments,
        distillation: Distillation | None = None,
        rows: int | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._settings = asdict(args) | {"processes": accelerator.num_processes, "training_rows": rows}
        self._settings["teacher"] = distillation and distillation.teacher.fingerprint
        self.step = self.epoch = self.batches = 0  # batches of this epoch
        self.tokens, self.seconds = 0, 0.0  # trained on, by all processes
        self.history: list[dict[str, float]] = []
        self.losses: list[torch.Tensor] = []  # since the last row of history
        self.test_before: float | None = None
        accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, Any]:
        """Return everything; every process must ask, for losses are averaged over them."""
        state = {key: value for key, value in vars(self).items() if key != "_accelerator"}
        if self.losses:
            state["losses"] = list(self._accelerator.reduce(torch.stack(self.losses), "mean").cpu())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore everything but the settings, which are kept beside this run's own."""
        self.saved_settings = state.pop("_settings")
        vars(self).update({"tokens": 0} | state)
        self.seconds *= "tokens" in state  # of an earlier version, which did not count them
        self.losses = [loss.to(self._accelerator.device) for loss in self.losses]

    def resume(self, choice: str | bool | None, output_dir: Path, optimizer: Optimizer) -> None:
        """Load the checkpoint that `check_resume` has chosen, if any, into all that accelerate has prepared."""
        checkpoint = resolve_checkpoint(choice, output_dir, PROGRESS_FILE)
        if checkpoint is None:
            return
        saved = torch.load(checkpoint / PROGRESS_FILE, weights_only=True)["_settings"]
        processes, kind = self._accelerator.num_processes, self._accelerator.distributed_type
        check_world_size(checkpoint, saved["processes"], processes, kind)
        check_decayed(checkpoint, _decayed(saved), _decayed(self._settings))
        check_teacher(str(checkpoint), saved, self._settings)
        check_steered(checkpoint, saved, self._settings)
        asked = hyperparameters(optimizer)
        with loading(checkpoint):
            self._accelerator.load_state(str(checkpoint))
        if self._accelerator.is_main_process:
            given = {key: self._settings[key] for key in self._settings.keys() - asked.keys() - _WITHOUT_EFFECT}
            warn_of_other_settings(checkpoint, hyperparameters(optimizer), asked, self.saved_settings, given)

    def save(self, output_dir: Path, limit: int | None) -> None:
        """Save a checkpoint, and delete the oldest ones beyond a limit."""
        checkpoint = output_dir / f"checkpoint-{self.step}"
        with staged_checkpoint(checkpoint) as staging:
            self._accelerator.save_state(str(staging))
        if self._accelerator.is_main_process:
            rotate_checkpoints(checkpoint, limit, state_file=PROGRESS_FILE)


def check_steered(checkpoint: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Check that a run is steered to zeros as the one that saved a checkpoint was: its optimizer's state says to what.

    Args:
        checkpoint: Named in the error.
        saved: The options of that run; those of a version before 0.2 have no `importance`.
        given: Of this one.

    Raises:
        CheckpointError: If it is not.
    """
    absent = {"target_sparsity": None, "target_pattern": None}
    was, will_be = has_target(absent | saved), has_target(absent | given)
    fresh = "or start a new run with its weights as the model"
    if was != will_be:
        had, do = ("a", "give it here too") if was else ("no", "leave it out")
        raise CheckpointError(
            f"{checkpoint} was saved by a run with {had} target_sparsity or target_pattern: {do}, {fresh}"
        )
    if was and "importance" not in saved:
        raise CheckpointError(
            f"{checkpoint} was saved by hf_padam before 0.2, whose steering to a target_sparsity cannot be continued "
            f"here: finish the run with that version, {fresh}"
        )


def _decayed(settings: dict[str, Any]) -> str:
    """Say which weights decay under the options of a run."""
    dense = settings.get("dense_modules")
    embeddings = " and embeddings" if settings["decay_embeddings"] else ""
    target = settings.get("target_sparsity")
    entries = f", those of {', '.join(target)}" if isinstance(target, dict) else ""
    return f"linear layers{embeddings}{entries}" + (f" but {dense}" if dense else "")


_WITHOUT_EFFECT = {
    "output_dir", "learning_rate", "per_device_eval_batch_size", "logging_steps", "save_strategy", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "report_to", "backend",
}  # fmt: skip
"""Options that do not change what is trained, or that `hyperparameters` covers under another name."""
