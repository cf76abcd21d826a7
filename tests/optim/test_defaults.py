"""PAdam does not care what torch's defaults are, nor what kind of number its hyperparameters are."""

import numpy as np
import pytest
import torch
from test_update import CPU_BACKENDS
from torch import nn

from hf_padam import PAdam, PAdam8bit, PNormScheduler, TargetSparsity, add_pnorm_decay
from hf_padam.optim.backends.fast_power import split_exponent


def train(optimizer_class=PAdam, steer=None, dtype=torch.float32, **options):
    weight = nn.Parameter(torch.linspace(-1, 1, 8193, dtype=torch.float32, device="cpu").to(dtype))
    optimizer = optimizer_class([weight], **{"lr": 1e-2, "p_norm": 0.8} | options)
    if steer:
        TargetSparsity(optimizer, steer, 12)
    for step in range(12):
        weight.grad = torch.cos(weight.detach() + step)
        optimizer.step()
    return weight.detach()


def adam_with_decay(params, **options):
    optimizer = torch.optim.Adam(params, lr=options.pop("lr"))
    add_pnorm_decay(optimizer, **options)
    return optimizer


KINDS = [np.float64, np.float32, np.float16]

OPTIMIZERS = {backend: (PAdam, {"backend": backend}) for backend in CPU_BACKENDS} | {
    "s": (PAdam, {"s_rate": 0.3}),
    "fisher": (PAdam, {"importance": "fisher"}),
    "rounding": (PAdam, {"dtype": torch.bfloat16, "bf16_stochastic_round": True}),
    "steered": (PAdam, {"steer": 0.6}),
    "8-bit": (PAdam8bit, {}),
    "decay added to Adam": (adam_with_decay, {"importance": "fisher"}),
}


def prepared(optimizer_class):
    if optimizer_class is PAdam8bit:
        pytest.importorskip("torchao")
    split_exponent.cache_clear()


@pytest.mark.parametrize(("optimizer_class", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_default_device_need_not_be_that_of_the_parameters(optimizer_class, options):
    """The meta device stands for another GPU: whatever is created there by mistake has no values."""
    prepared(optimizer_class)
    expected = train(optimizer_class, **options)
    prepared(optimizer_class)
    torch.set_default_device("meta")
    try:
        got = train(optimizer_class, **options)
    finally:
        torch.set_default_device(None)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("optimizer_class", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_default_dtype_changes_nothing(optimizer_class, options):
    prepared(optimizer_class)
    expected = train(optimizer_class, **options)
    prepared(optimizer_class)
    torch.set_default_dtype(torch.float64)
    try:
        got = train(optimizer_class, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_hyperparameters_may_be_scalars_of_numpy_and_count_as_what_they_are(kind, backend):
    options = dict(lr=1e-2, p_norm=0.75, lambda_p=0.1, weight_decay=0.3, betas=(0.9, 0.999), eps=1e-4)
    given = {name: kind(value) for name, value in options.items() if name != "betas"}
    given["betas"] = tuple(map(kind, options["betas"]))
    same = {name: float(value) for name, value in given.items() if name != "betas"}
    same["betas"] = tuple(map(float, given["betas"]))
    assert torch.equal(train(**given, backend=backend), train(**same, backend=backend))
    assert torch.equal(train(s_rate=kind(0.25)), train(s_rate=0.25))


def test_a_seed_of_numpy_is_the_same_seed():
    rounded = [
        train(dtype=torch.bfloat16, bf16_stochastic_round=True, rounding_seed=seed)
        for seed in (np.int64(12345), 12345, 12346)
    ]
    assert torch.equal(rounded[0], rounded[1]) and not torch.equal(rounded[1], rounded[2])


def test_a_schedule_may_compute_with_numpy():
    weight = nn.Parameter(torch.ones(3))
    optimizer = PAdam([weight], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float32(0.5))
    for _ in range(2):
        weight.grad = torch.ones(3)
        optimizer.step()
        schedule.step()
    assert weight.isfinite().all()


def two_groups(number):
    matrix, vector = nn.Parameter(torch.linspace(-1, 1, 100).reshape(10, 10)), nn.Parameter(torch.ones(10))
    groups = [{"params": [matrix], "weight_decay": number(0.5)}, {"params": [vector], "weight_decay": number(0)}]
    return PAdam(groups, lr=1e-2, lambda_p=0.1), None


def scheduled(number):
    optimizer, _ = two_groups(float)
    return optimizer, PNormScheduler(optimizer, np.int64(12), start=number(2), share=number(0.75))


def steered_together(number):
    optimizer, _ = two_groups(float)
    return optimizer, TargetSparsity(optimizer, number(0.625), np.int64(12), start=number(0.25), end=number(0.75))


def steered_by_groups(number):
    optimizer, _ = two_groups(float)
    optimizer.param_groups[0]["target_sparsity"] = number(0.625)
    return optimizer, TargetSparsity(optimizer, None, 12)


def given_to_the_optimizer(number):
    matrix, vector = nn.Parameter(torch.linspace(-1, 1, 100).reshape(10, 10)), nn.Parameter(torch.ones(10))
    groups = [{"params": [matrix], "p_norm": number(0.75), "lambda_p": number(0.125)}, {"params": [vector]}]
    everywhere = {"lambda_p": number(0), "eps": number(2**-20), "betas": (number(0.875), number(0.96875))}
    return PAdam(groups, lr=number(2**-6), weight_decay=number(0.5), **everywhere), None


def set_by_a_schedule(number):
    optimizer, _ = given_to_the_optimizer(float)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: number(0.5) ** step)


@pytest.mark.parametrize(
    "build", [scheduled, steered_together, steered_by_groups, given_to_the_optimizer, set_by_a_schedule]
)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_numpy_do_what_floats_do_and_leave_no_trace_in_checkpoints(build, kind, tmp_path):
    states = []
    for number in (kind, float):
        optimizer, helper = build(number)
        for step in range(12):
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad = torch.cos(param.detach() + step)
            optimizer.step()
            if helper is not None and not isinstance(helper, TargetSparsity):
                helper.step()
            if step in (5, 11):
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                states.append(torch.load(tmp_path / "state.pt", weights_only=True))  # it takes Python's numbers only
    groups = [state["param_groups"] for state in states]
    assert groups[:2] == groups[2:]
    moments = [[t for s in state["state"].values() for t in s.values()] for state in states]
    assert all(map(torch.equal, moments[0] + moments[1], moments[2] + moments[3]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_decay_beside_another_optimizer_leaves_no_trace_of_numpy_either(kind, tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    add_pnorm_decay(optimizer, p_norm=kind(0.5), lambda_p=kind(0.25))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    (group,) = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"]
    assert (group["p_norm"], group["lambda_p"]) == (0.5, 0.25)


@pytest.mark.parametrize("kind", [*KINDS, np.int64])
def test_a_group_is_exempt_by_a_zero_of_numpy_beside_a_number_of_numpy(kind):
    numbers = iter([kind(1), kind(0)])
    optimizer, _ = two_groups(lambda _: next(numbers))
    assert [group["lambda_p"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("number", [np.float32("nan"), np.float64(0), np.int64(1), np.bool_(True), True, "0.5"])
def test_what_is_no_target_is_refused_whoever_makes_it(number):
    with pytest.raises(ValueError, match="target_sparsity=.* is not allowed"):
        TargetSparsity(two_groups(float)[0], number, 12)


@pytest.mark.parametrize("steps", [0, "12", None, float("nan"), float("inf"), True], ids=str)
def test_what_is_no_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match="total_steps=.* is not allowed"):
        TargetSparsity(two_groups(float)[0], 0.5, steps)


@pytest.mark.parametrize("plan", [{"start": "0.2"}, {"start": float("nan")}, {"end": 0.1}, {"end": True}], ids=str)
def test_what_is_no_plan_is_refused(plan):
    with pytest.raises(ValueError, match="target_start=.* and target_end=.* are not allowed"):
        TargetSparsity(two_groups(float)[0], 0.5, 12, **plan)


@pytest.mark.parametrize(
    ("option", "name"),
    [({"start": np.float32("inf")}, "p_norm_start"), ({"start": np.bool_(True)}, "p_norm_start")]
    + [({"share": np.int64(0)}, "p_norm_schedule_share"), ({"total_steps": np.float64(12)}, "total_steps")],
    ids=str,
)
def test_what_is_no_schedule_is_refused_whoever_makes_it(option, name):
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed"):
        PNormScheduler(two_groups(float)[0], **{"total_steps": 12} | option)


@pytest.mark.parametrize(
    "option",
    [{"lr": np.float32("nan")}, {"lr": np.bool_(True)}, {"eps": np.int64(-1)}, {"rounding_seed": np.float64(1)},
     {"lambda_p": np.ones(1)}, {"s_rate": True}, {"rounding_seed": False}, {"late_decay": 1}, {"lr": 10**400},
     {"p_norm": -(10**400)}],
    ids=lambda option: str(option)[:40],
)  # fmt: skip
def test_what_is_no_number_in_range_is_refused_whoever_makes_it(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* is not allowed"):
        PAdam([nn.Parameter(torch.ones(3))], **option)
