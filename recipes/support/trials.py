"""Run recipes as processes of their own, several at a time where there are several GPUs, and keep what is finished."""

from __future__ import annotations

import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_padam.files import locked, write_atomically
from hf_padam.resuming.interruption import EXIT_STATUS

from .config_files import as_arguments
from .errors import RunFailed, UsageError

Options = dict[str, Any]
RECIPES = Path(__file__).parents[1]
_REQUEST = "options.json"
TRAINING_RECIPES = ("pretrain_char.py", "finetune_clm.py", "finetune_clm_no_trainer.py")


@dataclass(frozen=True)
class Job:
    """One run of a recipe."""

    recipe: str  # a file name in recipes/
    options: Options
    output_dir: Path
    needs: tuple[Path, ...] = ()  # output directories of the jobs that must be finished before

    @property
    def request(self) -> str:
        """What is run, as text by which another run of the same is known."""
        return json.dumps({"recipe": self.recipe, "options": self.options}, indent=1, sort_keys=True) + "\n"


class Runner:
    """Runs jobs, each on a GPU of its own where there are GPUs, else on a share of the CPU's cores.

    Args:
        jobs: How many run at a time; one per GPU, or one on a CPU, by default.
    """

    def __init__(self, jobs: int | None = None) -> None:
        gpus = torch.cuda.device_count()
        if jobs is not None and jobs < 1:
            raise UsageError(f"--jobs {jobs} is too small: it must be at least 1")
        self.jobs = jobs or max(1, gpus)
        self._slots: queue.Queue[dict[str, str]] = queue.Queue()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(i) for i in range(gpus)]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        for i in range(self.jobs):
            threads = {"OMP_NUM_THREADS": str(max(1, cores // self.jobs))} if self.jobs > 1 else {}
            self._slots.put({"CUDA_VISIBLE_DEVICES": names[i % gpus]} if gpus else threads)
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.RLock()  # a signal's handler may come while it is held
        self._stopped = False
        signal.signal(signal.SIGTERM, self._exit)

    @staticmethod
    def finished(job: Job) -> dict[str, Any] | None:
        """Return the results that an earlier run with the same options left, if any."""
        request, results = job.output_dir / _REQUEST, job.output_dir / "results.json"
        if results.is_file() and request.is_file() and request.read_text() == job.request:
            return json.loads(results.read_text())
        return None

    def run(self, job: Job) -> dict[str, Any]:
        """Run one job, or take the results that an earlier run with the same options left.

        Raises:
            RunFailed: If it ends without results.
            BusyError: If another command is running it.
            UsageError: If it refuses its options, or a finished run of other options is in its place.
        """
        with locked(job.output_dir.with_name(f".{job.output_dir.name}.lock")):
            finished = self.finished(job)
            return self._run(job) if finished is None else finished

    def _run(self, job: Job) -> dict[str, Any]:
        results, log = (job.output_dir / name for name in ("results.json", "log.txt"))
        if results.is_file():
            raise UsageError(
                f"{job.output_dir} holds a finished run of other options: remove it, or give another --output_dir"
            )
        shutil.rmtree(job.output_dir, ignore_errors=True)
        job.output_dir.mkdir(parents=True)
        write_atomically(job.output_dir / _REQUEST, job.request)
        environment = self._slots.get()
        try:
            command = [sys.executable, str(RECIPES / job.recipe), *_arguments(job)]
            with open(log, "w") as output, self._lock:
                if self._stopped:
                    raise RunFailed("stopped before it began")
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
                )
                self._running.add(process)
            status = process.wait()
        finally:
            self._slots.put(environment)
        with self._lock:
            self._running.discard(process)
        if status != 0 or not results.is_file():
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            reason = lines[-1] if lines else f"exit status {status}"
            kind = UsageError if status == UsageError.exit_status else RunFailed
            raise kind(f"the run in {job.output_dir} failed: {reason} (all of its output is in {log})")
        return json.loads(results.read_text())

    def run_all(
        self, jobs: Sequence[Job], done: Callable[[Job, dict[str, Any] | RunFailed], None]
    ) -> list[dict[str, Any] | RunFailed]:
        """Run jobs, call `done` after each, and return their results, or how they failed, in order.

        They begin in order, but for those that need one of the others: these wait for it, and fail if it does. No two
        may need each other.

        Raises:
            UsageError: Of the first job that cannot begin; no other one is started then.
        """
        outcomes: dict[Path, dict[str, Any] | RunFailed] = {}
        waiting = list(jobs)
        running: dict[Future[dict[str, Any]], Job] = {}
        places = {job.output_dir for job in jobs}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or running:
                    ready = [job for job in waiting if places.intersection(job.needs) <= outcomes.keys()]
                    for job in ready[: self.jobs - len(running)]:
                        waiting.remove(job)
                        running[pool.submit(self._run_after, job, outcomes)] = job
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        try:
                            outcomes[job.output_dir] = future.result()
                        except RunFailed as error:
                            outcomes[job.output_dir] = error
                        done(job, outcomes[job.output_dir])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise
        return [outcomes[job.output_dir] for job in jobs]

    def _run_after(self, job: Job, outcomes: Mapping[Path, dict[str, Any] | RunFailed]) -> dict[str, Any]:
        for place in job.needs if self.finished(job) is None else ():
            if isinstance(outcomes.get(place), RunFailed):
                raise RunFailed(f"the run in {job.output_dir} needs that in {place}, which failed")
        return self.run(job)

    def _exit(self, *_: Any) -> None:
        self.stop()
        sys.exit(EXIT_STATUS)

    def stop(self) -> None:
        """Terminate what is running, and start nothing more."""
        with self._lock:
            self._stopped = True
            for process in list(self._running):
                process.terminate()


def _arguments(job: Job) -> list[str]:
    return [*as_arguments(job.options), "--output_dir", str(job.output_dir), "--disable_tqdm", "true"]


def check_options(job: Job) -> None:
    """Parse a job's options as its recipe will, so that what it refuses is known before anything runs.

    Raises:
        UsageError: Naming the job, and what is wrong.
    """
    recipe = importlib.import_module(job.recipe.removesuffix(".py"))
    environment = dict(os.environ)  # which TrainingArguments change, and later runs inherit
    try:
        recipe.parse(_arguments(job))
    except UsageError as error:
        raise UsageError(f"{job.output_dir.name}: {error}") from error
    except SystemExit as exit:  # of argparse, which has said why
        raise UsageError(f"{job.output_dir.name}: its options are refused, see above") from exit
    finally:
        os.environ.clear()
        os.environ.update(environment)


def read_plan(path: str, keys: Mapping[str, type], optional: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a YAML file of a comparison or a sweep.

    Args:
        path: The file.
        keys: The keys it must have, and the types of their values.
        optional: Keys it may have besides.

    Raises:
        UsageError: If it cannot be read, or has other keys or types.
    """
    try:
        plan = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {error}") from error
    optional = optional or {}
    if not isinstance(plan, dict) or not set(keys) <= set(plan) <= {*keys, *optional}:
        given = ", ".join(map(str, plan)) if isinstance(plan, dict) else type(plan).__name__
        may = f", and may have {', '.join(optional)}" if optional else ""
        raise UsageError(f"{path} must have the keys {', '.join(keys)}{may}; it has {given}")
    for key, kind in {key: kind for key, kind in {**keys, **optional}.items() if key in plan}.items():
        if not isinstance(plan[key], kind) or plan[key] in ("", [], {}):
            raise UsageError(f"{path}: {key} is {plan[key]!r}, which is empty or of the wrong type")
    if plan["recipe"] not in TRAINING_RECIPES:
        raise UsageError(f"{path}: recipe is {plan['recipe']!r}; it must be one of {', '.join(TRAINING_RECIPES)}")
    return plan


def extra_options(arguments: Sequence[str]) -> Options:
    """Turn ``--name value`` pairs, meant for the recipe, into options.

    Raises:
        UsageError: If they are not of that form.
    """
    options: Options = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")  # argparse takes both
            options[name] = [value] if equals else []
        elif not options:
            raise UsageError(f"unexpected argument {argument!r}: options for the recipe are --name value")
        else:
            options[name].append(argument)
    for name, values in options.items():
        if not values:
            raise UsageError(f"option --{name} for the recipe has no value")
    return {name: values[0] if len(values) == 1 else values for name, values in options.items()}
