"""Run the scripts beside the tests in several real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from conftest import REPOSITORY


def launch(processes: int, *command: object) -> subprocess.CompletedProcess:
    # Not `accelerate launch --cpu`, which starts a single process whatever --num_processes says.
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    result = subprocess.run([*line, *map(str, command)], capture_output=True, text=True, timeout=400, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def job(processes: int, script: str, *arguments: object) -> dict:
    output = launch(processes, REPOSITORY / "tests" / script, *arguments).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))
