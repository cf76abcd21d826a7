"""Several real processes on one CPU (gloo) give what one process gives."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch
from conftest import tiny_llama
from processes import job
from torch import nn
from torch.distributed.fsdp import ShardingStrategy

from hf_padam import PAdam
from hf_padam.training import callbacks


def test_two_processes_train_and_evaluate_like_one(tmp_path):
    one = job(1, "training/distributed.py", "evaluate", tmp_path / "one", 4, 2)
    two = job(2, "training/distributed.py", "evaluate", tmp_path / "two", 4, 1)
    assert (one["processes"], two["processes"]) == (1, 2)
    # Sums in another order: rounding, which Adam carries on for six steps.
    assert two["eval_perplexity"] == pytest.approx(one["eval_perplexity"], rel=1e-4)
    assert two["eval_sparsity"] == pytest.approx(one["eval_sparsity"], abs=2e-3)


def test_sharded_training_equals_unsharded_training():
    result = job(2, "training/distributed.py", "shard")
    assert result["difference"] < 1e-5
    assert result["sharded"] == pytest.approx(result["plain"], abs=1e-4)
    assert result["plain"]["sparsity"] > 0.01
    assert "model.layers.0.mlp.gate_proj.weight" in result["refusal"] and "all zeros" in result["refusal"]


def test_replicas_step_with_the_whole_gradient():
    first, second = job(2, "training/distributed.py", "gradient_placements")["replicas"]
    assert first == second == pytest.approx([0.4] * 4)


def test_shards_round_differently_and_replicas_alike():
    result = job(2, "training/distributed.py", "stochastic_rounding")
    first, second = result["replicas"]
    assert first == second
    first, second = result["shards"]
    agreement = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    assert 0.5 < agreement < 0.8  # by chance: 0.74² + 0.26² = 0.62


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="runs where torchao is installed")
def test_sharded_8_bit_training_equals_unsharded_training_and_can_be_resumed(tmp_path):
    result = job(2, "training/distributed.py", "eight_bit", tmp_path)
    assert result["packed"] == [True, False]
    assert result["difference"] < 1e-5


def test_processes_that_cannot_run_the_same_backend_run_eagerly(monkeypatch, caplog):
    optimizer = PAdam([nn.Parameter(torch.ones(2, 2))])
    for others in (["hf_padam.optim.backends.eager"], ["hf_padam.optim.backends.compiled"]):
        monkeypatch.setattr("hf_padam.training.callbacks.gather_object", lambda own, others=others: [*own, others])
        callbacks._agree(optimizer)
        assert optimizer.backend == ("auto" if "eager" in others[0] else "eager")
    assert "not all processes can run" in caplog.text


@pytest.mark.parametrize("kind", ["HYBRID_SHARD", "NO_SHARD", "FULL_SHARD"])
def test_replicas_that_cannot_be_told_from_shards_are_refused(kind):
    model = tiny_llama()
    model.sharding_strategy = ShardingStrategy[kind]
    with contextlib.nullcontext() if kind == "FULL_SHARD" else pytest.raises(ValueError, match=f"FSDP1 with {kind}"):
        callbacks._check_replicas(model)
