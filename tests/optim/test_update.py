"""Every backend against the float64 oracle, and the edge semantics of the update."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import Oracle, factor

from hf_padam import PAdam
from hf_padam.optim.backends import BACKENDS
from hf_padam.optim.update import FLUSH_THRESHOLD, Form, initial_s, inverse_factor, prepare, update_

P_NORMS = (-math.inf, -8.0, -2.5, -1.0, 0.0, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
CPU_BACKENDS = [name for name, backend in BACKENDS.items() if backend.unavailable(torch.device("cpu")) is None]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VARIANTS = {
    "plain": {},
    "late": {"late_decay": True},
    "s": {"s_rate": 0.3},
    "fisher": {"importance": "fisher"},
    "fisher late": {"importance": "fisher", "late_decay": True},
}
# Relative to max(|w|, lr): the rounding of a few operations in fp32, or of the storage dtype at every step.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def awkward_weights(dtype: torch.dtype, n: int = 61) -> torch.Tensor:
    """Zeros, subnormal, tiny, ordinary and huge weights."""
    special = [0.0, -0.0, 1e-40, -1e-30, 1e-20, 3e-9, -1e-4, 1e3]
    if dtype != torch.float16:
        special += [1e20, -1e30]
    ordinary = torch.randn(n - len(special), generator=torch.Generator().manual_seed(3)) * 0.1
    return torch.cat([torch.tensor(special), ordinary]).to(dtype)


# Every p in the paper's method; few in the variants, which share its forms and take a kernel each.
CASES = [("plain", p_norm) for p_norm in P_NORMS] + [("late", 0.8), ("late", 1.0), ("s", 0.8), ("s", 2.0)]
FISHER = [("fisher", p_norm) for p_norm in P_NORMS] + [("fisher late", -1.0)]


def is_worth_it(backend, variant, p_norm, dtype):
    """Every form in fp32, and every dtype in few forms: a kernel that takes seconds to build shows nothing new."""
    if backend != "compiled" or dtype == torch.float32:
        return dtype != torch.float16 or variant == "plain"
    return p_norm == 0.8 or (variant == "plain" and p_norm == 1.0)


@pytest.mark.parametrize(
    ("backend", "variant", "p_norm", "dtype"),
    [
        pytest.param(backend, variant, p_norm, dtype, marks=[pytest.mark.slow] * takes_long)
        for backend, (variant, p_norm), dtype in itertools.product(CPU_BACKENDS, CASES, DTYPES)
        if is_worth_it(backend, variant, p_norm, dtype)
        for takes_long in [backend == "compiled" and variant != "plain" and dtype != torch.float32]
    ],
)
def test_one_step_matches_the_oracle(backend, variant, p_norm, dtype):
    for lambda_p, lambda_2, lr in itertools.product((0.0, 0.05), (0.0, 0.3), (0.0, 1e-2)):
        start = awkward_weights(dtype)
        param = torch.nn.Parameter(start.clone())
        options = dict(lr=lr, p_norm=p_norm, lambda_p=lambda_p, weight_decay=lambda_2, **VARIANTS[variant])
        optimizer = PAdam([param], backend=backend, **options)
        oracle = Oracle(start.double().numpy(), **options)
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        optimizer.step()
        expected = oracle.step(param.grad.double().numpy())
        got = param.detach().double().numpy()
        assert np.isfinite(got).all()
        scale = np.maximum(np.abs(expected), lr) + 1e-300
        tolerance = TOLERANCE[dtype]
        assert (np.abs(got - expected) <= tolerance * scale + 1e-37).all(), (lambda_p, lambda_2, lr)
        if lambda_p and lr and p_norm < 2:
            if variant != "late":
                assert (got[start.double().numpy() == 0] == 0).all(), "zero absorbs"
            assert not ((got != 0) & (np.abs(got) < FLUSH_THRESHOLD)).any(), "what is nearly dead is zero"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("variant", "p_norm"), CASES + FISHER)
def test_trajectory_matches_the_oracle(backend, variant, p_norm):
    """Both decays at once, elastic net; under "fisher" also weights without gradients, or with late ones."""
    fisher = {"mu": 0.7} if "fisher" in variant else {}
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(7, 9, generator=generator) * 0.1
    start[2, 3:6] = 0
    param = torch.nn.Parameter(start.clone())
    options = dict(lr=3e-3, p_norm=p_norm, lambda_p=0.1, weight_decay=0.1, **VARIANTS[variant])
    optimizer, oracle = PAdam([param], backend=backend, **options), Oracle(start.double().numpy(), **options, **fisher)
    for step in range(25):
        optimizer.param_groups[0]["lr"] = oracle.lr = 0.0 if step % 12 == 0 else 3e-3  # as schedules begin and end
        param.grad = torch.randn(7, 9, generator=generator)
        if fisher:
            optimizer.param_groups[0] |= {"importance_scale": 0.7, "importance_step": step}
            param.grad[0] = 0
            param.grad[1] *= step > 12
        optimizer.step()
        expected = oracle.step(param.grad.double().numpy())
    got = param.detach().double().numpy().reshape(-1)
    # Near its unstable fixed point a weight's fate magnifies rounding; nothing of this size gets there in 25 steps.
    assert np.allclose(got, expected, rtol=1e-3, atol=2e-6)
    assert ((got == 0) == (expected == 0)).mean() > 0.98


def test_factor_is_accurate_to_two_parts_in_a_million():
    magnitudes = torch.logspace(-30, 4, 20_001, dtype=torch.float64).float()
    for p_norm in (-3.0, -2.2, -1.0, -0.3, 0.0, 0.1, 0.3, 0.7, 0.8, 1.0, 1.2, 1.9, 2.0, 2.5, 3.0, 4.0):
        for lr, lambda_p, lambda_2 in ((1e-3, 0.1, 0.0), (1e-2, 1e-4, 0.1), (1e-5, 5.0, 1.0)):
            scalars = prepare(
                1, lr=lr, betas=(0.9, 0.999), eps=1e-8, p_norm=p_norm, lambda_p=lambda_p, weight_decay=lambda_2
            )
            got = (1 / inverse_factor(magnitudes, scalars)).double().numpy()
            expected = np.array([factor(w, lr, p_norm, lambda_p, lambda_2) for w in magnitudes.double().tolist()])
            # Elsewhere |w|^(p-2) leaves fp32's range, and the factor is as good as zero.
            representable = expected > 1e-37 / min(1.0, lr * lambda_p)
            error = np.abs(got - expected)[representable] / expected[representable]
            assert error.max() <= 2e-6, (p_norm, error.max())
            assert (got[~representable] <= 2e-37 / min(1.0, lr * lambda_p)).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "p_norm", (-3.0, -2.2, -1.0, -0.3, 0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 1.2, 1.5, 1.9, 2.0, 2.5, 4.0)
)
def test_every_backends_factor_is_accurate_to_two_parts_in_a_million(backend, p_norm):
    """Without a gradient the step is the factor alone."""
    weights = torch.logspace(-30, 4, 4_001, dtype=torch.float64).float()
    for lr, lambda_p, lambda_2 in ((1e-3, 0.1, 0.0), (1e-2, 1e-4, 0.1)):
        param = torch.nn.Parameter(weights.clone())
        optimizer = PAdam([param], lr=lr, p_norm=p_norm, lambda_p=lambda_p, weight_decay=lambda_2, backend=backend)
        param.grad = torch.zeros_like(weights)
        optimizer.step()
        expected = np.array([w * factor(w, lr, p_norm, lambda_p, lambda_2) for w in weights.double().tolist()])
        got = param.detach().double().numpy()
        alive = expected > 2 * FLUSH_THRESHOLD
        assert (np.abs(got - expected)[alive] <= 2e-6 * expected[alive]).all()
        if p_norm < 2:
            assert (got[expected < FLUSH_THRESHOLD / 2] == 0).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("p_norm", (0.5, 0.8, 2.0))
def test_s_is_the_moving_average_of_the_power_and_follows_while_nothing_decays(backend, p_norm):
    """Down to lr = 0, at which 0 * inf must not become NaN; zero absorbs afterwards, too."""
    generator = torch.Generator().manual_seed(2)
    start = torch.cat([torch.zeros(3), torch.rand(90, generator=generator) + 0.1])
    param = torch.nn.Parameter(start.clone())
    options = dict(p_norm=p_norm, lambda_p=0.02, s_rate=0.05)
    optimizer, oracle = PAdam([param], backend=backend, **options), Oracle(start.double().numpy(), **options)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = oracle.lr = 3e-2 * (step % 3)
        param.grad = torch.randn(93, generator=generator)
        optimizer.step()
        oracle.step(param.grad.double().numpy())
        s = optimizer.state[param]["s"]
        np.testing.assert_allclose(s.double().numpy(), oracle.s, rtol=2e-5)
        np.testing.assert_allclose(param.detach().double().numpy(), oracle.w, rtol=2e-5, atol=1e-6)
    assert s.dtype == torch.float32 and (p_norm == 2 or (s[:3].isinf().all() and not param[:3].any()))


@settings(max_examples=200, deadline=None)
@example(  # the size overflows, and its unit would vanish in fp32
    weight=2.0**106,
    grad=0.0,
    exp_avg=0.0,
    exp_avg_sq=2.0**44,
    step=11,
    lr=0.0,
    p_norm=0.0,
    lambda_p=0.0,
    weight_decay=0.0,
    variant=VARIANTS["fisher"],
    reference=1e30,
    importance_scale=1e20,
)
@given(
    weight=st.floats(width=32, allow_nan=False, allow_infinity=False),
    grad=st.floats(width=32, allow_nan=False, allow_infinity=False),
    exp_avg=st.floats(-(2.0**33), 2.0**33, width=32),
    exp_avg_sq=st.floats(0, 2.0**66, width=32),
    step=st.integers(1, 10_000),
    lr=st.sampled_from([0.0, 1e-30, 1e-12, 1e-3, 1.0]),
    p_norm=st.one_of(st.floats(-8.0, 5.0), st.just(-math.inf)),
    lambda_p=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]),
    weight_decay=st.sampled_from([0.0, 1e-3, 10.0]),
    variant=st.sampled_from([*VARIANTS.values()]),
    reference=st.sampled_from([None, 0.0, 1e-38, 1e-3, 1e30]),
    importance_scale=st.sampled_from([1e-30, 1.0, 1e20]),
)
def test_finite_input_never_gives_nan_and_zero_stays_zero(
    weight, grad, exp_avg, exp_avg_sq, step, lr, p_norm, lambda_p, weight_decay, variant, reference, importance_scale
):
    options = dict(lr=lr, betas=(0.9, 0.999), eps=1e-8, p_norm=p_norm, lambda_p=lambda_p, weight_decay=weight_decay)
    if "s_rate" in variant:
        reference, options["p_norm"] = None, (p_norm := max(0.0, p_norm))
    elif reference is not None and p_norm < 2:
        options["reference"] = reference
    scalars = prepare(step, **options, **variant, importance_scale=importance_scale)
    w, g, m, v = (torch.tensor([x], dtype=torch.float32) for x in (weight, grad, exp_avg, exp_avg_sq))
    inverse = inverse_factor(w, scalars, root=v.sqrt() if scalars.fisher else None)
    assert (inverse >= 1).all(), "|r| <= 1"
    s = initial_s(w, p_norm) if "s_rate" in variant else None
    update_(w, g, m, v, scalars, s=s)
    assert not w.isnan().any()
    if weight == 0 and scalars.form.makes_zeros and not scalars.late_decay:
        assert w == 0


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("variant", "p_norm"), [*CASES, *FISHER, ("plain", 0.1), ("plain", 1.9), ("plain", 4.0)])
def test_no_backend_makes_nan_of_any_finite_weight_and_gradient(backend, variant, p_norm):
    generator = torch.Generator().manual_seed(9)
    bits = torch.randint(-(2**31), 2**31 - 1, (2, 4096), dtype=torch.int32, generator=generator)
    weights, grads = bits.view(torch.float32).nan_to_num(0.0, 1.0, -1.0)  # every exponent, subnormals included
    weights[:100] = 0
    for lr, lambda_p in ((1e-3, 0.1), (1e-30, 1e-3), (1e-25, 1e-20)):
        param = torch.nn.Parameter(weights.clone())
        optimizer = PAdam([param], lr=lr, p_norm=p_norm, lambda_p=lambda_p, backend=backend, **VARIANTS[variant])
        for _ in range(13 if "fisher" in variant else 3):
            param.grad = grads.clone()
            optimizer.step()
        assert not param.isnan().any()
        if "late" not in variant and p_norm < 2 and lr * lambda_p > 2.0**-126:
            assert (param[:100] == 0).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_without_decay_this_is_torch_adam_over_100_steps(backend):
    generator = torch.Generator().manual_seed(6)
    start = torch.randn(31, 17, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    padam = PAdam([ours], lr=1e-2, lambda_p=0.0, backend=backend)
    adam = torch.optim.Adam([theirs], lr=1e-2)
    for _ in range(100):
        ours.grad = torch.randn(31, 17, generator=generator)
        theirs.grad = ours.grad.clone()
        padam.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_p_2_follows_adamw_up_to_the_square_of_the_learning_rate(backend):
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(31, 17, generator=generator)
    grads = [torch.randn(31, 17, generator=generator) for _ in range(100)]

    def distance(lr: float) -> float:
        ours, theirs = (torch.nn.Parameter(start.clone().double()) for _ in range(2))
        padam = PAdam([ours], lr=lr, p_norm=2.0, lambda_p=0.1, backend=backend)
        adamw = torch.optim.AdamW([theirs], lr=lr, weight_decay=0.1)
        for grad in grads:
            ours.grad = theirs.grad = grad.double()
            padam.step()
            adamw.step()
        return (ours - theirs).abs().max().item()

    assert distance(1e-3) < 1e-4
    # A tenth of the learning rate, a hundredth of the difference.
    assert distance(1e-4) < distance(1e-3) / 50


def test_the_factor_uses_the_weight_before_the_step():
    param = torch.nn.Parameter(torch.tensor([0.1]))
    optimizer = PAdam([param], lr=0.05, p_norm=1.0, lambda_p=1.0)
    param.grad = torch.tensor([1.0])
    optimizer.step()
    # The Adam step leads to 0.05; the old weight's factor is 1 / (1 + 0.05 / 0.1).
    assert math.isclose(param.item(), 0.05 / 1.5, rel_tol=1e-6)


def test_late_decay_uses_the_weight_after_the_step_and_lets_zeros_live():
    param = torch.nn.Parameter(torch.tensor([0.1, 0.0, 0.0]))
    optimizer = PAdam([param], lr=0.05, p_norm=1.0, lambda_p=1.0, late_decay=True)
    param.grad = torch.tensor([1.0, 1.0, 0.0])
    optimizer.step()
    # To 0.05 and -0.05, each with the factor 1 / (1 + 0.05 / 0.05).
    torch.testing.assert_close(param.detach(), torch.tensor([0.025, -0.025, 0.0]), rtol=1e-6, atol=0)


def test_lr_zero_and_lambda_zero_leave_zeros_and_weights_alone():
    for lr, lambda_p in ((0.0, 1.0), (1e-2, 0.0)):
        param = torch.nn.Parameter(torch.tensor([0.0, 0.5]))
        optimizer = PAdam([param], lr=lr, p_norm=0.5, lambda_p=lambda_p)
        param.grad = torch.zeros(2)
        optimizer.step()
        assert param.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("p_norm", (0.5, 0.8, 1.2, 2.0))
def test_in_the_authors_convention_two_passes_are_one_step_of_ours(p_norm):
    """Their lambda is multiplied by p, and applied in a pass after Adam's: ours is lambda_p = p * lambda, in one."""
    theirs, lr = 0.3, 1e-2
    start = torch.randn(50, generator=torch.Generator().manual_seed(8)).double()
    ours = torch.nn.Parameter(start.clone())
    optimizer = PAdam([ours], lr=lr, p_norm=p_norm, lambda_p=p_norm * theirs)
    reference = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([reference], lr=lr)
    for i in range(20):
        ours.grad = reference.grad = torch.randn(50, generator=torch.Generator().manual_seed(i)).double()
        old = reference.detach().clone()
        optimizer.step()
        adam.step()
        with torch.no_grad():
            reference /= 1 + lr * p_norm * theirs * old.abs() ** (p_norm - 2)
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_forms_cover_every_p():
    def form(p_norm, lambda_p=0.1):
        return prepare(1, lr=0.1, betas=(0.9, 0.9), eps=1e-8, p_norm=p_norm, lambda_p=lambda_p, weight_decay=0).form

    assert form(0.8, lambda_p=0.0) is Form.NONE
    assert [form(p) for p in (-math.inf, -1, 0, 0.5, 1, 1.5, 2, -8, 0.7, 1.99, 2.01)] == [
        Form.HARD, Form.MINUS_ONE, Form.ZERO, Form.HALF, Form.ONE, Form.THREE_HALVES, Form.TWO,
        Form.BELOW_TWO, Form.BELOW_TWO, Form.BELOW_TWO, Form.ABOVE_TWO,
    ]  # fmt: skip
