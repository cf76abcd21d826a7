"""The function that `eager` loops over, compiled by torch.compile into one fused, vectorised pass over memory.

The generic power is the expensive part on a CPU, where `pow` does not vectorise well; `fast_power` stands in for it.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..update import Form, Scalars, update_

# Chebyshev fits, highest power first: log2(1 + t) / t for 1 + t in [sqrt(1/2), sqrt(2)], and 2^f for f in [-1/2, 1/2].
_LOG2 = (-0.146203534, 0.234209851, -0.248821806, 0.287075611, -0.360241986, 0.480924039, -0.721352759, 1.44269496)
_EXP2 = (0.00015469732, 0.00134004322, 0.0096180256, 0.0555032721, 0.240226512, 0.693147207, 1.0)
_ROOT_HALF_BITS = 0x3F3504F3  # sqrt(1/2) as an fp32 bit pattern
_SMALLEST_NORMAL = 2.0**-126
_MAX_VARIANTS = 512  # torch.compile gives up specialising after 8 shapes by default, without an error


def unavailable(device: torch.device) -> str | None:
    """Return why torch.compile cannot build kernels for `device`, or None if it can."""
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        return None if has_triton() else f"Triton, which generates the code for {device.type} devices, is missing"
    if not any(name and shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++")):
        return "no C++ compiler was found: install g++ or clang++, or name one in CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the C headers of Python were not found: install python3-dev (or your system's name for it)"
    return None


def step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], scalars: Scalars
) -> None:
    """Take one step on every tensor, in place."""
    kernel = _kernel(scalars.form)
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    values = torch.tensor(scalars[1:], dtype=dtype, device=params[0].device)
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if tensors[0].numel():
            kernel(*_flatten(*tensors), values)


@functools.cache
def _kernel(form: Form) -> Callable[..., None]:
    """Compile `update_` for one form. Shapes are static: the generated loops vectorise only then."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_VARIANTS)

    def kernel(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, values: Tensor) -> None:
        power = fast_power if values.dtype == torch.float32 else torch.pow
        update_(param, grad, exp_avg, exp_avg_sq, Scalars(form, *values.unbind()), power)  # type: ignore[arg-type]

    return torch.compile(kernel, dynamic=False, fullgraph=True)


def _flatten(*tensors: Tensor) -> tuple[Tensor, ...]:
    """View tensors of one dense memory layout as 1-D: one kernel per size then serves all shapes."""
    param = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return tuple(t.view(-1) for t in tensors)
    if all(t.stride() == param.stride() for t in tensors) and torch.ops.aten.is_non_overlapping_and_dense(param):
        return tuple(t.as_strided((t.numel(),), (1,)) for t in tensors)
    return tensors


def fast_power(x: Tensor, y: Tensor) -> Tensor:
    """Return ``x ** y`` for fp32 ``x >= 0`` and a 0-dim fp32 ``y``, to a relative error of 3e-7; it vectorises.

    ``x = 2^e * (1 + t)`` gives ``x^y = 2^(y*e + y*log2(1 + t))``. The integer part of that exponent becomes the
    result's exponent bits, the rest goes through a polynomial. Subnormal ``x`` counts as zero; beyond fp32's normal
    range the result is zero or infinite.
    """
    bits = x.view(torch.int32)
    exponent = (bits - _ROOT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).view(torch.float32) - 1
    exponent_value = exponent.to(torch.float32)
    # y in two parts, the upper of 12 bits: its product with an exponent of 8 bits is exact, so no digits are lost.
    upper = (y.view(torch.int32) & -4096).view(torch.float32)
    product = upper * exponent_value
    whole = torch.round(product)
    rest = (product - whole) + ((y - upper) * exponent_value + y * (t * _polynomial(_LOG2, t)))
    carry = torch.round(rest)
    scale = ((torch.clamp(whole + carry, -127, 128).to(torch.int32) + 127) << 23).view(torch.float32)
    at_zero = torch.where(y < 0, float("inf"), 0.0)
    return torch.where(x < _SMALLEST_NORMAL, at_zero, scale * _polynomial(_EXP2, rest - carry))


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Evaluate a polynomial, highest power first, by Horner's rule."""
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + coefficient
    return result
