"""The ground truth: plain PyTorch, one tensor after another. Runs everywhere; slower and with temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

from ..update import Scalars, update_


def unavailable(device: torch.device) -> str | None:
    """Return why this backend cannot run on `device`: it always can."""
    return None


def step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], scalars: Scalars
) -> None:
    """Take one step on every tensor, in place."""
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        update_(*tensors, scalars)
