"""Which size a share of the weights is below, and which are the smallest: over tensors of any number and sharding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..sparsity import zeros_in
from .importance import Measured, sum_totals
from .random_bits import random_bits

_SHIFT = 15
"""Sizes are told apart by their exponent and the first 8 bits after it: all but this many bits of fp32."""

_BINS = 2 ** (31 - _SHIFT)
_INFINITE = 0x7F800000 >> _SHIFT
"""The bin of infinity, that is of weights that have had no gradient."""


class Histogram(NamedTuple):
    """How many weights there are of which size, over all shards."""

    counts: Tensor  # of finite sizes, by their leading bits; fp64, shape (bins,), on the host
    infinite: float  # sizes
    zeros: int  # weights that are exactly zero: all of them, however few were looked at
    extra: float  # see `tally`
    deviation: float  # of the share below a size, the standard one and at most, for not all elements were looked at


def histogram(tensors: Sequence[Measured], sample: int | None = None) -> Histogram:
    """Count sizes by their leading bits, and zeros, over all shards; see `tally`."""
    return histograms([tally(tensors, sample)])[0]


def tally(tensors: Sequence[Measured], sample: int | None = None, extra: Tensor | None = None) -> Tensor:
    """Count, for `histograms`, without a transfer from the device.

    Args:
        tensors: From `importance.measure`.
        sample: Look at this many elements of each shard at most, evenly spaced, and scale the counts up.
        extra: A number on the device that is wanted, too.
    """

    def count(tensor: Measured) -> Tensor:
        elements, step = tensor.weight.numel(), tensor.stride(sample)
        counts = _sum(_bincount(_bits(x) >> _SHIFT) for _, x in tensor.slices(step))
        zeros = zeros_in(tensor.weight).to(counts.dtype)
        seen = math.ceil(elements / step)
        variance = torch.full_like(zeros, 0.25 * elements**2 / seen if step > 1 else 0.0)
        return torch.cat([counts * (elements / seen), zeros[None], variance[None]])

    total = _total(tensors, count, _BINS + 2)
    number = torch.ones_like(total[:1]) if extra is None else extra.to(total)[None]
    return torch.cat([total, number])


def histograms(tallies: Sequence[Tensor]) -> list[Histogram]:
    """Return what has been counted, of any number of sets of tensors, with one transfer from the device."""
    found = []
    for tallied in torch.stack([tallied.to(tallies[0].device) for tallied in tallies]).cpu().double():
        counts, zeros, variance, extra = tallied.split([_BINS, 1, 1, 1])
        infinite = float(counts[_INFINITE:].sum())
        deviation = math.sqrt(float(variance)) / max(1.0, float(counts.sum()))
        found.append(Histogram(counts[:_INFINITE], infinite, int(zeros), float(extra), deviation))
    return found


def quantile(histogram: Tensor, share: float) -> float:
    """Return a size that about this share of the elements is below, at most a bin too small."""
    below = histogram.cumsum(0)
    index = int(torch.searchsorted(below, share * float(below[-1])))
    return torch.tensor(index << _SHIFT, dtype=torch.int32, device="cpu").view(torch.float32).item()


def zero_below_(tensors: Sequence[Measured], size: float) -> None:
    """Zero the weights that are smaller than a size, in place."""
    for tensor in tensors:
        parts = [x < size for _, x in tensor.slices()]
        if parts:
            tensor.weight.detach().masked_fill_(torch.cat(parts).view(tensor.weight.shape), 0.0)


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
            def parts() -> Iterator[Tensor]:
                for key, candidate in _keys(tensor, infinite):
                    for digit, wanted in zip(_DIGITS, prefix, strict=False):
                        candidate = candidate & (digit(key) == wanted)
                    yield _bincount(_DIGITS[level](key), candidate)

            return _sum(parts())

        below = _total(tensors, count).cpu().double().cumsum(0)
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


def _bincount(values: Tensor, chosen: Tensor | None = None) -> Tensor:
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    if values.device.type == "cpu":
        return torch.bincount(values if chosen is None else values[chosen], minlength=_BINS).to(dtype)
    # On a GPU, bincount reads the largest value, an index of truth values their number, and the host waits for it.
    counts = torch.zeros(_BINS, dtype=torch.int32, device=values.device)
    ones = torch.ones_like(values) if chosen is None else chosen.to(values.dtype)
    return counts.scatter_add_(0, values.long(), ones).to(dtype)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """Add up tensors, of which there is one at least, one at a time."""
    parts = iter(parts)
    total = next(parts)
    for part in parts:
        total += part
    return total


def _total(tensors: Sequence[Measured], count: Callable[[Measured], Tensor], length: int = _BINS) -> Tensor:
    """Add up what is counted in each tensor, over all shards: a few reductions for any number, and no transfer."""
    totals: dict[tuple, Tensor] = {}
    for tensor in tensors:
        if not tensor.weight.numel():
            counts = _bincount(tensor.weight.new_zeros(0, dtype=torch.int32)).new_zeros(length)
        else:
            counts = count(tensor)
        key = tensor.weight.device, tensor.sharding
        totals[key] = totals[key] + counts if key in totals else counts
    return sum_totals(totals)
