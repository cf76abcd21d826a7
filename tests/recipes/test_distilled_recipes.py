"""Both recipes distil: alike, from any name that a model has, and through a kill."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from conftest import REPOSITORY, character_tokenizer, tiny_llama
from processes import run_recipe
from support import loop
from support.errors import UsageError
from test_bad_inputs import complain as complain  # a fixture
from test_recipes import RECIPES, write_config
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    """A saved model with the tokenizer of `model_dir` and a padded vocabulary."""
    directory = tmp_path_factory.mktemp("teacher")
    tiny_llama(hidden_size=40, vocab_size=104).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_both_recipes_distil_alike(tmp_path, model_dir, teacher_dir, text_file):
    results = []
    settings = {"model_name_or_path": model_dir, "train_file": text_file, "max_train_samples": 4, "max_steps": 8}
    settings |= {"distill_temperature": 2.0, "distill_weight": 0.8}
    for recipe in RECIPES:
        out = tmp_path / recipe
        config = write_config(tmp_path, **settings, output_dir=out, distill_from=teacher_dir)
        result = run_recipe(recipe, config)
        assert result.returncode == 0, result.stderr[-3000:]
        results.append(json.loads((out / "results.json").read_text()))
    for key in ("test_perplexity_before", "test_perplexity", "validation_perplexity", "sparsity"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-4), key
    undistilled = write_config(tmp_path, model_name_or_path=model_dir, train_file=text_file, max_train_samples=4,
                               max_steps=8, output_dir=tmp_path / "plain")  # fmt: skip
    assert run_recipe(RECIPES[0], undistilled).returncode == 0
    plain = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert plain["test_perplexity"] != pytest.approx(results[0]["test_perplexity"], rel=1e-3)


@pytest.mark.parametrize("recipe", [pytest.param(RECIPES[0], marks=pytest.mark.slow), *RECIPES[1:]])
def test_a_resumed_run_has_the_model_of_the_start_for_its_teacher(tmp_path, model_dir, text_file, recipe):
    settings = {"model_name_or_path": model_dir, "train_file": text_file, "max_steps": 12, "distill_from": "start"}
    config = write_config(tmp_path, **settings, save_strategy="steps", save_steps=4)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_recipe(recipe, config, "--output_dir", whole).returncode == 0
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    result = run_recipe(recipe, config, "--output_dir", resumed, "--resume_from_checkpoint", "true")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "other settings" not in result.stderr
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # From the trained model, "start" would be another teacher.
    trained = ["--model_name_or_path", whole, "--output_dir", resumed, "--resume_from_checkpoint", "true"]
    shutil.rmtree(resumed / "checkpoint-8")
    shutil.rmtree(resumed / "checkpoint-12")
    result = run_recipe(recipe, config, *trained)
    assert result.returncode == 1 and "the model that the run began with" in result.stderr


@pytest.mark.slow
def test_what_is_pruned_is_distilled_too(tmp_path, model_dir, teacher_dir, text_file):
    settings = {"model_name_or_path": model_dir, "train_file": text_file, "max_steps": 4, "optim": "adamw_torch"}
    config = write_config(tmp_path, **settings, prune_to=0.5, prune_interval=1)
    config.write_text("\n".join(r for r in config.read_text().splitlines() if "_norm" not in r and "lambda" not in r))
    tensors = []
    for options in ([], ["--distill_from", teacher_dir]):
        out = tmp_path / str(len(options))
        result = run_recipe("finetune_clm.py", config, "--output_dir", out, *options)
        assert result.returncode == 0, result.stderr[-3000:]
        results = json.loads((out / "results.json").read_text())
        assert results["sparsity"] == pytest.approx(0.5, abs=0.01)
        tensors.append((out / "model.safetensors").read_bytes())
    assert tensors[0] != tensors[1]


@pytest.mark.parametrize("script", RECIPES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_from": "no/such-model"}, "'no/such-model' could not be loaded.*looked up on the Hugging Face"),
        ({"distill_from": "no_such_file.gguf"}, "--distill_from no_such_file.gguf does not exist"),
        ({"distill_from": "pypi:gpt5"}, "pypi:gpt5 is not a known model"),
        ({"distill_from": "other"}, "distill_from='.*other' has a vocabulary of 300 tokens|another tokenizer"),
        ({"distill_weight": 0.4}, "distill_weight=0.4 has no effect without distill_from"),
        ({"distill_from": "start", "distill_weight": 2}, "distill_weight=2.0 is not a share"),
        ({"distill_from": "start", "distill_temperature": -1}, "distill_temperature=-1.0 must be"),
    ],
)
def test_a_teacher_that_cannot_be_is_one_message(complain, tmp_path, script, changes, message):
    if changes.get("distill_from") == "other":
        tokens = {chr(code): code - 32 for code in range(32, 127)} | {"<unk>": 95}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="<unk>")), unk_token="<unk>"
        )
        tiny_llama().to(torch.float16).save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        changes = {"distill_from": tmp_path / "other"}
    if script == RECIPES[1]:
        changes = changes | {"use_cpu": None}
    assert re.search(message, complain(script=str(REPOSITORY / "recipes" / script), **changes), re.DOTALL)


def test_the_loop_refuses_a_teacher_that_zero3_would_shard(monkeypatch):
    monkeypatch.setattr(loop, "is_deepspeed_zero3_enabled", lambda: True)
    args = loop.LoopArguments(output_dir="out", distill_from="start")
    with pytest.raises(UsageError, match="--distill_from start under ZeRO-3"):
        loop.make_distillation(args, tiny_llama(), None, None, None)
