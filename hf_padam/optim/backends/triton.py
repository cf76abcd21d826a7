"""One kernel launch for all tensors of a bucket: the tables that make it possible, and the launch.

The tables (addresses, lengths, and which block of work belongs where) are built when a set of tensors is first seen
and kept; later steps upload the gradients' addresses again, and only if one has moved. fp64 tensors, and tensors that
are not dense or not laid out like their gradient, are left to `eager`: they are rare and gain nothing here.

GradScaler: its ``grad_scale`` and ``found_inf`` are not advertised, so it unscales the gradients and skips the step of
an overflow by itself. CUDA graphs: a step computes its bias corrections on the host, so capturing one is refused.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..update import Rounding, Scalars, prepare
from . import eager
from .fast_power import exponent_parts

_BLOCK = 2048  # elements; with 8 warps, 8 elements a thread
_WARPS = 8
_DTYPES = ("PARAM", "GRAD", "MOMENT1", "MOMENT2")
_TABLES_KEPT = 256  # sets of tensors: parameter groups times dtypes


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on `device`, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    import triton

    from .triton_kernel import step_kernel

    interpreted = not isinstance(step_kernel, triton.runtime.JITFunction)
    if device.type == "cpu":
        return None if interpreted else "Triton generates no code for CPUs (TRITON_INTERPRET=1 interprets it, slowly)"
    if device.type not in ("cuda", "xpu"):
        return f"Triton has no code generator for {device.type} devices"
    from torch.utils._triton import has_triton

    if not interpreted and not has_triton():
        return "Triton is installed but does not support this device"
    try:
        return None if _agrees_with_eager(device) else "its results differ from eager's there: please report this"
    except Exception as error:  # whatever a compiler or driver raises: the reason to use another backend
        return f"its kernel does not run there ({type(error).__name__}: {str(error).strip().splitlines()[0]})"


def _agrees_with_eager(device: torch.device) -> bool:
    """Compare a small step with eager's: there are more compilers, drivers and chips than a test suite can cover."""
    scalars = prepare(1, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, p_norm=0.8, lambda_p=0.05, weight_decay=0.1)
    weight = torch.linspace(-1, 1, 3001, device=device)
    results = []
    for take_step in (eager.step, step):
        new = weight.clone()
        take_step([new], [weight.sin()], [torch.zeros_like(weight)], [torch.zeros_like(weight)], scalars)
        results.append(new)
    expected, got = results
    return torch.allclose(got, expected, rtol=1e-5, atol=1e-7) and torch.equal(got == 0, expected == 0)


def step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    scalars: Scalars,
    rounding: Rounding | None = None,
    s: list[Tensor] | None = None,
    kept: dict[Any, Any] | None = None,
) -> None:
    """Take one step on every tensor, in place.

    Raises:
        RuntimeError: While a CUDA graph is being captured.
    """
    if params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("PAdam's step cannot be captured in a CUDA graph: capture forward and backward only")
    lists = (params, grads, exp_avgs, exp_avg_sqs, *([s] if s else []))
    regular: tuple[list[Tensor], ...] = tuple([] for _ in lists)
    keys = []
    for i, tensors in enumerate(zip(*lists, strict=True)):
        if not _one_dense_layout(tensors) or torch.float64 in (tensors[0].dtype, tensors[-1].dtype):
            param, grad, exp_avg, exp_avg_sq = tensors[:4]
            own = rounding and rounding._replace(tensor_keys=[rounding.tensor_keys[i]])
            eager.step([param], [grad], [exp_avg], [exp_avg_sq], scalars, own, s and [s[i]])
        elif tensors[0].numel():
            keys.append(rounding.tensor_keys[i] if rounding else 0)
            for values, tensor in zip(regular, tensors, strict=True):
                values.append(tensor)
    if regular[0]:
        _launch(regular, scalars, tuple(keys), rounding)
        torch.autograd.graph.increment_version([t for tensors in (regular[0], *regular[2:]) for t in tensors])


def _one_dense_layout(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the elements lie next to one another and in the same order in all tensors."""
    if all([t.is_contiguous() for t in tensors]):
        return True
    dense = torch.ops.aten.is_non_overlapping_and_dense(tensors[0])
    return dense and all(t.stride() == tensors[0].stride() for t in tensors)


def _launch(
    lists: tuple[list[Tensor], ...], scalars: Scalars, keys: tuple[int, ...], rounding: Rounding | None
) -> None:
    from .triton_kernel import FORM_NUMBER, step_kernel

    params = lists[0]
    addresses = [tuple([t.data_ptr() for t in tensors]) for tensors in lists]
    lengths = tuple([t.numel() for t in params])
    table = _table(params[0].device, addresses[0], addresses[2], addresses[3], lengths, keys, *addresses[4:])
    table.point_to_gradients(addresses[1])
    dtypes = {name: _triton_dtype(tensors[0].dtype) for name, tensors in zip(_DTYPES, lists, strict=False)}
    device = params[0].device
    # Triton launches on the current device, which need not be the tensors'.
    with contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
        step_kernel[(len(table.block_tensors),)](
            table.pointers,
            table.lengths,
            table.block_tensors,
            table.block_starts,
            table.keys,
            rounding.step_key if rounding else 0,
            len(params),
            *scalars.numbers,
            *exponent_parts(scalars.exponent),
            scalars.s_rate if len(lists) == 5 else None,
            FORM=FORM_NUMBER[scalars.form],
            LATE=scalars.late_decay,
            FISHER=scalars.fisher,
            **dtypes,
            ROUND=rounding is not None,
            ALIGNED=table.aligned and all(address % 16 == 0 for address in addresses[1]),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


@functools.lru_cache(maxsize=_TABLES_KEPT)
def _table(device: torch.device, *key: tuple[int, ...]) -> _Table:
    return _Table(device, *key)


class _Table:
    """Where the tensors of one bucket are, and how their elements are divided into blocks, on the device."""

    def __init__(
        self,
        device: torch.device,
        params: tuple[int, ...],
        exp_avgs: tuple[int, ...],
        exp_avg_sqs: tuple[int, ...],
        lengths: tuple[int, ...],
        keys: tuple[int, ...],
        *s: tuple[int, ...],
    ) -> None:
        """Build the tables from addresses, numbers of elements and random keys; the gradients' addresses follow."""
        self.gradients: tuple[int, ...] = (0,) * len(params)
        self.pointers = _upload([params, self.gradients, exp_avgs, exp_avg_sqs, *s], device)
        self.lengths = _upload(lengths, device)
        self.keys = _upload(keys, device).to(torch.int32)
        counts = (torch.tensor(lengths) + _BLOCK - 1) // _BLOCK
        tensors = torch.repeat_interleave(counts)
        first_blocks = counts.cumsum(0) - counts
        starts = (torch.arange(len(tensors)) - first_blocks[tensors]) * _BLOCK
        self.block_tensors, self.block_starts = tensors.to(torch.int32).to(device), starts.to(device)
        aligned_addresses = all(address % 16 == 0 for row in (params, exp_avgs, exp_avg_sqs, *s) for address in row)
        self.aligned = aligned_addresses and all(length % 16 == 0 for length in lengths)

    def point_to_gradients(self, addresses: tuple[int, ...]) -> None:
        """Upload the gradients' addresses, if any has moved since the last step."""
        if addresses != self.gradients:
            self.pointers[1].copy_(_upload(addresses, torch.device("cpu")), non_blocking=True)
            self.gradients = addresses


def _upload(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)
