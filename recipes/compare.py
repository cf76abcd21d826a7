r"""Compare PAdam with what people use instead: same data, same order, same steps, several seeds; a table, a picture.

    python recipes/compare.py recipes/configs/compare_char_cpu.yaml --train_file input.txt

The file names a recipe, options common to all runs, the seeds, and for each method a list of settings; `dense` is the
method with whose best loss others are compared, `reference` the one whose loss at the same sparsity is, seed by seed.
A setting may have `seeds` of its own. One with `distill_from: METHOD`, the name of a method of the plan, has for its
teacher the model that this made with the same seed and number of steps; one with `resume_from_checkpoint:
METHOD/checkpoint-99` goes on from there, and so does not repeat the steps that both have in common. Both wait for it.
That method is to save such a checkpoint (`save_strategy: steps`, `save_steps: 33`); its others are deleted.
Runs are made seed by seed, of each seed the first setting of every method, then the second ones: where settings go by
sparsity, whole comparisons are finished one after another. --methods and --seeds make those runs only, and table them
beside what is finished.

Every run is that recipe in a process of its own, one on each GPU where there are several; `log.txt`, `results.json`
and `run_config.yaml` of each are in a directory named after it. Interrupted, the same command goes on with the runs
that are not finished. A setting of which a run fails, for its loss grows out of bounds for example, is named and left
out of the table; the same command tries it again. Options after the file go to the recipe.

In the output directory, by default runs/ and the plan's name, of all that is finished: pareto.md (the table),
pareto.csv (every seed) and pareto.png.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from support.arguments import check_output_dir
from support.errors import RunFailed, UsageError, reports_usage_errors
from support.pareto import Comparison, Point, setting
from support.pruning import PruningArguments
from support.trials import Job, Runner, check_options, extra_options, read_plan

KEYS = {"title": str, "recipe": str, "options": dict, "seeds": list, "methods": dict}
COMPARED_WITH = {"dense": str, "reference": str}


def plan_jobs(plan: dict[str, Any], extra: dict[str, Any], directory: Path) -> dict[tuple[str, int, int], Job]:
    """Return the runs of a comparison, by method, number of the setting, and seed.

    Raises:
        UsageError: If a method's settings are no list of options, `extra` contradicts them, or two are the same.
    """
    for method, settings in plan["methods"].items():
        if not isinstance(settings, list) or not settings or not all(isinstance(o, dict) for o in settings):
            raise UsageError(f"method {method!r}: its settings must be a list of mappings from options to values")
        for options in settings:
            own = seeds_of(options, plan)
            if not isinstance(own, list) or not own or not set(own) <= set(plan["seeds"]):
                raise UsageError(
                    f"method {method!r}: seeds {own!r} must be a list of some of the plan's, {plan['seeds']}"
                )
        for name in ({"seed"} | {name for options in settings for name in options}) & extra.keys():
            raise UsageError(
                f"--{name} is what the plan varies: change it there ({method!r}), not on the command line"
            )
    planned = {}
    longest = max(map(len, plan["methods"].values()))
    for seed, number, (method, settings) in itertools.product(plan["seeds"], range(longest), plan["methods"].items()):
        if number < len(settings) and seed in seeds_of(settings[number], plan):
            options = options_of(settings[number])
            name = re.sub(r"[^a-z0-9.]+", "_", f"{method} {setting(options)}".lower()).strip("_")
            merged = plan["options"] | options | extra | {"seed": seed}
            planned[method, number, seed] = Job(plan["recipe"], merged, directory / f"{name}-seed{seed}")
    jobs = {}
    for key, job in planned.items():
        changes, needs = {}, []
        for name in ("distill_from", "resume_from_checkpoint"):
            method, slash, checkpoint = str(job.options.get(name, "")).partition("/")
            if method in plan["methods"]:
                others = [other for other_key, other in planned.items() if other_key[::2] == (method, key[2])]
                other = _counterpart(job, method, others)
                if name == "resume_from_checkpoint":
                    _check_branch(job, other, checkpoint)
                needs.append(other.output_dir)
                changes[name] = f"{other.output_dir}{slash}{checkpoint}"
        jobs[key] = replace(job, options=job.options | changes, needs=tuple(needs))
    try:
        TopologicalSorter({job.output_dir: job.needs for job in jobs.values()}).prepare()
    except CycleError as error:
        raise UsageError(f"runs that need each other: {', '.join(place.name for place in error.args[1])}") from error
    for place, number in Counter(job.output_dir for job in jobs.values()).items():
        if number > 1:
            raise UsageError(f"{number} settings have the name {place.name}: take one out, or name the methods apart")
    return jobs


def _counterpart(job: Job, method: str, candidates: list[Job]) -> Job:
    """Return what a job starts from: of runs of one method and seed, the one of as many steps."""
    for candidate in candidates:
        if candidate.options.get("max_steps") == job.options.get("max_steps"):
            return candidate
    raise UsageError(f"{job.output_dir.name}: {method}, which it needs, has no setting of its seed and max_steps")


_NOT_BEFORE = {
    "seed", "one_shot", "one_shot_by", "prune_to", "prune_by", "prune_start", "prune_end",
    "prune_interval", "calibration_samples", "save_strategy", "save_steps", "save_total_limit",
    "resume_from_checkpoint",
}  # fmt: skip
"""Options that change nothing before a method begins to prune, or are checked by themselves."""


def _check_branch(job: Job, start: Job, checkpoint: str) -> None:
    """Check that a run will save the checkpoint that another goes on from, and that this is the same until then."""
    differing = {n for n in {*job.options, *start.options} - _NOT_BEFORE if job.options.get(n) != start.options.get(n)}
    if differing:
        raise UsageError(
            f"{job.output_dir.name} goes on from {start.output_dir.name}, which has another "
            f"{', '.join(sorted(differing))}: up to the checkpoint both must be the same run"
        )
    number, options = re.fullmatch(r"checkpoint-(\d+)", checkpoint), start.options
    step = int(number[1]) if number else 0
    every = int(float(options.get("save_steps", 0))) if options.get("save_strategy") == "steps" else 0
    if not step or not every or step % every or options.get("save_total_limit"):
        raise UsageError(
            f"{job.output_dir.name} goes on from {checkpoint!r} of {start.output_dir.name}, which saves no such "
            "checkpoint: give that method save_strategy: steps, and save_steps of which the number is a multiple"
        )
    ramp = [float(job.options.get(name, getattr(PruningArguments, name))) for name in ("prune_start", "prune_end")]
    if job.options.get("prune_by") == "wanda" and ramp[0] < ramp[1]:
        raise UsageError(
            f"{job.output_dir.name} goes on from {start.output_dir.name}, but gradual Wanda keeps norms of the inputs "
            "from the first step on: let it begin by itself"
        )
    steps = int(job.options.get("max_steps", step))
    begins = math.ceil(ramp[0] * steps)
    if step > steps or "prune_to" in job.options and "max_steps" in job.options and step >= begins:
        raise UsageError(
            f"{job.output_dir.name} has {steps} steps, and prunes from step {begins} on if at all, but would go on "
            f"from {checkpoint}: name one before"
        )


def check_needs(asked: Iterable[Job], jobs: Iterable[Job], finished: Callable[[Job], Any]) -> None:
    """Check that what jobs start from is there, or is made with them.

    Raises:
        UsageError: If not.
    """
    places = {job.output_dir: job for job in jobs}
    made = {job.output_dir for job in asked if finished(job) is None}
    for job in asked:
        for place in job.needs if job.output_dir in made else ():
            done = finished(places[place]) is not None
            if not done and place not in made:
                raise UsageError(
                    f"{job.output_dir.name} needs the run in {place}, which is not finished: let --methods name its "
                    "method, too"
                )
            checkpoint = Path(job.options.get("resume_from_checkpoint", place))
            if done and checkpoint.parent == place and not checkpoint.is_dir():
                raise UsageError(f"{checkpoint}, from which {job.output_dir.name} goes on, is gone: remove {place}")


def seeds_of(settings: dict[str, Any], plan: dict[str, Any]) -> Any:
    """Return the seeds of one setting: its own, or the plan's."""
    return settings.get("seeds", plan["seeds"])


def options_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what of one setting goes to the recipe."""
    return {name: value for name, value in settings.items() if name != "seeds"}


def collect(plan: dict[str, Any], results: dict[tuple[str, int, int], dict[str, Any]]) -> list[Point]:
    """Gather results into points: one for each setting, and one for each one-shot pruning of its models."""
    points: dict[tuple[str, int, str], Point] = {}
    for (method, number, seed), result in sorted(results.items(), key=lambda item: item[0][1:]):
        options = setting(options_of(plan["methods"][method][number]))
        rows = [(method, options, result)]
        for row in result.get("one_shot", []):
            share = f"share {row['share']:g}"
            rows.append((f"{method}, one-shot {row['method']}", f"{options}, {share}" if options else share, row))
        for name, text, row in rows:
            point = points.setdefault((name, number, text), Point(name, text))
            point.seeds.append(seed)
            point.losses.append(row["validation_loss"])
            point.test_losses.append(row.get("test_loss"))
            point.best_losses.append(min(row["validation_loss"], row.get("best_validation_loss") or math.inf))
            point.sparsities.append(row["sparsity"])
            point.others.setdefault("whole model", []).append(row["sparsity_total"])
    order = [name for method in plan["methods"] for name in dict.fromkeys(p.method for p in points.values())
             if name == method or name.startswith(f"{method}, one-shot ")]  # fmt: skip
    return sorted(points.values(), key=lambda p: order.index(p.method))


def tabulate(plan: dict[str, Any], outcomes: dict[tuple[str, int, int], Any], directory: Path) -> Comparison | None:
    """Write the table, the picture and the CSV file of the runs so far, without settings of which a run has failed."""
    failed = {key[:2] for key, outcome in outcomes.items() if isinstance(outcome, RunFailed)}
    results = {key: outcome for key, outcome in outcomes.items() if key[:2] not in failed}
    if not results:
        return None
    comparison = Comparison(collect(plan, results), plan.get("dense"), plan.get("reference"))
    seeds = ", ".join(map(str, sorted({seed for _, _, seed in results})))
    machines = "; ".join(sorted({result["hardware"] for result in results.values()}))
    comparison.write(directory, plan["title"], f"Seeds {seeds}. Each run on: {machines}.")
    return comparison


@reports_usage_errors
def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Other options are passed to the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "plan", metavar="PLAN.yaml", help="what to compare, e.g. recipes/configs/compare_char_cpu.yaml"
    )
    parser.add_argument("--output_dir", help="where everything goes; by default runs/ and the plan's name")
    parser.add_argument("--jobs", type=int, help="runs at a time; by default one per GPU, or one")
    parser.add_argument("--methods", nargs="+", help="run these of the plan's methods only")
    parser.add_argument("--seeds", nargs="+", type=int, help="run these of the plan's seeds only")
    args, remaining = parser.parse_known_args()
    plan, extra = read_plan(args.plan, KEYS, COMPARED_WITH), extra_options(remaining)
    for name in COMPARED_WITH.keys() & plan.keys():
        if plan[name] not in plan["methods"]:
            raise UsageError(f"{args.plan}: {name} is {plan[name]!r}, which is not among the methods")
    for name in ("methods", "seeds"):
        for value in getattr(args, name) or []:
            if value not in plan[name]:
                raise UsageError(f"--{name} {value} is not among the plan's: {', '.join(map(str, plan[name]))}")
    directory = check_output_dir(args.output_dir or str(Path("runs") / Path(args.plan).stem))
    jobs = plan_jobs(plan, extra, directory)
    for job in {key[:2]: job for key, job in jobs.items()}.values():  # of one seed
        check_options(job)
    runner = Runner(args.jobs)
    asked = {
        key: job
        for key, job in jobs.items()
        if key[0] in (args.methods or plan["methods"]) and key[2] in (args.seeds or plan["seeds"])
    }
    check_needs(asked.values(), jobs.values(), runner.finished)
    starts = {Path(job.options.get("resume_from_checkpoint", "")) for job in jobs.values() if job.needs}
    earlier = {key: runner.finished(job) for key, job in jobs.items() if key not in asked}
    outcomes: dict[tuple[str, int, int], Any] = {key: result for key, result in earlier.items() if result is not None}

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("runs", total=len(asked))
        keys = {job.output_dir: key for key, job in asked.items()}

        def done(job: Job, result: dict[str, Any] | RunFailed) -> None:
            if isinstance(result, RunFailed):
                text = f"left out: {result}"
            else:
                text = f"loss {result['validation_loss']:.4f}, zeros {result['sparsity']:.2%}"
            progress.console.print(f"{job.output_dir.name}: {text}", highlight=False)
            progress.advance(task)
            outcomes[keys[job.output_dir]] = result
            if any(start.parent == job.output_dir for start in starts):
                for checkpoint in set(job.output_dir.glob("checkpoint-*")) - starts:
                    shutil.rmtree(checkpoint)
            tabulate(plan, outcomes, directory)

        runner.run_all(list(asked.values()), done)
    comparison = tabulate(plan, outcomes, directory)
    if comparison:
        comparison.print(plan["title"])
        print(f"pareto.md, pareto.csv and pareto.png are in {directory}")
    for outcome in outcomes.values():
        if isinstance(outcome, RunFailed):
            raise outcome


if __name__ == "__main__":
    main()
