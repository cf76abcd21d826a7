"""Compile a function with TorchInductor, below torch.compile. The only file that touches inductor's internals.

None of these entry points is promised to stay: where one is missing, importing this module fails, and the backend
`compiled` reports itself unavailable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

_OPTIONS = {
    # Fused multiply-adds halve the chains of dependent instructions that bound the polynomials.
    "cpp.enable_floating_point_contract_flag": "fast",
    # The kernel on disk must serve processes with any number of threads.
    "cpp.dynamic_threads": True,
}


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
        The kernel; it takes a list of the function's arguments.
    """
    # The distance between rows is symbolic too. Were it known to be the length of a row, inductor would merge the two
    # loops, and the compiler could no longer move what is constant, coefficients and bounds, out of the inner one.
    rows: Any = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DUCK, DimDynamic.STATIC], dynamic_strides=[DimDynamic.DUCK, DimDynamic.INFER_STRIDE]
    )
    mode = FakeTensorMode(shape_env=ShapeEnv())
    examples: list[Any] = []
    for i, dtype in enumerate(dtypes):
        example = torch.empty(2**14, 2 * row, dtype=dtype)[:, :row]
        examples.append(mode.from_tensor(example, symbolic_context=rows, source=ConstantSource(f"tensor{i}")))
    examples += [mode.from_tensor(other, static_shapes=True) for other in others]
    with torch.no_grad(), tracing(TracingContext(mode)), config.patch(_OPTIONS):
        graph = make_fx(function, select_decomp_table(), tracing_mode="fake")(*examples)
        return compile_fx_inner(graph, examples, is_inference=True)
