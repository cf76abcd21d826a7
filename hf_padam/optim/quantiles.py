"""Which magnitude a share of the weights is below: quantiles over tensors of any number, size and sharding."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..sparsity import local_shard, sum_over_shards

_SHIFT = 15
"""Magnitudes are told apart by their exponent and the first 8 bits after it: all but this many bits of fp32."""


def histogram(params: Iterable[Tensor], sample: int | None = None) -> Tensor:
    """Count magnitudes by their leading bits, fp64 of shape (2^(31 - _SHIFT),), over all shards.

    Args:
        params: Any shapes.
        sample: Look at this many elements of each shard at most, evenly spaced, and scale the counts up.
    """
    totals: dict[tuple, Tensor] = {}  # one for each device and sharding, so that few are reduced and transferred
    for param in params:
        local, sharding = local_shard(param)
        flat = local.reshape(-1)
        stride = max(1, flat.numel() // sample) if sample else 1
        while local.ndim and math.gcd(stride, local.shape[-1]) > 1 < local.shape[-1]:
            stride += 1  # else it would see some columns only
        bits = flat[::stride].abs().to(torch.float32).view(torch.int32) >> _SHIFT
        precise = torch.float32 if flat.device.type == "mps" else torch.float64
        counts = torch.bincount(bits, minlength=2 ** (31 - _SHIFT)).to(precise) * (flat.numel() / max(1, bits.numel()))
        key = flat.device, sharding
        totals[key] = totals[key] + counts if key in totals else counts
    return torch.stack([sum_over_shards(total, key[1]).cpu().double() for key, total in totals.items()]).sum(0)


def quantile(histogram: Tensor, share: float) -> float:
    """Return a magnitude that about this share of the elements is below, at most a bin too small."""
    below = histogram.cumsum(0)
    index = int(torch.searchsorted(below, share * float(below[-1])))
    return torch.tensor(index << _SHIFT, dtype=torch.int32).view(torch.float32).item()
