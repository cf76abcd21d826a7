"""N:M patterns: of every M weights in a row along the inputs of a linear map, at most N are not zero.

The decay looks at one weight at a time and cannot spare the largest of a block. So weights are chosen by block: in
each the M - N of the smallest sizes are to die, and of these, over all blocks, the smallest die first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .importance import Measured, sum_totals
from .quantiles import histogram, zero_smallest_

PATTERN, INPUT_DIM = "target_pattern", "target_input_dim"
"""Keys of steered groups: the pattern, and the dimension that runs along the inputs, the last one by default."""

_UNKNOWN = torch.finfo(torch.float32).max / 2
"""Weights that have had no gradient under "fisher" have sizes from here on, in the order of their magnitudes."""


def parse_pattern(text: str) -> tuple[int, int]:
    """Read a pattern such as "2:4".

    Raises:
        ValueError: If it is none.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"{text!r} is no N:M pattern such as 2:4, with 0 < N < M")
    return int(match[1]), int(match[2])


def pattern_share(text: str) -> float:
    """Return the share of zeros under a pattern."""
    n, m = parse_pattern(text)
    return (m - n) / m


def check_blocks(group: dict[str, Any]) -> None:
    """Check that the blocks of a group's pattern are whole, in its parameters and in the shards of these.

    Raises:
        ValueError: Naming the first parameter of which they are not.
    """
    m = parse_pattern(group[PATTERN])[1]
    names = group.get("param_names") or [""] * len(group["params"])
    for name, param in zip(names, group["params"], strict=True):
        dim = group.get(INPUT_DIM, -1) % max(1, param.ndim)
        why = None
        if hasattr(param, "ds_tensor") or hasattr(param, "_fsdp_flattened"):
            why = "is flattened by its sharding: use FSDP2 (fsdp_version: 2)"
        elif param.ndim < 2:
            why = "is no matrix: take it out of the group"
        elif param.shape[dim] % m:
            why = f"has {param.shape[dim]} inputs, no multiple of {m}: give a smaller pattern"
        elif isinstance(param, DTensor) and any(p.is_shard(dim) or p.is_partial() for p in param.placements):
            why = "is sharded along its inputs, which may cut blocks apart: shard another dimension"
        if why:
            raise ValueError(
                f"target_pattern={group[PATTERN]!r} does not go with the parameter {name or 'of the group'}, of shape "
                f"{tuple(param.shape)}, which {why}, or leave it out (dense_modules)"
            )


@torch.no_grad()
def missing_in_blocks(tensors: Sequence[Measured], groups: Iterable[dict[str, Any]]) -> int:
    """Return how many weights are still to die under a pattern, over all shards; see `sparing`."""
    totals: dict[tuple, Tensor] = {}
    for tensor, mask in zip(tensors, _to_die(tensors, groups), strict=True):
        key, missing = (tensor.weight.device, tensor.sharding), torch.count_nonzero(mask)
        totals[key] = totals[key] + missing if key in totals else missing
    return int(sum_totals(totals))


@torch.no_grad()
def zero_in_blocks_(tensors: Sequence[Measured], groups: Iterable[dict[str, Any]]) -> float:
    """Zero what is still to die under a pattern, in place; see `sparing`.

    Returns:
        The largest of the sizes that are finite.
    """
    masks = _to_die(tensors, groups)
    chosen = _sparing(tensors, masks)
    threshold = zero_smallest_(chosen, int(histogram(chosen).counts.sum()))
    for tensor, mask in zip(tensors, masks, strict=True):
        tensor.weight.detach().masked_fill_(mask, 0.0)
    return threshold


@torch.no_grad()
def sparing(tensors: Sequence[Measured], groups: Iterable[dict[str, Any]]) -> list[Measured]:
    """Return tensors with all weights spared but those that are still to die. Nothing is read from the device.

    Args:
        tensors: From `importance.measure`, of the groups.
        groups: With one pattern.
    """
    return _sparing(tensors, _to_die(tensors, groups))


def _sparing(tensors: Sequence[Measured], masks: Sequence[Tensor]) -> list[Measured]:
    return [tensor._replace(spared=~mask) for tensor, mask in zip(tensors, masks, strict=True)]


def _to_die(tensors: Sequence[Measured], groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """Return which weights of each tensor are to die and have not yet, a mask of its shape."""
    settings = [
        (*parse_pattern(group[PATTERN]), group.get(INPUT_DIM, -1))
        for group in groups
        for param in group["params"]
        if param.requires_grad
    ]
    return [_mask(tensor, *setting) for tensor, setting in zip(tensors, settings, strict=True)]


def _mask(tensor: Measured, n: int, m: int, dim: int) -> Tensor:
    weight = tensor.weight.detach()
    if not weight.numel():
        return torch.zeros_like(weight, dtype=torch.bool)
    x = torch.cat([part for _, part in tensor.slices()]).view(weight.shape)
    relative = weight.abs().float() / weight.abs().max().float().clamp(min=2.0**-126)
    x = torch.where(x.isinf(), _UNKNOWN * (1 + relative), x).masked_fill(weight == 0, -1)  # the dead come first
    blocks = x.movedim(dim, -1)
    smallest = blocks.reshape(-1, m).topk(m - n, largest=False, sorted=False).indices
    mask = torch.zeros(blocks.numel() // m, m, dtype=torch.bool, device=x.device).scatter_(1, smallest, True)
    return mask.view(blocks.shape).movedim(-1, dim) & (weight != 0)
