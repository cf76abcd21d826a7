"""Targets by modules: which weights an entry is for, what arrives, how a mapping gets in, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import blocks, tiny_gpt2, tiny_llama
from support.arguments import parse_arguments
from support.config_files import save_config
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from hf_padam import (
    PAdam,
    PAdamTrainer,
    PAdamTrainingArguments,
    PNormScheduleCallback,
    TargetSparsity,
    TargetSparsityCallback,
    decayed_parameters,
    get_param_groups,
)
from hf_padam.optim.target_sparsity import steering_of
from hf_padam.resuming.checkpoints import CheckpointError
from hf_padam.training import callbacks
from hf_padam.training.optim_args import parse_optim_args

SHARES = {"mlp": 0.8, "attn": 0.5}


def arguments(directory, cls=PAdamTrainingArguments, **options):
    common = dict(output_dir=str(directory), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    return cls(**common | dict(optim="padam", learning_rate=1e-3, max_steps=20, logging_steps=5) | options)


def share(params) -> float:
    params = list(params)
    return sum((p == 0).sum().item() for p in params) / sum(p.numel() for p in params)


def of(model, part: str) -> list[torch.Tensor]:
    return [param for name, param in decayed_parameters(model).items() if part in name]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("importance", ["magnitude", "fisher"])
def test_each_entry_arrives_at_its_own_share(tmp_path, scope, importance):
    options = dict(target_sparsity=SHARES, target_scope=scope, importance=importance)
    trainer = PAdamTrainer(model=tiny_llama(), args=arguments(tmp_path, **options), train_dataset=blocks())
    trainer.train()
    for part, target in SHARES.items():
        params = of(trainer.model, part)
        for pool in [params] if scope == "global" else [[param] for param in params]:
            assert target <= share(pool) < target + 1 / pool[0].numel()
    steering, sparsity = steering_of(trainer.optimizer), trainer.sparsity()["sparsity"]
    assert steering.met and steering.target == pytest.approx(sparsity, abs=1e-3)
    assert steering.state()["planned_sparsity"] == pytest.approx(sparsity, abs=1e-3)


@pytest.mark.parametrize(
    ("entries", "dense"),
    [
        ({"mlp": 0.8}, ["attn"]),
        ({r".*\.0\..*proj": 0.6}, ["h.1.", "layers.1."]),
        ({"mlp": 0.8, "*": 0.3}, []),
        ({"*": 0.4}, []),
    ],
)
def test_weights_of_no_entry_stay_dense_and_are_not_counted_unless_there_is_a_star(entries, dense):
    model = tiny_llama()
    chosen = decayed_parameters(model, target_sparsity=entries)
    everything = decayed_parameters(model)
    assert chosen.keys() == {name for name in everything if not any(part in name for part in dense)}
    groups = get_param_groups(model, p_norm=-1.0, target_sparsity=entries)
    steered = {name: group for group in groups for name, _ in group["params"] if group["lambda_p"] > 0}
    assert list(steered) == list(chosen)
    for name, group in steered.items():
        first = next((key for key in entries if key in name), "*" if "*" in entries else next(iter(entries)))
        assert group["target_sparsity"] == entries[first]
    grouped = [name for group in groups for name, _ in group["params"]]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())


def test_a_weight_belongs_to_the_first_entry_that_matches_it():
    model = tiny_llama()
    narrow_first = get_param_groups(model, target_sparsity={"layers.0.mlp": 0.3, "mlp": 0.8})
    assert [g["target_sparsity"] for g in narrow_first[:-1]] == [0.3, 0.8]
    assert all("layers.0." in name for name, _ in narrow_first[0]["params"])
    with pytest.raises(ValueError, match="the entry 'layers.0.mlp' has no weight.*put it before"):
        get_param_groups(model, target_sparsity={"mlp": 0.8, "layers.0.mlp": 0.3})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"mpl": 0.5}, "target_sparsity='mpl' matches no module.*modules are named like"),
        ({"mlp": 0.5, "(": 0.5}, "target_sparsity='.' is not a regular expression"),
        ({"norm": 0.5}, "the entry 'norm' has no weight"),
        ({"mlp": 0.5, "self_attn": 0.5, "*": 0.5}, "the entry '.' has no weight"),
    ],
)
def test_an_entry_that_is_for_nothing_is_an_error(entries, message):
    with pytest.raises(ValueError, match=message):
        get_param_groups(tiny_llama(), target_sparsity=entries)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mlp": 1.5}, "target_sparsity=1.5 is not allowed"),
        ({"mlp": "0.5"}, "must be a number or a mapping from modules to numbers"),
        ({"mlp": True}, "must be a number or a mapping"),
        ({1: 0.5}, "must be a number or a mapping"),
        ([0.5], "must be a number or a mapping"),
        ({}, "names no module"),
        ('{"mlp": 0.5', "is not a mapping in JSON"),
        ("{mlp: 0.5}", "is not a mapping in JSON"),
        ('{"mlp": 0.5, "attn": 0.4, "mlp": 0.8}', "'mlp' is given twice"),
    ],
    ids=str,
)
def test_a_mapping_that_is_none_is_refused_before_anything_is_loaded(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, target_sparsity=given)


def test_a_mapping_to_numbers_of_numpy_can_be_written_down(tmp_path):
    args = arguments(tmp_path, target_sparsity={"mlp": np.float32(0.5)})
    assert json.loads(args.to_json_string())["target_sparsity"] == {"mlp": 0.5}


def test_a_mapping_gets_in_by_optim_args(tmp_path):
    text = 'target_sparsity={"mlp": 0.8, "attn": 0.5}, target_end=0.5,p_norm=-1'
    assert parse_optim_args(text) == {"target_sparsity": SHARES, "target_end": 0.5, "p_norm": -1.0}
    args = arguments(tmp_path, TrainingArguments, optim_args=text)
    trainer = Trainer(model=tiny_gpt2(), args=args, train_dataset=blocks())
    trainer.train()
    assert share(of(trainer.model, "mlp")) == pytest.approx(0.8, abs=1e-3)
    assert share(of(trainer.model, "attn")) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("kind", ["command line", "yaml", "json"])
def test_a_mapping_gets_in_by_command_lines_and_config_files(tmp_path, kind):
    config = {"output_dir": str(tmp_path), "target_sparsity": SHARES, "report_to": "none"}
    if kind == "command line":
        argv = [word for key, value in config.items() for word in (f"--{key}", value)]
        argv[argv.index(SHARES)] = json.dumps(SHARES)
    else:
        file = tmp_path / f"config.{kind}"
        file.write_text(yaml.safe_dump(config, sort_keys=False) if kind == "yaml" else json.dumps(config))
        argv = [str(file)]
    (args,) = parse_arguments("", PAdamTrainingArguments, argv=argv)
    assert args.target_sparsity == SHARES and list(args.target_sparsity) == list(SHARES)
    save_config(tmp_path / "saved.yaml", args)
    (again,) = parse_arguments("", PAdamTrainingArguments, argv=[str(tmp_path / "saved.yaml")])
    assert again.target_sparsity == SHARES


@pytest.mark.parametrize(("words", "expected"), [(["--target_sparsity", "0.5"], 0.5), ([], None)])
def test_a_number_still_gets_in_by_command_lines(tmp_path, words, expected):
    (args,) = parse_arguments("", PAdamTrainingArguments, argv=["--output_dir", str(tmp_path), *words])
    assert args.target_sparsity == expected


def test_a_run_with_shares_by_modules_goes_on_exactly_and_other_modules_are_refused(tmp_path):
    def trainer(shares):
        options = dict(target_sparsity=shares, save_strategy="steps", save_steps=6, max_steps=12)
        return PAdamTrainer(model=tiny_llama(), args=arguments(tmp_path, **options), train_dataset=blocks())

    checkpoint = str(tmp_path / "checkpoint-6")
    whole = trainer(SHARES)
    whole.train()
    resumed = trainer(SHARES)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    halves = {"layers.0": 0.8, "layers.1": 0.5}
    for others in ({"mlp": 0.8}, {"attn": 0.5, "mlp": 0.8}, halves):
        with pytest.raises(
            CheckpointError,
            match="modules of target_sparsity as they were|is of other parameter groups: .*target_sparsity",
        ):
            trainer(others).train(resume_from_checkpoint=checkpoint)


def test_a_state_of_the_same_sizes_in_another_order_is_refused():
    """Else each layer would go on with the moments of the other."""

    def optimizer(shares):
        return PAdam(get_param_groups(tiny_llama(), target_sparsity=shares), lr=1e-3)

    state = optimizer({"layers.0": 0.8, "layers.1": 0.5}).state_dict()
    other = optimizer({"layers.1": 0.5, "layers.0": 0.8})
    with pytest.raises(ValueError, match="in another order"):
        other.load_state_dict(state)
    assert [group["target_sparsity"] for group in other.param_groups[:2]] == [0.5, 0.8]
    optimizer({"layers.0": 0.8, "layers.1": 0.5}).load_state_dict(state)


@pytest.mark.parametrize(
    ("shares", "pools", "expected"),
    [((0.25, 0.75), (), (0.25, 0.75)), ((0.5, 0.5), (), (0.0, 1.0)), ((0.25, 0.75), ("a", "a"), (0.25, 0.75))]
    + [((0.5, 0.5), ("a", "b"), (0.5, 0.5))],
)
def test_groups_of_ones_own_making_arrive_at_the_shares_that_they_give(shares, pools, expected):
    weights = [torch.nn.Parameter(torch.linspace(low, low + 1, 64)) for low in (5, 0.5)]
    groups = [{"params": [w], "target_sparsity": share} for w, share in zip(weights, shares, strict=True)]
    for group, pool in zip(groups, pools, strict=False):
        group["target_pool"] = pool
    optimizer = PAdam(groups, lr=1e-9)
    steering = TargetSparsity(optimizer, None, 10)
    for _ in range(10):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert [(weight == 0).float().mean().item() for weight in weights] == list(expected) and steering.met


def test_groups_without_a_target_are_not_steered_to_the_groups_own():
    optimizer = PAdam([{"params": [torch.nn.Parameter(torch.ones(4, 4))]}])
    with pytest.raises(ValueError, match="nothing to steer: .* and a target_sparsity"):
        TargetSparsity(optimizer, None, 10)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_groups_with_a_target_that_nothing_steers_are_refused_before_a_weight_dies(pattern):
    """Their p of -inf would zero the whole model."""
    model = tiny_llama()
    target = {"target_pattern": pattern} if pattern else {"target_sparsity": 0.5}
    optimizer = PAdam(get_param_groups(model, **target), lr=1e-3)
    before = {name: param.clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=r"nothing steers it.*TargetSparsity\(optimizer, total_steps"):
        optimizer.step()
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())
    TargetSparsity(optimizer, total_steps=20)
    optimizer.step()


def test_groups_of_both_importances_in_one_pool_are_measured_alike():
    """Sizes under fisher have a unit of their own; the same weights with the same gradients die alike."""
    torch.manual_seed(0)
    first = torch.nn.Parameter(torch.randn(200, 200) / 50)
    second = torch.nn.Parameter(first.detach().clone())
    groups = [{"params": [first], "importance": "fisher"}, {"params": [second]}]
    optimizer = PAdam(groups, lr=1e-3, p_norm=0.5, lambda_p=0.1)
    TargetSparsity(optimizer, 0.5, 60)
    for _ in range(60):
        first.grad = torch.randn(200, 200) * 1e-3
        second.grad = first.grad.clone()
        optimizer.step()
    assert [float((w == 0).float().mean()) for w in (first, second)] == pytest.approx([0.5, 0.5], abs=0.05)


def test_a_step_whose_learning_rate_is_zero_decays_nothing():
    weight = torch.nn.Parameter(torch.randn(50, 50, generator=torch.Generator().manual_seed(0)))
    optimizer = PAdam([weight], lr=1e-3, p_norm=0.8, lambda_p=0.1)
    TargetSparsity(optimizer, 0.5, 40, start=0.0, end=0.9)
    for step in range(30):
        weight.grad = torch.ones_like(weight) * 1e-3
        optimizer.param_groups[0]["lr"] = 0.0 if step == 20 else 1e-3
        before = weight.detach().clone()
        optimizer.step()
        assert torch.equal(weight, before) == (step == 20)


@pytest.mark.parametrize("attached", [False, True])
def test_groups_with_a_target_are_steered_by_any_trainer_unless_the_script_does(tmp_path, attached):
    model = tiny_llama()
    optimizer = PAdam(get_param_groups(model, target_sparsity=0.5), lr=1e-3)
    steering = TargetSparsity(optimizer, total_steps=40) if attached else None
    settings = dict(max_steps=20, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path), **settings), train_dataset=blocks(), optimizers=(optimizer, None)
    )
    trainer.train()
    zeros = sum(int((param == 0).sum()) for param in decayed_parameters(model).values())
    share = zeros / sum(param.numel() for param in decayed_parameters(model).values())
    assert share == pytest.approx(0.5, abs=1e-3) if not attached else 0 < share < 0.5
    assert (steering_of(optimizer) is steering) == attached


@pytest.mark.parametrize("target", [1.5, 0, -0.1, float("nan"), "half", {"mlp": 0.5, "*": 2}])
def test_groups_are_not_made_for_a_target_that_is_no_share(target):
    with pytest.raises(ValueError, match="target_sparsity=.* is not allowed: it must be a share of zeros"):
        get_param_groups(tiny_llama(), target_sparsity=target)


@pytest.mark.parametrize(
    "callback", [TargetSparsityCallback(0.5), PNormScheduleCallback()], ids=lambda c: type(c).__name__
)
def test_what_a_sharded_resume_did_not_load_is_not_begun_anew(callback, monkeypatch):
    """Torch loads into the keys that sharded groups have, and a callback gives them theirs later."""
    optimizer = PAdam([nn.Parameter(torch.ones(4, 4))], lr=1e-3, p_norm=0.5)
    state = TrainerState(max_steps=20, global_step=5)
    monkeypatch.setattr(callbacks, "local_shard", lambda param: (param, object()))
    with pytest.raises(
        RuntimeError, match="is not in the sharded optimizer's groups.*Take (target_sparsity|PAdamTrainer)"
    ):
        callback.on_train_begin(None, state, None, optimizer=optimizer)
    state.global_step = 0
    callback.on_train_begin(None, state, None, optimizer=optimizer)


def test_a_group_on_its_way_that_nothing_steers_is_refused():
    optimizer = PAdam([nn.Parameter(torch.ones(4, 4))], lr=1e-3, p_norm=0.5)
    optimizer.param_groups[0]["target_step"] = 5
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="is to arrive at a target_sparsity, and nothing steers it"):
        optimizer.step()
