"""The function that `eager` loops over, compiled by TorchInductor into one fused, vectorised C++ loop for CPUs.

One kernel serves tensors of every size: dense tensors are viewed as 1-D and the length is symbolic. It is called
directly, below torch.compile: the guards and wrappers of a `torch.compile`-d function cost about 0.1 ms a call, which
over the hundreds of tensors of a language model would be a quarter of the step.

The generic power is the expensive part on a CPU, where `pow` does not vectorise well; `fast_power` stands in for it.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..update import Form, Scalars, update_

# Minimax fits, lowest power first: log2(1 + t) / t for 1 + t in [sqrt(1/2), sqrt(2)], and 2^f for f in [-1/2, 1/2].
_LOG2 = (1.44269973, -0.721375871, 0.480465032, -0.358961855, 0.297262616, -0.272697891, 0.170634351)
_EXP2 = (1.0, 0.693146967, 0.240221197, 0.0555071327, 0.00967554133, 0.00132764715)
_ROOT_HALF_BITS = 0x3F3504F3  # sqrt(1/2) as an fp32 bit pattern
_SMALLEST_NORMAL = 2.0**-126
_VALUES = len(Scalars._fields) + 2  # all but the form, the exponent in four parts
_OPTIONS = {
    # Fused multiply-adds halve the chain of dependent instructions, which is what bounds the polynomials.
    "cpp.enable_floating_point_contract_flag": "fast",
}


def unavailable(device: torch.device) -> str | None:
    """Return why kernels cannot be built for `device`, or None if they can."""
    if device.type != "cpu":
        return f"it generates C++ code for CPUs, not code for {device.type} devices"
    if not any(name and shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++")):
        return "no C++ compiler was found: install g++ or clang++, or name one in CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the C headers of Python were not found: install python3-dev (or your system's name for it)"
    return None


def step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], scalars: Scalars
) -> None:
    """Take one step on every tensor, in place."""
    kernel = _kernel(scalars.form, params[0].dtype, grads[0].dtype, exp_avgs[0].dtype, exp_avg_sqs[0].dtype)
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    values = torch.tensor([*scalars[1:-1], *split_exponent(scalars.exponent)], dtype=dtype)
    for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if tensors[0].numel():
            kernel(*_flatten(*tensors), values)


@functools.cache
def _kernel(form: Form, *dtypes: torch.dtype) -> Callable[..., object]:
    """Compile `update_` for one form and one set of dtypes; inductor keeps the result on disk for later processes."""
    from torch._inductor import standalone_compile
    from torch.fx.experimental.proxy_tensor import make_fx

    def kernel(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, values: Tensor):  # type: ignore[no-untyped-def]
        *plain, y, upper, lower, at_zero = values.unbind()
        if values.dtype == torch.float32:
            exponent, power = (y, upper, lower, at_zero), fast_power
        else:
            exponent, power = y, torch.pow
        update_(param, grad, exp_avg, exp_avg_sq, Scalars(form, *plain, exponent), power)
        return ()

    # The length is symbolic; this one only tells inductor that tensors are long, and takes no memory until touched.
    examples = [torch.empty(2**20, dtype=dtype) for dtype in dtypes]
    examples.append(torch.zeros(_VALUES, dtype=torch.promote_types(dtypes[0], torch.float32)))
    graph = make_fx(kernel, tracing_mode="symbolic")(*examples)
    return standalone_compile(graph, examples, dynamic_shapes="from_graph", options={"config_patches": _OPTIONS})


def _flatten(*tensors: Tensor) -> tuple[Tensor, ...]:
    """View tensors of one dense memory layout as 1-D."""
    param = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return tuple(t.view(-1) for t in tensors)
    if all(t.stride() == param.stride() for t in tensors) and torch.ops.aten.is_non_overlapping_and_dense(param):
        return tuple(t.as_strided((t.numel(),), (1,)) for t in tensors)
    return tensors


def fast_power(x: Tensor, y: Sequence[Tensor]) -> Tensor:
    """Return ``x ** y`` for fp32 ``x >= 0``, to a relative error of 1e-6 for ``|y| <= 2``; all of it vectorises.

    ``x = 2^e * (1 + t)`` gives ``x^y = 2^(y*e + y*log2(1 + t))``. The integer part of that exponent becomes the
    result's exponent bits, the rest goes through a polynomial. Subnormal ``x`` counts as zero; beyond fp32's normal
    range the result is zero or infinite.

    Args:
        x: Any shape.
        y: The exponent in parts, as 0-dim tensors: see `split_exponent`.
    """
    exponent, upper, lower, at_zero = y
    bits = x.view(torch.int32)
    e = (bits - _ROOT_HALF_BITS) >> 23
    t = (bits - (e << 23)).view(torch.float32) - 1
    e_value = e.to(torch.float32)
    log2 = t * _polynomial(_LOG2, t)
    whole = torch.round(exponent * (e_value + log2))
    rest = (upper * e_value - whole) + (lower * e_value + exponent * log2)
    scale = ((torch.clamp(whole.to(torch.int32), -127, 128) + 127) << 23).view(torch.float32)
    return torch.where(x < _SMALLEST_NORMAL, at_zero, scale * _polynomial(_EXP2, rest))


def split_exponent(y: float) -> tuple[float, float, float, float]:
    """Return what `fast_power` needs to know of ``y``: itself, two parts that sum to it, and ``0 ** y``.

    The upper part has 12 bits, so its product with the 8 bits of an exponent is exact; the lower one carries digits
    that fp32 could not hold. Beyond 1e5 the exponent makes no difference that fp32 can show, save right at ``x = 1``.
    """
    y = max(-1e5, min(y, 1e5))
    mantissa, binary_exponent = math.frexp(y)
    upper = math.ldexp(round(mantissa * 4096), binary_exponent - 12)
    return y, upper, y - upper, math.inf if y < 0 else 0.0


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Evaluate a polynomial, lowest power first, by Estrin's rule: its dependency chain is short."""
    terms: list = list(coefficients)
    while len(terms) > 1:
        pairs = [terms[i] + terms[i + 1] * x for i in range(0, len(terms) - 1, 2)]
        terms = pairs + terms[2 * len(pairs) :]
        x = x * x
    return terms[0]
