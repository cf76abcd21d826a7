r"""Search p, lambda_p, the learning rate and the weight decay of any recipe for its best losses at every sparsity.

    python recipes/sweep.py recipes/configs/sweep_char_cpu.yaml --train_file input.txt --output_dir runs/sweep

Optuna minimises the validation loss and maximises the share of zeros at once. The study is `study.db` (SQLite) in the
output directory: the same command goes on where an earlier one ended or was interrupted, until there are as many
finished trials as asked for. A trial that fails, as those do whose losses grow out of bounds, is named and left out;
three in a row end the sweep. Trials run one on each GPU where there are several. Options after the file go to the
recipe.

In the output directory: pareto.md, pareto.csv and pareto.png, every trial in them, and a directory for each trial.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from support.arguments import check_output_dir
from support.errors import UsageError, reports_usage_errors
from support.pareto import Comparison, Point, setting
from support.report import hardware
from support.trials import Job, RunFailed, Runner, extra_options, read_plan

from hf_padam.files import locked

KEYS = {"title": str, "recipe": str, "options": dict, "search": dict, "seed": int}
FRONT, OTHERS = "Pareto front", "other trials"
FAILURES_IN_A_ROW = 3


def check_search(search: dict[str, Any], source: str) -> None:
    """Check that each searched option has a list of values, or a range: low, high and, if wanted, log.

    Raises:
        UsageError: Naming the first that has not.
    """
    for name, space in search.items():
        if isinstance(space, list) and space:
            continue
        numbers = isinstance(space, dict) and {"low", "high"} <= set(space) <= {"low", "high", "log"}
        if not numbers or not all(isinstance(space[k], int | float) for k in ("low", "high")):
            raise UsageError(
                f"{source}: search.{name} is {space!r}: give a list of values (of integers, too), or low, high and log"
            )
        if not space["low"] < space["high"] or (space.get("log") and space["low"] <= 0):
            raise UsageError(f"{source}: search.{name}: low must be below high, and above 0 where log is true")


def suggest(trial: optuna.Trial, search: dict[str, Any]) -> dict[str, Any]:
    """Draw the options of one trial."""
    options: dict[str, Any] = {}
    for name, space in search.items():
        if isinstance(space, list):
            options[name] = trial.suggest_categorical(name, space)
        else:
            value = trial.suggest_float(name, space["low"], space["high"], log=space.get("log", False))
            options[name] = float(f"{value:.4g}")
    return options


def open_study(directory: Path, plan: dict[str, Any], options: dict[str, Any]) -> optuna.Study:
    """Create the study, or open what an earlier command left; trials that it was killed in are tried again.

    Raises:
        UsageError: If what is there is no study, or one of another search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # failed trials are reported here, without a traceback
    try:
        study = optuna.create_study(
            study_name="sweep",
            storage=f"sqlite:///{directory / 'study.db'}",
            directions=["minimize", "maximize"],
            load_if_exists=True,
        )
    except Exception as error:  # SQLAlchemy raises its own kinds
        database = directory / "study.db"
        raise UsageError(f"{database} cannot be opened as a study: {error}. Give another --output_dir") from error
    searched = {"recipe": plan["recipe"], "search": plan["search"], "options": options}
    if study.user_attrs.setdefault("plan", searched) != searched:
        raise UsageError(f"{directory} holds a study of {study.user_attrs['plan']}: give another --output_dir")
    study.set_user_attr("plan", searched)
    seed = plan["seed"] + len(study.trials)  # else a second command would begin with the first one's trials
    study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def points_of(study: optuna.Study) -> list[Point]:
    """Return the finished trials as points, the densest first."""
    trials = study.get_trials(states=(TrialState.COMPLETE,))
    best = {trial.number for trial in study.best_trials}
    points = []
    for trial in sorted(trials, key=lambda t: t.values[1]):
        loss, sparsity = trial.values
        options = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in trial.params.items()}
        method = FRONT if trial.number in best else OTHERS
        points.append(Point(method, f"trial {trial.number}: {setting(options)}", [loss], [sparsity]))
    return points


@reports_usage_errors
def main() -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], epilog="Other options are passed to the recipe."
    )
    parser.add_argument("plan", metavar="PLAN.yaml", help="what to search, e.g. recipes/configs/sweep_char_cpu.yaml")
    parser.add_argument("--output_dir", default="runs/sweep", help="where everything goes, the study too")
    parser.add_argument("--trials", type=int, default=40, help="finished trials to have in the end")
    parser.add_argument("--jobs", type=int, help="trials at a time; by default one per GPU, or one")
    args, remaining = parser.parse_known_args()
    plan, extra = read_plan(args.plan, KEYS), extra_options(remaining)
    check_search(plan["search"], args.plan)
    for name in plan["search"].keys() & (plan["options"] | extra).keys():
        raise UsageError(f"{name} is searched, and given as an option, too: take it out of one of them")
    if args.trials < 1:
        raise UsageError(f"--trials {args.trials} is too small: it must be at least 1")
    directory = check_output_dir(args.output_dir)
    with locked(directory):
        search(plan, args, plan["options"] | extra, directory)


def search(plan: dict[str, Any], args: argparse.Namespace, common: dict[str, Any], directory: Path) -> None:
    """Run trials until so many have finished; write what was found after each."""
    study, runner = open_study(directory, plan, common), Runner(args.jobs)

    def finished() -> int:
        return len(study.get_trials(states=(TrialState.COMPLETE,)))

    failures: list[RunFailed] = []  # since the last trial that finished

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("trials", total=args.trials, completed=min(finished(), args.trials))

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            options = suggest(trial, plan["search"])
            job = Job(plan["recipe"], common | options, directory / f"trial-{trial.number}")
            try:
                result = runner.run(job)
            except RunFailed as error:
                failures.append(error)
                progress.console.print(f"trial {trial.number} is left out: {error}", highlight=False)
                if len(failures) >= FAILURES_IN_A_ROW:
                    study.stop()
                raise
            failures.clear()
            loss, sparsity = result["validation_loss"], result["sparsity"]
            line = f"trial {trial.number}: loss {loss:.4f}, zeros {sparsity:.2%}, {setting(options)}"
            progress.console.print(line, highlight=False)
            progress.advance(task)
            return loss, sparsity

        try:
            while (missing := args.trials - finished()) > 0 and len(failures) < FAILURES_IN_A_ROW:
                study.optimize(objective, missing, n_jobs=runner.jobs, catch=(RunFailed,))
        finally:
            runner.stop()
    if finished():
        comparison = Comparison(points_of(study), unconnected=(OTHERS,))
        comparison.write(directory, plan["title"], f"{hardware()}.")
        comparison.print(plan["title"])
        print(f"pareto.md, pareto.csv, pareto.png and study.db are in {directory}")
    if finished() < args.trials:
        raise failures[-1]


if __name__ == "__main__":
    main()
