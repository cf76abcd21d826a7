"""How much a weight matters, and zeroing those that matter least: magnitude, Fisher information, Wanda."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

Linear = tuple[nn.Module, Tensor]
"""A linear module, or GPT-2's transposed `Conv1D`, and its weight."""


def by_output(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a linear module's weight as (outputs, inputs), a view."""
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def prune_smallest(params: Sequence[Tensor], scores: Iterable[Tensor], share: float) -> None:
    """Zero this share of the elements of all tensors together: those of the smallest scores, exactly so many.

    Args:
        params: Any shapes.
        scores: One for each element, at least 0; for each parameter a tensor of its shape.
        share: Of zeros, 0 to 1. Weights that are zero already have to have the score 0 to be among them.
    """
    flat = torch.cat([score.flatten() for score in scores])
    count = round(share * flat.numel())
    if count == 0:
        return
    threshold = flat.kthvalue(count).values
    pruned = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    pruned[ties[: count - int(pruned.sum())]] = True
    for param, part in zip(params, pruned.split([param.numel() for param in params]), strict=True):
        param.masked_fill_(part.view_as(param), 0.0)


@torch.no_grad()
def prune_by_magnitude(params: Iterable[Tensor], share: float) -> None:
    """Zero this share of the elements of all tensors together: the smallest."""
    params = list(params)
    prune_smallest(params, (param.abs() for param in params), share)


@torch.no_grad()
def prune_by_fisher(params: Iterable[Tensor], optimizer: Any, share: float) -> None:
    """Zero this share of the elements of all tensors together: those of the smallest ``|weight| * sqrt(v)``.

    v is Adam's second moment, corrected for its start at zero: the diagonal of the empirical Fisher matrix, so that
    the squared score is the saliency of Optimal Brain Damage. Where v is 0 a weight has never had a gradient: nothing
    is known of it, and it is pruned after all others, by its magnitude, with a warning.

    Args:
        params: Any shapes, in the optimizer's groups.
        optimizer: Adam, AdamW or PAdam, or what accelerate has wrapped one in, after at least one step.
        share: Of zeros, 0 to 1.
    """
    params = list(params)
    beta2 = {id(param): group["betas"][1] for group in optimizer.param_groups for param in group["params"]}
    scores = []
    for param in params:
        state = optimizer.state.get(param, {})
        if "exp_avg_sq" not in state:
            second_moment = torch.zeros_like(param, dtype=torch.float32)
        else:
            second_moment = state["exp_avg_sq"].float() / (1 - beta2[id(param)] ** float(state["step"]))
        score = param.abs().float() * second_moment.sqrt()  # 16 bits would have ties
        scores.append(score.masked_fill_((second_moment == 0) & (param != 0), torch.inf))
    known = sum(int(score.isfinite().sum()) for score in scores)
    missing = round(share * sum(param.numel() for param in params)) - known
    if missing > 0:
        logger.warning("%d weights that have had no gradient yet must be pruned: the smallest are.", missing)
        largest = max(float(param.abs().max()) for param in params)
        for param, score in zip(params, scores, strict=True):
            # Whatever is known comes first, as -1; prune_smallest needs an order only.
            score.copy_(torch.where(score.isinf(), param.abs() / largest, -1.0))
    prune_smallest(params, scores, share)


@torch.no_grad()
def prune_by_wanda(weights: Mapping[str, Linear], norms: Mapping[str, Tensor], share: float) -> None:
    """Zero this share of each output's weights: those of the smallest ``|weight| * input norm`` (arXiv 2306.11695).

    Outputs take turns in rounding up and down, so that the share is met over all of them.

    Args:
        weights: Linear modules and their weights, by name.
        norms: (inputs,) for each, the root of the inputs' summed squares over calibration tokens. Where all are 0,
            nothing is known, and magnitudes alone decide.
        share: Of zeros, 0 to 1.
    """
    for name, (module, weight) in weights.items():
        rows = by_output(module, weight)
        outputs, inputs = rows.shape
        # Never less at a larger share, so that gradual pruning does not leave more zeros than it is asked for.
        turns = (torch.arange(outputs, dtype=torch.float64) + 0.5) / outputs
        counts = (share * inputs + turns).floor().long().to(rows.device)
        scores = rows.abs() * norms[name] if norms[name].any() else rows.abs()
        smallest = scores.topk(int(counts.max()), largest=False, sorted=True).indices
        chosen = torch.arange(smallest.shape[1], device=rows.device) < counts[:, None]
        rows.masked_fill_(torch.zeros_like(rows, dtype=torch.bool).scatter_(1, smallest, chosen), 0.0)
