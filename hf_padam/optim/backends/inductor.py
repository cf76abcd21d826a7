"""Compile a function with TorchInductor, below torch.compile. The only file that touches inductor's internals.

None of these entry points is promised to stay: where one is missing, importing this module fails, and the backend
`compiled` reports itself unavailable. `torch.compile` alone, which needs none of them, takes 2.1 times as long for a
step of SmolLM2's 272 tensors if it is called with each, 5.1 times with all of them concatenated and 5.7 times with
those of one shape stacked (fp32, p = 0.8, two cores of an AMD EPYC with AVX2; medians of 15 turns in one process).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.codegen.cpp import CppVecOverrides
from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

_OPTIONS = {
    # Fused multiply-adds halve the chains of dependent instructions that bound the polynomials.
    "cpp.enable_floating_point_contract_flag": "fast",
    # The kernel on disk must serve processes with any number of threads.
    "cpp.dynamic_threads": True,
}


def _reinterpret(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> str:
    """Return C++ code that reads the bits of whole vectors as another dtype of the same size.

    Inductor's own goes through memory element by element, which compilers mend for fp32 but not for bf16.
    """
    count, name = V.kernel._get_num_vectors(src_dtype), DTYPE_TO_CPP[dtype]
    if count == 1:
        return f"at::vec::cast<{name}>({x})"
    parts = ", ".join(f"at::vec::cast<{name}>({x}[{i}])" for i in range(count))
    return f"at::vec::VectorizedN<{name}, {count}>({parts})"


def _compilers() -> tuple[str | None, ...]:
    """Return the compilers to try, in this order: inductor's own, CXX or g++ on Linux, and the usual ones."""
    own = config.cpp.cxx
    return (*(own if isinstance(own, tuple | list) else (own,)), "g++", "clang++", "c++")


def compile_over_rows(
    function: Callable[..., object], dtypes: tuple[torch.dtype, ...], row: int, *others: Tensor
) -> Callable[..., object]:
    """Compile an elementwise in-place function for any number of rows.

    Args:
        function: Takes one tensor of shape (rows, `row`) per dtype, then tensors like `others`; returns ().
        dtypes: Of those tensors.
        row: Elements per row.
        others: Examples of the last arguments, whose shapes are fixed.

    Returns:
        ``kernel(rows, *arguments)``, for `arguments` of these dtypes of any shape, dense and in the same order, whose
        first ``rows * row`` elements are worked on. It does not check them.
    """
    # The distance between rows is symbolic too. Were it known to be the length of a row, inductor would merge the two
    # loops, and the compiler could no longer move what is constant, coefficients and bounds, out of the inner one.
    rows: Any = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DUCK, DimDynamic.STATIC], dynamic_strides=[DimDynamic.DUCK, DimDynamic.INFER_STRIDE]
    )
    mode = FakeTensorMode(shape_env=ShapeEnv())
    examples: list[Any] = []
    for i, dtype in enumerate(dtypes):
        example = torch.empty(2**14, 2 * row, dtype=dtype, device="cpu")[:, :row]
        examples.append(mode.from_tensor(example, symbolic_context=rows, source=ConstantSource(f"tensor{i}")))
    examples += [mode.from_tensor(other, static_shapes=True) for other in others]
    vectors = mock.patch.object(CppVecOverrides, "to_dtype_bitcast", staticmethod(_reinterpret))
    options = _OPTIONS | {"cpp.cxx": _compilers()}
    # The lock keeps other threads' torch.compile apart: one class is patched for all of them.
    with compile_lock, torch.no_grad(), tracing(TracingContext(mode)), config.patch(options), vectors:
        graph = make_fx(function, select_decomp_table(), tracing_mode="fake")(*examples)
        compiled = compile_fx_inner(graph, examples, is_inference=True)

    def kernel(count: int, *arguments: Tensor) -> object:
        views = [t.as_strided((count, row), (row, 1)) for t in arguments[: len(dtypes)]]
        return compiled([*views, *arguments[len(dtypes) :]])

    return _without_wrapper(compiled, dtypes, row, others) or kernel


def _without_wrapper(
    compiled: Any, dtypes: tuple[torch.dtype, ...], row: int, others: tuple[Tensor, ...]
) -> Callable[..., object] | None:
    """Return the C++ function in what inductor compiled, or None if that is more than one call of one function.

    The Python around it makes sure that tensors are what they were compiled for, in some five times the time that the
    function takes for ten thousand elements. What it passes on is learnt from a call, with a number of rows and a
    distance between them that no other argument has.
    """
    scope = getattr(getattr(compiled, "current_callable", None), "__globals__", {})
    fused = [name for name in scope if name.startswith("cpp_fused")]
    if len(fused) != 1:
        return None
    count, distance = 3, 2 * row
    inputs = [*(torch.zeros(count, distance, dtype=dtype, device="cpu")[:, :row] for dtype in dtypes), *others]
    calls: list[tuple[Any, ...]] = []
    with mock.patch.dict(scope, {fused[0]: lambda *arguments: calls.append(arguments)}):
        compiled(list(inputs))
    sources: list[Any] = [*inputs, count, distance]
    if len(calls) != 1:
        return None
    order = []
    for argument in calls[0]:
        places = [i for i, source in enumerate(sources) if argument is source]
        places = places or [i for i in (len(inputs), len(inputs) + 1) if argument == sources[i]]
        if len(places) != 1:
            return None
        order += places
    function, pick = scope[fused[0]], itemgetter(*order)
    return lambda count, *arguments: function(*pick((*arguments, count, row)))
