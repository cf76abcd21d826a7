"""`TrainingArguments` with "padam" as the default optimizer and its options as typed fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..optim.schedules import check_schedule
from .distillation import check_distillation_options
from .options import OPTIONS, PAPER, PAdamOptions, has_target, read
from .other_optimizers import check_decay_options
from .registration import NAME, OPTIMIZERS, optimizer_options


@dataclass
class PAdamTrainingArguments(PAdamOptions, TrainingArguments):
    """TrainingArguments with "padam" as the default optimizer and the fields of `PAdamOptions`.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        # The Trainer would take the largest perplexity for the best one.
        best = self.metric_for_best_model
        if best is not None and best.endswith("perplexity"):
            self.greater_is_better = False
        self.optim_target_modules = read("optim_target_modules", self.optim_target_modules)
        check_schedule(self.p_norm_start, self.p_norm_schedule_share, self.p_norm_schedule)
        check_distillation_options(self)
        if OptimizerNames(self.optim).value in OPTIMIZERS:
            optimizer_options(self)
        else:
            check_decay_options(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what was pickled, be it by a version before 0.2, which knew of one importance."""
        vars(self).update({"importance": PAPER["importance"]} | state)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments for logs and reports, with the options of padam that are in force."""
        values = super().to_dict()
        if OptimizerNames(self.optim).value in OPTIMIZERS:
            options = optimizer_options(self)
            values.update({key: options[key] for key in OPTIONS})
            if has_target(options):
                values["lambda_p"] = None  # it is found
        return values
