"""Run scripts in processes of their own, and several that work together, without waiting for imports each time.

Importing Transformers takes seconds. So a process is not started anew but forked from one that has done the imports
and nothing else; what it runs, it runs as `python SCRIPT` does.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).parent.parent
IMPORTS = [
    "hf_padam", "hf_padam.optim.backends.inductor", "hf_padam.optim.backends.triton", "transformers.trainer",
    "transformers.models.llama.modeling_llama", "transformers.data.data_collator", "evaluate", "matplotlib.pyplot",
    "torch.distributed.fsdp", "torch.distributed.tensor", "torchao.optim",
]  # fmt: skip
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(IMPORTS)


def _run(script: str, arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    gc.freeze()  # see conftest.py
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [script, *arguments]
    sys.path[:0] = [str(Path(script).parent), *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _ended(processes: list[BaseProcess], timeout: float) -> None:
    """Wait until all have ended, and end them when one of them fails or the time is over."""
    limit = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < limit:
        if any(process.exitcode for process in processes):
            limit = min(limit, time.monotonic() + 30)
        time.sleep(0.01)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def run_script(
    script: Path, *arguments: object, processes: int = 1, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script and return how it ended, and what it wrote.

    Args:
        script: Its file.
        arguments: Its command line.
        processes: How many, which find one another as those of torchrun do if there are several, or if RANK is given.
        timeout: Seconds after which they are killed.
        environment: Variables beside those of this process. One thread each, unless OMP_NUM_THREADS says otherwise.

    Returns:
        The status is that of the first process that failed; the output is all that they wrote.
    """
    defaults = {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment = os.environ | defaults | {"CUDA_VISIBLE_DEVICES": ""} | environment
    if environment["CUDA_VISIBLE_DEVICES"]:  # CUDA, of which torchao asks as it is imported, does not survive a fork
        line = [sys.executable, str(script), *map(str, arguments)]
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=timeout)
    if processes > 1 or "RANK" in environment:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    with tempfile.TemporaryDirectory() as directory:
        out, err = (Path(directory, name) for name in ("out", "err"))
        out.touch(), err.touch()
        started = []
        for rank in range(processes):
            if "WORLD_SIZE" in environment:
                environment |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            command = [str(script), [*map(str, arguments)], environment, str(out), str(err)]
            started.append(_FORKS.Process(target=_run, args=command))
            started[-1].start()
        _ended(started, timeout)
        status = next((process.exitcode for process in started if process.exitcode), 0)
        return subprocess.CompletedProcess([script, *arguments], status, out.read_text(), err.read_text())


def run_recipe(recipe: str, *arguments: object, **more) -> subprocess.CompletedProcess:
    return run_script(REPOSITORY / "recipes" / recipe, *arguments, **more)


def job(processes: int, script: str, *arguments: object) -> dict:
    """Run a script of the tests in several processes; return what the first one passed to `leave`."""
    result = run_script(REPOSITORY / "tests" / script, *arguments, processes=processes, timeout=400, RANK="0")
    assert result.returncode == 0, result.stderr[-4000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
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
