"""Runs of versions before 0.2 go on: what these left out is put in, and what changed since is said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import blocks, options, tiny_llama
from support.loop import check_steered
from transformers import Trainer, TrainingArguments

from hf_padam import PAdamTrainer, PAdamTrainingArguments
from hf_padam.optim.target_sparsity import EARLIER_STATE
from hf_padam.resuming.checkpoints import CheckpointError

ADDED_FIELDS = (
    "importance",
    "target_pattern",
    "distill_from",
    "distill_weight",
    "distill_temperature",
    "distill_dtype",
)
ADDED_KEYS = (
    "importance", "reference", "importance_scale", "target_pool", "target_reference", "target_arrives",
)  # fmt: skip
TARGET = {"target_sparsity": 0.6, "p_norm": 0.8, "importance": "magnitude"}


def made_earlier(checkpoint):
    """Turn a checkpoint into what 0.1 would have written."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for group in state["param_groups"]:
        if "target_step" in group:
            group[EARLIER_STATE] = group["lr"] * group["lambda_p"]
        for key in ADDED_KEYS:
            group.pop(key, None)
    torch.save(state, checkpoint / "optimizer.pt")
    run = json.loads((checkpoint / "run_state.json").read_text())
    run = {key: run[key] for key in ("losses", "last_log", "settings")}
    (checkpoint / "run_state.json").write_text(json.dumps(run))
    (checkpoint / "hf_padam_complete.json").unlink()
    return str(checkpoint)


def trainer(kind, directory, chosen):
    if kind is PAdamTrainer:
        args = PAdamTrainingArguments(
            **options(directory, optim_args=None, save_strategy="steps", save_steps=5), **chosen
        )
    else:
        text = ",".join(f"{key}={value}" for key, value in chosen.items())
        args = TrainingArguments(**options(directory, optim_args=text))
    return kind(model=tiny_llama(attention_dropout=0.1), args=args, train_dataset=blocks())


def weights(trainer):
    return torch.cat([param.detach().flatten() for param in trainer.model.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were not interrupted, with checkpoints at steps 5, 10, 15 and 20; the ramp ends at 15."""
    runs = {}
    for name, chosen in {"lambda_p": {"lambda_p": 0.3, "p_norm": 0.5}, "target": TARGET}.items():
        runs[name] = trainer(PAdamTrainer, tmp_path_factory.mktemp(name), chosen), chosen
        runs[name][0].train()
    return runs


@pytest.mark.parametrize("kind", [PAdamTrainer, Trainer])
@pytest.mark.parametrize(("name", "step"), [("lambda_p", 10), ("target", 15), ("target", 10)])
def test_a_run_goes_on_exactly_unless_it_says_that_it_cannot(whole, name, step, kind, tmp_path, caplog):
    run, chosen = whole[name]
    shutil.copytree(f"{run.args.output_dir}/checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    again = trainer(kind, tmp_path, chosen)
    again.train(resume_from_checkpoint=made_earlier(tmp_path / f"checkpoint-{step}"))
    steers = (name, step) == ("target", 10)
    assert torch.equal(weights(again), weights(run)) or steers
    assert caplog.text.count("whose steering cannot be continued exactly") == steers
    assert "other settings" not in caplog.text
    if name == "target":
        assert int((weights(again) == 0).sum()) == int((weights(run) == 0).sum())


def test_arguments_that_were_pickled_load_and_mean_what_they_meant(tmp_path, monkeypatch):
    args = PAdamTrainingArguments(str(tmp_path), target_sparsity=0.6, p_norm=0.8, report_to="none", use_cpu=True)
    for name in ADDED_FIELDS:
        del vars(args)[name]
    monkeypatch.setattr(PAdamTrainingArguments, "__module__", "hf_padam.trainer")
    torch.save(args, tmp_path / "training_args.bin")
    code = (
        "import sys, torch\n"
        "args = torch.load(sys.argv[1], weights_only=False)\n"
        "print({key: args.to_dict()[key] for key in ('p_norm', 'importance', 'target_sparsity', 'distill_from')})\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "training_args.bin")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    expected = {"p_norm": 0.8, "importance": "magnitude", "target_sparsity": 0.6, "distill_from": None}
    assert result.stdout.strip() == str(expected)


STEERED, FREE = {"target_sparsity": 0.6, "importance": None}, {"target_sparsity": None, "importance": None}


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        (STEERED, STEERED, None),
        (FREE, FREE, None),
        ({"target_sparsity": None}, FREE, None),
        ({"target_sparsity": 0.6}, STEERED, "saved by hf_padam before 0.2, whose steering"),
        (FREE, STEERED, "a run with no target_sparsity"),
        (FREE, FREE | {"target_pattern": "2:4"}, "a run with no target_sparsity"),
        (STEERED, FREE, "a run with a target_sparsity"),
    ],
)
def test_the_loop_refuses_a_checkpoint_that_was_steered_otherwise(saved, given, message):
    if message is None:
        check_steered("checkpoint-5", saved, given)
        return
    with pytest.raises(CheckpointError, match=message):
        check_steered("checkpoint-5", saved, given)
