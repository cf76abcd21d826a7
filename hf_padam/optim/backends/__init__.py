"""The ways of running `update.py`, one file each, all behind one signature.

    step(params, grads, exp_avgs, exp_avg_sqs, scalars, rounding=None, s=None, kept=None) -> None
        Lists of plain tensors, aligned, of one device and one dtype per list; updated in place, gradients only read.
        `scalars` is an `update.Scalars`, the same for all of them; `rounding`, an `update.Rounding`, asks for
        stochastic rounding of what is bf16; `s`, one more list of tensors, goes with `scalars.s_rate` below 1.
        `kept`, a dict, is for what a backend wants to keep between steps. The caller hands it over, empty at first,
        with tensors of the same number, dtypes, sizes and layouts, at the same addresses but for those of gradients;
        or, where it has `kept["moving"]` set, at any.
    unavailable(device) -> str | None
        Why the backend cannot run there, or None if it can.

`select` turns a user's choice into one of them. "auto" takes the fastest that is available there; an explicit
choice that cannot be met is an error, never a silent substitute.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

from . import compiled, eager, triton

logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {"eager": eager, "compiled": compiled, "triton": triton}
CHOICES = ("auto", *BACKENDS)
_COMPILE_PAYS_FROM = 500_000
"""Elements. Below, an eager step on a CPU takes a few milliseconds: seconds of compilation hardly pay."""


def check(choice: str, device: torch.device) -> None:
    """Check that an explicit choice can be met on `device`; the meta device, which holds no values, is not judged.

    Raises:
        RuntimeError: If it cannot.
    """
    if choice == "auto" or device.type == "meta":
        return
    reason = BACKENDS[choice].unavailable(device)
    if reason is not None:
        raise RuntimeError(f'backend="{choice}" cannot run on {device}: {reason}. Or use backend="auto".')


def select(choice: str, device: torch.device, elements: int) -> ModuleType:
    """Return the backend module for a user's choice.

    Args:
        choice: One of `CHOICES`.
        device: Where the tensors are.
        elements: How many elements the optimizer updates there in all.

    Raises:
        RuntimeError: If `choice` names a backend that cannot run on `device`.
    """
    if choice == "auto":
        if device.type == "cpu":
            name = "compiled" if elements >= _COMPILE_PAYS_FROM else "eager"
        else:
            name = "triton"
        return eager if _refusal(name, device.type) else BACKENDS[name]
    check(choice, device)
    return BACKENDS[choice]


@functools.cache
def _refusal(name: str, device_type: str) -> str | None:
    """Ask a backend once per device type whether it can run; say so once if a slower one takes its place."""
    reason = BACKENDS[name].unavailable(torch.device(device_type))
    if reason is not None:
        logger.warning("PAdam runs in eager mode on %s, which is slower: %s.", device_type, reason)
    return reason
