"""p on the move: its values, its steps in a loop and in Trainers, interrupted and resumed, and zeros that may live."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import blocks, options, tiny_llama
from oracle import Oracle
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_padam import (
    PAdam,
    PAdamTrainer,
    PAdamTrainingArguments,
    PNormScheduleCallback,
    PNormScheduler,
    get_param_groups,
    p_norm_at,
)
from hf_padam.optim.backends import compiled
from hf_padam.resuming.settings import hyperparameters


def expected_p(step, total, final, start=2.0, share=0.5, shape="linear"):
    """Of the step with this number, from 0."""
    x = min(1.0, step / (share * total))
    return start + (final - start) * {"linear": x, "cosine": 0.5 - 0.5 * math.cos(math.pi * x), "constant": 1}[shape]


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("start", "share"), [(2.0, 0.5), (3.0, 1.0), (1.5, 0.1)])
def test_p_goes_from_start_to_exactly_final(shape, start, share):
    values = [p_norm_at(step / 300, 0.8, start, share, shape) for step in range(301)]
    assert values == pytest.approx([expected_p(step, 300, 0.8, start, share, shape) for step in range(301)])
    assert values[0] == (0.8 if shape == "constant" else start)
    assert set(values[round(300 * share) :]) == {0.8} and values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shape": "quadratic"}, "p_norm_schedule='quadratic' is not allowed: it is one of constant, linear, cosine"),
        ({"start": float("inf")}, "p_norm_start=inf is not allowed"),
        ({"share": 1.5}, "p_norm_schedule_share=1.5 is not allowed"),
        ({"total_steps": 0}, "total_steps=0 is not allowed"),
    ],
)
def test_bad_settings_are_refused(given, message):
    optimizer = PAdam([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        PNormScheduler(optimizer, **{"total_steps": 10} | given)


def loop(param, optimizer, scheduler, steps):
    for step in steps:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("variant", [{}, {"late_decay": True}, {"s_rate": 0.3}], ids=["plain", "late", "s"])
def test_a_loop_follows_the_oracle_step_by_step_and_resumes_to_the_bit(backend, variant, tmp_path):
    if backend == "compiled" and compiled.unavailable(torch.device("cpu")):
        pytest.skip("runs where there are a C++ compiler and Python.h")
    start = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 0.1

    def build(weights):
        param = nn.Parameter(weights.clone())
        other = {"params": [nn.Parameter(torch.ones(3))], "lambda_p": 0.0, "p_norm": 0.7}
        optimizer = PAdam([{"params": [param]}, other], lr=3e-3, p_norm=0.8, lambda_p=0.1, backend=backend, **variant)
        return param, optimizer, PNormScheduler(optimizer, 20, share=0.6, shape="cosine")

    param, optimizer, scheduler = build(start)
    oracle = Oracle(start.double().numpy(), lr=3e-3, p_norm=2.0, lambda_p=0.1, **variant)
    kernels = compiled._kernel.cache_info().misses
    for step in range(20):
        oracle.p = expected_p(step, 20, 0.8, share=0.6, shape="cosine")
        assert scheduler.get_last_p_norm() == pytest.approx([oracle.p, 0.7])
        assert hyperparameters(optimizer)["p_norm"] == [0.8, 0.7], "what the settings are, not where p is"
        loop(param, optimizer, scheduler, [step])
        oracle.step(param.grad.double().numpy())
        np.testing.assert_allclose(param.detach().double().numpy(), oracle.w, rtol=1e-3, atol=2e-6)
        if step == 7:
            torch.save([param.detach(), optimizer.state_dict(), scheduler.state_dict()], tmp_path / "saved.pt")
    assert compiled._kernel.cache_info().misses - kernels <= 2, "p = 2 and p < 2"

    saved, optimizer_state, scheduler_state = torch.load(tmp_path / "saved.pt")
    resumed, other, other_scheduler = build(saved)
    other.load_state_dict(optimizer_state)
    other_scheduler.load_state_dict(scheduler_state)
    loop(resumed, other, other_scheduler, range(8, 20))
    assert torch.equal(resumed, param)


def test_what_starts_at_zero_or_small_lives_under_a_schedule_and_would_not_without():
    small = torch.full((50,), 1e-4)
    lived = []
    for scheduled in (True, False):
        model = nn.ModuleDict({"small": nn.Linear(50, 1, bias=False), "zero": nn.Linear(50, 1, bias=False)})
        with torch.no_grad():
            model["small"].weight.copy_(small)
            model["zero"].weight.fill_(0.0 if scheduled else 1e-4)
        groups = get_param_groups(model, p_norm=0.5, lambda_p=0.02, p_norm_start=2.0 if scheduled else None)
        optimizer = PAdam(groups, lr=1e-2)
        scheduler = PNormScheduler(optimizer, 100, shape="linear" if scheduled else "constant")
        for _ in range(100):
            loss = ((model["small"].weight - 1) ** 2).sum() + ((model["zero"].weight - 1) ** 2).sum()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        lived.append([float((layer.weight != 0).float().mean()) for layer in model.values()])
    assert lived == [[1.0, 1.0], [0.0, 0.0]]


def test_a_tensor_that_is_still_zero_when_p_goes_below_2_is_refused_by_name():
    param = nn.Parameter(torch.zeros(4))
    optimizer = PAdam([{"params": [("head", param)], "p_norm": 2.0, "final_p_norm": 0.8}], lr=0.0)
    scheduler = PNormScheduler(optimizer, 10)
    param.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(ValueError, match=r"parameter head.*all zeros.*p is about to go below 2.*learning rate was 0"):
        scheduler.step()


class Recorder:
    """The p of every optimizer step."""

    def __init__(self, trainer):
        self.values = []
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(self)

    def __call__(self, optimizer, *_):
        self.values.append(optimizer.param_groups[0]["p_norm"])


def weights(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


SCHEDULE = {"p_norm_schedule": "linear", "p_norm_schedule_share": 0.75}


def trainer_for(directory, **more):
    base = dict(optim_args=None, p_norm=0.5, lambda_p=0.3, max_steps=8, logging_steps=2, per_device_train_batch_size=2)
    base |= dict(gradient_accumulation_steps=2, s_rate=0.5, save_strategy="steps", save_steps=3) | SCHEDULE
    args = PAdamTrainingArguments(**options(directory, **base | more))
    return PAdamTrainer(model=tiny_llama(attention_dropout=0.1), args=args, train_dataset=blocks())


def test_trainers_move_p_alike_log_it_and_resume_to_the_bit(tmp_path, caplog):
    whole = trainer_for(tmp_path / "whole")
    recorded = Recorder(whole)
    whole.train()
    ps = [expected_p(step, 8, 0.5, share=0.75) for step in range(8)]
    assert recorded.values == pytest.approx(ps) and recorded.values[0] == 2 and recorded.values[-1] == 0.5
    logged = [row["p_norm"] for row in whole.state.log_history if "loss" in row]
    assert logged == recorded.values[1::2]

    caplog.clear()
    resumed = trainer_for(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert "other settings" not in caplog.text
    assert [row["p_norm"] for row in resumed.state.log_history if "loss" in row] == logged

    # The plain Trainer, with the callback; its optimizer is built with the final p.
    args = TrainingArguments(
        **options(tmp_path / "plain", optim_args="p_norm=0.5,lambda_p=0.3,s_rate=0.5", max_steps=8),
        gradient_accumulation_steps=2,
    )
    args.per_device_train_batch_size = 2
    callback = PNormScheduleCallback(share=0.75)
    model = tiny_llama(attention_dropout=0.1)
    plain = Trainer(model=model, args=args, train_dataset=blocks(), callbacks=[callback])
    recorded = Recorder(plain)
    plain.train()
    assert recorded.values == pytest.approx(ps)
    assert torch.equal(weights(plain.model), weights(whole.model))


def test_a_run_resumed_without_its_schedule_takes_the_final_p_with_a_warning(tmp_path, caplog):
    trainer_for(tmp_path).train()
    changed = trainer_for(tmp_path, p_norm_schedule="constant")
    recorded = Recorder(changed)
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert recorded.values == [0.5] * 5
    assert "p_norm_schedule: linear -> constant (the new value is used)" in caplog.text


def test_a_plain_trainer_refuses_a_schedule_that_it_would_not_follow(tmp_path):
    args = PAdamTrainingArguments(**options(tmp_path, optim_args=None, **SCHEDULE))
    with pytest.raises(ValueError, match="p_norm_schedule='linear' would have no effect.*PNormScheduleCallback"):
        Trainer(model=tiny_llama(), args=args, train_dataset=blocks()).train()
    with pytest.raises(ValueError, match=r"p_norm_schedule_share=2.0 is not allowed"):
        PAdamTrainingArguments(**options(tmp_path, p_norm_schedule_share=2))


def test_it_follows_accelerates_optimizer_and_optimizers_of_others_with_its_keys():
    weight = nn.Parameter(torch.ones(3))
    group = {"params": [weight], "p_norm": 0.8, "lambda_p": 0.1}  # SGD keeps the keys that it does not know
    optimizer = Accelerator(cpu=True).prepare_optimizer(torch.optim.SGD([group], lr=0.1))
    scheduler = PNormScheduler(optimizer, 4, share=1.0)
    seen = []
    for _ in range(5):
        seen.append(optimizer.optimizer.param_groups[0]["p_norm"])
        scheduler.step()
    assert seen == pytest.approx([2.0, 1.7, 1.4, 1.1, 0.8])


def test_a_schedule_cannot_move_p_to_minus_infinity():
    """The way there would be no number at all."""
    optimizer = PAdam([torch.nn.Parameter(torch.ones(4, 4))], p_norm=-math.inf)
    with pytest.raises(ValueError, match="p_norm=-inf is not where a schedule can move to"):
        PNormScheduler(optimizer, total_steps=10)


@pytest.mark.parametrize("lost", ["never made", "copied", "in a Trainer"])
def test_a_p_that_nothing_moves_is_an_error(lost, tmp_path):
    model = tiny_llama()
    optimizer = PAdam(get_param_groups(model, p_norm_start=2.0), lr=1e-3)
    if lost == "in a Trainer":
        trainer = Trainer(
            model,
            TrainingArguments(**options(tmp_path, optim_args=None)),
            None,
            blocks(),
            optimizers=(optimizer, None),
        )
        with pytest.raises(RuntimeError, match="add PNormScheduleCallback to a Trainer"):
            trainer.train()
        trainer.add_callback(PNormScheduleCallback)
        trainer.train()
        return
    if lost == "copied":
        PNormScheduler(optimizer, 10)
        model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
        optimizer.step()
        other = PAdam(get_param_groups(model, p_norm_start=2.0), lr=1e-3)
        other.load_state_dict(optimizer.state_dict())
        optimizer = other
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    with pytest.raises(RuntimeError, match="is to end with p_norm=0.8, and nothing moves it from 2.0: make PNorm"):
        optimizer.step()
    PNormScheduler(optimizer, 10)
    optimizer.step()


def test_a_schedule_and_a_target_exclude_each_other_whichever_comes_first():
    weight = nn.Parameter(torch.randn(8, 8))
    optimizer = PAdam([{"params": [weight], "target_sparsity": 0.5}], lr=1e-3, p_norm=0.5)
    with pytest.raises(ValueError, match="target_sparsity and a p-schedule exclude each other"):
        PNormScheduler(optimizer, 100)


def test_a_schedule_does_not_lead_to_where_s_cannot_follow():
    with pytest.raises(ValueError, match=r"s_rate=0.5 and p_norm=-1.0 exclude each other"):
        PAdam([{"params": [nn.Parameter(torch.ones(4, 4))], "final_p_norm": -1.0}], p_norm=2.0, s_rate=0.5)
