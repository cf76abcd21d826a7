"""What makes the host wait for the device: nothing in a step, and one transfer each time that steering aims."""

import math
from unittest import mock

import pytest
import torch
from torch import nn

from hf_padam import PAdam, TargetSparsity, add_pnorm_decay
from hf_padam.optim.patterns import PATTERN

WAITS = (
    "item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__",
    "nonzero", "argwhere", "unique", "masked_select", "repeat_interleave", "equal", "allclose",  # bincount is for CPUs
)  # fmt: skip


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU: notes what would make the host wait. All that is computed from it is one, too."""

    waits: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in WAITS or cls._picks(function, args):
            OnDevice.waits.append(function.__name__)
        if function.__name__ == "cpu":
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(function, types, args, kwargs)

    @staticmethod
    def _picks(function, args) -> bool:
        """Whether elements are picked by a mask, how many of which the host has to know."""
        if function.__name__ not in ("__getitem__", "__setitem__"):
            return function.__name__ == "where" and len(args) == 1
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8) for part in index)


def on_device(**options):
    """A tensor each in two groups, with gradients, and an optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(8, 8, generator=generator).as_subclass(OnDevice)) for _ in range(2)]
    optimizer = PAdam([{"params": [param]} for param in params], **{"lr": 1e-2, "p_norm": 0.5} | options)
    assert type(params[0].detach() * 2) is OnDevice
    return params, optimizer


def waits(params, optimizer, steps):
    """Yield for each step what would make the host wait."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(8, 8, generator=generator).as_subclass(OnDevice)
        OnDevice.waits.clear()
        optimizer.step()
        yield list(OnDevice.waits)


def no_launch(monkeypatch):
    """Let the Triton backend come as far as the launch of its kernel."""
    pytest.importorskip("triton")
    from hf_padam.optim.backends import triton, triton_kernel

    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    monkeypatch.setattr(triton_kernel, "step_kernel", mock.MagicMock())


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"late_decay": True},
        {"s_rate": 0.5},
        {"bf16_stochastic_round": True},
        {"weight_decay": 0.1},
        {"importance": "fisher"},
        {"lr": torch.tensor(1e-2)},
    ],
)
def test_a_step_does_not_wait_for_the_device(backend, options, monkeypatch):
    if backend == "triton":
        no_launch(monkeypatch)
    params, optimizer = on_device(backend=backend, **options)
    assert all(seen == [] for seen in waits(params, optimizer, 5))


def test_the_counting_would_see_a_wait():
    (param, _), _ = on_device()
    OnDevice.waits.clear()
    bool((param * 2).sum() > 0), float(param.sum()), param.detach().abs().tolist()
    assert OnDevice.waits == ["__bool__", "__float__", "tolist"]
    OnDevice.waits.clear()
    weight = param.detach()
    _ = weight[weight > 0], weight[0, 1:], torch.where(weight > 0, weight, 0), torch.where(weight > 0)
    weight[weight > 0] = 1.0
    assert OnDevice.waits == ["__getitem__", "where", "__setitem__"]


@pytest.mark.parametrize("importance", ["magnitude", "fisher"])
@pytest.mark.parametrize("scope", ["global", "layer", "blocks"])
@pytest.mark.parametrize("p_norm", [0.5, -math.inf])
@pytest.mark.parametrize("steps", [100, 260])
def test_steering_reads_the_device_once_each_time_it_aims_and_aims_200_times_at_most(importance, scope, p_norm, steps):
    params, optimizer = on_device(backend="eager", importance=importance, p_norm=p_norm)
    target = 0.5
    if scope == "blocks":
        target = None
        for group in optimizer.param_groups:
            group |= {"target_sparsity": 0.5, PATTERN: "2:4"}
    steering = TargetSparsity(optimizer, target, steps, start=0.1, end=0.9, per_group=scope == "layer")
    aimed = 0
    for step, seen in enumerate(waits(params, optimizer, steps)):
        if step == 0 or step == steering.last - 1:
            continue  # where zeros are counted, and the target is met exactly
        assert seen in ([], ["cpu"])
        aimed += len(seen)
    assert steering.met and min(50, steps // 4) / (2 if p_norm < 0 else 1) < aimed <= 200


@pytest.mark.parametrize(
    ("cls", "importance"),
    [(torch.optim.AdamW, "magnitude"), (torch.optim.AdamW, "fisher"), (torch.optim.SGD, "magnitude")],
)
def test_the_decay_around_another_optimizer_adds_no_wait(cls, importance):
    params, plain = on_device()[0], on_device()[0]
    optimizer, without = cls(params, lr=1e-2), cls(plain, lr=1e-2)
    add_pnorm_decay(optimizer, p_norm=0.5, lambda_p=0.1, importance=importance)
    seen = list(zip(waits(params, optimizer, 20), waits(plain, without, 20), strict=True))
    added = [step for step, (with_decay, own) in enumerate(seen) if with_decay != own]
    assert added == ([10, 12, 15, 18] if importance == "fisher" else [])  # where the unit is read, see below
    assert not all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


def test_the_scale_of_a_constant_decay_is_read_at_few_steps():
    params, optimizer = on_device(backend="eager", importance="fisher")
    seen = list(waits(params, optimizer, 600))
    assert all(one in ([], ["__float__"]) for one in seen)
    assert 15 < sum(map(len, seen)) < 30
