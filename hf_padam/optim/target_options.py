"""The options of a target sparsity: their defaults, the ranges they must be in, and what they exclude."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .hyperparameters import is_number
from .schedules import EXCLUDES_TARGET, FINAL

LONG_RAMP, SHORT_RAMP = (0.2, 0.75), (0.05, 0.2)
"""Where the ramp begins and ends, as shares of the training. What dies at once dies before the gradient has said
whether it is needed; which few are needed least is known early, and the others have longer to make up for them."""

SHORT_UP_TO = 0.4
"""The largest target of which the ramp is short. (Measured: recipes/README.md, on ramps.)"""

SCOPES = ("global", "layer")

STATE = {
    "target_step": 0,  # steps taken
    "target_reference": 0.0,  # what the decay is to be now, as `REFERENCE`
    "target_initial": -1.0,  # share of zeros before the first step, in the pool; -1: not counted yet
    "target_arrives": 0.0,  # share of zeros at the end of the ramp, in the pool; 0: as asked for
    "target_met": 0.0,  # the target whose ramp is over; 0 before
    "target_counted": (),  # the numbers, in the group, of the parameters that it was met over
    "target_zeroed": 0,  # weights that were zeroed at the end of the ramp, in the pool
    "target_threshold": 0.0,  # their sizes were not above this
}
"""What steering keeps in the keys of its groups, and where it starts. It is there from the beginning: what a group
lacks, FSDP does not load into it."""


def check_steerable(group: Mapping[str, Any]) -> None:
    """Check that zeros can be made with a parameter group's options, and that they stay.

    Raises:
        ValueError: If not.
    """
    if FINAL in group:
        raise ValueError(EXCLUDES_TARGET)
    for option, plain in (("late_decay", False), ("s_rate", 1.0), ("p_norm_schedule", "constant")):
        if group.get(option, plain) != plain:
            raise ValueError(
                f"target_sparsity and {option}={group[option]!r} exclude each other: the path to the target is "
                "planned for the plain decay. Drop one of them"
            )
    if group["p_norm"] >= 2:
        raise ValueError(f"p_norm={group['p_norm']} makes no zeros, so no target_sparsity can be reached: take p < 2")


def check_target(target: float) -> None:
    """Check what is asked for.

    Raises:
        ValueError: If it is no share of zeros.
    """
    if not is_number(target) or not 0 < target < 1:
        raise ValueError(
            f"target_sparsity={target!r} is not allowed: it must be a share of zeros, above 0 and below 1"
        )


def ramp(target: float, start: float | None, end: float | None) -> tuple[float, float]:
    """Return when zeros are made, as shares of the training: what is given, or goes with the target.

    Args:
        target: The largest, of several.
        start: None for the default.
        end: None for the default.

    Raises:
        ValueError: If the two are no shares of the training, in this order.
    """
    default = SHORT_RAMP if start is None and end is None and target <= SHORT_UP_TO else LONG_RAMP
    start, end = default[0] if start is None else start, default[1] if end is None else end
    if not is_number(start) or not is_number(end) or not 0 <= start <= end <= 1:
        raise ValueError(
            f"target_start={start!r} and target_end={end!r} are not allowed: they are shares of the training steps, "
            "0 <= start <= end <= 1"
        )
    return float(start), float(end)  # not NumPy's, in its precision
