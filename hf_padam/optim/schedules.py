"""Move p during training: from 2, where decay is AdamW's and every weight may grow, to the p that makes zeros.

With p below 2 from the beginning, what is small at first dies before the gradient has said whether it is needed, and
what is zero stays zero. The p of a step is a function of its number and of the total number of steps alone, so a run
that is interrupted and resumed has the same p at every step.

For the backend "compiled" a p that moves is a number, not a kernel: values between two even numbers share one. Those
that have a kernel of their own (-1, 0, 1/2, 1, 3/2), if p happens to meet them exactly, are compiled once like others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from .hyperparameters import check_not_all_zeros, innermost, is_integer, is_number, named

SHAPES = ("constant", "linear", "cosine")
DEFAULT_START, DEFAULT_SHARE = 2.0, 0.5
FINAL = "final_p_norm"
"""The key of a parameter group that remembers the p it ends with, as `initial_lr` does for learning rates."""

MOVES = "_p_norm_moves"
"""Of an optimizer: that something moves its p. A copy, or one that a state is loaded into, has to be told again."""


def check_moved(optimizer: Any, group: Mapping[str, Any]) -> None:
    """Check that a group whose p is not yet where it is to end is on its way there.

    Raises:
        RuntimeError: If nothing moves it.
    """
    final = group.get(FINAL, group["p_norm"])
    if group["p_norm"] != final and group["lambda_p"] > 0 and float(group["lr"]) > 0 and not hasattr(optimizer, MOVES):
        raise RuntimeError(
            f"a parameter group is to end with p_norm={final}, and nothing moves it from {group['p_norm']}: make "
            "PNormScheduler(optimizer, total_steps) before the first step, add PNormScheduleCallback to a Trainer, or "
            f"delete the group's {FINAL!r}"
        )


def check_schedule(start: float, share: float, shape: str) -> None:
    """Check a schedule's settings.

    Raises:
        ValueError: Naming the first that is not allowed, its value and what is.
    """
    if shape not in SHAPES:
        raise ValueError(f"p_norm_schedule={shape!r} is not allowed: it is one of {', '.join(SHAPES)}")
    if not is_number(start) or not -math.inf < start < math.inf:
        raise ValueError(f"p_norm_start={start!r} is not allowed: it must be a finite number; 2 is AdamW's decay")
    if not is_number(share) or not 0 < share <= 1:
        raise ValueError(
            f"p_norm_schedule_share={share!r} is not allowed: it must be above 0, at most 1: a share of the training "
            "steps"
        )


EXCLUDES_TARGET = "target_sparsity and a p-schedule exclude each other: the path is planned for one p"


def p_norm_at(
    progress: float, final: float, start: float = DEFAULT_START, share: float = DEFAULT_SHARE, shape: str = "linear"
) -> float:
    """Return p at a point of training.

    Args:
        progress: Steps taken before, as a share of all steps: 0 at the first.
        final: p from `share` of the training on; exactly this number, which is finite.
        start: p at the first step.
        share: Of training, over which p moves; in (0, 1].
        shape: "linear", "cosine" (slow at both ends) or "constant", which is `final` from the beginning.

    Raises:
        ValueError: If `start`, `share` or `shape` is not allowed, or `final` is not finite.
    """
    check_schedule(start, share, shape)
    if shape != "constant" and not math.isfinite(final):
        raise ValueError(f"p_norm={final!r} is not where a schedule can move to: give a finite p_norm")
    start, share, final = float(start), float(share), float(final)  # not NumPy's, in its precision
    x = progress / share
    if shape == "constant" or x >= 1:
        return final
    return start + (final - start) * (x if shape == "linear" else (1 - math.cos(math.pi * x)) / 2)


def set_p_norm(
    groups: Iterable[dict[str, Any]], steps_taken: int, total_steps: int, start: float, share: float, shape: str
) -> None:
    """Set `p_norm` of every decaying group (`lambda_p` > 0) to what the next step takes.

    A group's own final p is under the key "final_p_norm"; where that is missing, it is the `p_norm` found there. A
    "constant" schedule touches only groups that have the key: those of a checkpoint whose run had a schedule.

    Raises:
        ValueError: If p goes below 2 and a tensor is all zeros: from then on it could never train. Or if a group is
            steered to a target.
    """
    for group in groups:
        if group.get("lambda_p", 0) == 0 or (shape == "constant" and FINAL not in group):
            continue
        if group.get("target_sparsity") is not None or "target_step" in group:
            raise ValueError(EXCLUDES_TARGET)
        before = group["p_norm"]
        group["p_norm"] = p_norm_at(steps_taken / total_steps, group.setdefault(FINAL, before), start, share, shape)
        if before >= 2 > group["p_norm"] and steps_taken and not group.get("late_decay"):
            check_not_all_zeros([(name, p) for name, p in named(group) if p.requires_grad], _CURE)


_CURE = (
    "p is about to go below 2, and no step has moved it yet: it has no gradient, or the learning rate was 0 so far "
    "(warm-up begins there; from a start above 2, p gets to 2 later). Put it in a parameter group with lambda_p=0"
)


def scheduled_p_norm(optimizer: Any) -> float | None:
    """Return the present p of the first group that has a schedule, or None if none has."""
    return next((group["p_norm"] for group in getattr(optimizer, "param_groups", ()) if FINAL in group), None)


class PNormScheduler:
    """Move the `p_norm` of an optimizer's decaying groups, in the manner of torch's learning-rate schedulers.

        scheduler = PNormScheduler(optimizer, total_steps)
        ...
        optimizer.step()
        scheduler.step()

    Every group with ``lambda_p > 0`` goes from `start` to a p of its own, its `p_norm`, which moves to the group's key
    "final_p_norm". A tensor that starts as zeros is refused by `PAdam` unless p is 2 from the beginning: build the
    groups with ``get_param_groups(..., p_norm_start=2.0)``, which are ready for a schedule.

    Args:
        optimizer: `PAdam` or any optimizer with `p_norm` and `lambda_p` in its groups; also as accelerate wraps it.
        total_steps: Of the optimizer, in the whole training.
        start: p of the first step.
        share: Of the steps, over which p moves.
        shape: "linear", "cosine" or "constant" (see `p_norm_at`).

    Raises:
        ValueError: If a setting is out of range; see also `set_p_norm`.
    """

    def __init__(
        self,
        optimizer: Any,
        total_steps: int,
        start: float = DEFAULT_START,
        share: float = DEFAULT_SHARE,
        shape: str = "linear",
    ) -> None:
        """Set p for the first step."""
        check_schedule(start, share, shape)
        if not is_integer(total_steps) or total_steps < 1:
            raise ValueError(f"total_steps={total_steps!r} is not allowed: it must be an integer of at least 1")
        self.optimizer, self._settings = optimizer, (int(total_steps), start, share, shape)
        self.last_step = 0
        setattr(innermost(optimizer), MOVES, True)
        self.step(0)

    def step(self, steps_taken: int | None = None) -> None:
        """Set p for the next step.

        Args:
            steps_taken: By the optimizer; one more than at the last call, by default.
        """
        self.last_step = self.last_step + 1 if steps_taken is None else steps_taken
        set_p_norm(self.optimizer.param_groups, self.last_step, *self._settings)

    def get_last_p_norm(self) -> list[float]:
        """Return the present p of every group."""
        return [group["p_norm"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        """Return how many steps were taken. All else is the constructor's, as with torch's `LambdaLR`."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a state, once the optimizer has loaded its own."""
        self.step(state_dict["last_step"])
