"""PAdamTrainer with lambda_p and an optimizer that is not PAdam: short runs, resumed runs, what is refused."""

from __future__ import annotations

import contextlib
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import blocks, options, tiny_llama
from test_interruptions import At, rows, weights
from test_trainer import check_outcome
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from hf_padam import PAdam, PAdamTrainer, PAdamTrainingArguments, add_pnorm_decay
from hf_padam.optim.any_optimizer import has_pnorm_decay
from hf_padam.resuming.checkpoints import CheckpointError
from hf_padam.training.callbacks import CallbackFromGroups
from hf_padam.training.options import check_deepspeed

DECAY = {"optim_args": None, "p_norm": 0.5, "lambda_p": 0.3}


def arguments(directory, **more) -> PAdamTrainingArguments:
    return PAdamTrainingArguments(**options(directory, **DECAY | {"optim": "adamw_torch"} | more))


def trainer_for(directory, **more) -> PAdamTrainer:
    model = tiny_llama(attention_dropout=0.1)
    return PAdamTrainer(model=model, args=arguments(directory, **more), train_dataset=blocks())


@pytest.mark.parametrize(
    ("optim", "more"),
    [
        ("adamw_torch", {}),
        ("adamw_torch_fused", {"decay_embeddings": True}),
        ("adafactor", {}),
        ("sgd", {"learning_rate": 0.03, "p_norm": 0.8, "lambda_p": 0.1}),
    ],
)
def test_a_short_run_makes_zeros_in_the_weights_that_padam_would_decay(tmp_path, optim, more):
    trainer = trainer_for(tmp_path, optim=optim, **more)
    trainer.train()
    check_outcome(trainer.model, None, embeddings_decay="decay_embeddings" in more)
    padam = PAdamTrainingArguments(**options(tmp_path, optim_args=None, **more))
    reference = PAdamTrainer(model=tiny_llama(), args=padam)
    reference.create_optimizer()
    expected = {id(p) for p in reference.optimizer.param_groups[0]["params"]}
    names = {name for name, p in reference.model.named_parameters() if id(p) in expected}
    parameters = dict(trainer.model.named_parameters())
    decaying = {id(p) for group in trainer.optimizer.param_groups if group["lambda_p"] for p in group["params"]}
    assert decaying == {id(parameters[name]) for name in names} and names == set(trainer.decayed_names())
    logged = [row["sparsity"] for row in trainer.state.log_history if "loss" in row]
    assert logged[-1] > 0.001


def test_no_lambda_p_means_no_decay_but_padams_own(tmp_path):
    plain = trainer_for(tmp_path, p_norm=0.8, lambda_p=None, max_steps=5)
    plain.train()
    reference = Trainer(model=tiny_llama(attention_dropout=0.1), args=plain.args, train_dataset=blocks())
    reference.train()
    assert torch.equal(weights(plain.model), weights(reference.model))
    assert not has_pnorm_decay(plain.optimizer) and "lambda_p" not in plain.optimizer.param_groups[0]
    padam = arguments(tmp_path, optim="padam", lambda_p=None, optim_args="p_norm=0.5")
    assert (padam.to_dict()["p_norm"], padam.to_dict()["lambda_p"]) == (0.5, 0.1)
    assert arguments(tmp_path, p_norm=0.8, lambda_p=None).to_dict()["lambda_p"] is None


def test_a_run_that_is_interrupted_goes_on_bit_for_bit(tmp_path):
    schedule = dict(max_steps=8, logging_steps=3, lr_scheduler_type="cosine", warmup_steps=2)
    whole = trainer_for(tmp_path / "whole", **schedule)
    whole.train()
    stopped = trainer_for(tmp_path / "stopped", **schedule)
    stopped.add_callback(At(4, lambda _: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit):
        stopped.train()
    resumed = trainer_for(tmp_path / "stopped", **schedule)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed.model), weights(whole.model)) and (weights(whole.model) == 0).any()
    assert rows(resumed) == rows(whole)


def test_a_checkpoint_with_another_decay_is_noticed(tmp_path, caplog):
    schedule = dict(max_steps=4, save_strategy="steps", save_steps=2)
    trainer_for(tmp_path, **schedule).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    other = trainer_for(tmp_path, **schedule, lambda_p=0.5)
    other.train(resume_from_checkpoint=checkpoint)
    assert "lambda_p: 0.3 -> 0.5 (the saved value is used)" in caplog.text
    assert {group["lambda_p"] for group in other.optimizer.param_groups} == {0.3, 0.0}
    elsewhere = trainer_for(tmp_path, **schedule, decay_embeddings=True)
    with pytest.raises(CheckpointError, match="the p-norm decay acts on .* weights .*, here on .* weights"):
        elsewhere.train(resume_from_checkpoint=checkpoint)
    without = trainer_for(tmp_path, **schedule, p_norm=0.8, lambda_p=None)
    with pytest.raises(CheckpointError, match="a run with a p-norm decay added to its optimizer: give lambda_p too"):
        without.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"lambda_p": None}, "p_norm=0.5 has no effect on optim='adamw_torch' without lambda_p"),
        (
            {"lambda_p": None, "p_norm": 0.8, "p_norm_schedule": "cosine"},
            "p_norm_schedule='cosine' has no effect on optim='adamw_torch' without lambda_p",
        ),
        ({"target_start": 0.5}, "target_start=0.5 is an option of padam and has no effect"),
        ({"target_scope": "layer"}, "target_scope='layer' is an option of padam and has no effect"),
        ({"lambda_p": -1.0}, "lambda_p=-1.0 is not allowed"),
        ({"optim_args": "lambda_p=0.3"}, "lambda_p is an option of padam, not of adamw_torch.*--lambda_p"),
        ({"optim": "lomo"}, "does not go with optim='lomo': it updates each layer during the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "does not go with optim='galore_adamw_layerwise'"),
        ({"optim": "schedule_free_adamw"}, "averages over the steps"),
    ],
)
def test_what_would_have_no_effect_is_refused_before_anything_is_loaded(tmp_path, more, match):
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, **more)


def test_a_schedule_lets_zeros_grow_at_first_as_with_padam(tmp_path):
    """At p = 2 a tensor of zeros can still train; the group's own p is reached later."""
    trainer = trainer_for(tmp_path, p_norm_schedule="linear", max_steps=8)
    name, param = next(item for item in trainer.model.named_parameters() if "down_proj.weight" in item[0])
    torch.nn.init.zeros_(param)
    trainer.train()
    assert (param != 0).any(), name
    assert {group["p_norm"] for group in trainer.optimizer.param_groups if group["lambda_p"]} == {0.5}


def test_targets_that_match_nothing_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="optim_target_modules=.*matches no module"):
        trainer_for(tmp_path, optim_target_modules=["nowhere"]).create_optimizer()


def test_an_optimizer_of_the_users_own_decays_once(tmp_path):
    model = tiny_llama(attention_bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = PAdamTrainer(model=model, args=arguments(tmp_path), train_dataset=blocks(), optimizers=(optimizer, None))
    trainer.train()
    assert (weights(model) == 0).any()
    with pytest.raises(ValueError, match="has a p-norm decay already"):
        add_pnorm_decay(optimizer)


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, None),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}, None),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"optimizer": {"type": "AdamW"}}, "an optimizer section"),
    ],
)
def test_an_optimizer_that_deepspeed_makes_is_refused(config, refused):
    if refused is None:
        check_deepspeed(config, "sgd")
    else:
        with pytest.raises(ValueError, match=f"in place of sgd: its configuration has {refused}"):
            check_deepspeed(config, "sgd")


def test_padam_that_deepspeed_has_replaced_is_missed_in_any_trainer(tmp_path):
    args = TrainingArguments(str(tmp_path), optim="padam", use_cpu=True)
    args.deepspeed_plugin = SimpleNamespace(
        deepspeed_config={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    )
    own, padam = (kind([torch.nn.Parameter(torch.ones(2))], lr=0.1) for kind in (torch.optim.SGD, PAdam))
    for inner, refused in ((padam, False), (own, True)):
        wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))  # as accelerate and ZeRO do
        with pytest.raises(ValueError, match="in place of padam") if refused else contextlib.nullcontext():
            CallbackFromGroups().on_train_begin(args, TrainerState(), TrainerControl(), optimizer=wrapped)


def test_the_plain_trainer_says_that_it_adds_no_decay(tmp_path):
    with pytest.raises(ValueError, match="lambda_p=0.3 has no effect on optim='adamw_torch' in this Trainer"):
        Trainer(tiny_llama(), arguments(tmp_path), train_dataset=blocks()).train()
    Trainer(tiny_llama(), arguments(tmp_path, lambda_p=0.0, p_norm=None), train_dataset=blocks()).train()


def test_another_optimizer_cannot_prune(tmp_path):
    with pytest.raises(ValueError, match="p_norm=-inf needs a target_sparsity"):
        arguments(tmp_path, p_norm="-inf")
