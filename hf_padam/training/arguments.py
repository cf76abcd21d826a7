"""`TrainingArguments` with "padam" as the default optimizer and its options as typed fields."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..optim.backends import CHOICES
from ..optim.schedules import DEFAULT_SHARE, DEFAULT_START, SHAPES, check_schedule
from ..optim.target_sparsity import SCOPES
from .distillation import DEFAULT_TEMPERATURE, DEFAULT_WEIGHT, check_distillation_options
from .other_optimizers import check_decay_options
from .registration import NAME, OPTIMIZERS, OPTIONS, optimizer_options
from .teacher import DTYPES


@dataclass
class PAdamTrainingArguments(TrainingArguments):
    """TrainingArguments with "padam" as the default optimizer and its options as typed fields.

    The fields are the keys that a plain `TrainingArguments` takes in `optim_args`. With another `optim`, giving
    `lambda_p` makes `PAdamTrainer` add the same decay to that optimizer (see `add_pnorm_decay`).

    Raises:
        ValueError: On an option out of range, or one that the optimizer does not have, before anything is loaded.
    """

    optim: OptimizerNames | str = field(
        default=NAME, metadata={"help": "The optimizer: padam, padam_8bit, or any other name that Transformers knows."}
    )
    optim_args: str | None = field(
        default=None,
        metadata={
            "help": "Options of the optimizer as key=value pairs; padam's are also options of their own, below."
        },
    )
    optim_target_modules: None | str | list[str] = field(
        default=None,
        metadata={"help": "Narrow the decay to these modules: all-linear, a regular expression, or a JSON list."},
    )
    p_norm: float = field(
        default=OPTIONS["p_norm"].default,
        metadata={
            "help": "p of the norm whose decay is applied. Below 2 it makes zeros, below 1 the sparsest models."
        },
    )
    lambda_p: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the p-norm decay. More makes more zeros; 0 turns it off. Adds the decay to any other "
            f"optim too. Default: {OPTIONS['lambda_p'].default} with padam and padam_8bit, no decay with others."
        },
    )
    p_norm_schedule: str = field(
        default="constant",
        metadata={
            "help": "How p moves from p_norm_start to p_norm. PAdamTrainer moves it.",
            "choices": list(SHAPES),
        },
    )
    p_norm_start: float = field(
        default=DEFAULT_START, metadata={"help": "p of the first step, under a schedule; at 2 zeros may grow."}
    )
    p_norm_schedule_share: float = field(
        default=DEFAULT_SHARE, metadata={"help": "Share of the training steps over which p moves."}
    )
    late_decay: bool = field(
        default=OPTIONS["late_decay"].default,
        metadata={"help": "Take the decay's factor from the weight after the step. Makes few exact zeros."},
    )
    s_rate: float = field(
        default=OPTIONS["s_rate"].default,
        metadata={"help": "How fast the p-norm decay follows a weight, above 0, at most 1, which is at once."},
    )
    decay_embeddings: bool = field(
        default=OPTIONS["decay_embeddings"].default,
        metadata={"help": "Decay embeddings and the output head too, which are left out otherwise."},
    )
    dense_modules: None | str | list[str] = field(
        default=None,
        metadata={"help": "Leave these modules out of the decay: a regular expression, or a JSON list."},
    )
    target_sparsity: float | None = field(
        default=None,
        metadata={"help": "Share of the decayed weights that is to be zero in the end. Finds lambda_p in its place."},
    )
    target_start: float = field(
        default=OPTIONS["target_start"].default,
        metadata={"help": "Share of the steps after which target_sparsity begins to make zeros."},
    )
    target_end: float = field(
        default=OPTIONS["target_end"].default,
        metadata={"help": "Share of the steps after which it has made all; what survives recovers in the rest."},
    )
    target_scope: str = field(
        default=OPTIONS["target_scope"].default,
        metadata={
            "help": "What target_sparsity is a share of: all decayed weights together, or each tensor by itself.",
            "choices": list(SCOPES),
        },
    )
    bf16_stochastic_round: bool = field(
        default=OPTIONS["bf16_stochastic_round"].default,
        metadata={"help": "For models whose weights are bf16: round them up or down at random, exact in the mean."},
    )
    nonfinite_gradients: str = field(
        default="stop",
        metadata={
            "help": "At a step whose gradients are not finite: stop, or skip its update (as fp16 and DeepSpeed do).",
            "choices": ["stop", "skip"],
        },
    )
    distill_from: str | None = field(
        default=None,
        metadata={
            "help": "Distil from this teacher: a Hub id, a directory, or start, for the model as training begins. "
            "PAdamTrainer does it."
        },
    )
    distill_weight: float = field(
        default=DEFAULT_WEIGHT,
        metadata={"help": "Share of the teacher's part in the loss, above 0, at most 1; the rest is cross-entropy."},
    )
    distill_temperature: float = field(
        default=DEFAULT_TEMPERATURE,
        metadata={"help": "Teacher and student are compared at this temperature; above 1 small probabilities count."},
    )
    distill_dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the teacher's weights; auto is that of its files, or of the model at the start.",
            "choices": list(DTYPES),
        },
    )
    backend: str = field(
        default=OPTIONS["backend"].default,
        metadata={"help": "How the update runs. auto picks the fastest available.", "choices": list(CHOICES)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # The Trainer would take the largest perplexity for the best one.
        best = self.metric_for_best_model
        if best is not None and best.endswith("perplexity"):
            self.greater_is_better = False
        for name in ("optim_target_modules", "dense_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("["):  # a list, from a command line
                try:
                    setattr(self, name, json.loads(value))
                except ValueError as error:
                    raise ValueError(f"{name}={value!r} is not a list in JSON: {error}") from error
        if self.nonfinite_gradients not in ("stop", "skip"):
            raise ValueError(f"nonfinite_gradients={self.nonfinite_gradients!r} is not allowed: it is stop or skip")
        check_distillation_options(self)
        check_schedule(self.p_norm_start, self.p_norm_schedule_share, self.p_norm_schedule)
        if OptimizerNames(self.optim).value in OPTIMIZERS:
            optimizer_options(self)
        else:
            check_decay_options(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments for logs and reports, with the options of padam that are in force."""
        values = super().to_dict()
        if OptimizerNames(self.optim).value in OPTIMIZERS:
            options = optimizer_options(self)
            values.update({key: options[key] for key in OPTIONS})
        return values
