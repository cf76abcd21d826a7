"""How long a step keeps the host busy: what remains of it when the device is infinitely fast."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from hf_padam import PAdam
from hf_padam.optim.backends import BACKENDS
from hf_padam.optim.importance import REFERENCE

from .step_table import Row

COUNTS = {"272 tiny tensors": 272, "1,000 tiny tensors": 1000}
"""SmolLM2-135M has 272 tensors; models of some billions have up to 1,000."""

WARM_UP = 5


class _NoKernel:
    """Takes the place of a Triton kernel and does nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def without_launch() -> Iterator[None]:
    """Let the Triton backend do on CPU tensors all that it does before the launch of its kernel."""
    from hf_padam.optim.backends import triton, triton_kernel

    available = mock.patch.object(triton, "unavailable", lambda device: None)
    with available, mock.patch.object(triton_kernel, "step_kernel", _NoKernel()):
        yield


def time_host(repeats: int) -> list[Row]:
    """Time the steps' host side, optimizers taking turns; and whole steps over small tensors on the CPU.

    Args:
        repeats: Turns that each optimizer takes.

    Returns:
        Rows of `benchmark_step.py`; medians. Triton's are left out where Triton is not installed, the compiled ones
        where there is no compiler.
    """
    rows: list[Row] = []
    for name, count in COUNTS.items():
        params = _parameters(count, (16,))
        timed: dict[str, torch.optim.Optimizer] = {"AdamW fused": torch.optim.AdamW(params, fused=True)}
        if importlib.util.find_spec("triton"):
            with without_launch():
                timed["PAdam triton, no launch"] = PAdam(params, backend="triton")
                rows += _time(name, timed, repeats)
        else:
            rows += _time(name, timed, repeats)
    params = _parameters(100, (80, 125))
    timed = {"AdamW fused": torch.optim.AdamW(params, lr=1e-6, fused=True)}
    if BACKENDS["compiled"].unavailable(torch.device("cpu")) is None:
        timed["PAdam compiled"] = PAdam(params, lr=1e-6, backend="compiled")
        steered = PAdam(params, lr=1e-6, p_norm=-math.inf, importance="fisher", backend="compiled")
        steered.param_groups[0][REFERENCE] = 0.0  # between two prunings
        timed["PAdam compiled, as under a target"] = steered
    return rows + _time("1 M in 100 tensors", timed, repeats)


def _parameters(count: int, shape: tuple[int, ...]) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape) / 50) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(shape) / 100
    return params


def _time(name: str, timed: dict[str, torch.optim.Optimizer], repeats: int) -> list[Row]:
    durations: dict[str, list[float]] = {optimizer: [] for optimizer in timed}
    for turn in range(WARM_UP + repeats):
        for optimizer, own in timed.items():
            start = time.perf_counter()
            own.step()
            if turn >= WARM_UP:
                durations[optimizer].append(time.perf_counter() - start)
    medians = {optimizer: statistics.median(values) for optimizer, values in durations.items()}
    fused = medians["AdamW fused"]
    return [dict(model=name, dtype="fp32", device="cpu", p_norm=None, optimizer=optimizer, milliseconds=1e3 * median,
                 ratio_to_fused_adamw=median / fused, gb_per_s=None, peak_extra_bytes=None, first_step_seconds=None)
            for optimizer, median in medians.items()]  # fmt: skip
