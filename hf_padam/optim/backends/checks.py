"""How a backend is tried before it is trusted, and how it says that it cannot run."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ..random_bits import Rounding, random_key
from ..update import initial_s, prepare
from . import eager


class KernelError(RuntimeError):
    """A kernel cannot be built. No tensor has been touched, so another backend can take the step."""


class Case(NamedTuple):
    """A small step that a backend must take as `eager` does."""

    elements: int = 3001  # neither a whole number of rows nor of vectors
    weights: torch.dtype = torch.float32
    moments: torch.dtype = torch.float32
    rounds: bool = False
    options: dict[str, Any] = {"p_norm": 0.8}


PLAIN = Case()
"""The defaults of `PAdam`."""

THOROUGH = (
    PLAIN,
    Case(4096, options={"p_norm": 1.0, "late_decay": True}),
    Case(4096, options={"p_norm": 0.8, "s_rate": 0.3}),
    Case(4096, torch.bfloat16, torch.bfloat16, True, {"p_norm": 0.8}),
    Case(4096, torch.bfloat16, torch.float32, True, {"p_norm": -1.0, "importance": "fisher"}),
    Case(3001, options={"p_norm": -8.0, "importance": "fisher"}),
    Case(3001, options={"p_norm": -math.inf, "importance": "fisher", "reference": 0.1}),
    Case(4096, options={"p_norm": -math.inf, "reference": 0.0}),
)
"""Storages, both importances, `s`, what `target_sparsity` does by default; tensors that are read in whole vectors and
others."""


def disagreement(step: Callable[..., object], device: torch.device, cases: Iterable[Case] = THOROUGH) -> str | None:
    """Compare small steps with eager's: there are more compilers, drivers and chips than a test suite can cover.

    Args:
        step: Of a backend.
        device: Where to take the steps.
        cases: Which steps.

    Returns:
        What is wrong, or None.

    Raises:
        Exception: Whatever a compiler or a driver raises.
    """
    for case in cases:
        options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "lambda_p": 0.05}
        options |= {"weight_decay": 0.1} | case.options
        scalars = prepare(12, **options)
        rounding = Rounding(random_key(1), [random_key(2)]) if case.rounds else None
        results = []
        for take_step in (eager.step, step):
            x = torch.linspace(-1, 1, case.elements, dtype=torch.float32, device=device)
            x[:9] = 0
            weight, grad = x.to(case.weights), x.sin().to(case.weights)
            first, second = (x / 3).to(case.moments), x.square().to(case.moments)
            s = [initial_s(x, options["p_norm"])] if scalars.s_rate < 1 else None
            take_step([weight], [grad], [first], [second], scalars, rounding, s)
            results.append([weight, second, first, *(s or ())])
        for i, (expected, got) in enumerate(zip(*results, strict=True)):
            # A last bit of fp32 may differ, which moves few roundings to 16 bits.
            tolerance = 2**-7 if expected.dtype == torch.bfloat16 else 1e-5
            close = torch.isclose(got, expected, rtol=tolerance, atol=1e-7) & ((got == 0) == (expected == 0))
            draws = case.rounds and i < 2 and expected.dtype == torch.bfloat16
            if not close.all() or (draws and (got != expected).float().mean() > 0.01):
                return f"its results differ from eager's there ({case}): please report this"
    return None


def summary(error: BaseException) -> str:
    """Return an error in one line, with what a compiler says is the matter, if it is a compiler's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if " error: " in f" {line}"]
    return ": ".join([type(error).__name__, *(telling or lines)[:1]])


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory at the moment, which may pass."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower()
