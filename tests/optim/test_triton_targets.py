"""The Triton kernel compiled ahead of time for GPUs that need not be there: no spills, few registers, no byte more.

A step reads four tensors and writes three (with `s` five and four). That takes so many accesses of 16 bytes, and no
more; what else is read are a handful of numbers from the tables.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

import pytest

from hf_padam.optim.backends import triton as backend
from hf_padam.optim.update import Form

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("runs where Triton compiles, without TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton import compile as compile_kernel  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_padam.optim.backends.triton_kernel import FORM_NUMBER, step_kernel  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
STORAGES = {  # of weights, gradients and both moments
    "fp32": (tl.float32, tl.float32, tl.float32, tl.float32),
    "bf16": (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
    "bf16 and fp32": (tl.bfloat16, tl.bfloat16, tl.float32, tl.float32),
    "bf16 and fp32, fp16 gradients": (tl.bfloat16, tl.float16, tl.float32, tl.float32),
    "fp16 and fp32": (tl.float16, tl.float16, tl.float32, tl.float32),
}


class Kernel(NamedTuple):
    """Everything that the kernel is specialised on, and for what GPU."""

    target: str
    form: Form
    fisher: bool
    late: bool
    storage: str
    rounds: bool
    s: bool
    aligned: bool

    @property
    def exists(self) -> bool:
        """Whether `PAdam` ever launches it."""
        if self.s and (self.fisher or self.late or self.form not in (Form.NONE, Form.BELOW_TWO, Form.ABOVE_TWO)):
            return False
        return "bf16" in self.storage or not self.rounds

    @property
    def sizes(self) -> list[int]:
        """Bytes of an element of the weights, gradients, moments and `s`."""
        return [dtype.primitive_bitwidth // 8 for dtype in STORAGES[self.storage]] + [4] * self.s

    @property
    def most_registers(self) -> int:
        """So many that a multiprocessor holds half of the threads that it can (AMD: all)."""
        return 96 if self.target == "gfx1100" else 64


YES_NO = (False, True)
KERNELS = [
    kernel
    for choices in itertools.product(TARGETS, Form, YES_NO, YES_NO, STORAGES, YES_NO, YES_NO, YES_NO)
    if (kernel := Kernel(*choices)).exists
]


def covering(kernels):
    """Choose a few, among which any two choices that go together do so at least once."""

    def pairs(kernel):
        return set(itertools.combinations(enumerate(kernel), 2))

    shuffled = random.Random(0).sample(kernels, len(kernels))
    missing, chosen = set().union(*map(pairs, kernels)), []
    for enough in (28, 20, 14, 10, 7, 5, 3, 2, 1):
        for kernel in shuffled:
            if len(new := pairs(kernel) & missing) >= enough:
                missing -= new
                chosen.append(kernel)
    assert not missing
    return chosen


def compiled(kernel: Kernel):
    rounds_moments = kernel.rounds and kernel.storage == "bf16"
    crowded = backend._crowded(kernel.form, kernel.fisher or kernel.s, rounds_moments)
    options = backend._options(kernel.aligned, crowded)
    constants = dict(FORM=FORM_NUMBER[kernel.form], LATE=kernel.late, FISHER=kernel.fisher, ROUND=kernel.rounds)
    constants |= dict(zip(backend._DTYPES, STORAGES[kernel.storage], strict=True))
    constants |= dict(BLOCK=backend._BLOCK, ALIGNED=options.pop("ALIGNED")) | ({} if kernel.s else {"s_rate": None})
    names = step_kernel.arg_names
    types = dict.fromkeys(names, "fp32") | dict.fromkeys(constants, "constexpr")
    types |= dict(pointers="*i64", lengths="*i64", block_tensors="*i32", block_starts="*i64", tensor_keys="*i32")
    types |= dict(step_key="i32", tensors="i32")
    source = ASTSource(step_kernel, types, {(names.index(name),): value for name, value in constants.items()})
    return compile_kernel(source, target=TARGETS[kernel.target], options=options), options["num_warps"]


def cuda_resources(binary: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and the bytes of the stack that it spills to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def hip_resources(assembly: str) -> tuple[int, int]:
    usage = dict(re.findall(r"\.([sv]gpr_(?:spill_)?count):\s*(\d+)", assembly))
    return int(usage["vgpr_count"]), int(usage["vgpr_spill_count"]) + int(usage["sgpr_spill_count"])


def cuda_accesses(ptx: str, verb: str) -> Counter[int]:
    """Return how many accesses to global memory there are of each width in bytes."""
    found = re.findall(rf"\b{verb}\.global\S*?(?:\.v(\d))?\.b(\d+)\s", ptx)
    return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)


HIP_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16}


def hip_accesses(assembly: str, verb: str) -> Counter[int]:
    found = re.findall(rf"\b(?:global|buffer|flat)_{verb}_(\S+)", assembly)
    return Counter(HIP_WIDTHS.get(name, 2) for name in found)  # ushort, short_d16_hi, d16_b16 and the like


def floor(sizes: list[int], elements: int, aligned: bool) -> Counter[int]:
    """Return the fewest accesses with which a thread can reach its elements of some tensors."""
    accesses: Counter[int] = Counter()
    for size in sizes:
        width = min(16, elements * size) if aligned else size
        accesses[width] += elements * size // width
    return accesses


def check(kernel: Kernel) -> None:
    result, warps = compiled(kernel)
    target = TARGETS[kernel.target]
    elements = backend._BLOCK // (warps * target.warp_size)
    tables: Counter[int] = Counter()
    if target.backend == "cuda":
        registers, spilled = cuda_resources(result.asm["cubin"])
        loads, stores = (cuda_accesses(result.asm["ptx"], verb) for verb in ("ld", "st"))
        if kernel.form not in (Form.BELOW_TWO, Form.ABOVE_TWO) and not kernel.s:  # a logarithm is made of some
            assert not re.search(r"\bfma\.\S*f32", result.asm["ptx"]), kernel
        tables = Counter({4: 1 + kernel.rounds, 8: 2 + len(kernel.sizes)})  # AMD's come by other instructions
    else:
        registers, spilled = hip_resources(result.asm["amdgcn"])
        loads, stores = (hip_accesses(result.asm["amdgcn"], verb) for verb in ("load", "store"))
    assert spilled == 0, kernel
    assert registers <= kernel.most_registers, (kernel, registers)
    read, written = kernel.sizes, [size for i, size in enumerate(kernel.sizes) if i != 1]  # not the gradients
    assert loads - tables == floor(read, elements, kernel.aligned), (kernel, loads)
    assert stores == floor(written, elements, kernel.aligned), (kernel, stores)


@pytest.mark.parametrize("kernel", covering(KERNELS), ids=lambda kernel: "-".join(map(str, kernel)))
def test_neither_spills_nor_superfluous_accesses_in_any_pair_of_choices(kernel):
    check(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("form", Form, ids=lambda form: form.name)
@pytest.mark.parametrize("target", TARGETS)
def test_neither_spills_nor_superfluous_accesses_in_any_kernel(target, form):
    for kernel in KERNELS:
        if kernel.target == target and kernel.form is form:
            check(kernel)
