"""Say so where weights stored in bf16 would hardly train: the steps of fine-tuning are lost in their rounding."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from ..sparsity import local_tensor

logger = logging.getLogger(__name__)

_HALF_SPACING = 2.0**-9
"""Of bf16 numbers, as the least share of a number: what is smaller is rounded away. An Adam step is lr, or less."""

_SAMPLE, _TOLERATED = 2**16, 0.1


def warn_of_lost_updates(groups: Iterable[dict[str, Any]]) -> None:
    """Warn if a tenth of PAdam's bf16 weights or more is too large for a step to change, and give the cure.

    Args:
        groups: An optimizer's parameter groups, with the highest learning rate in `initial_lr` or `lr`.
    """
    fixed, rates, count = [], set(), 0
    for group in groups:
        rate = group.get("initial_lr", group["lr"])
        for param in group["params"] if group.get("bf16_stochastic_round") is False else ():
            if param.dtype == torch.bfloat16 and param.requires_grad:
                sample = local_tensor(param).detach().flatten()[:_SAMPLE].float().abs()
                fixed.append((sample * _HALF_SPACING > rate).sum().cpu())
                rates.add(rate)
                count += sample.numel()
    share = int(sum(fixed)) / max(1, count)
    if share >= _TOLERATED:
        logger.warning(
            "About %.0f %% of the weights are too large for a step at the learning rate %s to change: they are "
            "stored in bf16, whose rounding to the nearest loses it. Give bf16_stochastic_round=true (in optim_args, "
            "or as an option of its own), or load the model with dtype=torch.float32 and train with bf16=True.",
            100 * share,
            ", ".join(f"{rate:g}" for rate in sorted(rates)),
        )
