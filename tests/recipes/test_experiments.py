"""The paper's experiment, the methods to compare with, and searches, at a tiny size; comparisons: test_compare.py."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pretrain_char
import pytest
import sweep
import torch
import yaml
from conftest import REPOSITORY, TEXT, tiny_gpt2, tiny_llama
from processes import run_recipe
from support.arguments import DataArguments, ModelArguments, parse_arguments
from support.characters import Blocks, character_tokenizer, collate_blocks, encode
from support.config_files import as_arguments
from support.errors import UsageError
from support.importance_scores import prune_by_wanda
from support.pruning import MagnitudePruning, PruningArguments, SoftThreshold, prune_by_magnitude
from support.trials import Job, RunFailed, check_options, read_plan
from torch import nn
from transformers import AutoTokenizer, GPT2LMHeadModel, TrainerControl, TrainerState, TrainingArguments

from hf_padam import PAdamTrainingArguments

TINY = {
    "preset": "cpu", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "max_steps": 20, "logging_steps": 5,
    "eval_steps": 10, "warmup_steps": 2, "learning_rate": 1e-2,
}  # fmt: skip


def flags(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def refusal(main, arguments: list[str], monkeypatch, capsys) -> str:
    """Run a recipe that must end with a message for the user, and return that."""
    monkeypatch.setattr(sys, "argv", ["recipe", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    return capsys.readouterr().err


def results_of(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def test_pretrain_char_evaluates_every_character_of_the_tail_and_reports_both_sparsities(tmp_path, text_file):
    out = tmp_path / "out"
    options = TINY | {"p_norm": 0.5, "lambda_p": 0.05, "train_file": text_file, "output_dir": out}
    result = run_recipe("pretrain_char.py", *flags(options), "--one_shot", "0.5", "0.75")
    assert result.returncode == 0, result.stderr[-3000:]
    results = results_of(out)

    # The loss again, from the saved model and the text alone.
    model, tokenizer = GPT2LMHeadModel.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    tail = tokenizer(TEXT[len(TEXT) - round(len(TEXT) * 0.1) :], return_tensors="pt")["input_ids"][0]
    assert tokenizer.decode(tail) == TEXT[-len(tail) :]
    nll = 0.0
    for start in range(0, len(tail) - 1, 16):
        inputs, targets = tail[start : start + 16][: len(tail) - 1 - start], tail[start + 1 : start + 17]
        with torch.no_grad():
            nll += nn.functional.cross_entropy(model(inputs[None]).logits[0], targets, reduction="sum").item()
    assert results["validation_loss"] == pytest.approx(nll / (len(tail) - 1), rel=1e-5)
    assert results["best_validation_loss"] <= results["validation_loss"] + 1e-9

    matrices = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    linear = [p for name, p in matrices.items() if "wte" not in name and "wpe" not in name]
    for key, tensors in (("sparsity", list(matrices.values())), ("linear_sparsity", linear)):
        zeros = sum(int((p == 0).sum()) for p in tensors) / sum(p.numel() for p in tensors)
        assert 0.05 < results[key] == pytest.approx(zeros), key
    assert [(row["method"], row["share"]) for row in results["one_shot"]] == [
        ("magnitude", 0.5), ("magnitude", 0.75), ("wanda", 0.5), ("wanda", 0.75), ("fisher", 0.5), ("fisher", 0.75),
    ]  # fmt: skip
    assert results["one_shot"][1]["sparsity"] == pytest.approx(max(0.75, results["sparsity"]), abs=1e-3)

    # The saved options repeat the run.
    again = run_recipe("pretrain_char.py", out / "run_config.yaml", "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr[-3000:]
    assert results_of(tmp_path / "again")["validation_loss"] == results["validation_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "--preset huge is not one of full, cpu"),
        ({"n_head": 3}, "--n_embd 16 must be a multiple of --n_head 3"),
        ({"prune_to": 1.5}, "--prune_to 1.5 is not a share of the weights"),
        ({"prune_start": 0.9}, "0 <= start <= end <= 1"),
        ({"prune_end": 0.9}, "--prune_end has no effect without --prune_to"),
        ({"prune_to": 0.5}, "--prune_to and --soft_threshold are methods to compare padam with"),
        ({"train_file": "/nowhere.txt"}, "--train_file /nowhere.txt does not exist"),
        ({"block_size": 10**6}, "fewer than one --block_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pretrain_char_refuses_bad_input(tmp_path, text_file, options, message, monkeypatch, capsys):
    arguments = flags(TINY | {"train_file": text_file, "output_dir": tmp_path} | options)
    assert message in refusal(pretrain_char.main, arguments, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


def test_a_preset_gives_padam_its_strength_unless_another_is_given():
    def strength(*argv: str) -> bool:
        return any(argument.startswith("--lambda_p=") for argument in pretrain_char.with_preset(list(argv)))

    assert strength("--preset", "cpu") and strength("--preset=cpu", "--optim_args", "backend=eager")
    assert not strength("--preset", "cpu", "--optim", "adamw_torch")
    assert not strength("--preset", "cpu", "--target-sparsity", "0.7")
    assert not strength("--preset", "cpu", "--optim_args=lambda_p=0.2")
    assert not strength("--preset", "cpu", "--optim_args", "p_norm=0.5,lambda_p=0.2")
    assert not strength("--preset", "cpu", "--optim_args", "p_norm=0.5,target_sparsity=0.5")
    with pytest.raises(UsageError, match="exclude each other"):
        pretrain_char.with_preset(["my.yaml", "--preset", "cpu"])


def test_a_strength_takes_the_place_of_a_config_files_target_and_the_reverse(tmp_path):
    kinds = (ModelArguments, DataArguments, PAdamTrainingArguments)
    file = str(REPOSITORY / "recipes" / "configs" / "quickstart.yaml")
    *_, args = parse_arguments("", *kinds, argv=[file, "--lambda_p", "0"])
    assert (args.target_sparsity, args.lambda_p) == (None, 0)
    *_, args = parse_arguments("", *kinds, argv=[file])
    assert (args.target_sparsity, args.lambda_p) == (0.5, None)
    (tmp_path / "strength.yaml").write_text(
        f"train_file: {file}\noutput_dir: {tmp_path}\nlambda_p: 0.3\np_norm: 0.3\n"
    )
    *_, args = parse_arguments("", *kinds, argv=[str(tmp_path / "strength.yaml"), "--target_sparsity", "0.2"])
    assert (args.target_sparsity, args.lambda_p, args.p_norm) == (0.2, None, 0.3)


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "recipes" / "configs").glob("sweep_*.yaml")), ids=lambda f: f.name
)
def test_the_plans_of_sweeps_are_taken(file):
    plan = read_plan(str(file), sweep.KEYS)
    sweep.check_search(plan["search"], str(file))


def test_blocks_cover_a_text_once_or_start_anywhere():
    tokenizer = character_tokenizer(TEXT)
    tokens = encode(TEXT[:50], tokenizer)
    whole = Blocks(tokens, 8, stride=8)
    batch = collate_blocks([whole[i] for i in range(len(whole))])
    assert batch["labels"][batch["labels"] != -100].tolist() == tokens[1:].tolist()
    assert batch["input_ids"][batch["labels"] != -100].tolist() == tokens[:-1].tolist()
    anywhere = Blocks(tokens, 8, stride=1)
    assert len(anywhere) == 42 and anywhere[41].tolist() == tokens[41:].tolist()


def drive(callback, params, optimizer, steps: int, gradient: float = 0.1) -> list[float]:
    """Call a callback as the Trainer does; return the share of zeros after each step."""
    args, state, control = TrainingArguments("unused"), TrainerState(max_steps=steps), TrainerControl()
    shares = []
    for _ in range(steps):
        for param in params:
            param.grad = torch.full_like(param, gradient)
        callback.on_pre_optimizer_step(args, state, control, optimizer=optimizer)
        optimizer.step()
        callback.on_optimizer_step(args, state, control, optimizer=optimizer)
        state.global_step += 1
        shares.append(sum(int((p == 0).sum()) for p in params) / sum(p.numel() for p in params))
    return shares


def test_gradual_pruning_follows_the_cubic_and_keeps_its_zeros():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(40, 25)), nn.Parameter(3 * torch.randn(1000))]
    optimizer = torch.optim.SGD(params, lr=1e-3)
    shares = drive(MagnitudePruning(params, 0.8, 0.1, 0.5, 2), params, optimizer, 40)
    expected = [0.8 * (1 - (1 - min(1, max(0, (step - 4) // 2 * 2 / 16))) ** 3) for step in range(1, 41)]
    assert shares == pytest.approx(expected, abs=1e-3)
    # One pool: the tensor of smaller weights loses more.
    assert (params[0] == 0).float().mean() > 0.85 > 0.75 > (params[1] == 0).float().mean()


@pytest.mark.parametrize(("steps", "prunings"), [(60, 33), (2000, 50)])
def test_without_an_interval_there_are_some_50_prunings_along_the_ramp(steps, prunings):
    pruning = MagnitudePruning([], 0.5, 0.2, 0.75, PruningArguments().prune_interval)
    shares = [pruning._share(step, steps) for step in range(1, steps + 1)]
    made = [share for share in shares if share is not None]
    assert len(made) == prunings + 1 and made[-1] == 0.5


def test_all_at_once_then_recovery():
    params = [nn.Parameter(torch.arange(1.0, 101.0))]
    shares = drive(MagnitudePruning(params, 0.3, 0.5, 0.5, 20), params, torch.optim.SGD(params, lr=1e-3), 10)
    assert shares == [0.0] * 4 + [0.3] * 6
    assert (params[0] == 0).nonzero().flatten().tolist() == list(range(30))


def test_pruning_does_not_go_on_from_a_checkpoint_that_has_missed_it():
    """Its zeros would never be made, or fewer than were asked for in the steps before."""
    dense, sparse = nn.Parameter(torch.rand(10) + 1), nn.Parameter(torch.tensor([0.0] + [1.0] * 9))

    def begin(params: nn.Parameter, step: int, *plan) -> None:
        state = TrainerState(global_step=step, max_steps=20)
        MagnitudePruning([params], 0.5, *plan).on_train_begin(None, state, None)

    for plan, last in (((0.5, 0.5, 1), 9), ((0.2, 0.6, 3), 6)):  # at step 10; at 4 (no zeros yet), 7, 10 and 12
        for step in (0, last):
            begin(dense, step, *plan)
        begin(sparse, last + 1, *plan)
        with pytest.raises(UsageError, match=f"checkpoint of step {last + 1} was not pruned"):
            begin(dense, last + 1, *plan)


def test_soft_threshold_is_the_proximal_step_of_l1():
    start = torch.tensor([1.0, -1.0, 0.05, -0.05, 0.0])
    param = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([param], lr=0.5)
    drive(SoftThreshold([param], 0.2), [param], optimizer, 1, gradient=0.0)
    # The minimiser of (w - start)^2 / 2 + lr * 0.2 * |w|, on a grid.
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    objective = (grid - start[:, None].double()) ** 2 / 2 + 0.1 * grid.abs()
    assert param.detach().numpy() == pytest.approx(grid[objective.argmin(1)].numpy(), abs=1e-5)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_wanda_removes_the_smallest_scores_of_each_output(make):
    model = make()
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith(("mlp.c_fc", "mlp.up_proj")))
    weight = module.weight.detach().clone()
    inputs = weight.shape[0] if "c_fc" in name else weight.shape[1]
    norms = torch.rand(inputs) + 0.1
    prune_by_wanda({name: (module, module.weight)}, {name: norms}, 0.25)
    for output in range(weight.numel() // inputs):
        row, pruned = (w[:, output] if "c_fc" in name else w[output] for w in (weight, module.weight.detach()))
        expected = {i for i, _ in sorted(enumerate((row.abs() * norms).tolist()), key=lambda s: s[1])[: inputs // 4]}
        assert set((pruned == 0).nonzero().flatten().tolist()) == expected


def test_pruning_nothing_changes_nothing():
    param = torch.randn(10)
    before = param.clone()
    prune_by_magnitude([param], 0.0)
    assert torch.equal(param, before)


def test_checking_options_leaves_the_environment_alone(tmp_path, monkeypatch):
    """TrainingArguments set variables that the runs, which are processes of their own, would inherit."""
    monkeypatch.setattr(pretrain_char, "parse", lambda argv: os.environ.update(ACCELERATE_SOMETHING="true"))
    check_options(Job("pretrain_char.py", {}, tmp_path))
    assert "ACCELERATE_SOMETHING" not in os.environ


def test_options_without_a_value_are_left_to_the_recipe():
    assert as_arguments({"a": None, "one_shot": [], "b": [1, 2], "c": False}) == ["--b", "1", "2", "--c=False"]


@pytest.mark.parametrize(("failing", "status"), [({0, 2}, 0), ({1, 2, 3}, 1)], ids=["some", "three in a row"])
def test_a_sweep_leaves_out_what_fails_and_tables_the_rest(tmp_path, failing, status, monkeypatch, capsys):
    class Runner:
        def __init__(self, jobs):
            self.jobs = 1

        def run(self, job):
            if int(job.output_dir.name.removeprefix("trial-")) in failing:
                raise RunFailed("gradients are not finite")
            return {"validation_loss": 1.0, "sparsity": job.options["p_norm"]}

        def stop(self):
            pass

    file = tmp_path / "sweep.yaml"
    search = {"p_norm": {"low": 0.3, "high": 0.9}}
    file.write_text(
        yaml.safe_dump({"title": "T", "recipe": "pretrain_char.py", "options": TINY, "search": search, "seed": 0})
    )
    monkeypatch.setattr(sweep, "Runner", Runner)
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(file), "--output_dir", str(tmp_path / "out"), "--trials", "3"])
    with pytest.raises(SystemExit) if status else contextlib.nullcontext():
        sweep.main()
    printed = capsys.readouterr()
    assert printed.out.count("is left out: gradients are not finite") == len(failing)
    assert ("error: gradients are not finite" in printed.err) == bool(status)
    rows = list(csv.DictReader((tmp_path / "out" / "pareto.csv").open()))
    assert len(rows) == (1 if status else 3)


def test_a_sweep_refuses_an_option_that_it_searches(tmp_path, monkeypatch, capsys):
    file = REPOSITORY / "recipes" / "configs" / "sweep_char_cpu.yaml"
    arguments = [str(file), "--output_dir", str(tmp_path), "--p_norm", "0.5"]
    assert "p_norm is searched, and given as an option" in refusal(sweep.main, arguments, monkeypatch, capsys)
    arguments[-2] = "--p-norm"
    assert "p_norm is searched, and given as an option" in refusal(sweep.main, arguments, monkeypatch, capsys)


@pytest.mark.slow
def test_a_sweep_goes_on_after_it_was_killed(tmp_path, text_file):
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    search = {"lambda_p": {"low": 1e-3, "high": 0.1, "log": True}, "p_norm": [0.5, 0.8]}
    contents = {"title": "Tiny", "recipe": "pretrain_char.py", "options": TINY, "search": search, "seed": 0}
    file.write_text(yaml.safe_dump(contents))
    arguments = [file, "--output_dir", out, "--train_file", text_file, "--trials"]
    command = [sys.executable, str(REPOSITORY / "recipes" / "sweep.py"), *map(str, arguments), "3"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (out / "trial-1").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)

    result = run_recipe("sweep.py", *arguments, "3")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = list(csv.DictReader((out / "pareto.csv").open()))
    assert len(rows) == 3 == len({row["setting"].partition(": ")[2] for row in rows})  # none was drawn twice
    losses = {round(float(row["loss"]), 9) for row in rows}
    assert losses <= {round(results_of(f.parent)["validation_loss"], 9) for f in out.glob("*/results.json")}
    assert all(math.isfinite(loss) for loss in losses)

    file.write_text(yaml.safe_dump(contents | {"search": {"p_norm": [0.5]}}))
    other = run_recipe("sweep.py", *arguments, "3")
    assert other.returncode == 2 and "holds a study of" in other.stderr
