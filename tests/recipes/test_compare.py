"""Comparisons: plans, what their runs need of each other, and the tables that come out, at a tiny size."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import compare
import pytest
import yaml
from conftest import REPOSITORY
from processes import run_recipe
from support.pareto import Comparison, Point, differences, loss_at, pareto_front
from support.trials import Job, RunFailed, check_options, read_plan
from test_experiments import TINY, refusal, results_of


def test_settings_are_told_apart_from_seeds():
    plan = {"methods": {"AdamW": [{"learning_rate": 1e-3, "one_shot": [0.5]}, {"learning_rate": 3e-3}]}}
    result = {"validation_loss": 1.0, "sparsity": 0.0, "sparsity_total": 0.0}
    shot = result | {"method": "magnitude", "share": 0.5, "validation_loss": 2.0}
    results = {("AdamW", n, seed): result | {"one_shot": [shot]} for n in (0, 1) for seed in (1, 2)}
    points = compare.collect(plan, results)
    assert [(p.method, p.setting, len(p.losses)) for p in points] == [
        ("AdamW", "learning_rate 0.001", 2), ("AdamW", "learning_rate 0.003", 2),
        ("AdamW, one-shot magnitude", "learning_rate 0.001, share 0.5", 2),
        ("AdamW, one-shot magnitude", "learning_rate 0.003, share 0.5", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "file",
    sorted(f for f in (REPOSITORY / "recipes" / "configs").glob("*.yaml") if "methods" in f.read_text()),
    ids=lambda f: f.stem,
)
def test_every_setting_of_a_plan_is_a_run_that_its_recipe_understands(file, tmp_path, text_file):
    plan = read_plan(str(file), compare.KEYS, compare.COMPARED_WITH)
    jobs = compare.plan_jobs(plan, {}, tmp_path)
    for job in {key[:2]: job for key, job in jobs.items()}.values():  # of one seed each
        text = {"train_file": str(text_file)} if job.recipe == "pretrain_char.py" else {}
        options = {name: value for name, value in job.options.items() if name != "bf16"}
        check_options(replace(job, options=options | text))


def test_pareto_front_and_interpolation():
    points = [Point("m", s, [loss], [zeros]) for s, loss, zeros in
              (("a", 1.0, 0.1), ("b", 1.2, 0.5), ("c", 1.3, 0.4), ("d", 1.1, 0.1), ("e", 2.0, 0.9))]  # fmt: skip
    assert [p.setting for p in pareto_front(points)] == ["a", "b", "e"]
    pairs = [(p.sparsity, p.loss) for p in points]
    assert loss_at([pairs[0], pairs[4]], 0.5) == pytest.approx(1.5)
    assert loss_at(pairs, 0.95) is None


def test_differences_from_the_reference_are_taken_seed_by_seed():
    dense = Point("dense", "", [1.0, 2.0], [0.0, 0.0], best_losses=[0.5, 0.5])
    pruned = Point("reference", "", [2.0, 3.0], [0.5, 0.5])
    point = Point("m", "", [1.6, 2.4], [0.25, 0.25])
    assert differences(point, [dense, pruned]) == pytest.approx([0.1, -0.1])
    assert differences(Point("m", "", [1.0], [0.9]), [dense, pruned]) == []
    assert differences(Point("m", "", [2.4], [0.25], seeds=[1]), [dense, pruned]) == pytest.approx([-0.1])
    comparison = Comparison([dense, pruned, point], "dense", "reference")
    rows = [dict(zip(comparison.columns(), row, strict=True)) for row in comparison.rows()]
    assert [row["loss less reference's"] for row in rows] == ["", "", "+0.0000 ± 0.1414"]
    assert rows[2]["loss over dense's best"] == "+300.00%"


def plan(directory: Path, **changes) -> Path:
    methods = {
        "AdamW": [{"optim": "adamw_torch", "one_shot": [0.5]}],
        "gradual": [{"optim": "adamw_torch", "prune_to": 0.4}, {"optim": "adamw_torch", "prune_to": 0.8}],
        "PAdam": [{"p_norm": 0.5, "lambda_p": 0.05}],
    }
    file = directory / "plan.yaml"
    contents = {"title": "Tiny", "recipe": "pretrain_char.py", "options": TINY, "seeds": [1, 2], "dense": "AdamW"}
    file.write_text(yaml.safe_dump(contents | {"reference": "gradual", "methods": methods} | changes, sort_keys=False))
    return file


def test_whole_comparisons_come_first_seed_by_seed_and_settings_may_have_seeds_of_their_own(tmp_path):
    methods = {"A": [{"p_norm": 0.5}, {"p_norm": 0.7}, {"p_norm": 0.3, "seeds": [2]}], "B": [{}, {"lambda_p": 0.1}]}
    jobs = compare.plan_jobs(yaml.safe_load(plan(tmp_path, methods=methods).read_text()), {}, tmp_path)
    assert list(jobs) == [
        ("A", 0, 1), ("B", 0, 1), ("A", 1, 1), ("B", 1, 1),
        ("A", 0, 2), ("B", 0, 2), ("A", 1, 2), ("B", 1, 2), ("A", 2, 2),
    ]  # fmt: skip
    assert not any("seeds" in job.options for job in jobs.values())


def test_parts_of_a_plan_are_run_and_tabled_beside_what_is_finished_and_test_losses_too(
    tmp_path, text_file, monkeypatch
):
    ran = []

    class Runner(compare.Runner):
        def run(self, job):
            if self.finished(job) is None:
                ran.append((job.options["seed"], job.options.get("p_norm", "dense")))
                result = {"validation_loss": 1.0 + job.options["seed"], "sparsity": 0.0, "sparsity_total": 0.0}
                result["test_loss"] = 3.0 + job.options["seed"] + job.options.get("p_norm", 0)
                job.output_dir.mkdir()
                (job.output_dir / "results.json").write_text(json.dumps(result | {"hardware": "a machine"}))
                (job.output_dir / "options.json").write_text(job.request)
            return self.finished(job)

    text = ["--train_file", str(text_file)]

    def rows(*options: str) -> list[tuple[str, str, str]]:
        monkeypatch.setattr(
            sys, "argv", ["compare.py", str(file), "--output_dir", str(tmp_path / "out"), *options, *text]
        )
        compare.main()
        table = csv.DictReader((tmp_path / "out" / "pareto.csv").open())
        return [(row["method"], row["seed"], row["test_loss"]) for row in table]

    monkeypatch.setattr(compare, "Runner", Runner)
    methods = {"AdamW": [{"optim": "adamw_torch"}], "PAdam": [{"p_norm": 0.5}, {"p_norm": 0.25, "seeds": [2]}]}
    file = plan(tmp_path, methods=methods, reference="AdamW")
    assert rows("--methods", "PAdam", "--seeds", "2") == [("PAdam", "2", "5.5"), ("PAdam", "2", "5.25")]
    assert rows("--methods", "AdamW")[:2] == [("AdamW", "1", "4.0"), ("AdamW", "2", "5.0")]
    assert ran == [(2, 0.5), (2, 0.25), (1, "dense"), (2, "dense")]
    assert rows()[2:] == [("PAdam", "1", "4.5"), ("PAdam", "2", "5.5"), ("PAdam", "2", "5.25")]
    assert ran[4:] == [(1, 0.5)]
    header = (tmp_path / "out" / "pareto.md").read_text().splitlines()[2]
    assert "| loss |" in header and "| test loss |" in header


@pytest.mark.slow
def test_compare_tables_every_method_and_takes_up_what_is_finished(tmp_path, text_file):
    out = tmp_path / "out"
    arguments = [plan(tmp_path), "--output_dir", out, "--jobs", "2", "--train_file", text_file]
    result = run_recipe("compare.py", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = list(csv.DictReader((out / "pareto.csv").open()))
    assert [row["method"] for row in rows[::2]] == [
        "AdamW", "AdamW, one-shot magnitude", "AdamW, one-shot wanda", "AdamW, one-shot fisher",
        "gradual", "gradual", "PAdam",
    ]  # fmt: skip
    padam = [float(row["loss"]) for row in rows if row["method"] == "PAdam"]
    directories = [out / f"padam_p_norm_0.5_lambda_p_0.05-seed{seed}" for seed in (1, 2)]
    assert padam == [results_of(directory)["validation_loss"] for directory in directories]
    assert padam[0] != padam[1]
    gradual = [float(row["sparsity"]) for row in rows if row["method"] == "gradual"]
    assert gradual == pytest.approx([0.4, 0.4, 0.8, 0.8], abs=2e-3)
    assert (out / "pareto.png").stat().st_size > 10_000 and "| PAdam |" in (out / "pareto.md").read_text()

    # The second time, only the run that is missing is made.
    times = {file: file.stat().st_mtime_ns for file in out.glob("*/results.json")}
    (out / "gradual_prune_to_0.8-seed2" / "results.json").unlink()
    assert run_recipe("compare.py", *arguments).returncode == 0
    changed = [f.parent.name for f in out.glob("*/results.json") if f.stat().st_mtime_ns != times[f]]
    assert changed == ["gradual_prune_to_0.8-seed2"]

    # A finished run of other options is not thrown away.
    result = run_recipe("compare.py", *arguments, "--max_steps", "21")
    assert result.returncode == 2 and "holds a finished run of other options" in result.stderr, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "nothing.py"}, "recipe is 'nothing.py'; it must be one of pretrain_char.py"),
        (
            {"methods": {"AdamW": [{"prune_ot": 0.5}], "gradual": [{}]}},
            "adamw_prune_ot_0.5-seed2: unknown option --prune_ot (did you mean --prune_to?)",
        ),
        ({"dense": "Adam"}, "dense is 'Adam', which is not among the methods"),
        ({"methods": {"AdamW": [], "gradual": 3}}, "must be a list of mappings"),
        ({"methods": {"AdamW": [{}, {"one_shot": [0.5]}], "gradual": [{}]}}, "2 settings have the name adamw-seed1"),
        ({"colour": 1}, "must have the keys title, recipe"),
        ({"methods": {"AdamW": [{"seeds": [3]}], "gradual": [{}]}}, "seeds [3] must be a list of some of the plan's"),
        ({"methods": {"AdamW": [{"seeds": 1}], "gradual": [{}]}}, "seeds 1 must be a list of some of the plan's"),
    ],
    ids=["recipe", "option", "dense", "methods", "twice", "key", "seeds", "no list of seeds"],
)
def test_compare_refuses_a_bad_plan(tmp_path, changes, message, monkeypatch, capsys):
    arguments = [str(plan(tmp_path, **changes)), "--output_dir", str(tmp_path / "out")]
    assert message in refusal(compare.main, arguments, monkeypatch, capsys)


@pytest.mark.parametrize("option", [("--methods", "Adam"), ("--seeds", "3")], ids=lambda o: o[0])
def test_compare_refuses_a_part_that_its_plan_lacks(tmp_path, option, monkeypatch, capsys):
    arguments = [str(plan(tmp_path)), "--output_dir", str(tmp_path / "out"), *option]
    assert f"{' '.join(option)} is not among the plan's" in refusal(compare.main, arguments, monkeypatch, capsys)


@pytest.mark.parametrize("option", [("--p_norm", "0.3"), ("--p-norm", "0.3"), ("--seed", "7")], ids=lambda o: o[0])
def test_compare_refuses_options_that_its_plan_varies(tmp_path, option, monkeypatch, capsys):
    arguments = [str(plan(tmp_path)), "--output_dir", str(tmp_path / "out"), *option]
    name = option[0].removeprefix("--").replace("-", "_")
    assert f"--{name} is what the plan varies" in refusal(compare.main, arguments, monkeypatch, capsys)


def test_compare_leaves_out_what_fails_says_why_and_tables_the_rest(tmp_path, text_file):
    methods = {"AdamW": [{"optim": "adamw_torch"}], "gradual": [{"learning_rate": 1e30}]}
    changed = plan(tmp_path, methods=methods, seeds=[1])
    result = run_recipe("compare.py", changed, "--output_dir", tmp_path / "out", "--train_file", text_file)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
    assert re.search(r"error: the run in .* failed: error: the gradient norm of step .*log.txt", result.stderr)
    assert "left out" in result.stdout
    rows = list(csv.DictReader((tmp_path / "out" / "pareto.csv").open()))
    assert [row["method"] for row in rows] == ["AdamW"]


@pytest.mark.parametrize("recipe", ["finetune_clm.py", "finetune_clm_no_trainer.py"])
def test_a_plan_may_be_of_any_recipe_that_trains(recipe, tmp_path, model_dir, text_file):
    options = {"model_name_or_path": str(model_dir), "train_file": str(text_file), "block_size": 32, "max_steps": 2}
    methods = {"PAdam": [{"lambda_p": 0.1}]}
    changed = plan(tmp_path, recipe=recipe, options=options, methods=methods, seeds=[1], dense="PAdam")
    changed.write_text(changed.read_text().replace("reference: gradual\n", ""))
    result = run_recipe("compare.py", changed, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "/2 [" not in (tmp_path / "out" / "padam_lambda_p_0.1-seed1" / "log.txt").read_text(), "no bars in logs"


def test_a_plan_names_a_method_as_the_teacher_and_runs_it_first(tmp_path, monkeypatch, capsys):
    """Of the same seed and number of steps; the checkpoint to go on from alike."""
    saves = {"save_strategy": "steps", "save_steps": 3}
    plan = {
        "title": "t", "recipe": "finetune_clm.py", "seeds": [0, 1],
        "options": {"model_name_or_path": "m", "train_file": str(tmp_path / "f.txt"), "max_steps": 5},
        "methods": {
            "both": [{"distill_from": "AdamW", "resume_from_checkpoint": "taught/checkpoint-3",
                      "calibration_samples": 7}],
            "taught": [{"distill_from": "AdamW", "max_steps": 9}, {"distill_from": "AdamW", **saves}],
            "AdamW": [{"optim": "adamw_torch"}, {"optim": "adamw_torch", "max_steps": 9}],
            "from a file": [{"distill_from": "some/model", "resume_from_checkpoint": "some/checkpoint-1"}],
        },
    }  # fmt: skip
    (tmp_path / "f.txt").write_text("text")
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    ran: list[Job] = []

    class Runner(compare.Runner):
        def run(self, job):
            ran.append(job)
            if job.output_dir.name == failing:
                raise RunFailed("no")
            for step in (3, 5):
                (job.output_dir / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
            return {"validation_loss": 1.0, "sparsity": 0.0}

        @staticmethod
        def finished(job):
            return {} if job.output_dir.name in finished else None

    def run(*options: str) -> int:
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["compare.py", str(file), *options])
        try:
            compare.main()
        except SystemExit as exit:
            return exit.code
        return 0

    monkeypatch.setattr(compare, "Runner", Runner)
    monkeypatch.setattr(compare, "tabulate", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    failing, finished = "", set()
    assert run("--jobs", "3") == 0
    left = {place.name for place in Path("runs/plan/taught_distill_from_adamw-seed0").iterdir()}
    assert left == {"checkpoint-3"}, "what nobody goes on from is deleted, where one is gone on from"
    assert len(list(Path("runs/plan/adamw-seed0").iterdir())) == 2
    keys = ("distill_from", "resume_from_checkpoint")
    starts = [tuple(job.options.get(key, "").removeprefix("runs/plan/") for key in keys) for job in ran]
    order = [job.output_dir.name for job in ran]
    assert sorted(starts) == sorted(
        [("", "")] * 4
        + [("some/model", "some/checkpoint-1")] * 2
        + [(f"adamw{steps}-seed{seed}", "") for steps in ("", "_max_steps_9") for seed in (0, 1)]
        + [(f"adamw-seed{seed}", f"taught_distill_from_adamw-seed{seed}/checkpoint-3") for seed in (0, 1)]
    )
    for place, needed in zip(order, starts, strict=True):
        for name in filter(None, needed):
            assert name.startswith("some/") or order.index(name.split("/")[0]) < order.index(place)

    failing = "adamw-seed0"
    assert run() == 1
    assert len(ran) == 12 - 2, "what needs it, and what needs that"
    assert run("--methods", "taught") == 2 and not ran
    assert re.search("needs the run in runs/plan/adamw.*not finished: let --methods", capsys.readouterr().err)
    failing, finished = "", {"taught_distill_from_adamw-seed0"}
    Path("runs/plan/taught_distill_from_adamw-seed0/checkpoint-3").rmdir()
    assert run("--seeds", "0") == 2 and not ran
    assert "is gone: remove runs/plan/taught" in capsys.readouterr().err
    finished.add("both_distill_from_adamw_calibration_samples_7-seed0")
    assert run("--seeds", "0", "--methods", "both") == 0, "what it needed matters no more"

    taught, both, dense = plan["methods"]["taught"][1], plan["methods"]["both"][0], plan["methods"]["AdamW"][0]
    for changed, options, message in (
        (dense, {"distill_from": "taught"}, "runs that need each other: "),
        (taught, {"save_steps": 2}, "which saves no such checkpoint"),
        (taught, {"save_total_limit": 1}, "which saves no such checkpoint"),
        (both, {"resume_from_checkpoint": "taught"}, "which saves no such checkpoint"),
        (both, {"learning_rate": 1e-4}, "which has another learning_rate: up to the checkpoint"),
        (both, {"prune_to": 0.5, "prune_by": "wanda", "prune_start": 0.7}, "gradual Wanda keeps norms"),
        (both, {"prune_to": 0.5, "prune_by": "wanda"}, "gradual Wanda keeps norms"),
        (both, {"prune_to": 0.5}, "prunes from step 1 on if at all, but would go on from checkpoint-3"),
    ):
        kept = dict(changed)
        changed |= options
        file.write_text(yaml.safe_dump(plan, sort_keys=False))
        assert run() == 2 and not ran
        assert message in capsys.readouterr().err
        changed.clear()
        changed |= kept


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_common_beginning_ends_as_one_from_the_start(tmp_path, model_dir, text_file):
    """Of a plan: the steps before a method begins are made once."""
    options = {"model_name_or_path": str(model_dir), "train_file": str(text_file), "block_size": 16, "max_steps": 6}
    options |= {"max_eval_samples": 4, "save_strategy": "no", "logging_steps": 1, "use_cpu": True}
    pruned = {"optim": "adamw_torch", "prune_to": 0.5, "prune_by": "sparsegpt", "prune_start": 0.5, "prune_end": 0.5}
    gradual = {"optim": "adamw_torch", "prune_to": 0.5, "prune_by": "fisher", "prune_start": 0.5, "prune_interval": 1}
    methods = {
        "AdamW": [{"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}],
        "whole": [pruned, gradual],
        "branch": [o | {"resume_from_checkpoint": "AdamW/checkpoint-2"} for o in (pruned, gradual)],
    }
    changes = {"recipe": "finetune_clm.py", "options": options, "seeds": [1], "reference": "whole"}
    result = run_recipe("compare.py", plan(tmp_path, methods=methods, **changes), "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "out" / "pareto.csv").open()))
    losses = {method: [row["loss"] for row in rows if row["method"] == method] for method in methods}
    assert losses["branch"] == losses["whole"] and len(set(losses["whole"] + losses["AdamW"])) == 3
