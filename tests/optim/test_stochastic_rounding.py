"""bf16 weights rounded at random: unbiased, reproducible, independent, and the same in every backend."""

import copy

import pytest
import torch
from test_update import CPU_BACKENDS

from hf_padam import PAdam
from hf_padam.optim.backends import BACKENDS, eager
from hf_padam.optim.random_bits import Rounding, random_bits, random_key
from hf_padam.optim.update import prepare, round_stochastically

DRAWS = 10**6


def shrink(backend, *, size=DRAWS, tensors=1, steps=1, **options):
    """Decay bf16 ones towards zero by 1/1000 a step, without a gradient; return the tensors."""
    params = [torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for _ in range(tensors)]
    optimizer = PAdam(params, lr=1e-3, weight_decay=1.0, lambda_p=0, backend=backend, **options)
    for _ in range(steps):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_mean_is_exact_to_three_standard_errors_where_the_nearest_would_stall(backend):
    if backend != "triton":  # whose interpreter (not the GPU) truncates
        assert (shrink(backend)[0] == 1).all()
    (rounded,) = shrink(backend, bf16_stochastic_round=True)
    below, one = rounded.unique().tolist()
    assert (below, one) == (1 - 2**-8, 1)
    error = rounded.double().mean() - 1 / 1.001
    assert error.abs() < 3 * rounded.double().std() / DRAWS**0.5


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("x", [1.0001, 3e-30, 1e-39, 0.1, 3e38])
def test_numbers_of_every_size_are_rounded_without_bias(x, sign):
    bits = random_bits(torch.arange(DRAWS, dtype=torch.int32), random_key(1), random_key(2)) & 0xFFFF
    exact = torch.tensor(sign * x)
    rounded = round_stochastically(exact.expand(DRAWS), bits).double()
    assert len(rounded.unique()) == 2
    assert (rounded.mean() - exact.double()).abs() < 3 * rounded.std() / DRAWS**0.5


def test_what_bf16_holds_exactly_stays():
    exact = torch.tensor([0.0, -0.0, 1.0, -0.5, 2.0**-130, float("inf"), -float("inf"), float("nan")])
    worst = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaN, every bit of them set
    rounded = round_stochastically(torch.cat([exact, worst]), torch.full((10,), 0xFFFF, dtype=torch.int32))
    torch.testing.assert_close(rounded[:8], exact, rtol=0, atol=0, equal_nan=True)
    assert rounded[8:].isnan().all()


def test_second_moments_do_not_stall_either():
    """With beta2 = 0.999 a second moment that is rounded to the nearest bf16 can never fall."""
    moments = []
    for rounds in (False, True):
        param = torch.nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
        optimizer = PAdam([param], lr=0.0, bf16_stochastic_round=rounds, backend="eager")
        for step in range(101):
            param.grad = torch.full_like(param, 1.0 if step == 0 else 0.0)
            optimizer.step()
        moments.append(optimizer.state[param]["exp_avg_sq"].double().mean().item())
    stalled, exact = moments
    assert stalled > 0.99e-3
    assert exact == pytest.approx(1e-3 * 0.999**100, rel=1e-3)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_element_tensor_step_and_seed_draws_its_own(backend):
    def up(**options):
        return [t == 1 for t in shrink(backend, bf16_stochastic_round=True, size=10_000, **options)]

    first, second = up(tensors=2)
    (again,), (other_seed,) = up(), up(rounding_seed=1)
    assert torch.equal(first, again)
    for other in (second, other_seed, first.roll(1), first.flip(0)):
        agreement, ones = (first == other).double().mean().item(), first.double().mean().item()
        assert agreement == pytest.approx(ones**2 + (1 - ones) ** 2, abs=0.02)
    bits = [random_bits(torch.arange(DRAWS, dtype=torch.int32), 5, random_key(0, step)) & 0xFFFF for step in (1, 2)]
    assert torch.corrcoef(torch.stack(bits).float())[0, 1].abs() < 0.005


@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "eager"])
@pytest.mark.parametrize("shape", [(100, 64), (1281,), (5,), (0,), ()])
def test_every_backend_draws_the_same(backend, shape):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).abs().bfloat16() / 10 for _ in range(4)]
    scalars = prepare(1, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, p_norm=1.0, lambda_p=0.1, weight_decay=0.0)
    rounding = Rounding(random_key(0, 1), [random_key(0, 0)])
    ours, theirs = ([[t.clone()] for t in start] for _ in range(2))
    BACKENDS[backend].step(*ours, scalars, rounding)
    eager.step(*theirs, scalars, rounding)
    for i in (0, 3):  # first moments are not rounded at random
        # A last bit of fp32 may differ, which moves one rounding in some ten thousand.
        assert (ours[i][0] != theirs[i][0]).sum() <= 1


def test_a_copy_continues_with_the_same_weights():
    def train(optimizer, param, steps):
        for step in steps:
            param.grad = torch.sin(torch.arange(5000.0) + step).bfloat16()
            optimizer.step()

    def start():
        param = torch.nn.Parameter(torch.linspace(-1, 1, 5000).bfloat16())
        return param, PAdam([param], lr=1e-3, bf16_stochastic_round=True, rounding_seed=7)

    param, optimizer = start()
    train(optimizer, param, range(3))
    half_way = copy.deepcopy((param.data, optimizer.state_dict()))
    train(optimizer, param, range(3, 6))
    resumed = torch.nn.Parameter(half_way[0])
    other = PAdam([resumed], lr=1e-3)  # rounding and its seed come with the state
    other.load_state_dict(half_way[1])
    train(other, resumed, range(3, 6))
    assert torch.equal(resumed, param)


def test_zeros_still_absorb():
    param = torch.nn.Parameter(torch.cat([torch.zeros(64), torch.full((64,), 1e-9), torch.ones(64)]).bfloat16())
    optimizer = PAdam([param], lr=1e-3, p_norm=0.5, lambda_p=1.0, bf16_stochastic_round=True)
    for _ in range(3):
        param.grad = torch.full_like(param, 1e-9)
        optimizer.step()
    assert (param[:128] == 0).all() and (param[128:] != 0).all()


def test_a_model_without_bf16_weights_is_told_that_the_option_does_nothing(caplog):
    PAdam([torch.nn.Parameter(torch.ones(2))], bf16_stochastic_round=True)
    assert "none of the parameters is bf16" in caplog.text


@pytest.mark.parametrize("option", [dict(bf16_stochastic_round="no"), dict(rounding_seed=0.5)])
def test_bad_options_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* is not allowed"):
        PAdam([torch.nn.Parameter(torch.ones(2))], **option)


def test_tensors_whose_keys_are_alike_share_no_bits():
    position = torch.arange(2**16, dtype=torch.int32)
    key = random_key(1)
    one, other = (random_bits(position, k, random_key(2)) for k in (key, key ^ 12345))
    assert torch.isin(one, other).double().mean() < 1e-3  # were they the same ones in another order: 1
