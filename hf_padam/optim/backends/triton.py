"""One kernel launch for all tensors of a bucket: the tables that make it possible, and the launch.

The tables (addresses, lengths, and which block of work belongs where) are built when a set of tensors is first seen,
and the caller keeps them as long as the set; later steps upload the addresses that have moved. Tables belong to the
stream that they were uploaded on, and a step on another stream builds its own: so neither a new address nor, once they
are dropped, what their memory is given to next can overtake a kernel that reads them. Tensors that are not aligned to
16 bytes have a launch of their own, for they would cost all others their wide loads. fp64 tensors, and tensors that
are not dense or not laid out like their gradient, are left to `eager`: they are rare and gain nothing here.

GradScaler: its ``grad_scale`` and ``found_inf`` are not advertised, so it unscales the gradients and skips the step of
an overflow by itself. CUDA graphs: a step computes its bias corrections on the host, so capturing one is refused.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import subprocess
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..random_bits import Rounding
from ..update import Form, Scalars
from . import eager
from .checks import KernelError, disagreement, lacks_memory, summary
from .fast_power import exponent_parts

_BLOCK = 2048  # elements; with 8 warps, 8 elements a thread
_DTYPES = ("PARAM", "GRAD", "MOMENT1", "MOMENT2")
_ALIGNMENT = 16  # bytes of the addresses, and elements of the lengths


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on `device`, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    try:
        import triton

        from .triton_kernel import step_kernel

        interpreted = not isinstance(step_kernel, triton.runtime.JITFunction)
        if device.type == "cpu" and not interpreted:
            return "Triton generates no code for CPUs (TRITON_INTERPRET=1 interprets it, slowly)"
        if device.type == "cpu":
            return None
        if device.type not in ("cuda", "xpu"):
            return f"Triton has no code generator for {device.type} devices"
        from torch.utils._triton import has_triton

        if not interpreted and not has_triton():
            return "Triton is installed but does not support this device"
        return disagreement(step, device)
    except Exception as error:  # whatever an import, a compiler or a driver raises: the reason to use another backend
        if lacks_memory(error.__cause__ or error):
            raise (error.__cause__ or error) from None
        return f"its kernel does not run there ({summary(error)})"


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
        KernelError: If the kernel cannot be built.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, *([s] if s else []))
    kept = {} if kept is None else kept
    keys = rounding.tensor_keys if rounding else [0] * len(params)
    stream = _stream(params[0].device)
    before = kept["addresses"] if kept.get("stream") == stream else None
    if before is None or kept.get("moving"):
        addresses = [[t.data_ptr() for t in tensors] for tensors in lists]
    else:
        addresses = [before[0], list(map(Tensor.data_ptr, grads)), *before[2:]]
    if before is None or (addresses != before and not all([launch.move(addresses) for launch in kept["launches"]])):
        launches, irregular = _divide(lists, addresses, keys)
        kept |= dict(stream=stream, launches=launches, irregular=irregular)
    kept["addresses"] = addresses
    for number, launch in enumerate(kept["launches"]):
        try:
            _launch(launch, lists, scalars, rounding)
        except KernelError as error:
            if number == 0:
                raise
            raise RuntimeError(
                f"{error}, when other tensors had taken the step: start again from a checkpoint"
            ) from error
    for i in kept["irregular"]:  # last: a launch may fail, and touch nothing
        own = rounding and rounding._replace(tensor_keys=[keys[i]])
        eager.step([params[i]], [grads[i]], [exp_avgs[i]], [exp_avg_sqs[i]], scalars, own, s and [s[i]])
    torch.autograd.graph.increment_version(params)  # as any in-place operation does, for graphs that hold weights


def _stream(device: torch.device) -> Any:
    return device if device.type == "cpu" else torch.get_device_module(device).current_stream(device)


def _divide(
    lists: tuple[list[Tensor], ...], addresses: list[list[int]], keys: list[int]
) -> tuple[list[_Launch], list[int]]:
    """Sort tensors into up to two launches, aligned and not, and those that are not for this kernel."""
    irregular = []
    sides: tuple[list[int], list[int]] = ([], [])
    for i, tensors in enumerate(zip(*lists, strict=True)):
        if not _one_dense_layout(tensors) or torch.float64 in (tensors[0].dtype, tensors[-1].dtype):
            irregular.append(i)
        elif tensors[0].numel():
            odd = functools.reduce(or_, [row[i] for row in addresses], tensors[0].numel()) % _ALIGNMENT
            sides[bool(odd)].append(i)
    launches = []
    for aligned, side in zip((True, False), sides, strict=True):
        if side:
            lengths = [lists[0][i].numel() for i in side]
            table = _Table(lists[0][0].device, lengths, [keys[i] for i in side])
            launch = _Launch(side if len(side) < len(lists[0]) else None, aligned, table)
            launch.move(addresses)
            launches.append(launch)
    return launches, irregular


@contextlib.contextmanager
def _building() -> Iterator[None]:
    """Tell a kernel that cannot be built, of which nothing has run, from one that fails as it runs."""
    from triton.errors import TritonError

    try:
        yield
    except (TritonError, OSError, subprocess.CalledProcessError) as error:  # of the compiler, of the disk, of a linker
        raise KernelError(f"a kernel cannot be built ({summary(error)})") from error


def _one_dense_layout(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the elements lie next to one another and in the same order in all tensors."""
    if all([t.is_contiguous() for t in tensors]):
        return True
    dense = torch.ops.aten.is_non_overlapping_and_dense(tensors[0])
    return dense and all(t.stride() == tensors[0].stride() for t in tensors)


class _Launch(NamedTuple):
    """Tensors of a bucket that go into one launch."""

    places: list[int] | None  # in the lists; None if these are all of them
    aligned: bool
    table: _Table

    def move(self, addresses: list[list[int]]) -> bool:
        """Tell the table where all tensors are now; return False if one has lost its alignment."""
        if self.places is not None:
            addresses = [[row[i] for i in self.places] for row in addresses]
        moved = [row for row, old in zip_longest(addresses, self.table.rows) if row != old]
        if self.aligned and any(functools.reduce(or_, row) % _ALIGNMENT for row in moved):
            return False
        self.table.point_to(addresses)
        return True


def _launch(launch: _Launch, lists: tuple[list[Tensor], ...], scalars: Scalars, rounding: Rounding | None) -> None:
    from .triton_kernel import FORM_NUMBER, step_kernel

    table = launch.table
    dtypes = {name: _triton_dtype(tensors[0].dtype) for name, tensors in zip(_DTYPES, lists, strict=False)}
    rounds_moments = rounding is not None and lists[3][0].dtype == torch.bfloat16
    crowded = _crowded(scalars.form, scalars.fisher or len(lists) == 5, rounds_moments)
    device = lists[0][0].device
    # Triton launches on the current device, which need not be the tensors'.
    with (
        _building(),
        contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device),
    ):
        step_kernel[(len(table.block_tensors),)](
            table.pointers,
            table.lengths,
            table.block_tensors,
            table.block_starts,
            table.keys,
            rounding.step_key if rounding else 0,
            len(table.rows[0]),
            *scalars.numbers,
            *exponent_parts(scalars.exponent),
            scalars.s_rate if len(lists) == 5 else None,
            FORM=FORM_NUMBER[scalars.form],
            LATE=scalars.late_decay,
            FISHER=scalars.fisher,
            **dtypes,
            ROUND=rounding is not None,
            BLOCK=_BLOCK,
            **_options(launch.aligned, crowded),
        )


def _crowded(form: Form, fisher_or_s: bool, rounds_moments: bool) -> bool:
    """Whether eight elements would take a thread more than 64 registers: where all is asked of it at once."""
    return form in (Form.BELOW_TWO, Form.ABOVE_TWO) and fisher_or_s and rounds_moments


def _options(aligned: bool, crowded: bool) -> dict[str, Any]:
    """Return what Triton is told about the tensors, and how to compile.

    Half as many elements to a thread where eight would take more than 64 registers: single ones have an address each,
    and see `_crowded`. A multiprocessor so always holds half of the threads that it can. No multiplication is fused
    with an addition, whatever Triton's default is: each result is rounded as eager rounds it. That costs some 8% more
    instructions, of which a step that waits for memory has many to spare, and it takes fewer registers.
    """
    return {"ALIGNED": aligned, "num_warps": 8 if aligned and not crowded else 16, "enable_fp_fusion": False}


@functools.cache
def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


class _Table:
    """How the elements of some tensors are divided into blocks, and where the tensors are, on the device."""

    def __init__(self, device: torch.device, lengths: Sequence[int], keys: Sequence[int]) -> None:
        """Build the tables from numbers of elements and random keys; `point_to` follows."""
        self.device = device
        self.rows: list[list[int]] = []
        self.lengths, self.keys = _upload(lengths, device), _upload(keys, device, torch.int32)
        counts = (torch.tensor(lengths, device="cpu") + _BLOCK - 1) // _BLOCK
        tensors = torch.repeat_interleave(counts)
        first_blocks = counts.cumsum(0) - counts
        starts = (torch.arange(len(tensors), device="cpu") - first_blocks[tensors]) * _BLOCK
        self.block_tensors, self.block_starts = _upload(tensors, device, torch.int32), _upload(starts, device)

    def point_to(self, rows: list[list[int]]) -> None:
        """Upload the addresses of parameters, gradients, moments and `s`, as far as they have moved."""
        if not self.rows:
            self.pointers = _upload(rows, self.device)
        else:
            for pointers, row, old in zip(self.pointers, rows, self.rows, strict=True):
                if row != old:
                    pointers.copy_(_upload(row, self.device), non_blocking=True)
        self.rows = rows


def _upload(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Copy numbers to the device, from pinned memory, so that the host need not wait for what the device is at."""
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
