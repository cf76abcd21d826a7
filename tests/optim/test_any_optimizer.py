"""add_pnorm_decay: what any optimizer makes of a weight, times the oracle's factor of the weight before the step."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from oracle import factor
from processes import job
from torch import nn
from transformers.optimization import Adafactor as TransformersAdafactor

from hf_padam import PAdam, PAdam8bit, add_pnorm_decay, decayed_parameters
from hf_padam.optim import any_optimizer

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="runs where torchao is installed"
)


class Lion(torch.optim.Optimizer):
    """Sign of an average of gradients, with decoupled L2 decay; as people write optimizers of their own."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    average = self.state[param].setdefault("average", torch.zeros_like(param))
                    param.mul_(1 - group["lr"] * 0.1)
                    param.add_(average.lerp(param.grad, 0.1).sign_(), alpha=-group["lr"])
                    average.lerp_(param.grad, 0.01)


class OwnStep(torch.optim.AdamW):
    """An optimizer whose step calls that of its parent, which has hooks of its own."""

    def step(self, closure=None):
        return super().step(closure)


def adamw_8bit(params, lr):
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=lr)


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd_loop": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, foreach=False),
    "adam_foreach": lambda params: torch.optim.Adam(params, lr=0.02, amsgrad=True, foreach=True),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.1, fused=True),
    "adamw_tensor_lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.02, dtype=torch.float64)),
    "own_step": lambda params: OwnStep(params, lr=0.02),
    "muon": lambda params: torch.optim.Muon(params, lr=0.02),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.02),
    "transformers_adafactor": lambda params: TransformersAdafactor(params, lr=0.02, relative_step=False),
    "lion": lambda params: Lion(params, lr=0.02),
    "adamw_8bit": lambda params: adamw_8bit(params, lr=0.02),
}


def parameters(dtype=torch.float32, shape=(64, 80)) -> list[nn.Parameter]:
    """A decayed matrix of many magnitudes, zeros among them, one that does not decay, and one without gradients."""
    generator = torch.Generator().manual_seed(0)
    size, sign = (torch.rand(shape, generator=generator) for _ in range(2))
    weights = 10 ** (-5 * size) * (sign - 0.5).sign()
    weights[0] = 0
    return [nn.Parameter(tensor.to(dtype)) for tensor in (weights, torch.ones(shape), torch.ones(shape))]


def set_gradients(params, step) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params[:2]:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad[1] = 0  # only the decay moves these, to zero in the end


CASES = [(name, p_norm, torch.float32) for name in OPTIMIZERS for p_norm in (0.5, 0.8, 1.0, 2.0, 3.0)]
CASES += [(name, 0.5, dtype) for name in OPTIMIZERS if "8bit" not in name for dtype in (torch.bfloat16, torch.float64)]


@pytest.mark.parametrize(
    ("name", "p_norm", "dtype"),
    [pytest.param(*case, marks=needs_torchao if "8bit" in case[0] else ()) for case in CASES],
    ids=lambda value: str(value).removeprefix("torch."),
)
@torch.compiler.set_stance("force_eager")  # torchao's optimizers compile their step, which takes half a minute
def test_each_step_is_the_optimizers_own_times_the_oracles_factor(name, p_norm, dtype):
    params, twins = parameters(dtype), parameters(dtype)
    optimizer, twin = OPTIMIZERS[name](params), OPTIMIZERS[name](twins)
    add_pnorm_decay(optimizer, p_norm=p_norm, lambda_p=0.3, params=[params[0], params[2]])
    for step in range(5):
        for param, other in zip(params, twins, strict=True):
            other.data.copy_(param.data)
        before = params[0].detach().double().flatten().tolist()
        set_gradients(params, step)
        set_gradients(twins, step)
        optimizer.step()
        twin.step()
        factors = np.array([factor(w, 0.02, p_norm, 0.3, 0.0) for w in before])
        expected = twins[0].detach().double().flatten().numpy() * factors
        if p_norm < 2:
            expected[abs(expected) < 2.0**-100] = 0
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-13}[dtype]
        np.testing.assert_allclose(params[0].detach().double().flatten(), expected, rtol=tolerance, atol=1e-37)
        assert torch.equal(params[1], twins[1]) and torch.equal(params[2], twins[2])
    if p_norm == 0.5:
        assert 0.01 < (params[0][2:] == 0).double().mean() < 0.9


def test_adam_with_it_is_padam():
    (ours, *_), (theirs, *_) = parameters(), parameters()
    options = dict(p_norm=0.8, lambda_p=0.05)
    padam, adam = PAdam([theirs], lr=1e-2, weight_decay=0.0, **options), torch.optim.Adam([ours], lr=1e-2)
    add_pnorm_decay(adam, **options)
    for step in range(50):
        set_gradients([ours], step)
        set_gradients([theirs], step)
        padam.step()
        adam.step()
        # Rounding is an ulp of the weight or of Adam's step, 1e-2; then weights are alike again, lest it adds up.
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-8)
        assert torch.equal(ours == 0, theirs == 0)
        ours.data.copy_(theirs.data)
    assert (ours[1:] == 0).any()


def test_a_schedule_changes_the_decay_of_each_group_and_zero_turns_it_off():
    params = parameters()
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], lr=0.1)
    add_pnorm_decay(optimizer, p_norm=2.0, lambda_p=1.0)
    optimizer.param_groups[1] |= {"p_norm": 3.0, "lambda_p": 4.0}
    optimizer.param_groups[0]["lambda_p"] = 0.0
    for param in params[:2]:
        param.grad = torch.zeros_like(param)
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[1].unique().tolist() == pytest.approx([1 / 3]) and params[2].unique().tolist() == [1.0]
    optimizer.param_groups[0]["lambda_p"] = float("nan")
    with pytest.raises(ValueError, match="lambda_p=nan is not allowed"):
        optimizer.step()


def test_groups_are_divided_with_all_their_keys_and_those_added_later_join():
    a, b, c, d = (nn.Parameter(torch.ones(2)) for _ in range(4))
    groups = [{"params": [("a", a), ("b", b)], "lr": 0.5}, {"params": [("c", c)]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0)
    add_pnorm_decay(optimizer, p_norm=2.0, lambda_p=1.0, params=[b, c])
    keys = ("param_names", "lr", "p_norm", "lambda_p")
    rows = [tuple(group[key] for key in keys) for group in optimizer.param_groups]
    assert rows == [(["b"], 0.5, 2.0, 1.0), (["a"], 0.5, 2.0, 0.0), (["c"], 0.1, 2.0, 1.0)]
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)
    optimizer.add_param_group({"params": [("d", d)]})
    for param in (a, b, c, d):
        param.grad = torch.zeros(2)
    optimizer.step()
    assert [p[0].item() for p in (a, b, c, d)] == pytest.approx([1, 1 / 1.5, 1 / 1.1, 1])
    assert optimizer.param_groups[3]["lambda_p"] == 0  # some were chosen, it was not
    everything = torch.optim.SGD([("a", a)], lr=0.1)
    add_pnorm_decay(everything, p_norm=0.5)
    everything.add_param_group({"params": [("late", nn.Parameter(torch.zeros(2)))]})
    with pytest.raises(ValueError, match="late, of shape .* is all zeros"):
        everything.step()


@pytest.mark.parametrize("name", ["sgd", "adamw_fused", "muon"])
def test_a_loaded_state_goes_on_bit_for_bit(name):
    def start(**options):
        params = parameters()
        optimizer = OPTIMIZERS[name](params)
        add_pnorm_decay(optimizer, **options, params=params[:1])
        return params, optimizer

    def train(params, optimizer, steps):
        for step in steps:
            set_gradients(params, step)
            optimizer.step()

    whole, optimizer = start(p_norm=0.5, lambda_p=0.3)
    train(whole, optimizer, range(4))
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in whole]
    train(whole, optimizer, range(4, 8))
    resumed, optimizer = start(p_norm=3.0, lambda_p=9.0)
    optimizer.load_state_dict(saved)
    for param, weight in zip(resumed, weights, strict=True):
        param.data.copy_(weight)
    train(resumed, optimizer, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_state_saved_without_the_decay_keeps_the_decay_that_was_asked_for():
    param = nn.Parameter(torch.ones(2))
    saved = torch.optim.SGD([param], lr=0.5).state_dict()
    optimizer = torch.optim.SGD([param], lr=0.1)
    add_pnorm_decay(optimizer, p_norm=0.7, lambda_p=0.2)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["p_norm"], group["lambda_p"]) == (0.5, 0.7, 0.2)


def test_closures_compute_their_gradients_after_the_weights_are_kept():
    used, unused = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.SGD([used, unused], lr=0.1)
    add_pnorm_decay(optimizer, p_norm=1.0, lambda_p=1.0)

    def closure():
        optimizer.zero_grad()
        loss = used.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert used.tolist() == pytest.approx([0.9 / 1.1] * 3) and unused.tolist() == [1.0] * 3


def test_a_step_that_fails_leaves_nothing_behind():
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.1)
    add_pnorm_decay(optimizer, p_norm=1.0, lambda_p=1.0)

    def closure():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    param.grad = torch.zeros(3)
    optimizer.step()
    assert param.tolist() == pytest.approx([1 / 1.1] * 3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_loss_scaling_skips_changes_nothing(fused):
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param], lr=0.1, fused=fused, weight_decay=0.0)
    add_pnorm_decay(optimizer, p_norm=1.0, lambda_p=1.0)
    scaler = torch.amp.GradScaler("cpu")
    for gradient, expected in ((float("inf"), 1.0), (0.0, 1 / 1.1)):
        optimizer.zero_grad()
        scaler.scale((param * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert param.tolist() == pytest.approx([expected] * 3)


def test_it_survives_what_accelerate_does_to_optimizers():
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param], lr=0.1, weight_decay=0.0)
    add_pnorm_decay(optimizer, p_norm=1.0, lambda_p=1.0)
    prepared = Accelerator(cpu=True).prepare(optimizer)  # goes through state_dict and load_state_dict
    swapped = nn.Parameter(torch.ones(3))
    prepared.param_groups[0]["params"] = [swapped]  # as for FSDP2
    swapped.grad = torch.zeros(3)
    prepared.step()
    assert swapped.tolist() == pytest.approx([1 / 1.1] * 3) and param.tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="this AdamW has a p-norm decay already"):
        add_pnorm_decay(prepared)


def test_a_copy_can_be_given_the_decay_again():
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.1)
    add_pnorm_decay(optimizer, p_norm=1.0, lambda_p=1.0)
    twin = copy.deepcopy(optimizer)
    add_pnorm_decay(twin, p_norm=1.0, lambda_p=1.0)
    (copied,) = twin.param_groups[0]["params"]
    copied.grad = torch.zeros(3)
    twin.step()
    assert copied.tolist() == pytest.approx([1 / 1.1] * 3)


def test_between_steps_no_copy_is_kept_and_during_one_a_single_one():
    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            (hook,) = self._optimizer_step_pre_hooks.values()
            held.append(sum(before.nbytes for _, before, _ in hook.__self__._kept))

    held: list[int] = []
    weight, bias = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16)), nn.Parameter(torch.ones(8))
    optimizer = Watching([weight, bias], lr=0.1)
    add_pnorm_decay(optimizer, params=[weight])
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer.step()
    (hook,) = optimizer._optimizer_step_pre_hooks.values()
    assert held == [weight.nbytes] and hook.__self__._kept == []


def sgd(*params, **options):
    return torch.optim.SGD([*params], lr=0.1, **options)


ones, zeros = (lambda: nn.Parameter(torch.ones(2))), (lambda: nn.Parameter(torch.zeros(2)))


def scheduled():
    optimizer = sgd(ones(), ones())
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    return optimizer


@pytest.mark.parametrize(
    ("build", "options", "error", "match"),
    [
        (lambda: PAdam([ones()]), {}, ValueError, "PAdam has a p-norm decay of its own"),
        (lambda: nn.Linear(2, 2), {}, TypeError, "Linear, which is no torch.optim.Optimizer"),
        (lambda: TransformersAdafactor([ones()]), {}, ValueError, "no learning rate.*relative_step=False"),
        (lambda: sgd(ones(), zeros()), {}, ValueError, "number 1 of its group, .* is all zeros.*params="),
        (lambda: sgd(ones()), {"p_norm": float("inf")}, ValueError, "p_norm=inf is not allowed"),
        (lambda: sgd(ones()), {"lambda_p": -1.0}, ValueError, "lambda_p=-1.0 is not allowed"),
        (lambda: sgd(ones()), {"params": [("foreign", ones())]}, ValueError, r"1 of the 1 .*\(foreign.*not in this"),
        (lambda: sgd(ones()), {"params": []}, ValueError, "params is empty"),
        (lambda: sgd(nn.Parameter(torch.ones(2, dtype=torch.cfloat))), {}, ValueError, "has dtype torch.complex64"),
    ],
)  # fmt: skip
def test_what_cannot_decay_is_refused_and_left_as_it_was(build, options, error, match):
    optimizer = build()
    groups = copy.copy(getattr(optimizer, "param_groups", None))
    with pytest.raises(error, match=match):
        add_pnorm_decay(optimizer, **options)
    assert getattr(optimizer, "param_groups", None) == groups


def test_a_schedule_that_counts_the_groups_comes_after_the_decay():
    optimizer = scheduled()
    with pytest.raises(ValueError, match="before the schedule is built"):
        add_pnorm_decay(optimizer, params=optimizer.param_groups[0]["params"][:1])
    add_pnorm_decay(optimizer)  # which divides no group


@pytest.mark.parametrize("with_closure", [False, True])
def test_sparse_gradients_are_refused(with_closure):
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    add_pnorm_decay(optimizer)

    def closure():
        embedding(torch.tensor([1])).sum().backward()

    if not with_closure:
        closure()
    with pytest.raises(RuntimeError, match="needs dense gradients.*sparse=False"):
        optimizer.step(*[closure] * with_closure)


def test_what_does_not_decay_may_have_sparse_gradients():
    embedding, linear = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 3)
    optimizer = torch.optim.SGD([*embedding.parameters(), *linear.parameters()], lr=0.1)
    add_pnorm_decay(optimizer, p_norm=0.5, lambda_p=1.0, params=[linear.weight])
    for _ in range(200):
        optimizer.zero_grad()
        (0 * linear(embedding(torch.tensor([1]))).sum()).backward()
        optimizer.step()
    assert (linear.weight == 0).all() and (embedding.weight != 0).all()


def test_a_step_that_a_cuda_graph_would_repeat_is_refused(monkeypatch):
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([param])
    add_pnorm_decay(optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        optimizer.step()


@needs_torchao
def test_8_bit_padam_has_its_own(llama):
    with pytest.raises(ValueError, match="PAdam8bit has a p-norm decay of its own"):
        add_pnorm_decay(PAdam8bit(decayed_parameters(llama).values()))


def test_sharded_weights_decay_like_whole_ones():
    result = job(2, "training/distributed.py", "added_decay")
    assert result["difference"] < 1e-6 and result["is_sharded"]
    assert result["zeros"][0] == result["zeros"][1] > 0


def test_steps_that_a_fused_optimizer_counts_on_the_device_are_read_once(monkeypatch):
    reads = []

    def counted(value):
        reads.append(value) if isinstance(value, torch.Tensor) else None
        return int(value)

    monkeypatch.setattr(any_optimizer, "int", counted, raising=False)
    weights = [nn.Parameter(torch.linspace(0.1, 1.0, 64).view(8, 8)) for _ in range(3)]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    add_pnorm_decay(optimizer, p_norm=0.5, lambda_p=1e-3, importance="fisher")
    for step in range(25):
        for i, weight in enumerate(weights):
            grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            weight.grad = None if i == 2 and step % 2 else grad  # which has taken half as many
        optimizer.step()
    assert len(reads) == 3
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert len(reads) == 6
    assert optimizer.param_groups[0]["importance_step"] in range(20, 26)
