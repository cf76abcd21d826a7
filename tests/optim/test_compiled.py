"""What is particular to the compiled backend: its power, its tensor layouts, its cache on disk."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_padam import PAdam
from hf_padam.optim import backends
from hf_padam.optim.backends import compiled, eager
from hf_padam.optim.backends.fast_power import fast_power, split_exponent
from hf_padam.optim.update import prepare

needs_compiler = pytest.mark.skipif(
    compiled.unavailable(torch.device("cpu")) is not None, reason="runs where there are a C++ compiler and Python.h"
)
HYPERPARAMETERS = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, lambda_p=0.1, weight_decay=0.01)


def power(x, y):
    parts, squares = split_exponent(y)
    return fast_power(x, torch.tensor(parts, dtype=torch.float32), squares)


@pytest.mark.parametrize("p", [-8, -5.5, -3.3, -2, -1, -0.4, 0, 0.01, 0.1, 0.5, 0.8, 1.2, 1.9, 1.999, 2.001, 2.5, 4])
def test_fast_power_is_accurate_to_1_5e_6(p):
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(200_000, generator=generator, dtype=torch.float64) * 36 - 31
    around_one = torch.linspace(0.6, 1.6, 20_001, dtype=torch.float64)
    x = torch.cat([10**exponents, around_one]).float()
    exact = x.double() ** (p - 2)
    representable = (exact > 2.0**-125) & (exact < 2.0**126)
    error = (power(x, p - 2).double() / exact - 1).abs()[representable]
    assert error.max() < 1.5e-6


@pytest.mark.parametrize("y", [-1.9, -0.3, -1e-6])
def test_fast_power_of_zero_is_infinite_for_negative_exponents(y):
    assert power(torch.tensor([0.0, 1e-45]), y).tolist() == [float("inf")] * 2


def test_fast_power_never_makes_nan():
    x = torch.tensor([0.0, 1e-45, 2.0**-126, 1e-30, 1.0, 1e30, 3.4e38, float("inf")])
    for y in (-10.0, -9.7, -4.0, -2.0, -1.2, -1e-6, 1e-6, 0.5, 2.0):
        assert not power(x, y).isnan().any()


LAYOUTS = {
    "rows": lambda t: t[:1280].clone().view(20, 64),
    "odd": lambda t: t[:1281].clone(),
    "shorter than a row": lambda t: t[:5].clone(),
    "one element": lambda t: t[:1].clone().view(()),
    "empty": lambda t: t[:0].clone(),
    "transposed": lambda t: t[:1280].clone().view(64, 20).t(),
    "transposed and odd": lambda t: t[:1281].clone().view(21, 61).t(),
    "every second column": lambda t: t.clone().view(-1, 64)[:20, ::2],
    "misaligned": lambda t: t.clone()[1:1281],
}


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("p_norm", "variant"), [(0.8, {}), (1.0, {}), (0.8, {"late_decay": True}), (0.8, {"s_rate": 0.3})], ids=str
)
def test_every_layout_gets_the_eager_result(layout, p_norm, variant):
    generator = torch.Generator().manual_seed(0)
    raw = [torch.randn(4096, generator=generator) * scale for scale in (0.1, 0.01, 0.01, 0.01)]
    raw[3] = raw[3].abs()
    if "s_rate" in variant:
        raw.append(torch.rand(4096, generator=generator) * 10)
    ours, theirs = ([[LAYOUTS[layout](t)] for t in raw] for _ in range(2))
    scalars = prepare(3, p_norm=p_norm, **HYPERPARAMETERS, **variant)
    compiled.step(*ours[:4], scalars, None, *ours[4:])
    eager.step(*theirs[:4], scalars, None, *theirs[4:])
    for [a], [b] in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-9)


@needs_compiler
def test_layouts_may_differ_between_a_parameter_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    raw = [torch.randn(30, 50, generator=generator) * 0.1 for _ in range(4)]
    raw[3] = raw[3].abs()
    ours, theirs = ([[t.clone()] for t in raw] for _ in range(2))
    ours[0][0] = raw[0].t().contiguous().t()
    scalars = prepare(3, p_norm=0.8, **HYPERPARAMETERS)
    compiled.step(*ours, scalars)
    eager.step(*theirs, scalars)
    for [a], [b] in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-9)


@needs_compiler
@pytest.mark.parametrize("p_norm", [0.8, 1.0])
def test_zero_absorbs_huge_survives_and_dying_weights_become_exact_zeros(p_norm):
    weights = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 1e-20, 1e-3, 3e38, -3e38]).repeat(9)
    tensors = [[weights.clone()], [torch.full((72,), 1e-3)], [torch.zeros(72)], [torch.zeros(72)]]
    compiled.step(*tensors, prepare(1, p_norm=p_norm, **HYPERPARAMETERS | {"lr": 1e-6}))
    new = tensors[0][0]
    assert not new.isnan().any()
    assert (new.view(9, 8)[:, :4] == 0).all()
    torch.testing.assert_close(new.view(9, 8)[:, 6:], weights.view(9, 8)[:, 6:])


@needs_compiler
def test_autograd_notices_the_step():
    param = torch.nn.Parameter(torch.ones(64))
    loss = (param**2).sum()
    param.grad = torch.ones(64)
    PAdam([param], backend="compiled").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_a_step_needs_no_memory_to_speak_of():
    params = [torch.nn.Parameter(torch.randn(1000, 1000)) for _ in range(2)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = PAdam(params, backend="compiled")
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < sum(e.nbytes() for e in events if e.nbytes() > 0) <= 0.01 * sum(p.nbytes for p in params)


def test_without_a_compiler_an_explicit_choice_raises_and_auto_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    backends._say_that_eager_runs.cache_clear()
    compiled.unavailable.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="C\\+\\+ compiler"):
            backends.select("compiled", torch.device("cpu"), 10**9)
        assert [backends.select("auto", torch.device("cpu"), 10**9) for _ in range(2)] == [eager, eager]
        assert sum("C++ compiler" in record.message for record in caplog.records) == 1
    finally:
        backends._say_that_eager_runs.cache_clear()
        compiled.unavailable.cache_clear()


@needs_compiler
def test_several_threads_may_step_and_build_kernels_at_once():
    """Trials of hyperparameters in threads, for example. One class of inductor is patched for the time of a build."""
    from torch._inductor.codegen.cpp import CppVecOverrides

    before = vars(CppVecOverrides)["to_dtype_bitcast"]
    compiled._kernel.cache_clear()
    torch._dynamo.reset()
    weights = torch.linspace(-1, 1, 6400)
    user = torch.compile(lambda x: (x * 2).sin())  # of a user's model, at the same time

    def train(options, backend="compiled"):
        param = torch.nn.Parameter(weights.clone())
        optimizer = PAdam([param], lr=1e-2, backend=backend, **options)
        for step in range(3):
            param.grad = torch.cos(weights + step)
            optimizer.step()
        return param.detach()

    runs = [{"p_norm": p} for p in (0.8, 0.5, 1.0, 0.8, -math.inf, 2.0)]
    with ThreadPoolExecutor(len(runs) + 1) as pool:
        compiled_by_user = pool.submit(user, weights)
        for options, got in zip(runs, pool.map(train, runs), strict=True):
            torch.testing.assert_close(got, train(options, "eager"), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(compiled_by_user.result(), (weights * 2).sin())
    assert vars(CppVecOverrides)["to_dtype_bitcast"] is before


@pytest.mark.parametrize("elements", [2**31 + 5, 2**32 + 70, 2**33 - 1])
def test_the_random_bits_of_the_last_row_are_those_of_its_place_in_a_tensor_of_any_size(elements):
    """As eager counts: positions in int64, of which the last 32 bits are taken. Meta tensors take no memory."""
    tensors = tuple(torch.empty(elements, dtype=torch.bfloat16, device="meta") for _ in range(4))
    starts = []

    def kernel(rows, *arguments):
        starts.append(int(arguments[-1][2]))

    row = compiled._row(torch.bfloat16, torch.float32)
    compiled._step_irregular(kernel, row, tensors, [torch.zeros(3), torch.tensor([1, 2, 0], dtype=torch.int32)])
    place = torch.tensor(elements // row * row).to(torch.int32).item()
    assert starts == [0, place]


@needs_compiler
@pytest.mark.parametrize("s_rate", [1.0, 0.3])
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_function_called_without_its_wrapper_does_what_it_does_with_it(monkeypatch, s_rate, stochastic):
    """Were the order of its arguments learnt wrongly, or not at all, one of the two would differ, or be slow."""
    from hf_padam.optim.backends import inductor

    learnt, results = [], []

    def watched(*args):
        learnt.append(without_wrapper(*args))
        return learnt[-1] if not results else None

    without_wrapper = inductor._without_wrapper
    monkeypatch.setattr(inductor, "_without_wrapper", watched)
    for _ in range(2):
        compiled._kernel.cache_clear()
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(70, 13, generator=generator).bfloat16())
        options = dict(p_norm=0.7, lambda_p=0.1, s_rate=s_rate, bf16_stochastic_round=stochastic)
        optimizer = PAdam([param], backend="compiled", **options)
        for _ in range(3):
            param.grad = torch.randn(70, 13, generator=generator).bfloat16()
            optimizer.step()
        results.append(param.detach())
    compiled._kernel.cache_clear()
    assert all(learnt) and len(learnt) >= 2
    torch.testing.assert_close(*results, rtol=0, atol=0)


RUN = """
import torch
from torch._dynamo.utils import counters
from hf_padam.optim.backends import compiled
from hf_padam.optim.update import prepare
scalars = prepare(1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, p_norm=1.5, lambda_p=0.1, weight_decay=0.0)
compiled.step(*([torch.ones(64)] for _ in range(4)), scalars)
print(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
"""


@needs_compiler
@pytest.mark.slow
def test_a_second_process_finds_the_kernel_on_disk(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", RUN]
    hits = [subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert [int(hit) > 0 for hit in hits] == [False, True]
