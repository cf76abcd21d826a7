"""Callbacks that count, evaluations without progress for example, go on where they were in a resumed run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState


def go_on(callbacks: Sequence[TrainerCallback], state: TrainerState, made_anew: bool) -> None:
    """Give callbacks what they had counted; their arguments are the new ones.

    One that the checkpoint does not know begins anew: Transformers could not save its state.

    Args:
        callbacks: The trainer's.
        state: As it was loaded. What it holds of callbacks becomes what the trainer's next save expects.
        made_anew: Whether Transformers has made callbacks with the old arguments and counts already
            (`restore_callback_states_from_checkpoint`).
    """
    kept: Any = state.stateful_callbacks  # by name, as they are loaded
    named: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            named.setdefault(type(callback).__name__, []).append(callback)
    for name, mine in named.items():
        saved = kept.get(name, [])
        newest = saved[-len(mine) :] if isinstance(saved, list) else [saved]  # each save adds some to a list
        if not made_anew:
            for callback, counted in zip(mine, newest, strict=False):
                vars(callback).update(counted.get("attributes", {}))
        kept[name] = newest if len(mine) > 1 else {}


def has_stopped_early(callbacks: Sequence[TrainerCallback]) -> bool:
    """Whether the run had no more progress to wait for when its checkpoint was saved."""
    found = [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
    return any(callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in found)
