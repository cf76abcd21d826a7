"""The report of a checkpoint's sparsity, against counts made with NumPy alone from the dense files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from hf_padam import compress
from hf_padam.__main__ import main


def sparse(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param[torch.rand(param.shape) < 0.55] = 0
                param[torch.rand(param.shape) < 0.02] = 1e-12
    return model


@pytest.fixture(params=["llama", "gpt2"])
def checkpoint(request, tmp_path):
    model = sparse(tiny_llama() if request.param == "llama" else tiny_gpt2())
    model.save_pretrained(tmp_path / request.param, max_shard_size="1GB")
    return tmp_path / request.param


def report_of(path, capsys, *options):
    main(["sparsity", str(path), "--json", "-", *options])
    return json.loads(capsys.readouterr().out)


def blocks_that_hold(matrix, n, m):
    """Along the input: Linear's weight has it last, Conv1D's first."""
    holding = [
        sum(value == 0 for value in row[start : start + m]) >= n for row in matrix for start in range(0, len(row), m)
    ]
    return sum(holding) / len(holding)


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "compressed"])
@pytest.mark.parametrize("pattern", ["2:4", "3:8", "9:16"])
def test_every_figure_is_that_of_the_files(checkpoint, compressed, pattern, tmp_path, capsys):
    tensors = load_file(checkpoint / "model.safetensors")
    if compressed:
        compress(checkpoint, tmp_path / "compressed")
    report = report_of(tmp_path / "compressed" if compressed else checkpoint, capsys, "--pattern", pattern)
    n, m = map(int, pattern.split(":"))
    assert {row["name"] for row in report["tensors"]} == set(tensors)
    for row in report["tensors"]:
        tensor = tensors[row["name"]]
        is_decayed = tensor.ndim == 2 and not any(part in row["name"] for part in ("embed", "wte", "wpe", "lm_head"))
        assert row["decayed"] == is_decayed
        assert row["elements"] == tensor.size and row["zeros"] == int((tensor == 0).sum())
        assert row["near_zeros"] == int(((np.abs(tensor) < 1e-8) & (tensor != 0)).sum())
        if is_decayed:
            matrix = tensor.T if checkpoint.name == "gpt2" else tensor
            assert row[f"{pattern}_blocks"] == blocks_that_hold(matrix.tolist(), n, m)
    decayed = [tensors[row["name"]] for row in report["tensors"] if row["decayed"]]
    zeros = sum(int((tensor == 0).sum()) for tensor in decayed)
    assert report["sparsity"] == pytest.approx(zeros / sum(tensor.size for tensor in decayed))
    everything = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    assert report["sparsity_total"] == pytest.approx(everything / sum(tensor.size for tensor in tensors.values()))


def test_names_without_the_model_prefix_are_recognised(tmp_path, capsys):
    """As in the checkpoints of GPT-2 on the Hub."""
    sparse(tiny_gpt2()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    report = report_of(tmp_path, capsys)
    assert sum(row["decayed"] for row in report["tensors"]) == 8 and "GPT2LMHeadModel" in report["decayed_by"]


def test_without_a_known_model_class_it_guesses_and_says_so(checkpoint, capsys):
    known = {row["name"] for row in report_of(checkpoint, capsys)["tensors"] if row["decayed"]}
    (checkpoint / "config.json").unlink()
    report = report_of(checkpoint, capsys)
    assert {row["name"] for row in report["tensors"] if row["decayed"]} == known
    assert "guessed" in report["decayed_by"] and "config.json" in report["decayed_by"]


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    directory = tmp_path / "model"
    tiny_llama().save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'has run')!r}, 'w')\n")
    command = [sys.executable, "-m", "hf_padam", "sparsity", str(directory)]
    result = subprocess.run(command, input="y\n", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "guessed" in result.stdout + result.stderr and "Do you wish" not in result.stdout + result.stderr
    assert not (tmp_path / "has run").exists()


def test_complex_weights_are_counted(tmp_path, capsys):
    save_torch({"w": torch.tensor([[1j, 0, 1 + 1j, 2]])}, tmp_path / "model.safetensors")
    assert report_of(tmp_path, capsys)["tensors"][0]["zeros"] == 1


def test_the_table_shows_each_layer_and_both_totals(checkpoint, capsys):
    main(["sparsity", str(checkpoint)])
    lines = capsys.readouterr().out.splitlines()
    assert "2:4 blocks" in lines[0] and sum("layers." in line or ".h." in line for line in lines) in (14, 8)
    assert lines[-3].startswith("decayed weights") and lines[-2].startswith("whole model")


def test_the_picture_is_drawn_or_the_missing_package_named(checkpoint, tmp_path, monkeypatch):
    main(["sparsity", str(checkpoint), "--picture", str(tmp_path / "zeros.png")])
    assert (tmp_path / "zeros.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"hf-padam\[recipes\]"):
        main(["sparsity", str(checkpoint), "--picture", str(tmp_path / "other.png")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/path"], "neither a directory nor a model's id"),
        (["nobody/no-such-model"], "could not be had from the Hub"),
        ([".", "--pattern", "4:2"], "no N:M pattern"),
        ([".", "--pattern", "two"], "no N:M pattern"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["sparsity", *arguments])
