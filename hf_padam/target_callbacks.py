"""Target sparsity in a Trainer: the callbacks that attach `TargetSparsity` once the number of steps is known."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .target_sparsity import DEFAULT_END, DEFAULT_START, TargetSparsity, check_plan


class TargetSparsityCallback(TrainerCallback):
    """Steer a Trainer's PAdam to a share of zeros; see `TargetSparsity`.

    Not needed where the training arguments ask for it (``target_sparsity``, also in `optim_args`). `lambda_p` and the
    share planned so far (`planned_sparsity`) and the share so far (`sparsity`) are added to the training logs.

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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet the target if the ramp was to end with the training, and loss scaling has skipped steps of it."""
        if self._steering is not None and state.global_step >= state.max_steps:
            self._steering.finish()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the training logs, for what logs them after this and for the history."""
        if self._steering is not None and "loss" in kwargs["logs"]:
            additions = self._steering.state()
            kwargs["logs"].update(additions)
            state.log_history[-1].update(additions)


class CallbackFromGroups(TargetSparsityCallback):
    """The callback as every Trainer has it: it acts if the optimizer's groups hold a `target_sparsity`."""

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
