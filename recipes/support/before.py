"""The perplexity of the model that a run begins with."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_padam import PAdamTrainer

from .errors import UsageError


class TestBefore(TrainerCallback):
    """Evaluate the untrained model on the test split, as training begins.

    Not before, as an example for the plain Trainer, too: one that has evaluated no longer wraps its model for several
    processes, whose gradients would silently not be averaged. The result is kept in the log history, so a resumed run
    has it from its checkpoint.
    """

    KEY = "test_before_perplexity"

    def __init__(self, trainer: PAdamTrainer, split: Any) -> None:
        self.trainer, self.split = trainer, split

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Evaluate, unless the log history says that this has been done."""
        if not any(self.KEY in row for row in state.log_history):
            if self.KEY not in self.trainer.evaluate(self.split, metric_key_prefix="test_before"):
                raise UsageError("this recipe reports perplexities, but none is known of this model: see the log")

    @classmethod
    def result(cls, trainer: PAdamTrainer) -> float:
        """Return what was found, once training has begun."""
        return next(row[cls.KEY] for row in trainer.state.log_history if cls.KEY in row)
