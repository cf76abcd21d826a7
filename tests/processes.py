"""Run the scripts beside the tests in several real processes, and what these scripts share."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch.distributed as dist
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


def leave(result: dict) -> None:
    """Print the result on the first process, and end this one at once.

    Without an interpreter's usual end: torch's threads (gloo's, checkpointing's) are still running then in one run of
    four or so, and abort the process although all is done.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("RESULT " + json.dumps(result), flush=True)  # noqa: T201
    if dist.is_initialized():
        dist.barrier()
    sys.stderr.flush()
    os._exit(0)
