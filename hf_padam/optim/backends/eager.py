"""The ground truth: plain PyTorch, one tensor after another. Runs everywhere; slower and with temporaries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..random_bits import Rounding, random_bits
from ..update import Scalars, update_


def unavailable(device: torch.device) -> str | None:
    """Return why this backend cannot run on `device`: it always can."""
    return None


def step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    scalars: Scalars,
    rounding: Rounding | None = None,
    s: list[Tensor] | None = None,
    kept: dict[Any, Any] | None = None,
) -> None:
    """Take one step on every tensor, in place."""
    for i, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        bits = None
        if rounding is not None:
            position = torch.arange(tensors[0].numel(), device=tensors[0].device).to(torch.int32)
            bits = random_bits(position.view(tensors[0].shape), rounding.tensor_keys[i], rounding.step_key)
        update_(*tensors, scalars, bits=bits, s=s[i] if s else None)
