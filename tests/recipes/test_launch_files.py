"""The launch files for accelerate, and what they start: several processes that train like one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from conftest import REPOSITORY, character_tokenizer, tiny_llama
from processes import run_recipe
from safetensors.torch import load_file
from support import models
from support.arguments import ModelArguments, parse_arguments
from support.errors import UsageError
from test_recipes import write_config

LAUNCH_FILES = sorted((REPOSITORY / "recipes" / "accelerate").glob("*.yaml"))
DEEPSPEED_MISSING = (
    "deepspeed is not installed: pip install -e .[deepspeed]"
    if importlib.util.find_spec("deepspeed") is None
    else "deepspeed builds its communication on CPUs when first used: that needs a C++ compiler (c++ or g++)"
    if not (shutil.which("c++") or shutil.which("g++"))
    else None
)
needs_deepspeed = pytest.mark.skipif(DEEPSPEED_MISSING is not None, reason=str(DEEPSPEED_MISSING))


def accelerate_launch(file: str, *command: object) -> None:
    """Launch two processes on the CPU with one of the files."""
    line = [sys.executable, "-m", "accelerate.commands.launch"]
    line += ["--config_file", REPOSITORY / "recipes" / "accelerate" / file, "--num_processes", "2"]
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*map(str, [*line, *command])], capture_output=True, text=True, timeout=400, env=environment
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_accelerate_understands_every_key_of_a_launch_file(file):
    config = load_config_from_file(str(file))  # refuses unknown keys, at the top level only
    parser = launch_command_parser()
    known = vars(parser.parse_args(["script.py"]))
    for section in (config.fsdp_config, config.deepspeed_config):
        assert set(section) <= set(known)
    args, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "script.py"]))
    assert args.num_processes >= 2
    assert (args.use_fsdp, args.use_deepspeed) == (bool(config.fsdp_config), bool(config.deepspeed_config))
    assert args.use_fsdp or args.use_deepspeed or args.multi_gpu, "else accelerate starts one process"
    assert config.distributed_type in (DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED)


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_the_readme_has_every_launch_file(file):
    assert f"`{file.name}`" in (REPOSITORY / "recipes" / "README.md").read_text()


def test_several_machines_shard_as_one_does():
    one, several = (yaml.safe_load((REPOSITORY / "recipes/accelerate" / f"{name}.yaml").read_text())
                    for name in ("fsdp2", "multi_node"))  # fmt: skip
    assert one["fsdp_config"] == several["fsdp_config"]


@pytest.fixture(scope="module")
def config(tmp_path_factory, text_file) -> Path:
    """A run whose every step takes all of the data, so that the order in which processes share it cannot matter."""
    directory = tmp_path_factory.mktemp("launched")
    # Without key biases, whose gradients are all rounding noise, which Adam would blow up.
    tiny_llama(attention_bias=False).save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    settings = {
        "model_name_or_path": directory,
        "train_file": text_file,
        "max_train_samples": 4,
        "max_eval_samples": 7,
    }
    return write_config(directory, **settings, max_steps=8, per_device_train_batch_size=2)


@pytest.fixture(scope="module")
def one_process(config, tmp_path_factory) -> Path:
    """The output of one process that accumulates two batches where two processes take one each."""
    out = tmp_path_factory.mktemp("one")
    run_alone(config, out, *SAVES)
    return out


@pytest.fixture(scope="module")
def two_processes(config, tmp_path_factory) -> Path:
    """The output of two processes under cpu.yaml."""
    out = tmp_path_factory.mktemp("two")
    accelerate_launch("cpu.yaml", REPOSITORY / "recipes/finetune_clm.py", config, "--output_dir", out, *SAVES)
    return out


SAVES = ("--save_strategy", "steps", "--save_steps", "4")


def run_alone(config: Path, out: Path, *arguments: object) -> None:
    result = run_recipe("finetune_clm.py", config, "--output_dir", out, "--gradient_accumulation_steps", 2, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]


def check_equal(out: Path, reference: Path) -> None:
    """Check that a run ended with the weights, the zeros and the perplexities of another."""
    weights, expected = (load_file(directory / "model.safetensors") for directory in (out, reference))
    for name, tensor in expected.items():
        # Gradients summed in another order differ by rounding, which Adam's normalisation makes some 1e-7 of the
        # learning rate a step for most weights, and more for those with the smallest gradients. One step is 3e-3.
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    results, expected = (json.loads((directory / "results.json").read_text()) for directory in (out, reference))
    for key in ("test_perplexity_before", "test_perplexity", "validation_perplexity"):
        assert results[key] == pytest.approx(expected[key], rel=1e-5), key
    assert expected["sparsity"] > 0.01
    for key in ("sparsity", "sparsity_total"):
        assert results[key] == pytest.approx(expected[key], rel=1e-3), key  # a weight may be about to die
    for key in ("decayed_parameters", "total_parameters", "train_steps"):
        assert results[key] == expected[key], key
    assert not [file for file in out.iterdir() if file.name.startswith(".")], "only one process writes"


def test_two_processes_train_like_one_that_accumulates(two_processes, one_process):
    check_equal(two_processes, one_process)


def test_a_checkpoint_of_two_processes_goes_on_in_one(tmp_path, config, two_processes, one_process):
    run_alone(config, tmp_path, "--resume_from_checkpoint", two_processes / "checkpoint-4", *SAVES)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"], "it began at step 4"
    check_equal(tmp_path, one_process)


def test_the_loop_in_two_processes_trains_like_one(tmp_path, config, one_process):
    result = run_recipe("finetune_clm_no_trainer.py", config, "--output_dir", tmp_path, processes=2)
    assert result.returncode == 0, result.stderr[-4000:]
    check_equal(tmp_path, one_process)


def test_a_checkpoint_of_one_process_goes_on_in_two_under_hf_padam_run(tmp_path, config, one_process):
    command = ["-m", "hf_padam", "run", REPOSITORY / "recipes/finetune_clm.py", config, "--output_dir", tmp_path]
    accelerate_launch("cpu.yaml", *command, "--resume_from_checkpoint", one_process / "checkpoint-4", *SAVES)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"], "it began at step 4"
    check_equal(tmp_path, one_process)


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "recipe"),
    [
        (2, "finetune_clm.py"),
        (3, "finetune_clm_no_trainer.py"),
        pytest.param(2, "finetune_clm_no_trainer.py", marks=pytest.mark.slow),
        pytest.param(3, "finetune_clm.py", marks=pytest.mark.slow),
    ],
)
def test_deepspeed_trains_like_one_process(tmp_path, config, one_process, stage, recipe):
    # DeepSpeed's flat fp32 partitions have no names: equal zeros mean that a group's options reach its own weights.
    command = [REPOSITORY / "tests/training/distributed.py", "over_gloo", REPOSITORY / "recipes" / recipe, config]
    command += ["--output_dir", tmp_path]
    command += ["--ddp_backend", "gloo"] if recipe == "finetune_clm.py" else []
    accelerate_launch(f"deepspeed_zero{stage}.yaml", "--mixed_precision", "no", *command)
    check_equal(tmp_path, one_process)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch by fisher", "padam by fisher"])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_decays_as_one_process_does(tmp_path, config, stage, optim):
    recipe, (name, *fisher) = REPOSITORY / "recipes" / "finetune_clm.py", optim.split()
    optim = ["--optim", name, *(["--importance", "fisher", "--max_steps", "16"] if fisher else [])]
    run_alone(config, tmp_path / "one", *optim)
    command = [
        REPOSITORY / "tests/training/distributed.py",
        "over_gloo",
        recipe,
        config,
        "--ddp_backend",
        "gloo",
        *optim,
    ]
    file = f"deepspeed_zero{stage}.yaml"
    accelerate_launch(file, "--mixed_precision", "no", *command, "--output_dir", tmp_path / "two")
    check_equal(tmp_path / "two", tmp_path / "one")


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_goes_on_from_a_checkpoint_to_the_bit(tmp_path, config, stage):
    recipe = REPOSITORY / "recipes" / "finetune_clm.py"
    command = [REPOSITORY / "tests/training/distributed.py", "over_gloo", recipe, config, "--ddp_backend", "gloo"]
    command += ["--importance", "fisher", "--max_steps", "16", "--save_strategy", "steps", "--save_steps", "14"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for out, more in ((whole, []), (resumed, ["--resume_from_checkpoint", whole / "checkpoint-14"])):
        file = f"deepspeed_zero{stage}.yaml"
        accelerate_launch(file, "--mixed_precision", "no", *command, "--output_dir", out, *more)
    weights, expected = (load_file(out / "model.safetensors") for out in (resumed, whole))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert not (resumed / "checkpoint-14").exists(), "it began there"


def test_fsdp_without_a_gpu_is_refused_with_the_file_to_use(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UsageError, match="cpu.yaml"):
        parse_arguments("", ModelArguments, argv=[])


def test_a_gguf_file_under_zero3_is_refused(monkeypatch):
    """Its weights would be copied into empty placeholders, and a random model trained."""
    monkeypatch.setattr(models, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UsageError, match="fsdp2.yaml"):
        models.load_model_and_tokenizer(ModelArguments("model.gguf"), contextlib.nullcontext())
