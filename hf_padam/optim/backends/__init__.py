"""The ways of running `update.py`, one file each, all behind one signature.

    step(params, grads, exp_avgs, exp_avg_sqs, scalars, rounding=None, s=None, kept=None) -> None
        Lists of plain tensors, aligned, of one device and one dtype per list; updated in place, gradients only read.
        `scalars` is an `update.Scalars`, the same for all of them; `rounding`, a `random_bits.Rounding`, asks for
        stochastic rounding of what is bf16; `s`, one more list of tensors, goes with `scalars.s_rate` below 1.
        `kept`, a dict, is for what a backend wants to keep between steps. The caller hands it over, empty at first,
        with tensors of the same number, dtypes, sizes and layouts, at the same addresses but for those of gradients;
        or, where it has `kept["moving"]` set, at any.
        A kernel that cannot be built is a `checks.KernelError`, raised before any tensor is touched.
    unavailable(device) -> str | None
        Why the backend cannot run there, or None if it can: found out by trying, once per process. An error that it
        raises is one that may pass (no memory left, say), and is not remembered.

`select` turns a user's choice into one of them. "auto" takes the fastest that is available there, and eager mode for
what that cannot do; an explicit choice that cannot be met is an error, never a silent substitute.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import compiled, eager, triton
from .checks import KernelError, lacks_memory, summary

logger = logging.getLogger(__name__)


class _OrEager(ModuleType):
    """A backend that "auto" chose: where it has no kernel for a step, eager mode takes that step."""

    def __init__(self, backend: ModuleType) -> None:
        super().__init__(backend.__name__)
        self.backend = backend

    def step(self, params: list[Tensor], *others: Any, **options: Any) -> None:
        """Take one step on every tensor, in place."""
        try:
            self.backend.step(params, *others, **options)
        except KernelError as error:
            _say_that_eager_runs(params[0].device.type, str(error))
            eager.step(params, *others, **options)


BACKENDS: dict[str, ModuleType] = {"eager": eager, "compiled": compiled, "triton": triton}
CHOICES = ("auto", *BACKENDS)
_OR_EAGER = {name: _OrEager(backend) for name, backend in BACKENDS.items()}
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
        return eager if name == "eager" or _refusal(name, device) else _OR_EAGER[name]
    check(choice, device)
    return BACKENDS[choice]


def _refusal(name: str, device: torch.device) -> str | None:
    """Ask a backend whether it can run; say so once if a slower one takes its place, even if only for a while."""
    try:
        reason = BACKENDS[name].unavailable(device)
    except Exception as error:  # devices tell a lack of memory by classes of their own
        if not lacks_memory(error):
            raise
        reason = f"there was no memory to try backend {name} in, which will be tried again ({summary(error)})"
    if reason is not None:
        _say_that_eager_runs(device.type, reason)
    return reason


@functools.cache
def _say_that_eager_runs(device_type: str, reason: str) -> None:
    logger.warning("PAdam runs in eager mode on %s, which is slower: %s.", device_type, reason)
