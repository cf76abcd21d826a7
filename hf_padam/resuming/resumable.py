"""A Trainer whose runs can be killed at any moment and go on to the same weights, logs and pictures.

What Transformers 5.23 leaves to do: its checkpoints are written in place and the newest is taken for complete; a
checkpoint of the last step is trained one step further; the losses since the last log are forgotten. Its
`enable_jit_checkpoint` does not fit: it saves with the random state of half a step later, before the step is logged,
at a step that processes do not agree on, and lets the script go on as if training had ended.
"""

from __future__ import annotations

import json
import logging
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, TrainOutput, has_length
from transformers.training_args import OptimizerNames
from transformers.utils import is_peft_available

from .callback_states import go_on, has_stopped_early
from .checkpoints import (
    RUN_STATE,
    TRAINER_STATE,
    claimed,
    loading,
    resolve_checkpoint,
    rotate_checkpoints,
    staged_checkpoint,
)
from .draws import Place, are_settled, seeded, settle_draws
from .interruption import EXIT_STATUS, StopSignal
from .settings import check_optimizer, check_world_size, hyperparameters, warn_of_other_settings
from .weights import check_adapters, check_keys, load_weights, weight_files

logger = logging.getLogger(__name__)

_SETTINGS = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "bf16", "fp16",
    "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices", "dataloader_drop_last",
    "train_sampling_strategy",
)  # fmt: skip
_BATCH_SETTINGS = ("per_device_train_batch_size", "train_batch_size", "gradient_accumulation_steps", "processes")


class ResumableTrainer(Trainer):
    """A Trainer that survives SIGKILL, and on SIGTERM saves a checkpoint and ends the process with status 143.

    * ``train(resume_from_checkpoint=True)`` goes on from the newest complete checkpoint of the output directory, warns
      about the incomplete ones that it passes over, and starts from the beginning if there is none.
    * A checkpoint is written whole or not at all. A run that goes on from one ends with the weights and the log
      history of a run that was never interrupted.
    * A checkpoint of other settings is used with a warning that lists them: those that the optimizer saves (learning
      rate, decay, ...) stay as they were, all others are the new ones. One of another model or optimizer is refused.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "enable_jit_checkpoint", False):
            raise ValueError(
                "enable_jit_checkpoint saves in the middle of a step, from which a run cannot go on exactly: leave it "
                f"out. {type(self).__name__} saves on SIGTERM itself"
            )
        self._stop_signal = StopSignal()
        self._staging: Path | None = None
        self._saved: Path | None = None
        self._resumed: dict[str, Any] = {}  # what `_complete` had written into the checkpoint to go on from
        self._home: Path | None = None  # the directory of that checkpoint
        self._place = self._begin(apart=True)
        self._batches = self._first_step = 0
        self._epoch_ended = False
        self._last_step: tuple[Any, Any] = None, None  # gradient norm and learning rate
        self._evaluated: Any = None  # the data that were evaluated on last
        self._follow = _Follow(self)
        self.add_callback(self._follow)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: The path of a checkpoint, or True for the newest complete one.
            args: As there.
            kwargs: As there.

        Raises:
            CheckpointError: If the named checkpoint is not complete or does not fit, one cannot be saved, or another
                run saves its own into the output directory.
            SystemExit: After a SIGTERM, once a checkpoint is saved.
        """
        directory = str(self.args.output_dir)
        with nullcontext() if self.args.save_strategy == SaveStrategy.NO else claimed(directory), self._stop_signal:
            checkpoint = resolve_checkpoint(resume_from_checkpoint, directory)
            self._resumed = _read_run_state(checkpoint)
            self._home = checkpoint and checkpoint.parent
            self._place = self._begin(apart=not checkpoint or self._resumed.get("draws_apart", False))
            if checkpoint:
                self._check_settings(str(checkpoint), self._resumed.get("settings", {}))
            if self.args.world_size > 1 and self.model_wrapped is self.model and not self.is_fsdp_enabled:
                # An evaluation has marked the bare model as prepared: replicas would train apart from each other.
                self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
                vars(self.model).pop("_is_accelerate_prepared", None)
            return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    def _check_settings(self, checkpoint: str, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint of settings that this run cannot go on from; `saved` may lack any of `_settings`."""
        if "processes" in saved:
            distributed_type = self.accelerator.distributed_type
            check_world_size(checkpoint, saved["processes"], self.args.world_size, distributed_type)
        if "optim" in saved:
            check_optimizer(checkpoint, saved["optim"], OptimizerNames(self.args.optim).value)

    # Where the run is: an epoch, and how many of its batches are done. Streams end where they like.

    def _begin(self, apart: bool) -> Place:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Place(seed, self.args.process_index, apart)

    def _hp_search_setup(self, trial: Any) -> None:
        """Begin with the seeds of a trial, if it is one: called before anything is made from the arguments."""
        super()._hp_search_setup(trial)
        self._place = self._begin(self._place.apart)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training data; what it draws depends on the place in the run, see `draws`."""
        loader = super().get_train_dataloader()
        settle_draws(loader, self._place)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the loader of what is asked for; where workers persist, Transformers would return the first one's."""
        if not isinstance(eval_dataset, str):
            data = self.eval_dataset if eval_dataset is None else eval_dataset
            if data is not self._evaluated:
                earlier = getattr(self, "_eval_dataloaders", {}).pop("eval", None)
                kept = [loader for loader in self.accelerator._dataloaders if loader is not earlier]
                self.accelerator._dataloaders[:] = kept  # without it, its workers end
            self._evaluated = data
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate. What this draws, persistent workers once in a process for one, changes nothing that follows."""
        with seeded(self.args.seed):
            return super().evaluation_loop(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, but not at the start (`eval_on_start`) of a run that goes on: it has, when it began."""
        if kwargs.get("skip_scheduler") and self.state.global_step > 0:
            return {}
        return super()._evaluate(*args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return the epoch to go on in, and how many of its batches to skip."""
        epoch, batches = super()._init_training_state(*args, **kwargs)
        self._find_best()
        self._first_step = self.state.global_step
        settings, saved = self._settings(), self._resumed.get("settings", {})
        saved = {"train_batch_size": settings["train_batch_size"]} | saved  # which earlier versions did not say
        same = all(settings[name] == saved.get(name) for name in _BATCH_SETTINGS)
        if "epoch" not in self._resumed or not same:  # the batches are others, and cannot be counted
            return epoch, batches
        if self._resumed["epoch_ended"]:
            return self._resumed["epoch"] + 1, 0
        return self._resumed["epoch"], 0 if self.args.ignore_data_skip else self._resumed["batches"]

    def _find_best(self) -> None:
        """Look for the best checkpoint beside the one to go on from: the run's directory may have another name now."""
        best = self._home and self._home / f"checkpoint-{self.state.best_global_step}"
        known = self.state.best_model_checkpoint
        if best and best.is_dir() and (known is None or best.resolve() != Path(known).resolve()):
            logger.warning("The best checkpoint so far is %s.", best)
            self.state.best_model_checkpoint = str(best)

    def _load_callback_state(self) -> None:
        """Let callbacks that count go on where they were."""
        super()._load_callback_state()
        go_on(self.callback_handler.callbacks, self.state, made_anew=self.args.restore_callback_states_from_checkpoint)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, or what is left of it: nothing after the last step but its end."""
        checkpoint, epoch = kwargs["resume_from_checkpoint"], kwargs["epoch"]
        self._place.epoch = epoch
        begun = checkpoint is not None and epoch == kwargs["epochs_trained"]
        self._batches = kwargs["steps_trained_in_current_epoch"] if begun else 0
        self._epoch_ended = False
        over = self.state.global_step >= self.state.max_steps or (
            begun and has_stopped_early(self.callback_handler.callbacks)
        )
        if begun and not are_settled(kwargs["train_dataloader"]):
            logger.warning(
                "The data loader is one of the trainer's own making (%s): this run goes on exactly only if the data "
                "are prepared without random draws.",
                type(kwargs["train_dataloader"]).__name__,
            )
        if not over and not (begun and self._batches >= kwargs["steps_in_epoch"]):
            if not self.is_deepspeed_enabled:  # what a stream's end has left of an accumulation is in no checkpoint
                kwargs["model"].zero_grad()
            super()._run_epoch(*args, **kwargs)
            return
        if begun and self._batches and "last_step" in self._resumed:
            self._load_rng_state(checkpoint)
            self.control.should_log = self.control.should_evaluate = self.control.should_save = False
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            norm, rate = self._resumed["last_step"]
            rest = {name: kwargs[name] for name in ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")}
            self._maybe_log_save_evaluate(self._tr_loss, norm, learning_rate=rate, **rest)
        self.control.should_training_stop |= over

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Remember what the end of the epoch logs, if a checkpoint is saved before that.

        Callbacks are told of a checkpoint once its random state is saved: what they draw then (samples of text, for
        example) is not to change what follows, for a resumed run does not draw it.
        """
        self._last_step = grad_norm, kwargs.get("learning_rate")
        self._saved = None
        self.control.should_save |= self._follow.stopping  # whatever later callbacks have set
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if self._follow.stopping and self._saved is not None:
            # For loggers to write what they hold.
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.accelerator.end_training()
            logger.warning("SIGTERM: saved %s, and stopping. Resume from it to go on.", self._saved.name)
            sys.exit(EXIT_STATUS)
        if self._saved is not None and not self.args.save_only_model:
            self._load_rng_state(str(self._saved))

    # What has been logged: the losses since then, and of all steps, go on too.

    def _restore_losses(self) -> None:
        """Restore the losses of the steps before the checkpoint, once the Trainer has set them to zero."""
        if not self._resumed:
            return
        losses = torch.tensor(self._resumed["losses"])
        mine = losses[self.args.process_index] if len(losses) == self.args.world_size else losses.mean()
        self._tr_loss.copy_(mine)
        self._total_loss_scalar = self._resumed.get("total_loss", -losses.mean().item())
        self._globalstep_last_logged = self._resumed["last_log"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; a mean loss is that of all the run's steps, or of those since a checkpoint that does not say theirs."""
        if {"train_loss", "train_runtime"} <= logs.keys():  # those that training ends with
            steps = self.state.global_step - (0 if "total_loss" in self._resumed else self._first_step)
            logs["train_loss"] = self._total_loss_scalar / max(steps, 0.001)
        super().log(logs, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        output = super()._finalize_training(*args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])  # as it was logged

    # Saving: the Trainer writes into a directory that is renamed afterwards.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging.parent) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(super()._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        only_model = self.args.save_only_model
        with staged_checkpoint(checkpoint) as self._staging:
            try:
                if self._follow.stopping and not getattr(self, "is_distributed_loading_by_transformers", False):
                    self.args.save_only_model = False  # the run is to go on from this
                super()._save_checkpoint(model, trial)
                self._complete(self._staging, checkpoint)
            finally:
                self._staging, self.args.save_only_model = None, only_model
        if self.args.should_save:
            rotate_checkpoints(checkpoint, self.args.save_total_limit, self.state.best_model_checkpoint)
        self._saved = checkpoint
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(checkpoint))

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether `save_strategy="best"` saves now: also after a SIGTERM, be it the best or not."""
        return super()._determine_best_metric(*args, **kwargs) or self._follow.stopping

    def _complete(self, staging: Path, checkpoint: Path) -> None:
        """Add what a Trainer forgets: the losses since the last log, of every process, and the settings."""
        losses = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        if self.state.best_model_checkpoint == str(staging):
            self.state.best_model_checkpoint = str(checkpoint)
        if not self.args.should_save:
            return
        self.state.save_to_json(str(staging / TRAINER_STATE))
        run_state = {
            "losses": losses,
            "total_loss": self._total_loss_scalar,
            "last_log": self._globalstep_last_logged,
            "last_step": [None if value is None else float(value) for value in self._last_step],
            "epoch": self._place.epoch,
            "epoch_ended": self._epoch_ended,
            "batches": self._batches,
            "draws_apart": self._place.apart,
            "settings": self._settings(),
        }
        (staging / RUN_STATE).write_text(json.dumps(run_state))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: called before the checkpoint has its name; `_save_checkpoint` pushes it later."""

    # Loading.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with loading(resume_from_checkpoint):
            if not self._load_here(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None  # else this is not called
        with loading(best):
            if not self._load_here(best):
                super()._load_best_model()

    def _load_here(self, checkpoint: str) -> bool:
        """Load weights as they were saved, or check that the Trainer will; whether that is done."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # these save the names and shapes in memory
            return False
        assert self.model is not None  # the Trainer has one from its constructor on
        if is_peft_available():
            from peft import PeftModel

            if isinstance(self.model, PeftModel):
                check_adapters(self.model, checkpoint)
                return False
        if not weight_files(checkpoint):
            return False
        load_weights(self.model, checkpoint)
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Let what is missing or unexpected be an error where the Trainer loads the weights."""
        check_keys("the checkpoint", set(load_result.missing_keys), set(load_result.unexpected_keys))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None  # created before anything is loaded
        asked = hyperparameters(self.optimizer)
        with loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if not self.is_world_process_zero():
            return
        settings = _read_run_state(checkpoint).get("settings", {})
        warn_of_other_settings(checkpoint, hyperparameters(self.optimizer), asked, settings, self._settings())

    def _settings(self) -> dict[str, Any]:
        """Return what shapes a run's weights and is not in its optimizer's state."""
        settings = {name: getattr(self.args, name) for name in _SETTINGS if hasattr(self.args, name)}
        settings |= {"processes": self.args.world_size, "optim": OptimizerNames(self.args.optim).value}
        settings["train_batch_size"] = self._train_batch_size  # which auto_find_batch_size may have made smaller
        if has_length(self.train_dataset):
            settings["training_rows"] = len(cast(Any, self.train_dataset))
        return json.loads(json.dumps(settings, default=str))


def _read_run_state(checkpoint: str | Path | None) -> dict[str, Any]:
    """Read what `_complete` has written; nothing from a checkpoint of the plain Trainer."""
    file = Path(checkpoint or "") / RUN_STATE
    return json.loads(file.read_text()) if checkpoint and file.is_file() else {}


class _Follow(TrainerCallback):
    """Keep track of where a run is, and of a SIGTERM: the Trainer saves once the step is logged and evaluated."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = weakref.proxy(trainer)  # whose loader's workers would wait for a circle's end
        self.stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._restore_losses()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._batches += 1
        self._stop_if_agreed(control)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._batches += 1

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._epoch_ended = True
        if control.should_training_stop:  # for whatever reason
            self._stop_if_agreed(control, last=True)

    def _stop_if_agreed(self, control: TrainerControl, last: bool = False) -> None:
        if self.trainer._stop_signal.agreed(last):
            self.stopping = control.should_save = True
