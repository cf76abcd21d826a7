"""The Triton backend on CPU, through Triton's interpreter, which must be chosen before Triton is imported."""

import errno
import math
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import REPOSITORY

from hf_padam import PAdam
from hf_padam.optim.backends import checks, triton

pytest.importorskip("triton", reason="runs where Triton is installed")
from triton.errors import TritonError  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CompilationFailed = type("CompilationFailed", (TritonError,), {})
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside the test below, under TRITON_INTERPRET=1")


@pytest.mark.skipif(INTERPRETED, reason="it would start itself")
@pytest.mark.parametrize(
    "what",
    [
        ["tests/optim/test_update.py", "tests/optim/test_stochastic_rounding.py", "-k", "triton"],
        ["tests/optim/test_triton.py", "tests/optim/test_plan.py", "tests/recipes/test_check_gpu.py", "-k", "triton"],
    ],
    ids=["parity", "launch and plan"],
)
def test_under_the_interpreter(what):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=-m 'not slow'", *what]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(INTERPRETED, reason="without TRITON_INTERPRET=1")
def test_a_cpu_is_refused_with_the_reason():
    assert "TRITON_INTERPRET" in triton.unavailable(torch.device("cpu"))


def both(layout, dtypes, p_norm, steps=2, **variant):
    """Step the same tensors with Triton and eagerly; return both lists of lists, the fifth of `s` if there is any."""
    from hf_padam.optim.backends import eager
    from hf_padam.optim.update import initial_s, prepare

    generator = torch.Generator().manual_seed(0)
    results = []
    raw = [[torch.randn(8192, generator=generator) / 10 for _ in range(3)] for _ in range(4)]
    for backend in (triton, eager):
        lists = [[layout(t.to(dtype)) for t in column] for column, dtype in zip(raw, dtypes, strict=True)]
        for t in lists[3]:
            t.abs_()
        if "s_rate" in variant:
            lists.append([initial_s(t, p_norm) for t in lists[0]])
        for step in range(1, steps + 1):
            options = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, p_norm=p_norm, lambda_p=0.1, weight_decay=0.01)
            backend.step(*lists[:4], prepare(step, **options, **variant), None, *lists[4:])
            lists[1] = [-g for g in lists[1]]  # the gradients move
        results.append(lists)
    return results


LAYOUTS = {
    "several blocks": lambda t: t.clone(),
    "odd": lambda t: t[:4099].clone(),
    "one element": lambda t: t[:1].clone().view(()),
    "empty": lambda t: t[:0].clone(),
    "transposed": lambda t: t[:1281].clone().view(21, 61).t(),
    "every second column": lambda t: t.clone().view(-1, 64)[:20, ::2],
    "misaligned": lambda t: t.clone()[1:1282],
}


@interpreted
@pytest.mark.parametrize("p_norm", [-1e38, -200.0, 150.0, 1e38])
def test_no_p_makes_nan(p_norm):
    """Of sizes next to that to which a steep power is relative, each is told apart, by the eager step too."""
    ours, theirs = both(lambda t: 1 + t / 4, [torch.float32] * 4, p_norm)
    assert all(torch.isfinite(t).all() for tensors in (*ours, *theirs) for t in tensors)
    alive = [(a[0] != 0) & (b[0] != 0) for a, b in zip(ours[:1], theirs[:1], strict=True)][0]
    torch.testing.assert_close(ours[0][0][alive], theirs[0][0][alive], rtol=1e-4, atol=1e-6)
    assert ((ours[0][0] == 0) == (theirs[0][0] == 0)).float().mean() > 0.99


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("p_norm", "variant"),
    [
        (0.8, {}),
        (1.0, {}),
        (3.0, {}),
        (0.8, {"late_decay": True}),
        (1.0, {"late_decay": True}),
        (0.8, {"s_rate": 0.3}),
    ],
    ids=str,
)
def test_every_layout_gets_the_eager_result(layout, p_norm, variant):
    ours, theirs = both(LAYOUTS[layout], [torch.float32] * 4, p_norm, **variant)
    assert len(ours) == len(theirs) == (5 if "s_rate" in variant else 4)
    for i, tensors in enumerate(zip(ours, theirs, strict=True)):
        for a, b in zip(*tensors, strict=True):  # s is the power of weights that a step has rounded
            torch.testing.assert_close(a, b, rtol=1e-5 if i == 4 else 3e-6, atol=1e-8)


@interpreted
@pytest.mark.parametrize("p_norm", [0.5, 0.8, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("variant", [{}, {"late_decay": True}, {"s_rate": 0.3}], ids=["plain", "late", "s"])
def test_every_dtype_gets_the_eager_result(dtype, p_norm, variant):
    moments = torch.float32 if dtype == torch.float16 else dtype
    # One step, and one unit in the last place: the interpreter (not the GPU) truncates where bf16 should be rounded.
    ours, theirs = both(LAYOUTS["odd"], [dtype, dtype, moments, moments], p_norm, steps=1, **variant)
    for a, b in zip(sum(ours, []), sum(theirs, []), strict=True):
        unit = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=max(3e-6, 1.01 * unit), atol=1e-8)


@pytest.fixture
def built(monkeypatch):
    """The lengths of the tensors of every table that is built."""
    lengths, build = [], triton._Table.__init__

    def recorded(self, device, *args):
        lengths.append(list(args[0]))
        build(self, device, *args)

    monkeypatch.setattr(triton._Table, "__init__", recorded)
    return lengths


FORMS = [
    {"p_norm": p_norm, **importance, **where}
    for p_norm in (-math.inf, -8.0, -2.5, -1.0, 0.0, 0.5, 0.8, 1.5, 2.0, 3.0)
    for importance in ({}, {"importance": "fisher"})
    for where in ({}, {"reference": 0.0}, {"reference": 0.03}, {"late_decay": True})
    if p_norm < 2 or "reference" not in where
]


@interpreted
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_every_form_gets_the_eager_result(options):
    """After the first steps, which under "fisher" do not decay; with zeros, and weights without gradients so far."""
    from hf_padam.optim.backends import eager
    from hf_padam.optim.update import prepare

    generator = torch.Generator().manual_seed(0)
    weight, grad, first, second = torch.randn(4, 4099, generator=generator) / 10
    weight[:40] = 0
    grad[20:80] = first[20:80] = second[20:80] = 0
    first[60:120] = second[60:120] = 0
    results = []
    for backend in (triton, eager):
        lists = [[t.clone()] for t in (weight, grad, first / 10, second.square())]
        for step in range(20, 23):
            fixed = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, lambda_p=0.1, weight_decay=0.01, importance_scale=0.2)
            backend.step(*lists, prepare(step, **fixed, **options))
        results.append(lists)
    for [got], [expected] in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-8)
        assert torch.equal(got == 0, expected == 0)


@interpreted
@pytest.mark.parametrize("case", checks.THOROUGH, ids=str)
def test_the_comparison_that_a_gpu_must_pass_is_passed(case):
    assert checks.disagreement(triton.step, torch.device("cpu"), [case]) is None


@interpreted
@pytest.mark.parametrize("error", [CompilationFailed("p = 7"), OSError(errno.ENOSPC, "No space left")], ids=str)
def test_a_kernel_that_cannot_be_built_leaves_every_tensor_to_eager(error, monkeypatch, caplog):
    """Those too that are eager's anyway, because of their layout: none is stepped twice."""
    from hf_padam.optim import backends
    from hf_padam.optim.backends import eager, triton_kernel
    from hf_padam.optim.update import prepare

    class Kernel:
        def __getitem__(self, grid):
            def launch(*_, **__):
                raise error

            return launch

    def lists():
        weight = torch.linspace(-1, 1, 4096)
        columns = (weight, weight.sin(), weight / 3, weight.square())
        return [[t.clone(), t.clone().view(64, 64)[:, ::2], t.clone()[1:]] for t in columns]

    monkeypatch.setattr(triton_kernel, "step_kernel", Kernel())
    scalars = prepare(1, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, p_norm=0.8, lambda_p=0.1, weight_decay=0.0)
    ours, theirs, untouched = lists(), lists(), lists()
    eager.step(*theirs, scalars)
    backends._OR_EAGER["triton"].step(*ours, scalars)
    with pytest.raises(checks.KernelError):
        triton.step(*untouched, scalars)
    for result, expected in ((ours, theirs), (untouched, lists())):
        assert all(
            torch.equal(a, b) for pair in zip(result, expected, strict=True) for a, b in zip(*pair, strict=True)
        )
    assert str(error) in caplog.text


@interpreted
@pytest.mark.parametrize("groups", [1, 300])
def test_tables_are_built_once_per_set_of_tensors(built, groups, monkeypatch):
    from hf_padam.optim.backends import triton_kernel

    monkeypatch.setattr(triton_kernel, "step_kernel", mock.MagicMock())  # seconds under the interpreter
    params = [torch.nn.Parameter(torch.randn(16)) for _ in range(300)]
    share = len(params) // groups
    lists = [params[i * share : (i + 1) * share] for i in range(groups)]
    optimizer = PAdam([{"params": own, "lr": 1e-3 / (i + 1)} for i, own in enumerate(lists)], backend="triton")
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(16)  # elsewhere each time, as after zero_grad
        optimizer.step()
    assert len(built) == groups


@interpreted
def test_tables_of_packed_moments_are_built_once(built, monkeypatch):
    pytest.importorskip("torchao")
    from hf_padam import PAdam8bit

    monkeypatch.setattr("hf_padam.optim.eight_bit._SLICE", 4096)
    param = torch.nn.Parameter(torch.randn(4096, 20))
    optimizer = PAdam8bit([param], backend="triton")
    for _ in range(3):
        param.grad = torch.randn_like(param)
        optimizer.step()
    assert len(built) == 20


@interpreted
def test_one_misaligned_tensor_leaves_the_wide_loads_to_the_others(built):
    generator = torch.Generator().manual_seed(0)
    buffer = torch.zeros(65)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (64, 32, 7, 16)]
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    ours, theirs = PAdam(params, backend="triton"), PAdam(twins, backend="eager")
    for step in range(4):
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn(param.shape, generator=generator)
            twin.grad = param.grad.clone()
        if step == 2:  # a gradient that loses its alignment, as in a bucket of DDP
            params[0].grad = buffer[1:].copy_(params[0].grad)
        ours.step()
        theirs.step()
    assert built == [[64, 32, 16], [7], [32, 16], [64, 7]]
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=3e-6, atol=1e-8)


@interpreted
def test_a_step_on_another_stream_builds_its_own_tables(built, monkeypatch):
    param = torch.nn.Parameter(torch.randn(16))
    optimizer = PAdam([param], backend="triton")
    for stream in ("first", "first", "second", "second"):
        monkeypatch.setattr(triton, "_stream", lambda device, stream=stream: stream)
        param.grad = torch.randn(16)
        optimizer.step()
    assert len(built) == 2


def test_a_table_covers_every_element_once_beyond_2_to_the_31(monkeypatch):
    monkeypatch.setattr(triton, "_BLOCK", 2**20)
    table = triton._Table(torch.device("cpu"), (5, 2**33 + 1, 2**20), (0, 0, 0))
    assert table.block_tensors.bincount().tolist() == [1, 2**13 + 1, 1]
    assert table.block_starts[table.block_tensors == 1].tolist() == [i * 2**20 for i in range(2**13 + 1)]
