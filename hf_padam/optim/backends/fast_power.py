"""A power that vectorises on CPUs, where `torch.pow` costs several times the rest of the update."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_EXPONENT, LARGEST_EXPONENT = -10.0, 2.0
"""Between which `fast_power` is accurate: enough for p in [-8, 4]."""

_DEGREE = 9  # of the polynomial for m^y
PARTS = 4 + _DEGREE
"""How many numbers `split_exponent` makes of an exponent."""

_EXP2 = (1.0, 0.693146967, 0.240221197, 0.0555071327, 0.00967554133, 0.00132764715)
"""2^t for t in [-1/2, 1/2], lowest power first: a minimax fit, 8e-8 off at most."""

_INTEGERS, _INTEGERS_BITS = 2.0**23, 0x4B000000
"""From 2^23 on, fp32 holds just the integers: n + 2^23 has the bits of 2^23, plus n; n + 1.5 * 2^23 also for n < 0."""

_SMALLEST_NORMAL = 2.0**-126


def fast_power(x: Tensor, y: Sequence[Tensor], squares: int = 0) -> Tensor:
    """Return ``x ** (y - 2 * squares)`` for fp32 ``x >= 0`` and ``|y| <= 2``, to a relative error of 1.5e-6.

    ``x = 2^e * m`` with ``1 <= m < 2`` gives ``x^y = 2^whole * m^y * 2^rest`` where ``y*e = whole + rest``: bits, and
    two polynomials that the processor can evaluate side by side. The usual ``2^(y*log2(x))`` needs them one after the
    other, and the length of such chains is what bounds the speed. Subnormal ``x`` counts as zero; beyond fp32's normal
    range the result is zero or infinite.

    Args:
        x: Any shape.
        y: The exponent in parts, 0-dim tensors: see `split_exponent`.
        squares: How many times to divide by the square of `x`, which is exact but for rounding.
    """
    upper, lower, at_zero, *coefficients = y
    # Integers become floats, and floats integers, as the last bits of a large float: conversions are slow.
    bits = x.view(torch.int32)
    e = ((bits >> 23) | _INTEGERS_BITS).view(torch.float32) - (_INTEGERS + 127)
    t = ((bits & 0x007FFFFF) | 0x3F800000).view(torch.float32) - 1.5
    product = torch.clamp(upper * e, -127.0, 128.0)
    shifted = product + (1.5 * _INTEGERS + 127)
    rest = (product - (shifted - (1.5 * _INTEGERS + 127))) + lower * e
    scale = (shifted.view(torch.int32) << 23).view(torch.float32)
    scale = torch.where(x < _SMALLEST_NORMAL, at_zero, scale)
    result = (scale * _polynomial(coefficients, t)) * _polynomial(_EXP2, rest)
    if squares:
        inverse = 1 / x
        for _ in range(squares):
            result = (result * inverse) * inverse
    return result


def exponent_parts(y: float) -> tuple[float, float, float]:
    """Return two parts that sum to `y`, and ``0 ** y``.

    The upper part has 12 bits, so its product with the 8 bits of an exponent is exact; the lower one has the digits
    that fp32 could not hold.
    """
    mantissa, binary_exponent = math.frexp(y)
    upper = math.ldexp(round(mantissa * 4096), binary_exponent - 12)
    return upper, y - upper, math.inf if y < 0 else 0.0**y


@functools.lru_cache(maxsize=64)
def split_exponent(y: float) -> tuple[tuple[float, ...], int]:
    """Return what `fast_power` needs to know of ``y``: its parts, and how many `squares` to divide by.

    The squares bring it into ``[-2, 2]``. The parts are those of `exponent_parts`, and the coefficients, lowest power
    first, of the polynomial that interpolates ``(1.5 + t)^y`` at the Chebyshev points of [-1/2, 1/2].
    """
    squares = max(0, math.ceil(-y / 2 - 1))
    y += 2 * squares
    points = torch.arange(_DEGREE + 1, dtype=torch.float64, device="cpu")  # whatever the default device is
    points = torch.cos((points + 0.5) * math.pi / (_DEGREE + 1)) / 2
    powers = points[:, None] ** torch.arange(_DEGREE + 1, device="cpu")
    coefficients = torch.linalg.solve(powers, (1.5 + points) ** y)
    return (*exponent_parts(y), *coefficients.tolist()), squares


def _polynomial(coefficients: Sequence[float | Tensor], x: Tensor) -> Tensor:
    """Evaluate a polynomial, lowest power first, by Horner's rule in ``x^2``: half as long a chain as in ``x``.

    (Estrin's rule is shorter yet, but its ``x^4`` runs into subnormal numbers, on which CPUs crawl.)
    """
    pairs: list = [low + high * x for low, high in zip(coefficients[0::2], coefficients[1::2], strict=False)]
    pairs += coefficients[2 * len(pairs) :]
    square, result = x * x, pairs.pop()
    while pairs:
        result = result * square + pairs.pop()
    return result
