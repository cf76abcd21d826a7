"""Other processes know "padam": those that a script spawns, and those that read what one has pickled."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

import hf_padam  # noqa: F401 (registers the name)

SCRIPT = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor

def arguments():
    from transformers import TrainingArguments
    return TrainingArguments("out", optim="padam", report_to="none", use_cpu=True)

def names(depth, args):
    return [args.optim.value, arguments().optim.value] + (in_pool(depth - 1, args) if depth else [])

def in_pool(*args):
    with ProcessPoolExecutor(1, multiprocessing.get_context(sys.argv[1])) as pool:
        return list(map(str, pool.submit(names, *args).result()))

if __name__ == "__main__":
    print(in_pool(1, arguments()))
"""


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_processes_that_a_script_starts_and_their_children_know_the_name(tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "hf_padam", "run", str(script), method]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == str(["padam"] * 4)


def test_pickled_arguments_can_be_read_where_nothing_has_imported_the_package(tmp_path):
    for name in ("padam", "padam_8bit"):
        args = TrainingArguments(str(tmp_path), optim=name, report_to="none", use_cpu=True)
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            (tmp_path / f"{name}.{protocol}.pickle").write_bytes(pickle.dumps(args, protocol))
        torch.save(args, tmp_path / f"{name}.bin")
    code = (
        "import pathlib, pickle, sys, torch\n"
        "for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    load = pickle.load if file.suffix == '.pickle' else lambda f: torch.load(f, weights_only=False)\n"
        "    args = load(file.open('rb'))\n"
        "    assert args.optim.value == file.name.split('.')[0] and args.optim is type(args.optim)(args.optim.value)\n"
        "    print(file.name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 2 * (pickle.HIGHEST_PROTOCOL - 1) + 2


def test_other_optimizers_are_pickled_as_ever():
    assert b"hf_padam" not in pickle.dumps(OptimizerNames.ADAMW_TORCH)
    assert all(pickle.loads(pickle.dumps(member)) is member for member in OptimizerNames)
