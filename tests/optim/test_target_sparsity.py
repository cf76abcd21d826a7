"""Asking for a share of zeros: the plan, what arrives, and that it goes on exactly after an interruption."""

from __future__ import annotations

import contextlib
import copy
import math
from unittest import mock

import pytest
import torch
from conftest import blocks, tiny_llama
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_padam import (
    PAdam,
    PAdamTrainer,
    PAdamTrainingArguments,
    TargetSparsity,
    TargetSparsityCallback,
    decayed_parameters,
    get_param_groups,
)
from hf_padam.optim.importance import REFERENCE, Measured
from hf_padam.optim.quantiles import histogram, quantile
from hf_padam.optim.target_sparsity import steering_of

STEPS = 120


def problem(seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A regression in which few weights are needed: noisy gradients on the others."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 20))
    x = torch.randn(4096, 40)
    y = torch.tanh(x[:, :6] @ torch.randn(6, 20)) + 0.1 * torch.randn(4096, 20)
    return model, x, y


def groups_of(model: nn.Module, p_norm: float) -> list[dict]:
    weights = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": weights, "p_norm": p_norm, "lambda_p": 1.0}, {"params": others, "lambda_p": 0.0}]


def train(model, optimizer, scheduler, x, y, steps: range, batch: int = 32, after=None) -> None:
    for step in steps:
        rows = torch.randint(len(x), (batch,), generator=torch.Generator().manual_seed(step))
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if after:
            after(step + 1)


def share(params) -> float:
    params = list(params)
    return sum(int((p == 0).sum()) for p in params) / sum(p.numel() for p in params)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def schedule(name: str, optimizer, steps: int):
    shapes = {
        "constant": lambda step: 1.0,
        "warm-up and linear": lambda step: min(step / (0.1 * steps), max(0.0, 1 - step / steps)),
        "restarts": lambda step: 1.0 - (step % (steps // 3)) / (steps / 3),
    }
    return torch.optim.lr_scheduler.LambdaLR(optimizer, shapes[name])


@pytest.mark.parametrize(
    ("p_norm", "target", "lr", "shape", "steps", "batch"),
    [
        (0.8, 0.7, 3e-3, "warm-up and linear", STEPS, 32),
        (0.5, 0.7, 3e-3, "warm-up and linear", STEPS, 32),
        (1.0, 0.7, 3e-3, "warm-up and linear", STEPS, 32),
        (0.8, 0.5, 3e-3, "constant", STEPS, 32),
        (0.8, 0.95, 3e-3, "restarts", STEPS, 32),
        (0.8, 0.7, 3e-2, "constant", STEPS, 32),
        (0.8, 0.7, 3e-4, "constant", STEPS, 8),
        (0.5, 0.9, 3e-3, "warm-up and linear", 900, 32),
        (0.5, 0.9, 3e-3, "warm-up and linear", 20, 128),
        (-8.0, 0.7, 3e-3, "constant", 900, 32),  # what is aimed at dies in one of the steps between two aims
        (-3.0, 0.9, 3e-3, "warm-up and linear", 900, 32),
        (1.5, 0.7, 3e-3, "warm-up and linear", STEPS, 32),
    ],
    ids=str,
)
def test_the_target_is_met_whatever_else_is_set(p_norm, target, lr, shape, steps, batch):
    model, x, y = problem()
    optimizer = PAdam(groups_of(model, p_norm), lr=lr)
    steering = TargetSparsity(optimizer, target, steps)
    path, sets = [], []

    def observe(step: int) -> None:
        path.append(share(weights_of(model)))
        sets.append([w == 0 for w in weights_of(model)])

    train(model, optimizer, schedule(shape, optimizer, steps), x, y, range(steps), batch, observe)
    assert path[-1] == pytest.approx(target, abs=0.001)
    assert max(path) <= target + 0.001  # never an overshoot
    assert all(bool((now[i] >= before[i]).all()) for before, now in zip(sets, sets[1:], strict=False) for i in (0, 1))
    recovery = path[steering.last - 1 :]
    assert len(recovery) == steps - steering.last + 1 and set(recovery) == {path[-1]}  # nothing dies in it
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_for_small_p_the_path_is_the_planned_one():
    model, x, y = problem()
    optimizer = PAdam(groups_of(model, 0.5), lr=3e-3)
    steering = TargetSparsity(optimizer, 0.8, 400, start=0.0)
    errors = []
    train(model, optimizer, schedule("constant", optimizer, 400), x, y, range(400),
          after=lambda step: errors.append(abs(share(weights_of(model)) - steering.planned(step))))  # fmt: skip
    assert max(errors[80:]) < 0.05
    # Little is left for the end.
    count, threshold = steering.zeroed()
    assert count < 0.01 * sum(w.numel() for w in weights_of(model)) and threshold < 1e-2


def test_the_plan_is_cubic_between_its_ends():
    model, _, _ = problem()
    steering = TargetSparsity(PAdam(groups_of(model, 0.5)), 0.8, 100, start=0.1, end=0.6)
    assert [steering.planned(s) for s in (0, 10, 60, 100)] == [0.0, 0.0, 0.8, 0.8]
    assert steering.planned(35) == pytest.approx(0.8 * (1 - 0.5**3))
    assert steering.planned(35, initial=0.4) == pytest.approx(0.4 + 0.4 * (1 - 0.5**3))


@pytest.mark.parametrize("stop", [1, 33, 90, 100])
def test_a_resumed_run_goes_on_exactly(stop):
    def build(model):
        optimizer = PAdam(groups_of(model, 0.5), lr=3e-3)
        TargetSparsity(optimizer, 0.7, STEPS)
        return optimizer, schedule("warm-up and linear", optimizer, STEPS)

    model, x, y = problem()
    start = copy.deepcopy(model.state_dict())
    optimizer, scheduler = build(model)
    train(model, optimizer, scheduler, x, y, range(STEPS))

    first, _, _ = problem()
    first.load_state_dict(start)
    optimizer, scheduler = build(first)
    train(first, optimizer, scheduler, x, y, range(stop))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), scheduler.state_dict()))

    second, _, _ = problem(seed=5)
    second.load_state_dict(saved[0])
    optimizer, scheduler = build(second)
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    train(second, optimizer, scheduler, x, y, range(stop, STEPS))
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [13, 20, 90])
@pytest.mark.parametrize("options", [{}, {"importance": "magnitude", "p_norm": -math.inf}], ids=str)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_pruning_arrives_to_the_element_however_few_the_steps(steps, options, scope):
    model = tiny_llama()
    groups = get_param_groups(model, target_sparsity=0.7, target_scope=scope, **options)
    optimizer = PAdam(groups, lr=1e-2)
    TargetSparsity(optimizer, total_steps=steps)
    data = torch.tensor([row["input_ids"] for row in blocks()[:4]])
    shares = []
    for _ in range(steps):
        model(input_ids=data, labels=data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(share(decayed_parameters(model).values()))
    params = list(decayed_parameters(model).values())
    assert shares == sorted(shares) and len(set(shares)) >= (2 if steps < 20 else 5)
    for pool in [params] if scope == "global" else [[param] for param in params]:
        assert sum(int((p == 0).sum()) for p in pool) == math.ceil(0.7 * sum(p.numel() for p in pool))


def test_each_group_alone_or_all_together():
    for per_group in (False, True):
        model, x, y = problem()
        with torch.no_grad():
            model[2].weight.mul_(10)
        groups = [{"params": [w], "p_norm": 0.5, "lambda_p": 1.0} for w in weights_of(model)]
        optimizer = PAdam(groups, lr=3e-3)
        TargetSparsity(optimizer, 0.6, STEPS, per_group=per_group)
        train(model, optimizer, schedule("constant", optimizer, STEPS), x, y, range(STEPS))
        shares = [share([w]) for w in weights_of(model)]
        assert share(weights_of(model)) == pytest.approx(0.6, abs=0.01)
        assert (max(abs(s - 0.6) for s in shares) < 0.01) is per_group, shares


def test_each_tensor_is_met_to_the_weight_though_its_quantile_is_that_of_a_sample(monkeypatch):
    """Were a sample's error larger than what is left to the end, some tensors of many would end above their target."""
    monkeypatch.setattr("hf_padam.optim.target_sparsity._SAMPLE", 2**10)
    monkeypatch.setattr("hf_padam.optim.target_sparsity._POOL_SAMPLE", 2**10)
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(100, 200, generator=generator)) for _ in range(100)]
    optimizer = PAdam(params, lr=1e-6, p_norm=-math.inf)
    optimizer.param_groups[0]["params"], rest = params[:1], params[1:]
    for param in rest:
        optimizer.add_param_group({"params": [param]})
    TargetSparsity(optimizer, 0.5, 10, per_group=True)
    for _ in range(10):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert {int((param == 0).sum()) for param in params} == {10_000}


def test_a_structure_in_the_columns_does_not_mislead_the_sample():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(1024, 1024))
    with torch.no_grad():
        weight[:, ::4] *= 2
    optimizer = PAdam([weight], lr=1e-3, p_norm=0.5, backend="compiled")
    TargetSparsity(optimizer, 0.7, 60)
    for _ in range(60):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert share([weight]) == pytest.approx(0.7, abs=0.003)


def test_a_ramp_that_skipped_steps_cut_short_is_finished():
    model, x, y = problem()
    optimizer = PAdam(groups_of(model, 0.8), lr=3e-3)
    steering = TargetSparsity(optimizer, 0.5, STEPS, end=1.0)
    train(model, optimizer, schedule("constant", optimizer, STEPS), x, y, range(STEPS - 5))
    steering.finish()
    assert share(weights_of(model)) == pytest.approx(0.5, abs=0.01)


def test_zeros_that_are_there_count_and_stay():
    model, x, y = problem()
    with torch.no_grad():
        for w in weights_of(model):
            w[torch.rand_like(w) < 0.3] = 0.0
    before = [w == 0 for w in weights_of(model)]
    optimizer = PAdam(groups_of(model, 0.8), lr=3e-3)
    steering = TargetSparsity(optimizer, 0.5, STEPS, start=0.3)
    path = []
    train(model, optimizer, schedule("constant", optimizer, STEPS), x, y, range(STEPS),
          after=lambda step: path.append(share(weights_of(model))))  # fmt: skip
    assert path[steering.first - 1] == path[0] == pytest.approx(0.3, abs=0.03)
    assert path[-1] == pytest.approx(0.5, abs=0.01)
    assert all(bool((w == 0)[mask].all()) for w, mask in zip(weights_of(model), before, strict=True))


@pytest.mark.parametrize("p_norm", [0.5, -8.0, -math.inf])
def test_holding_moves_no_weight_and_frees_no_zero(p_norm):
    weight = nn.Parameter(torch.tensor([0.0, 1e-10, 0.1, -3.0]))
    plain = nn.Parameter(weight.detach().clone())
    held = PAdam([{"params": [weight], REFERENCE: 0.0}], lr=0.1, p_norm=p_norm)
    free = PAdam([plain], lr=0.1, lambda_p=0.0)
    for param, optimizer in ((weight, held), (plain, free)):
        param.grad = torch.tensor([1.0, 0.0, 0.5, -0.2])
        optimizer.step()
    assert weight[0] == 0 != plain[0]
    assert torch.equal(weight[1:], plain[1:])


def test_quantiles_are_right_to_a_bin():
    torch.manual_seed(0)
    params = [torch.randn(1000, 50), 0.01 * torch.randn(50_000), torch.zeros(10_000)]
    measured = [Measured(p, None, 1.0, None, i) for i, p in enumerate(params)]
    magnitudes = torch.cat([p.flatten() for p in params]).abs()
    for q in (0.05, 0.1, 0.5, 0.9, 0.99):
        exact = magnitudes.kthvalue(round(q * len(magnitudes))).values.item()
        assert quantile(histogram(measured)[0], q) == pytest.approx(exact, rel=0.005)
        assert quantile(histogram(measured, sample=10_000)[0], q) == pytest.approx(exact, rel=0.05)


def test_how_far_a_quantile_may_be_off_is_known_though_one_tensor_has_most_of_the_weights():
    torch.manual_seed(0)
    params = [torch.randn(1_000_000), *(0.01 * torch.randn(1000) for _ in range(9))]
    misses = []
    for i in range(20):
        measured = [Measured(p[torch.randperm(len(p))], None, 1.0, None, i) for p in params]
        sizes = histogram(measured, sample=1000)
        below = torch.cat(params).abs() < quantile(sizes.counts, 0.5)
        misses.append(float(below.double().mean()) - 0.5)
    spread = math.sqrt(sum(miss**2 for miss in misses) / len(misses))
    assert 0.5 * sizes.deviation < spread < 1.5 * sizes.deviation
    assert histogram(measured).deviation == 0  # all are looked at


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "target_sparsity=1.0 is not allowed"),
        ({"target": True}, "target_sparsity=True is not allowed"),
        ({"target": 0.5, "start": 0.8, "end": 0.2}, "0 <= start <= end <= 1"),
        ({"target": 0.5, "total_steps": 0}, "total_steps=0 is not allowed"),
        ({"target": 0.5, "p_norm": 2.0}, "p_norm=2.0 makes no zeros"),
        ({"target": 0.5, "lambda_p": 0.0}, "nothing to steer"),
    ],
    ids=str,
)
def test_impossible_plans_are_refused(options, message):
    options = dict(options)
    hyperparameters = {key: options.pop(key) for key in ("p_norm", "lambda_p") if key in options}
    optimizer = PAdam([torch.randn(4, 4, requires_grad=True)], **hyperparameters)
    with pytest.raises(ValueError, match=message):
        TargetSparsity(optimizer, options.pop("target"), options.pop("total_steps", 10), **options)


@pytest.mark.parametrize("total", [60, 66, 80])
def test_a_run_that_goes_on_with_fewer_steps_arrives(total):
    model, x, y = problem()
    optimizer = PAdam(groups_of(model, 0.8), lr=3e-3)
    TargetSparsity(optimizer, 0.7, 100)
    train(model, optimizer, schedule("constant", optimizer, 100), x, y, range(50))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = PAdam(groups_of(model, 0.8), lr=3e-3)
    steering = TargetSparsity(optimizer, 0.7, total)
    optimizer.load_state_dict(state)
    assert not steering.met
    train(model, optimizer, schedule("constant", optimizer, 100), x, y, range(50, total))
    assert steering.met and share(weights_of(model)) == pytest.approx(0.7, abs=0.01)


def test_a_run_that_goes_on_with_a_larger_target_arrives_there():
    model, x, y = problem()
    optimizer = PAdam(groups_of(model, 0.8), lr=3e-3)
    TargetSparsity(optimizer, 0.5, 60)
    train(model, optimizer, schedule("constant", optimizer, 60), x, y, range(60))
    steering = TargetSparsity(optimizer, 0.8, 100)
    assert not steering.met
    train(model, optimizer, schedule("constant", optimizer, 100), x, y, range(60, 100))
    assert steering.met and share(weights_of(model)) == pytest.approx(0.8, abs=0.01)


def test_frozen_weights_are_neither_changed_nor_counted():
    model, x, y = problem()
    frozen, trained = weights_of(model)
    optimizer = PAdam(groups_of(model, 0.5), lr=3e-3)
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    steering = TargetSparsity(optimizer, 0.6, 60)
    train(model, optimizer, schedule("constant", optimizer, 60), x, y, range(60))
    assert torch.equal(frozen, before)
    assert share([trained]) == pytest.approx(0.6, abs=0.01) == pytest.approx(steering.state()["sparsity"], abs=0.01)


@pytest.mark.parametrize("per_group", [False, True])
def test_a_group_that_is_added_on_the_way_is_steered_too(per_group):
    model, x, y = problem()
    first, second = weights_of(model)
    optimizer = PAdam([{"params": [first]}], lr=3e-3, p_norm=0.5)
    TargetSparsity(optimizer, 0.6, 100, per_group=per_group)
    second.requires_grad_(False)
    constant = schedule("constant", optimizer, 100)
    train(model, optimizer, constant, x, y, range(30))
    optimizer.add_param_group({"params": [second.requires_grad_(True)], "lr": 3e-3})
    constant = schedule("constant", optimizer, 100)
    train(model, optimizer, constant, x, y, range(30, 100))
    assert share([first, second]) == pytest.approx(0.6, abs=0.01)
    if per_group:
        assert share([first]) == pytest.approx(0.6, abs=0.01) == pytest.approx(share([second]), abs=0.01)


@pytest.mark.parametrize("frozen_from, frozen_to", [(0, 30), (20, 40), (20, 90), (70, 90)])
@pytest.mark.parametrize("groups", ["one", "pool", "own"])
def test_what_is_frozen_for_a_while_counts_again_afterwards(groups, frozen_from, frozen_to):
    model, x, y = problem()
    first, second = weights_of(model)
    parts = [[first, second]] if groups == "one" else [[first], [second]]
    optimizer = PAdam([{"params": part} for part in parts], lr=3e-3, p_norm=0.5)
    first.requires_grad_(frozen_from > 0)
    steering = TargetSparsity(optimizer, 0.6, 100, per_group=groups == "own")
    constant = schedule("constant", optimizer, 100)

    def freeze(step):
        first.requires_grad_(not frozen_from <= step < frozen_to)
        if step == 92:  # at once, so that the rest of the steps are left to recover
            assert steering.met and share([first, second]) == pytest.approx(0.6, abs=0.01)

    train(model, optimizer, constant, x, y, range(100), after=freeze)
    assert steering.met and share([first, second]) == pytest.approx(0.6, abs=0.01)
    assert {group["target_step"] for group in optimizer.param_groups} == {100}
    if groups == "own":
        assert share([first]) == pytest.approx(0.6, abs=0.01) == pytest.approx(share([second]), abs=0.01)


def test_a_target_is_not_met_while_all_that_it_is_of_is_frozen():
    model, x, y = problem()
    optimizer = PAdam([*({"params": [p], "target_sparsity": 0.6} for p in weights_of(model))], lr=3e-3, p_norm=0.5)
    steering = TargetSparsity(optimizer, total_steps=60)
    constant = schedule("constant", optimizer, 60)
    train(model, optimizer, constant, x, y, range(30))
    for weight in weights_of(model):
        weight.requires_grad_(False)
    train(model, optimizer, constant, x, y, range(30, 60))
    assert not steering.met and steering.state() == {} and steering.target == pytest.approx(0.6)


@pytest.mark.parametrize("p_norm", [1.9, 1.999, math.nextafter(2, 0)])
@pytest.mark.parametrize("importance", ["magnitude", "fisher"])
def test_next_to_two_no_decay_is_without_measure(p_norm, importance):
    model, x, y = problem()
    groups = [group | {"importance": importance} for group in groups_of(model, p_norm)]
    optimizer = PAdam(groups, lr=3e-3)
    TargetSparsity(optimizer, 0.5, 40)
    sizes = [1.0]

    def compare(_):
        sizes.append(float(weights_of(model)[0].detach().norm()))
        assert sizes[-1] > 0.3 * sizes[-2]

    train(model, optimizer, schedule("constant", optimizer, 40), x, y, range(40), after=compare)
    assert share(weights_of(model)) == pytest.approx(0.5, abs=0.001)


def test_a_loaded_state_without_a_target_does_not_end_the_steering_unnoticed():
    model, x, y = problem()
    plain = PAdam([{"params": weights_of(model)}], lr=3e-3)
    optimizer = PAdam([{"params": weights_of(model), "target_sparsity": 0.6}], lr=3e-3)
    TargetSparsity(optimizer, total_steps=60)
    optimizer.load_state_dict(plain.state_dict())
    nn.functional.mse_loss(model(x), y).backward()
    before = [weight.detach().clone() for weight in weights_of(model)]
    with pytest.raises(RuntimeError, match="nothing to steer any more"):
        optimizer.step()
    assert all(map(torch.equal, before, weights_of(model)))


@pytest.mark.parametrize("target, elements, zeros", [(0.55, 100, 55), (0.07, 300, 21), (0.29, 100, 29), (0.5, 15, 8)])
def test_not_one_weight_too_many_dies(target, elements, zeros):
    weight = nn.Parameter(torch.randn(elements // 5, 5))
    optimizer = PAdam([{"params": [weight], "target_sparsity": target}], lr=1e-3, p_norm=-math.inf)
    TargetSparsity(optimizer, total_steps=20)
    for _ in range(20):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert int((weight == 0).sum()) == zeros


def test_another_target_after_the_first_is_planned_and_met():
    model, x, y = problem()
    optimizer = PAdam([{"params": weights_of(model), "target_sparsity": 0.5}], lr=3e-3, p_norm=0.5)
    TargetSparsity(optimizer, total_steps=30)
    train(model, optimizer, schedule("constant", optimizer, 60), x, y, range(30))
    optimizer.param_groups[0]["target_sparsity"] = 0.7
    steering = TargetSparsity(optimizer, total_steps=60)
    assert not steering.met
    train(model, optimizer, schedule("constant", optimizer, 60), x, y, range(30, 60))
    assert steering.met and steering.state()["planned_sparsity"] == 0.7
    assert share(weights_of(model)) == pytest.approx(0.7, abs=0.001)


def test_a_target_below_what_is_there_is_refused():
    optimizer = PAdam([nn.Parameter(torch.tensor([0.0, 0.0, 0.0, 1.0]))], p_norm=0.5)
    with pytest.raises(ValueError, match="zeros do not come back"):
        TargetSparsity(optimizer, 0.5, 10)


@pytest.mark.parametrize("importance", ["magnitude", "fisher"])
def test_a_model_that_has_met_a_target_trains_on_with_the_same(importance):
    weight = nn.Parameter(torch.linspace(0.1, 1.0, 7))
    for _ in range(2):  # of 7 weights 3 are less than half, and 4 are more
        optimizer = PAdam([weight], lr=1e-3, importance=importance, p_norm=-math.inf)
        steering = TargetSparsity(optimizer, 0.5, 20)
        for step in range(20):
            weight.grad = torch.randn(7, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        assert steering.met and (weight == 0).sum() == 4


# Through the Trainer.


def training_arguments(kind, tmp_path, **options):
    common = dict(
        output_dir=str(tmp_path), max_steps=40, per_device_train_batch_size=4, logging_steps=10, learning_rate=3e-3,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="steps", save_steps=25, seed=1,
    )  # fmt: skip
    return kind(**common | options)


def decayed_share(model) -> float:
    return share(decayed_parameters(model).values())


@pytest.mark.parametrize("way", ["optim_args", "callback", "PAdamTrainer", "layer", "padam_8bit"])
def test_every_way_of_asking_arrives(tmp_path, way):
    model = tiny_llama()
    if way == "optim_args":
        args = training_arguments(
            TrainingArguments, tmp_path, optim="padam", optim_args="target_sparsity=0.6,p_norm=0.5"
        )
        trainer = Trainer(model=model, args=args, train_dataset=blocks())
    elif way == "callback":
        args = training_arguments(TrainingArguments, tmp_path, optim="padam", optim_args="p_norm=0.5")
        trainer = Trainer(model=model, args=args, train_dataset=blocks(), callbacks=[TargetSparsityCallback(0.6)])
    else:
        options = {"layer": {"target_scope": "layer"}, "padam_8bit": {"optim": "padam_8bit"}}.get(way, {})
        args = training_arguments(PAdamTrainingArguments, tmp_path, target_sparsity=0.6, p_norm=0.5, **options)
        trainer = PAdamTrainer(model=model, args=args, train_dataset=blocks())
    trainer.train()
    assert decayed_share(model) == pytest.approx(0.6, abs=0.01)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    fisher = trainer.optimizer.param_groups[0]["importance"] == "fisher"  # nothing is known of weights before step 10
    assert fisher == (way != "callback")
    assert [round(row["planned_sparsity"], 3) for row in rows] == [
        0.0 if fisher else 0.149,
        0.525 if fisher else 0.544,
        0.6,
        0.6,
    ]
    assert all(row["lambda_p"] > 0 for row in rows)
    if way == "layer":
        shares = [share([p]) for p in decayed_parameters(model).values()]
        assert max(abs(s - 0.6) for s in shares) < 0.02, shares
    count, threshold = steering_of(trainer.optimizer).zeroed()
    assert (count > 0) == (threshold > 0)


def test_the_best_model_is_one_that_met_the_target(tmp_path):
    args = training_arguments(
        PAdamTrainingArguments, tmp_path, target_sparsity=0.6, p_norm=0.5, save_steps=5, eval_strategy="steps",
        eval_steps=5, load_best_model_at_end=True, metric_for_best_model="perplexity",
    )  # fmt: skip
    rows = blocks()
    stop_early = EarlyStoppingCallback(1)
    trainer = PAdamTrainer(
        model=tiny_llama(), args=args, train_dataset=rows, eval_dataset=rows[:8], callbacks=[stop_early]
    )
    trainer.train()
    assert decayed_share(trainer.model) == pytest.approx(0.6, abs=0.01)
    assert trainer.state.best_global_step >= 30


def test_a_run_that_ends_too_early_says_so(tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 15

    args = training_arguments(PAdamTrainingArguments, tmp_path, target_sparsity=0.6, p_norm=0.5, save_strategy="no")
    PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks(), callbacks=[Stop()]).train()
    assert "Training ended before target_sparsity=0.6 was met" in caplog.text


def test_what_reports_logs_gets_the_steering_however_it_was_asked_for(tmp_path):
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    class Writer(SummaryWriter):
        tags: set[str] = set()

        def add_scalar(self, tag, *args, **kwargs):
            self.tags.add(tag)

    args = training_arguments(TrainingArguments, tmp_path, optim="padam", optim_args="p_norm=0.5")
    steering = TargetSparsityCallback(0.6)
    callbacks = [TensorBoardCallback(Writer(tmp_path / "logs")), steering]
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=blocks(), callbacks=callbacks)
    trainer.train()
    assert {"train/lambda_p", "train/planned_sparsity", "train/sparsity", "train/target_zeroed"} <= Writer.tags
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    assert last["target_zeroed"] == steering_of(trainer.optimizer).zeroed()[0]


def test_an_interrupted_trainer_goes_on_to_the_same_weights(tmp_path, caplog):
    def trainer():
        args = training_arguments(PAdamTrainingArguments, tmp_path / "out", target_sparsity=0.6, p_norm=0.8)
        return PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks())

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-25"))
    assert "other settings" not in caplog.text
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"lambda_p": 0.1}, {"target_sparsity": 0.6}, "target_sparsity: None -> 0.6 (the saved value is used)"),
        ({"target_sparsity": 0.6}, {"lambda_p": 0.1}, "target_sparsity: 0.6 -> None (the saved value is used)"),
        ({"target_sparsity": 0.6}, {"target_sparsity": 0.7}, "target_sparsity: 0.6 -> 0.7 (the saved value is used)"),
    ],
    ids=["added", "dropped", "changed"],
)
def test_another_target_at_resumption_is_named(tmp_path, caplog, first, second, message):
    for options, resume in ((first | {"max_steps": 4}, None), (second | {"max_steps": 6}, True)):
        args = training_arguments(PAdamTrainingArguments, tmp_path, save_steps=4, **options)
        PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks()).train(resume_from_checkpoint=resume)
    assert message in caplog.text


def test_only_padam_is_steered(tmp_path):
    args = training_arguments(TrainingArguments, tmp_path, optim="adamw_torch")
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=blocks(), callbacks=[TargetSparsityCallback(0.6)])
    with pytest.raises(ValueError, match="cannot steer AdamW: it steers PAdam"):
        trainer.train()


def test_named_modules_stay_dense(tmp_path):
    options = dict(target_sparsity=0.6, p_norm=0.5, dense_modules=["down_proj", "layers.0"])
    args = training_arguments(PAdamTrainingArguments, tmp_path, **options)
    trainer = PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks())
    trainer.train()
    decayed = trainer.decayed_names()
    for name, param in decayed_parameters(trainer.model).items():
        dense = "down_proj" in name or "layers.0" in name
        assert dense == (name not in decayed) == (share([param]) == 0.0), name
    assert trainer.sparsity()["sparsity"] == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_sparsity": 0.5, "lambda_p": 0.1}, "exclude each other"),
        ({"target_sparsity": 1.5}, "target_sparsity=1.5 is not allowed"),
        ({"target_sparsity": 0.5, "p_norm": 2.0}, "makes no zeros"),
        ({"target_sparsity": 0.5, "target_start": 0.9, "target_end": 0.5}, "0 <= start <= end <= 1"),
        ({"target_sparsity": 0.5, "optim": "adamw_torch"}, 'take optim="padam"'),
        ({"target_sparsity": 0.5, "optim_args": "target_sparsity=0.7"}, "given twice"),
        ({"target_sparsity": 0.5, "late_decay": True}, "late_decay=True exclude each other"),
        ({"target_sparsity": 0.5, "p_norm_schedule": "linear"}, "p_norm_schedule='linear' exclude each other"),
        ({"s_rate": 0.5, "optim": "adamw_torch"}, "has no effect on optim='adamw_torch'"),
        ({"target_scope": "layer"}, "has no effect without target_sparsity"),
        ({"target_sparsity": 0.5, "target_scope": "model"}, "target_scope='model' must be one of global, layer"),
        ({"dense_modules": "[oops"}, "is not a list in JSON"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_is_loaded(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        training_arguments(PAdamTrainingArguments, tmp_path, **options)


def test_a_step_that_fails_in_the_ramp_leaves_no_decay_behind(monkeypatch):
    weight = nn.Parameter(torch.linspace(0.1, 1.0, 100))
    optimizer = PAdam([weight], lr=1e-2, p_norm=0.5, backend="eager")
    TargetSparsity(optimizer, 0.5, 20)
    for step in range(8):
        weight.grad = torch.ones(100)
        with contextlib.nullcontext() if step < 7 else pytest.raises(MemoryError), monkeypatch.context() as patched:
            if step == 7:
                patched.setattr("hf_padam.optim.backends.eager.update_", mock.Mock(side_effect=MemoryError))
            optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["reference"] == 0.0


def test_a_target_that_cannot_be_met_is_not_called_met_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr("hf_padam.optim.target_sparsity.zero_smallest_", lambda *args, **options: 0.0)
    weight = nn.Parameter(torch.linspace(0.1, 1.0, 100))
    optimizer = PAdam([weight], lr=1e-9, p_norm=0.5)
    steering = TargetSparsity(optimizer, 0.5, 20)
    for _ in range(20):
        weight.grad = torch.ones(100)
        optimizer.step()
    assert not steering.met and caplog.text.count("target_sparsity=0.5 is not met") == 1


def test_a_run_that_was_steered_and_is_not_any_more_says_so(tmp_path, caplog):
    settings = dict(optim="padam", max_steps=8, save_steps=4)
    for callbacks, resume in (([TargetSparsityCallback(0.5)], None), ([], str(tmp_path / "checkpoint-4"))):
        args = training_arguments(TrainingArguments, tmp_path, **settings)
        Trainer(tiny_llama(), args, train_dataset=blocks(), callbacks=callbacks).train(resume_from_checkpoint=resume)
        assert ("of a run on its way to a target" in caplog.text) == (not callbacks)


def test_who_is_detached_steers_no_more_and_zeros_are_held_until_the_groups_are_freed():
    model, x, y = problem()
    optimizer = PAdam(groups_of(model, 0.5), lr=3e-3)
    steering = TargetSparsity(optimizer, 0.5, 20)
    constant = schedule("constant", optimizer, 20)
    train(model, optimizer, constant, x, y, range(20))
    steering.detach()
    assert steering_of(optimizer) is None
    group = optimizer.param_groups[0]
    group["lambda_p"] = 10.0
    train(model, optimizer, constant, x, y, range(5))
    assert share(weights_of(model)) == 0.5
    for key in ("reference", "target_step", "target_sparsity"):
        group.pop(key, None)
    train(model, optimizer, constant, x, y, range(5))
    assert share(weights_of(model)) > 0.55


@pytest.mark.parametrize(
    ("target", "given", "steps"),
    [
        (0.3, {}, (50, 200)),
        (0.4, {}, (50, 200)),
        (0.41, {}, (200, 750)),
        (0.3, {"start": 0.1}, (100, 750)),
        (0.3, {"end": 0.5}, (200, 500)),
        (0.3, {"start": 0.2, "end": 0.75}, (200, 750)),
    ],
)
def test_without_a_ramp_it_is_short_for_small_targets(target, given, steps):
    steering = TargetSparsity(PAdam(weights_of(problem()[0]), p_norm=0.5), target, 1000, **given)
    assert (steering.first, steering.last) == steps


def test_of_several_targets_the_largest_says_which_ramp_it_is():
    first, second = weights_of(problem()[0])
    groups = [{"params": [first], "target_sparsity": 0.2}, {"params": [second], "target_sparsity": 0.6}]
    assert TargetSparsity(PAdam(groups, p_norm=0.5), total_steps=1000).first == 200
    groups[1]["target_sparsity"] = 0.3
    assert TargetSparsity(PAdam(groups, p_norm=0.5), total_steps=1000).first == 50


@pytest.mark.parametrize(("options", "steps"), [("", (50, 200)), (",target_end=0.5", (200, 500))])
def test_the_ramp_of_a_small_target_in_every_trainer(tmp_path, options, steps):
    args = training_arguments(TrainingArguments, tmp_path, optim="padam", optim_args=f"target_sparsity=0.3{options}")
    trainer = Trainer(tiny_llama(), args, train_dataset=blocks())
    trainer.create_optimizer()
    callback = TargetSparsityCallback(0.3) if not options else TargetSparsityCallback(0.3, end=0.5)
    group = trainer.optimizer.param_groups[0]
    assert [round(1000 * group[key]) for key in ("target_start", "target_end")] == list(steps)
    state = TrainerState(max_steps=1000)
    callback.on_train_begin(args, state, TrainerControl(), optimizer=PAdam(weights_of(problem()[0]), p_norm=0.5))
    assert (callback._steering.first, callback._steering.last) == steps
