"""The unit of the Fisher importance, mu: what it is, when it is computed, and from what."""

from __future__ import annotations

import pytest
import torch
from test_importance import SHAPE, noisy, trained
from torch import nn

from hf_padam import PAdam, add_pnorm_decay
from hf_padam.optim.importance import fisher_scale, measure


def test_the_mean_square_size_is_that_of_the_weights():
    weight, optimizer = trained(30)
    (group,) = optimizer.param_groups
    (state,) = optimizer.state.values()
    mu = float(fisher_scale(measure(optimizer, [group])))
    x = weight.double().abs() * (state["exp_avg_sq"].double() / (1 - 0.999**30)).sqrt() / mu
    torch.testing.assert_close(x.square().mean(), weight.double().square().mean(), rtol=1e-5, atol=0)
    assert group["importance_scale"] == pytest.approx(mu, rel=0.2) and group["importance_step"] in range(20, 30)


@pytest.mark.parametrize("importance", ["magnitude", "fisher"])
def test_a_weight_whose_second_moment_has_overflown_makes_no_other_small(importance):
    weights = []
    for spike in (1.0, 1e25):
        weight = nn.Parameter(torch.linspace(0.1, 1, 64))
        optimizer = PAdam([weight], lr=1e-3, importance=importance, lambda_p=1e-3, betas=(0.9, torch.tensor(0.999)))
        for step in range(20):
            weight.grad = torch.randn(64, generator=torch.Generator().manual_seed(step))
            weight.grad[0] = spike
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(weights[0][1:], weights[1][1:], rtol=0.05, atol=0)
    assert weights[1].count_nonzero() == 64


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("how", [{"lambda_p": 1e-3}, {"steer": 0.6}, {"steer": 0.6, "p_norm": -3.0}], ids=str)
def test_the_scale_of_the_loss_does_not_matter(scale, how):
    plain, scaled = trained(60, **how)[0], trained(60, loss_scale=scale, **how)[0]
    torch.testing.assert_close(plain, scaled, rtol=1e-3, atol=1e-5)
    assert 0.05 < (plain == 0).float().mean() < 0.95


def test_lambda_p_is_of_the_same_order_as_under_magnitude():
    def share(importance):
        return float((trained(100, lambda_p=0.03, importance=importance)[0] == 0).float().mean())

    assert 0.1 < share("magnitude") < 0.9 and share("magnitude") / 4 < share("fisher") < 4 * share("magnitude")


def test_while_all_is_frozen_no_scale_is_asked_for():
    weight, head = nn.Parameter(torch.randn(SHAPE)), nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([{"params": [weight]}, {"params": [head]}])
    add_pnorm_decay(optimizer, lambda_p=1e-3, importance="fisher", params=[weight])
    for step in range(40):
        weight.requires_grad_(not 15 <= step < 25)  # 15: the scale is due
        weight.grad = noisy(step, torch.ones(())) if weight.requires_grad else None
        head.grad = torch.ones(4)
        optimizer.step()
    assert optimizer.param_groups[0]["importance_scale"] != 1


def test_the_scale_is_known_though_the_first_parameter_is_younger_than_the_others():
    """An expert that is routed to late. Without mu all other weights would shrink to nothing in a few steps."""
    means = []
    for late in (0, 4):
        expert, weight = (torch.nn.Parameter(trained(0)[0].clone()) for _ in range(2))
        optimizer = PAdam([expert, weight], lr=1e-3, p_norm=0.8, lambda_p=1e-3, importance="fisher")
        for step in range(16):
            expert.grad = noisy(step, torch.ones(())) * 1e-4 if step >= late else None
            weight.grad = noisy(step, torch.ones(())) * 1e-4
            optimizer.step()
        means.append(weight.detach().abs().mean())
    torch.testing.assert_close(*means, rtol=0.01, atol=0)


def test_while_nothing_is_known_no_scale_is_recorded_and_cleared_states_have_a_new_one():
    weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    add_pnorm_decay(optimizer, p_norm=0.5, lambda_p=1e-3, importance="fisher")
    (group,) = optimizer.param_groups
    for step in range(30):
        frozen = 10 <= step < 15  # just when the scale would be computed
        weight.requires_grad_(not frozen)
        weight.grad = None if frozen else noisy(step, torch.ones(SHAPE)) * 1e-5
        optimizer.step()
        assert group["importance_step"] == 0 if step < 15 else group["importance_scale"] < 1e-3
    assert (weight == 0).float().mean() < 0.5
    optimizer.state.clear()
    for step in range(12):
        weight.grad = noisy(step, torch.ones(SHAPE)) * 1e3
        optimizer.step()
    assert group["importance_scale"] > 1 and group["importance_step"] in range(10, 12)


def test_the_unit_is_computed_where_a_process_has_no_gradients_too():
    """Of FSDP1's shards one may hold no decayed weight: all the same it takes part in the sum, at the same step."""
    for build in (lambda w: PAdam([w], lr=1e-3, p_norm=0.5, importance="fisher"), lambda w: torch.optim.AdamW([w])):
        weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
        optimizer = build(weight)
        if not isinstance(optimizer, PAdam):
            add_pnorm_decay(optimizer, p_norm=0.5, lambda_p=0.1, importance="fisher")
        (group,) = optimizer.param_groups
        for step in range(11):
            weight.grad = noisy(step, torch.ones(SHAPE)) if step < 10 else None
            optimizer.step()
        assert group["importance_step"] == 10 and group["importance_taken"] == 11


def test_a_step_that_calls_its_parents_is_counted_once():
    class Nested(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    weights = []
    for cls in (torch.optim.AdamW, Nested):
        weights.append(nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05))
        optimizer = cls(weights[-1:], lr=1e-3)
        add_pnorm_decay(optimizer, p_norm=0.5, lambda_p=0.1, importance="fisher")
        for step in range(30):
            weights[-1].grad = noisy(step, torch.ones(SHAPE))
            optimizer.step()
        assert optimizer.param_groups[0]["importance_taken"] == 30
    assert torch.equal(*weights) and (weights[0] == 0).any()


def test_the_threshold_of_a_target_is_a_size_in_the_units_of_weights():
    thresholds = [trained(60, scale, steer=0.6)[1].param_groups[0]["target_threshold"] for scale in (1.0, 1e3)]
    assert thresholds[1] == pytest.approx(thresholds[0], rel=0.02) and 1e-6 < thresholds[0] < 0.05


def test_the_unit_is_not_taken_from_the_first_gradients_of_what_thaws_later():
    """A probe is trained for long, and then the weights: their unit is known when they have their own ten steps."""
    weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), requires_grad=False)
    optimizer = PAdam([weight], lr=1e-3, p_norm=0.5, importance="fisher")
    (group,) = optimizer.param_groups
    for step in range(140):
        weight.requires_grad_(step >= 100)
        weight.grad = noisy(step, torch.ones(SHAPE)) if step >= 100 else None
        optimizer.step()
        assert group["importance_step"] == 0 or step >= 110
    assert group["importance_taken"] == 40 and group["importance_step"] >= 30
