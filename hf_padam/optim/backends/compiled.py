"""The function that `eager` loops over, compiled by TorchInductor into one fused, vectorised C++ loop for CPUs.

One kernel serves every tensor: it works on short rows, whose number is symbolic. It is called directly, below
torch.compile: the guards and wrappers of a `torch.compile`-d function cost about 0.1 ms a call, which over the
hundreds of tensors of a language model would be a quarter of the step. Inductor keeps its kernels on disk (see
TORCHINDUCTOR_CACHE_DIR), so only the first run on a machine compiles.

The generic power is the expensive part on a CPU, where `pow` does not vectorise well; `fast_power` stands in for it.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..random_bits import Rounding, random_bits
from ..update import Form, Scalars, exact_power, update_
from .checks import PLAIN, KernelError, disagreement, lacks_memory, summary
from .fast_power import LARGEST_EXPONENT, PARTS, SMALLEST_EXPONENT, fast_power, split_exponent

_ROW_BYTES = 64
"""Of a row of the smallest dtype: an AVX-512 register. It is short, so that few tensors have more behind the last."""

_PLAIN = len(Scalars._fields) - 4  # how many `Scalars.numbers` there are
_BUILDING = threading.Lock()  # inductor is not made for several threads at once


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Return why kernels cannot be built for `device`, or None if they can."""
    if device.type != "cpu":
        return f"it generates C++ code for CPUs, not code for {device.type} devices"
    if not any(name and shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++")):
        return "no C++ compiler was found: install g++ or clang++, or name one in CXX"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the C headers of Python were not found: install python3-dev (or your system's name for it)"
    try:
        return disagreement(step, device, [PLAIN])
    except Exception as error:  # whatever loading or running it raises: the reason to use another backend
        if lacks_memory(error.__cause__ or error):
            raise (error.__cause__ or error) from None
        return str(error) if isinstance(error, KernelError) else f"its kernel does not run ({summary(error)})"


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
    lists = [params, grads, exp_avgs, exp_avg_sqs, *([s] if s else [])]
    dtypes = [tensors[0].dtype for tensors in lists]
    row = _row(*dtypes)
    arithmetic = torch.promote_types(dtypes[0], torch.float32)
    form = scalars.form
    parts: tuple[float, ...] = ()
    squares = None
    if form in (Form.BELOW_TWO, Form.ABOVE_TWO) or s:
        if arithmetic == torch.float32 and SMALLEST_EXPONENT <= scalars.exponent <= LARGEST_EXPONENT:
            parts, squares = split_exponent(scalars.exponent)
    try:
        with _BUILDING:
            kernel = _kernel(form, scalars.late_decay, scalars.fisher, squares, rounding is not None, *dtypes)
    except Exception as error:  # there was no memory, which will be tried again
        raise KernelError(summary(error)) from error
    if isinstance(kernel, str):
        raise KernelError(kernel)
    rate = [scalars.s_rate] if s else []
    # On the CPU, whatever torch.set_default_device says.
    values = torch.tensor([*scalars.numbers, *rate, *parts], dtype=arithmetic, device="cpu")
    numbers = [values]
    tails = []
    for i, tensors in enumerate(zip(*lists, strict=True)):
        if rounding is not None:
            keys = [rounding.tensor_keys[i], rounding.step_key, 0]
            numbers = [values, torch.tensor(keys, dtype=torch.int32, device="cpu")]
        if not all([t.is_contiguous() for t in tensors]):
            _step_irregular(kernel, row, tensors, numbers)
            continue
        rows, behind = divmod(tensors[0].numel(), row)
        if not behind or rounding is None:
            if rows:
                kernel(rows, *tensors, *numbers)
            if behind:
                start = rows * row
                tails.append([t.as_strided((behind,), (1,), t.storage_offset() + start) for t in tensors])
        else:
            _step_irregular(kernel, row, tensors, numbers)
    if tails:
        _step_tails(kernel, row, list(map(list, zip(*tails, strict=True))), numbers)
    written = [*params, *exp_avgs, *exp_avg_sqs, *(s or ())]
    torch.autograd.graph.increment_version(written)  # as any in-place operation does


def _row(*dtypes: torch.dtype) -> int:
    """Return the elements of a row for tensors of these dtypes."""
    return _ROW_BYTES // min(dtype.itemsize for dtype in dtypes)


def _step_tails(kernel: Callable[..., object], row: int, lists: list[list[Tensor]], numbers: list[Tensor]) -> None:
    """Step what tensors have behind their last whole row, all of it at once, through copies."""
    sizes = [t.numel() for t in lists[0]]
    missing = -sum(sizes) % row
    flat = [torch.nn.functional.pad(torch.cat(tensors), (0, missing)) for tensors in lists]
    kernel(len(flat[0]) // row, *flat, *numbers)
    for i, (tensors, stepped) in enumerate(zip(lists, flat, strict=True)):
        if i != 1:
            torch._foreach_copy_(tensors, list(stepped.split([*sizes, missing])[: len(sizes)]))


def _step_irregular(
    kernel: Callable[..., object], row: int, tensors: tuple[Tensor, ...], numbers: list[Tensor]
) -> None:
    """Step tensors whose elements are not one whole number of rows, through copies of what does not fit."""
    param = tensors[0]
    if torch.ops.aten.is_non_overlapping_and_dense(param) and all(t.stride() == param.stride() for t in tensors):
        flat = [t.as_strided((t.numel(),), (1,)) for t in tensors]
    else:
        flat = [t.contiguous().view(-1) for t in tensors]
    whole = param.numel() // row * row
    if whole:
        kernel(whole // row, *flat, *numbers)
    if whole < param.numel():
        rest = [torch.nn.functional.pad(t[whole:], (0, whole + row - param.numel())) for t in flat]
        for keys in numbers[1:]:
            keys[2] = (whole + 2**31) % 2**32 - 2**31  # positions count modulo 2^32, as in every backend
        kernel(1, *rest, *numbers)
        for t, padded in zip(flat, rest, strict=True):
            if t is not flat[1]:
                t[whole:] = padded[: param.numel() - whole]
    for i, (t, own) in enumerate(zip(flat, tensors, strict=True)):
        if i != 1 and t.data_ptr() != own.data_ptr():  # it was a copy
            own.copy_(t.view_as(own))


@functools.cache
def _kernel(
    form: Form, late: bool, fisher: bool, squares: int | None, rounds: bool, *dtypes: torch.dtype
) -> Callable[..., object] | str:
    """Compile `update_` for one form and one set of dtypes: four, or five with that of `s`.

    Args:
        form: See `Scalars`.
        late: See `Scalars`.
        fisher: See `Scalars`.
        squares: From `split_exponent`; None if the exact power is to be taken, or none at all.
        rounds: Whether to round stochastically.
        dtypes: Of the tensors.

    Returns:
        ``kernel(rows, param, grad, exp_avg, exp_avg_sq[, s], values, keys)``: how many rows of `_row` elements; dense
        tensors of these dtypes; the numbers in `Scalars`, followed by its `s_rate` if there is `s` and the parts of
        the exponent if there are `squares`; and, only if it `rounds` stochastically, the keys of the tensor and of the
        step and the position of the first element. If it cannot be built, why: trying again at every step would take
        seconds.
    """
    try:
        from . import inductor
    except ImportError as error:
        return f"torch {torch.__version__} lacks an entry point of TorchInductor that it uses ({error})"
    except OSError as error:  # it creates its cache as it is imported
        return f"TorchInductor cannot be loaded ({summary(error)})"
    fast = squares is not None
    power: Any = functools.partial(fast_power, squares=squares) if squares is not None else exact_power
    follows = len(dtypes) == 5
    row = _row(*dtypes)

    # No annotations: they would end up in inductor's cache key.
    def take_step(param, grad, exp_avg, exp_avg_sq, *others):
        s, (values, *keys) = others[0] if follows else None, others[follows:]
        scalars = Scalars(form, *values[:_PLAIN].unbind())._replace(late_decay=late, fisher=fisher)
        if follows:
            scalars = scalars._replace(s_rate=values[_PLAIN])
        if fast:
            scalars = scalars._replace(exponent=values[_PLAIN + follows :].unbind())
        bits = None
        if rounds:
            tensor_key, step_key, start = keys[0].unbind()
            rows, columns = (torch.arange(n, dtype=torch.int32, device=param.device) for n in param.shape)
            bits = random_bits(rows[:, None] * row + columns + start, tensor_key, step_key)
        update_(param, grad, exp_avg, exp_avg_sq, scalars, power, bits, s)
        return ()

    arithmetic = torch.promote_types(dtypes[0], torch.float32)
    values = torch.empty(_PLAIN + follows + PARTS * fast, dtype=arithmetic, device="cpu")
    keys = [torch.empty(3, dtype=torch.int32, device="cpu")] * rounds
    try:
        return inductor.compile_over_rows(take_step, dtypes, row, values, *keys)
    except Exception as error:  # of a compiler, a linker, a full or read-only disk
        if lacks_memory(error):
            raise
        return f"a kernel for {form.name}, {', '.join(map(str, dtypes))} cannot be built ({summary(error)})"
