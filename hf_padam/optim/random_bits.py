"""Random bits without a state: a hash of keys and of an element's position, which every backend computes alike.

Stochastic rounding draws them, and what else has to choose at random and the same again after a resumption.
"""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

from torch import Tensor

MULTIPLIERS = (0x7FEB352D, 0x846CA68B, 0x31848BAB)
"""Of the hash in `random_bits`; odd, and found good by Wellons' search (nullprogram.com/blog/2018/07/31)."""


class Rounding(NamedTuple):
    """What the random bits of a stochastically rounded step depend on, besides the position in the tensor."""

    step_key: int
    tensor_keys: list[int]  # one for each tensor


@functools.lru_cache(maxsize=2**16)
def random_key(*numbers: int) -> int:
    """Hash some numbers into a signed 32-bit one, the same on every machine."""
    text = repr(tuple(map(int, numbers)))  # int: NumPy's write themselves otherwise
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "little", signed=True)


def random_bits(position: Tensor, tensor_key: int | Tensor, step_key: int | Tensor) -> Tensor:
    """Return 32 random bits for each element: a hash, so no state is kept; every backend draws the same.

    Args:
        position: Of the elements in their tensor; int32. Backends may count strided tensors' in another order.
        tensor_key: From `random_key`, another for each tensor.
        step_key: From `random_key`, another for each step.
    """
    # Multiplications carry low bits up, shifts bring high bits down, until each bit depends on all others.
    first, second, third = (m - 2**32 if m >= 2**31 else m for m in MULTIPLIERS)
    x = position ^ tensor_key
    x = (x ^ ((x >> 16) & 0xFFFF)) * first
    x = ((x ^ ((x >> 15) & 0x1FFFF)) + (step_key ^ tensor_key)) * second
    x = (x ^ ((x >> 16) & 0xFFFF)) * third
    return x ^ ((x >> 16) & 0xFFFF)
