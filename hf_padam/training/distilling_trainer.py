"""A Trainer that distils: it finds the teacher, and keeps to it when a run goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..resuming.checkpoints import CheckpointError
from ..resuming.resumable import ResumableTrainer
from .callbacks import CallbackFromGroups
from .distillation import Distillation, check_distillation_options, shifts_labels
from .options import DISTILLATION, PAdamOptions, options_of
from .teacher import START, Teacher, check_vocabularies, load_teacher

_TEACHER = "teacher"
"""Among the settings that a checkpoint keeps: a hash of the teacher's weights."""


class DistillingTrainer(ResumableTrainer):
    """A Trainer that distils if its arguments ask for it: `distill_from`, and what belongs to it.

    Evaluations know nothing of it. The teacher is no part of checkpoints; a run that goes on from one must have the
    same, and `distill_from="start"` is the model that the Trainer was made with, before the checkpoint is loaded.

    Args:
        args: As for `transformers.Trainer`.
        teacher: A model and its tokenizer, or the model alone, already loaded; `distill_from` is only its name then.
            It is frozen in place.
        kwargs: As for `transformers.Trainer`.
    """

    def __init__(self, *args: Any, teacher: tuple[nn.Module, Any] | nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given_teacher: tuple[Any, Any] | None = (teacher, None) if isinstance(teacher, nn.Module) else teacher
        self._distillation: Distillation | None = None
        self._found: tuple[str, str] | None = None  # by what name and in which dtype its teacher was found
        self._resumed_from: tuple[str, dict[str, Any]] | None = None  # the checkpoint and its settings
        name = options_of(self.args).distill_from
        if isinstance(self.args, PAdamOptions):
            check_distillation_options(self.args)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, CallbackFromGroups):
                callback.distils = True
        if teacher is not None and name in (None, START):
            raise ValueError(
                f"teacher=... has no effect with distill_from={name!r}: give the teacher's name there, or drop teacher"
            )
        if self._distills:
            self._check_distills()

    @property
    def _distills(self) -> bool:
        return options_of(self.args).distill_from is not None

    def _check_distills(self) -> None:
        args: Any = self.args
        check_distillation_options(args)
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        why = None
        if self.compute_loss_func is not None:
            why = "compute_loss_func, which replaces the model's loss"
        elif self.args.n_gpu > 1:
            why = f"the {self.args.n_gpu} GPUs of one process: start one process for each, with torchrun or accelerate"
        elif self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            why = "DeepSpeed's ZeRO-3, which shards the teacher too: use FSDP2, or ZeRO-2"
        elif parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            why = "sequences split over devices"
        if why is not None:
            raise ValueError(f"distill_from={args.distill_from!r} does not go with {why}")
        assert self.model is not None  # the Trainer has one from its constructor on
        shifts_labels(self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see `ResumableTrainer.train`.

        Raises:
            ValueError: If there is no such teacher, or it has another vocabulary.
        """
        self._resumed_from = None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_settings(self, checkpoint: str, saved: dict[str, Any]) -> None:
        super()._check_settings(checkpoint, saved)
        self._resumed_from = checkpoint, saved

    def _hp_search_setup(self, trial: Any) -> None:
        """Find the teacher: called once the model is made, before a checkpoint is loaded into it."""
        super()._hp_search_setup(trial)  # which may have changed the arguments
        if self._distills:
            self._check_distills()
            self._find_teacher()
        else:
            self._distillation = None

    def _find_teacher(self) -> None:
        args: Any = self.args
        assert self.model is not None
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)  # that of a processor
        options: dict[str, Any] = dict(device=args.device, autocast=self.accelerator.autocast)
        options |= {"dtype": args.distill_dtype}
        found = args.distill_from, args.distill_dtype
        earlier = self._distillation if self._found == found else None
        if earlier is not None and (args.distill_from != START or self._resumed_from is not None):
            teacher = earlier.teacher  # the model as it was at the start has been trained since
        elif args.distill_from == START:
            teacher = Teacher.copied(self.model, tokenizer, **options)
        else:
            loaded = self._given_teacher
            if loaded is None:
                with args.main_process_first(desc="fetching the teacher"):
                    loaded = load_teacher(args.distill_from, shifts_labels(self.model), args.distill_dtype)
            teacher = Teacher(*loaded, name=args.distill_from, **options)
        check_vocabularies(teacher.name, (self.model, tokenizer), (teacher.model, teacher.tokenizer))
        self._found = found
        self._distillation = Distillation(teacher, args.distill_weight, args.distill_temperature)
        if self._resumed_from is not None:
            check_teacher(*self._resumed_from, self._settings())

    def _settings(self) -> dict[str, Any]:
        settings = super()._settings() | {name: getattr(options_of(self.args), name) for name in DISTILLATION}
        if self._distillation is not None:
            settings[_TEACHER] = self._distillation.teacher.fingerprint
        return settings

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a step, up to the gradients; see `transformers.Trainer.training_step`.

        Raises:
            ValueError: If it has not distilled, as it was asked to: a subclass makes the loss in its own way.
        """
        loss = super().training_step(*args, **kwargs)
        if self._distillation is not None and not self._distillation.used:
            raise ValueError(
                f"distill_from={options_of(self.args).distill_from!r} has no effect: compute_loss of "
                f"{type(self).__name__} does not call PAdamTrainer's. Call super().compute_loss there, or leave "
                "distill_from out"
            )
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss; see `transformers.Trainer.compute_loss`. In training it is the distilled one, if asked."""
        if self._distillation is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with self._distillation(student, inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)


def check_teacher(checkpoint: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check that a teacher of the same name is the one that a checkpoint was distilled from.

    Args:
        checkpoint: Named in the error.
        saved: Its settings, which may lack any.
        given: The settings of the run that goes on from it.

    Raises:
        CheckpointError: If its weights are others.
    """
    same = all(saved.get(name) == given.get(name) for name in ("distill_from", "distill_dtype"))
    if same and saved.get(_TEACHER, given[_TEACHER]) != given[_TEACHER]:
        name = given["distill_from"]
        what = "the model that the run began with, not the checkpoint's," if name == START else "the teacher as it was"
        raise CheckpointError(
            f"{checkpoint} was distilled from other weights than distill_from={name!r} stands for now. Give {what} or "
            "start a new run with the checkpoint's weights as the model"
        )
