"""Which size a share of the weights is below, and which are the smallest: over tensors of any number and sharding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..sparsity import sum_over_shards
from .importance import Measured
from .update import random_bits

_SHIFT = 15
"""Sizes are told apart by their exponent and the first 8 bits after it: all but this many bits of fp32."""

_BINS = 2 ** (31 - _SHIFT)
_INFINITE = 0x7F800000 >> _SHIFT
"""The bin of infinity, that is of weights that have had no gradient."""


def histogram(tensors: Sequence[Measured], sample: int | None = None) -> tuple[Tensor, float]:
    """Count sizes by their leading bits, over all shards.

    Args:
        tensors: From `importance.measure`.
        sample: Look at this many elements of each shard at most, evenly spaced, and scale the counts up.

    Returns:
        The counts of finite sizes, fp64 of shape (bins,), and how many sizes are infinite.
    """

    def count(tensor: Measured) -> Tensor:
        elements, step = tensor.weight.numel(), tensor.stride(sample)
        counts = torch.stack([_bincount(_bits(x) >> _SHIFT) for _, x in tensor.slices(step)]).sum(0)
        return counts * (elements / math.ceil(elements / step))

    counts = _total(tensors, count)
    return counts[:_INFINITE], float(counts[_INFINITE:].sum())


def quantile(histogram: Tensor, share: float) -> float:
    """Return a size that about this share of the elements is below, at most a bin too small."""
    below = histogram.cumsum(0)
    index = int(torch.searchsorted(below, share * float(below[-1])))
    return torch.tensor(index << _SHIFT, dtype=torch.int32, device="cpu").view(torch.float32).item()


def zero_smallest_(tensors: Sequence[Measured], number: int, infinite: bool = False) -> float:
    """Zero exactly so many of the smallest weights that are not zero yet, in place; ties are decided at random.

    A radix selection over 62 bits: those of the size, then a hash of the place, which is the same on all replicas.

    Args:
        tensors: From `importance.measure`.
        number: How many in all, over all shards.
        infinite: Choose among those of infinite size, by magnitude, rather than among those of finite size.

    Returns:
        The size (or magnitude) of the largest that became zero.
    """
    if number <= 0:
        return 0.0
    prefix: list[int] = []  # of the last one that becomes zero
    left = number
    for level in range(len(_DIGITS)):

        def count(tensor: Measured, level: int = level) -> Tensor:
            counts = []
            for key, candidate in _keys(tensor, infinite):
                for digit, wanted in zip(_DIGITS, prefix, strict=False):
                    candidate = candidate & (digit(key) == wanted)
                counts.append(_bincount(_DIGITS[level](key)[candidate]))
            return torch.stack(counts).sum(0)

        below = _total(tensors, count).cumsum(0)
        digit = int(torch.searchsorted(below, float(left)))
        prefix.append(min(digit, len(below) - 1))
        left -= int(below[digit - 1]) if digit else 0
    for tensor in tensors:
        parts = []
        for key, candidate in _keys(tensor, infinite):
            smaller, equal = torch.zeros_like(candidate), candidate
            for digit_of, wanted in zip(_DIGITS, prefix, strict=True):
                digits = digit_of(key)
                smaller |= equal & (digits < wanted)
                equal = equal & (digits == wanted)
            parts.append(smaller | equal)
        if parts:
            tensor.weight.detach().masked_fill_(torch.cat(parts).view(tensor.weight.shape), 0.0)
    return torch.tensor(prefix[0] << _SHIFT | prefix[1], dtype=torch.int32, device="cpu").view(torch.float32).item()


_LOW = 2**_SHIFT - 1
_DIGITS: tuple[Callable[[tuple[Tensor, Tensor]], Tensor], ...] = (
    lambda key: key[0] >> _SHIFT,
    lambda key: key[0] & _LOW,
    lambda key: (key[1] >> _SHIFT) & (_BINS - 1),
    lambda key: key[1] & _LOW,
)
"""Of a key, the pair of a size's bits and a hash."""


def _keys(tensor: Measured, infinite: bool) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Yield for each part of a tensor the keys of its weights, and which weights can be chosen."""
    start = 0
    for weight, x in tensor.slices():
        candidate = (weight != 0) & (x.isinf() == infinite)
        position = torch.arange(start, start + len(x), device=x.device).to(torch.int32)
        start += len(x)
        yield (_bits(weight.abs() if infinite else x), random_bits(position, tensor.key, 0)), candidate


def _bits(x: Tensor) -> Tensor:
    """Return the bits of sizes, which have the order of the sizes."""
    return x.float().view(torch.int32)


def _bincount(values: Tensor) -> Tensor:
    return torch.bincount(values, minlength=_BINS).to(torch.float32 if values.device.type == "mps" else torch.float64)


def _total(tensors: Sequence[Measured], count: Callable[[Measured], Tensor]) -> Tensor:
    """Add up what is counted in each tensor, over all shards: a few reductions and transfers for any number."""
    totals: dict[tuple, Tensor] = {}
    for tensor in tensors:
        if not tensor.weight.numel():
            counts = _bincount(tensor.weight.new_zeros(0, dtype=torch.int32))
        else:
            counts = count(tensor)
        key = tensor.weight.device, tensor.sharding
        totals[key] = totals[key] + counts if key in totals else counts
    return torch.stack([sum_over_shards(total, key[1]).cpu().double() for key, total in totals.items()]).sum(0)
