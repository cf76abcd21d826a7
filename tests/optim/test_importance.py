"""The Fisher importance: its scale, that no evidence is not unimportance, and steering by it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hf_padam import PAdam, PAdam8bit, TargetSparsity, add_pnorm_decay
from hf_padam.optim.importance import measure
from hf_padam.optim.update import YOUNG_STEPS

SHAPE = (40, 64)


def noisy(step: int, spread: torch.Tensor) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)) * spread


def trained(
    steps: int,
    loss_scale: float = 1.0,
    gradient=noisy,
    optimizer_class=PAdam,
    steer=None,
    total=None,
    start=0.2,
    end=0.75,
    **options,
):
    """A matrix whose gradients are noise of very unlike sizes; and its optimizer."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE) * 0.05)
    spread = torch.exp(2 * torch.randn(SHAPE))
    optimizer = optimizer_class([weight], **dict(lr=1e-3, p_norm=0.5, importance="fisher", eps=1e-30) | options)
    if steer:
        TargetSparsity(optimizer, steer, total or steps, start=start, end=end)
    for step in range(steps):
        weight.grad = gradient(step, spread) * loss_scale
        optimizer.step()
    return weight.detach(), optimizer


def test_among_equal_weights_those_die_that_the_loss_would_not_miss():
    torch.manual_seed(0)
    spread = torch.where(torch.arange(64) < 32, 0.01, 1.0).expand(SHAPE)
    weight = nn.Parameter(torch.full(SHAPE, 0.05))
    optimizer = PAdam([weight], lr=1e-4, p_norm=-1, importance="fisher")
    TargetSparsity(optimizer, 0.5, 60)
    for step in range(60):
        weight.grad = noisy(step, spread)
        optimizer.step()
    assert bool((weight[:, :32] == 0).all()) and bool((weight[:, 32:] != 0).all())


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("p_norm", [-8.0, -1.0, 0.8, -math.inf])
def test_a_weight_without_a_gradient_so_far_is_left_alone(backend, p_norm):
    def gradient(step, spread):
        grad = noisy(step, spread)
        grad[:7] = 0
        return grad

    weight, _ = trained(40, gradient=gradient, lambda_p=10.0, p_norm=p_norm, backend=backend)
    start = trained(0)[0]
    assert torch.equal(weight[:7], start[:7]) and (weight[7:] == 0).any()


@pytest.mark.parametrize(
    ("how", "beta2", "most"), [("decay", 0.99, 0.02), ("decay", 0.999, 0.02), ("pruning", 0.999, 0.06)]
)
def test_none_dies_by_its_first_few_gradients_whenever_they_come(how, beta2, most):
    """An expert is first routed to after 200 steps. Later its weights are as important as all others."""

    def gradient(step, spread):
        grad = noisy(step, torch.ones(()))
        if step < 200:
            grad[:7] = 0
        return grad

    def late(steps):
        options = {"lambda_p": 1e-5, "p_norm": -1.0} if how == "decay" else {"steer": 0.3, "p_norm": -math.inf}
        if how == "pruning":
            options |= {"total": 204, "start": 0.9, "end": 1.0}
        return trained(steps, gradient=gradient, betas=(0.9, beta2), eps=1e-8, **options)[0]

    before, after = late(200)[:7], late(203)
    assert 0.05 < (after[7:] == 0).float().mean() < 0.5
    assert (before - after[:7]).abs().median() > 1e-3  # they have trained
    assert (after[:7] == 0).float().mean() < most


@pytest.mark.parametrize("at_once", [False, True])
def test_none_dies_by_its_first_gradients_in_a_ramp_that_has_begun(at_once):
    """A layer thaws, or an expert of its own is first routed to, in mid-ramp: its weights die as others do."""
    torch.manual_seed(0)
    old, young = (nn.Parameter(torch.randn(SHAPE)) for _ in range(2))
    optimizer = PAdam([old, young], lr=1e-5, p_norm=-math.inf, importance="fisher")
    TargetSparsity(optimizer, 0.5, 100, start=0.5, end=0.5 if at_once else 0.7)
    first = 45 if at_once else 55
    for step in range(70):
        old.grad = noisy(step, torch.ones(()))
        young.grad = None if step < first else noisy(1000 + step, torch.ones(()))
        if young.grad is not None and step < first + 5:
            young.grad[:20] *= 1e-6
        optimizer.step()
        if step == first + 8:
            shares = [float((half == 0).float().mean()) for half in (young[:20], young[20:])]
            assert abs(shares[0] - shares[1]) < 0.15, shares
    assert ((old == 0).sum() + (young == 0).sum()) / (2 * old.numel()) == 0.5


def test_an_expert_that_is_new_where_all_die_at_once_is_not_lost():
    """In a stack of experts one number of steps is that of all."""

    def gradient(step, spread):
        grad = noisy(step, torch.ones(()))
        if step < 98:
            grad[:7] = 0
        return grad

    options = {"steer": 0.5, "total": 200, "start": 0.5, "end": 0.5, "p_norm": -math.inf}
    weight, _ = trained(101, gradient=gradient, eps=1e-8, **options)
    assert (weight[:7] == 0).float().mean() < 0.75 and (weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("p_norm", [2.0, 3.0])
def test_an_added_decay_of_any_p_begins_as_padams_does(p_norm):
    weights = [nn.Parameter(torch.full(SHAPE, 0.5)) for _ in range(2)]
    options = dict(p_norm=p_norm, lambda_p=0.5, importance="fisher")
    padam, adam = PAdam(weights[:1], lr=1e-2, **options), torch.optim.Adam(weights[1:], lr=1e-2)
    add_pnorm_decay(adam, **options)
    for step in range(30):
        for weight, optimizer in zip(weights, (padam, adam), strict=True):
            weight.grad = noisy(step, torch.ones(()))
            optimizer.step()
    plain = nn.Parameter(torch.full(SHAPE, 0.5))
    undecayed = torch.optim.Adam([plain], lr=1e-2)
    for step in range(30):
        plain.grad = noisy(step, torch.ones(()))
        undecayed.step()
    gone = (plain - weights[0]).mean().item()
    assert gone > 0.005 and (plain - weights[1]).mean().item() == pytest.approx(gone, rel=0.1)


def test_a_needed_weight_whose_first_three_gradients_happen_to_be_tiny_lives():
    def gradient(step, spread):
        grad = noisy(step, torch.ones(()))
        if step < 3:
            grad[0] *= 1e-6
        return grad

    weight, _ = trained(40, gradient=gradient, lambda_p=0.003, p_norm=0.0)
    shares = (weight == 0).float().mean(1)
    assert 0.05 < shares[1:].mean() < 0.5 and shares[0] < 2 * shares[1:].mean()
    early, _ = trained(YOUNG_STEPS, gradient=gradient, lambda_p=1e3)
    assert (early != 0).all()


def test_zeros_stay_zero_while_nothing_else_decays():
    weight = nn.Parameter(torch.tensor([0.0, 0.1]))
    optimizer = PAdam([weight], lr=1e-2, importance="fisher")
    for _ in range(YOUNG_STEPS):
        weight.grad = torch.ones(2)
        optimizer.step()
    assert weight[0] == 0 and weight[1].item() == pytest.approx(0.1 - 0.01 * YOUNG_STEPS, abs=1e-5)


@pytest.mark.parametrize("stop", [5, 12, 23, 40])
@pytest.mark.parametrize("steer", [None, 0.6])
def test_a_resumed_run_goes_on_to_the_bit(stop, steer):
    whole, _ = trained(60, steer=steer, lambda_p=0.3)
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE) * 0.05)
    spread, saved = torch.exp(2 * torch.randn(SHAPE)), None
    for part in (range(stop), range(stop, 60)):
        optimizer = PAdam([weight], lr=1e-3, p_norm=0.5, importance="fisher", eps=1e-30, lambda_p=0.3)
        if steer:
            TargetSparsity(optimizer, steer, 60)
        if saved:
            optimizer.load_state_dict(saved)
        for step in part:
            weight.grad = noisy(step, spread)
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
    assert torch.equal(weight.detach(), whole)


@pytest.mark.parametrize("optimizer_class", [PAdam, PAdam8bit])
@pytest.mark.parametrize("p_norm", [-8.0, -3.0, -1.0, 0.0, 0.8, 1.5, -math.inf])
@pytest.mark.parametrize("importance", ["magnitude", "fisher"])
def test_every_p_arrives_by_either_importance(optimizer_class, p_norm, importance):
    if optimizer_class is PAdam8bit:
        pytest.importorskip("torchao")
    options = dict(p_norm=p_norm, importance=importance, optimizer_class=optimizer_class, steer=0.7)
    weight, _ = trained(60, **options)
    assert abs((weight == 0).float().mean() - 0.7) < 1 / weight.numel()


@pytest.mark.parametrize("levels", [1, 2, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_broken_so_that_the_target_is_met(levels, dtype):
    torch.manual_seed(0)
    weight = nn.Parameter((torch.randint(1, levels + 1, SHAPE) / levels).to(dtype))
    optimizer = PAdam([weight], lr=0.0)
    TargetSparsity(optimizer, 0.7, 10)
    for _ in range(10):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    rows = (weight == 0).float().mean(1)
    assert rows.mean() == pytest.approx(0.7, abs=1 / weight.numel())
    assert levels > 1 or 0.4 < rows.min() < rows.max() < 0.95  # spread evenly


def test_if_too_few_have_evidence_the_others_go_by_magnitude_to_the_same_share():
    def gradient(step, spread):
        grad = noisy(step, spread)
        grad[10:] = 0
        return grad

    weight, _ = trained(60, gradient=gradient, steer=0.6, p_norm=-1.0)
    start = trained(0)[0]
    assert (weight == 0).float().mean() == pytest.approx(0.6, abs=1e-3)
    assert (weight[10:] == 0).float().mean() == pytest.approx(0.6, abs=1e-2)
    died = weight[10:] == 0
    assert start[10:][died].abs().max() <= start[10:][~died].abs().min()


def test_a_copy_that_nothing_steers_holds():
    weight = nn.Parameter(torch.randn(SHAPE) * 0.05)
    steered = PAdam([weight], lr=1e-3, p_norm=0.5)
    TargetSparsity(steered, 0.7, 100)
    for step in range(50):
        weight.grad = noisy(step, torch.ones(()))
        steered.step()
    other = copy.deepcopy(steered)
    (copied,) = other.param_groups[0]["params"]
    before = copied == 0
    for step in range(50, 100):
        copied.grad = noisy(step, torch.ones(()))
        other.step()
    assert 0.3 < before.float().mean() < 0.7 and torch.equal(copied == 0, before)


def test_all_at_once():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE) * 0.05)
    optimizer = PAdam([weight], lr=1e-3, importance="fisher", p_norm=-1.0)
    TargetSparsity(optimizer, 0.5, 50, start=0.3, end=0.3)
    shares = []
    for step in range(50):
        weight.grad = noisy(step, torch.ones(()))
        optimizer.step()
        shares.append(float((weight == 0).float().mean()))
    assert shares == [0.0] * 15 + [0.5] * 35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": "wanda"}, "importance='wanda' is not allowed"),
        ({"s_rate": 0.5}, 's_rate=0.5 and importance="fisher" exclude each other'),
        ({"importance": "magnitude", "s_rate": 0.5, "p_norm": -1}, "s_rate=0.5 and p_norm=-1 exclude each other"),
        ({"p_norm": math.inf}, "p_norm=inf is not allowed"),
        ({"p_norm": math.nan}, "p_norm=nan is not allowed"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trained(0, **options)


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam"])
def test_relatives_of_adam_can_measure_by_their_own_second_moments(name):
    torch.manual_seed(0)
    spread = torch.where(torch.arange(64) < 32, 0.01, 1.0).expand(SHAPE)
    weight = nn.Parameter(torch.full(SHAPE, 0.05))
    optimizer = getattr(torch.optim, name)([weight], lr=1e-4)
    add_pnorm_decay(optimizer, p_norm=0.5, lambda_p=0.3, importance="fisher")
    for step in range(60):
        weight.grad = noisy(step, spread)
        optimizer.step()
        assert step >= YOUNG_STEPS or weight.all()
    assert (weight[:, :32] == 0).float().mean() > 0.9 and weight[:, 32:].all()


@pytest.mark.parametrize("name", ["SGD", "Muon", "Adafactor", "RMSprop"])
def test_an_optimizer_without_second_moments_is_refused(name):
    optimizer = getattr(torch.optim, name)([nn.Parameter(torch.ones(4, 4))])
    with pytest.raises(ValueError, match=f"needs second moments, and {name} keeps none"):
        add_pnorm_decay(optimizer, importance="fisher")


@pytest.mark.parametrize("kind", ["projected", "factored", "counted by group"])
def test_second_moments_that_are_not_of_every_weight_are_refused(kind):
    class Other(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3, all_alike=False):
            super().__init__(params, dict(lr=lr, betas=(0.9, 0.99), all_alike=all_alike))

        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                full = kind == "counted by group" or not self.defaults["all_alike"] and param.shape == (4, 4)
                shape = param.shape if full else {"projected": (1, 8), "factored": (4, 1)}.get(kind)
                self.state[param]["exp_avg_sq"] = torch.ones(shape)
                if kind != "counted by group":
                    self.state[param]["step"] = torch.ones(())

    weight = nn.Parameter(torch.ones(4, 8))
    weight.grad = torch.ones(4, 8)
    with pytest.raises(ValueError, match="needs second moments, and Other keeps none"):
        add_pnorm_decay(Other([weight], all_alike=True), importance="fisher")
    if kind != "counted by group":  # for some tensors only, which the first step tells
        optimizer = Other([weight])
        add_pnorm_decay(optimizer, importance="fisher")
        with pytest.raises(ValueError, match="needs second moments, and this optimizer keeps none"):
            optimizer.step()


def test_with_adam_the_decay_around_the_step_is_that_of_padam():
    """But for weights with large gradients in a step, which only PAdam can see."""
    weights = [nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05) for _ in range(2)]
    padam = PAdam([weights[0]], lr=1e-3, p_norm=0.5, lambda_p=0.01, importance="fisher")
    adam = torch.optim.Adam([weights[1]], lr=1e-3)
    add_pnorm_decay(adam, p_norm=0.5, lambda_p=0.01, importance="fisher")
    for step in range(40):
        for weight, optimizer in zip(weights, (padam, adam), strict=True):
            weight.grad = noisy(step, torch.ones(()))
            optimizer.step()
    assert ((weights[0] - weights[1]).abs() < 1e-5).float().mean() > 0.7
    shares = [(weight == 0).float().mean().item() for weight in weights]
    assert 0.05 < shares[0] <= shares[1] < 1.1 * shares[0]


@pytest.mark.parametrize("name", ["AdamW4bit", "AdamW8bit"])
def test_moments_in_which_small_and_none_are_one_are_refused(name):
    optimizer = getattr(pytest.importorskip("torchao.optim"), name)([nn.Parameter(torch.ones(64, 64))])
    with pytest.raises(ValueError, match=f"needs second moments, and {name}"):
        add_pnorm_decay(optimizer, p_norm=0.5, lambda_p=1e-3, importance="fisher")


def test_what_nothing_steers_cannot_prune():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(4, 4))])
    with pytest.raises(ValueError, match="p_norm=-inf needs a target_sparsity, to which PAdam alone is steered"):
        add_pnorm_decay(optimizer, p_norm=-math.inf, lambda_p=0.1)


@pytest.mark.parametrize("p_norm", [-math.inf, 1.4])
def test_a_small_expert_that_is_new_at_the_end_of_the_ramp_is_not_lost(p_norm):
    """What is missing is made up for by the smallest sizes: which those of a few noisy gradients seem to be."""

    def gradient(step, spread):
        grad = noisy(step, torch.ones(()))
        if step < 147:
            grad[0, :16] = 0
        return grad

    options = {"steer": 0.5, "total": 200, "start": 0.2, "end": 0.75, "p_norm": p_norm, "lr": 1e-4}
    weight, optimizer = trained(151, gradient=gradient, eps=1e-8, **options)
    assert (weight == 0).float().mean() == 0.5 and optimizer.param_groups[0]["target_met"]
    assert (weight[0, :16] == 0).float().mean() <= 0.5


@pytest.mark.parametrize("step", [1, 3, 7])
def test_moments_in_8_bits_are_read_as_they_would_be_unpacked_and_no_more_of_them(step, monkeypatch):
    pytest.importorskip("torchao")
    weight = nn.Parameter(torch.randn(96, 64))
    optimizer = PAdam8bit([weight], lr=1e-3, importance="fisher", p_norm=0.5, lambda_p=0.1)
    for i in range(12):
        weight.grad = torch.randn(96, 64, generator=torch.Generator().manual_seed(i))
        optimizer.step()
    moment = optimizer.state[weight]["exp_avg_sq"]
    expected = moment.dequantize().flatten()[::step].sqrt() * weight.detach().flatten()[::step].abs()
    monkeypatch.setattr(type(moment), "dequantize", lambda *_: pytest.fail("all is unpacked"))
    (measured,) = measure(optimizer, optimizer.param_groups, spare_young=True)
    sizes = torch.cat([x for _, x in measured.slices(step)]) * (1 - 0.999**12) ** 0.5
    seen = sizes.isfinite()
    assert seen.float().mean() > 0.9
    torch.testing.assert_close(sizes[seen], expected[seen])


def test_a_pattern_that_is_met_at_once_spares_what_is_new():
    def gradient(step, spread):
        grad = noisy(step, torch.ones(()))
        if step < 100:
            grad[:, :16] = 0
        return grad

    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE) * 0.05)
    before = weight.detach().clone()
    group = {"params": [weight], "target_sparsity": 0.5, "target_pattern": "2:4"}
    optimizer = PAdam([group], lr=1e-6, p_norm=-math.inf, importance="fisher")
    TargetSparsity(optimizer, None, 200, start=0.5, end=0.5)
    for step in range(101):
        weight.grad = gradient(step, None)
        optimizer.step()
    kept = before[:, :16].reshape(-1, 4).abs().topk(2).values.sum()  # by magnitude, as little is known of them
    assert weight[:, :16].abs().sum() > 0.97 * kept
    assert (weight.reshape(-1, 4) != 0).sum(1).eq(2).all()


def test_the_decay_in_the_logs_is_that_of_the_latest_step():
    _, optimizer = trained(20, steer=0.6, total=60)
    steering = optimizer._target_sparsity
    seen = steering.state()["lambda_p"]
    optimizer.param_groups[0]["lr"] = 0.0  # as a schedule leaves it before logs are written
    assert steering.state()["lambda_p"] == seen > 1e-6
