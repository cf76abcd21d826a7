"""Target sparsity in a Trainer: the callbacks that attach `TargetSparsity` once the number of steps is known."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .target_sparsity import DEFAULT_END, DEFAULT_START, TargetSparsity, check_plan, steering_of

logger = logging.getLogger(__name__)


class TargetSparsityCallback(TrainerCallback):
    """Steer a Trainer's PAdam to a share of zeros; see `TargetSparsity`.

    Not needed where the training arguments ask for it (``target_sparsity``, also in `optim_args`). What
    `TargetSparsity.state` returns is added to the training logs. A model from before the target is met is never the
    best one, whatever `metric_for_best_model` says of it, and does not stop a run early.

    Args:
        target: Share of exact zeros among the decayed weights, in (0, 1).
        start: See `TargetSparsity`.
        end: See `TargetSparsity`.
        per_group: See `TargetSparsity`.
    """

    def __init__(
        self, target: float, start: float = DEFAULT_START, end: float = DEFAULT_END, per_group: bool = False
    ) -> None:
        check_plan(target, start, end)
        self._plan: dict[str, Any] = {"target": target, "start": start, "end": end, "per_group": per_group}
        self._steering: TargetSparsity | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, now that the number of steps is known."""
        self._steering = TargetSparsity(kwargs["optimizer"], total_steps=state.max_steps, **self._plan)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the best model so far while weights are still to die."""
        if self._steering is not None and not self._steering.met:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet the target if the ramp was to end with the training, and loss scaling has skipped steps of it."""
        if self._steering is None:
            return
        if state.global_step >= state.max_steps:
            self._steering.finish()
        if not self._steering.met:
            logger.warning(
                "Training ended before target_sparsity=%s was met: %.2f %% of the decayed weights are zero.",
                self._steering.target,
                100 * self._steering.state()["sparsity"],
            )


class CallbackFromGroups(TargetSparsityCallback):
    """The callback as every Trainer has it: it acts if the optimizer's groups hold a `target_sparsity`.

    It also writes the logs of every steered optimizer, for it comes before the callbacks that report them.
    """

    def __init__(self) -> None:
        self._steering = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach if the groups say so."""
        groups = getattr(kwargs.get("optimizer"), "param_groups", [])
        plans = [group for group in groups if group.get("target_sparsity") is not None]
        self._steering = None
        if plans:
            self._plan = {
                "target": plans[0]["target_sparsity"],
                "start": plans[0]["target_start"],
                "end": plans[0]["target_end"],
                "per_group": plans[0]["target_scope"] == "layer",
            }
            super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the training logs, for what logs them after this and for the history."""
        steering = steering_of(kwargs.get("optimizer"))
        if steering is not None and "loss" in kwargs["logs"]:
            additions = steering.state()
            kwargs["logs"].update(additions)
            state.log_history[-1].update(additions)
