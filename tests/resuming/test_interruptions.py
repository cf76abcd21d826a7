"""Runs that are killed, told to stop, or hit by a full disk, bad gradients, a dying process: one message, no loss."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, blocks, options, tiny_llama
from processes import run_recipe, run_script
from test_recipes import RECIPES, write_config
from transformers import TrainerCallback

from hf_padam import PAdamTrainer, PAdamTrainingArguments
from hf_padam.resuming import interruption, resumable


def kill_test(*arguments: object, timeout: int) -> dict:
    result = run_script(REPOSITORY / "tests/resuming/kill_test.py", *arguments, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_killed_at_the_worst_moments_ends_the_same_to_the_bit(recipe):
    """Weights written but not the optimizer; all written but not renamed; all done but results.json."""
    summary = kill_test(recipe, "--moments", "optimizer", "publish", "results", timeout=300)
    assert (summary["kills"], summary["during_save"], summary["passed_over"]) == (3, 2, 2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_gets_sigterm_saves_and_ends_the_same_to_the_bit(recipe):
    summary = kill_test(recipe, "--kills", 3, "--signal", "SIGTERM", timeout=300)
    assert summary["kills"] == 3 and summary["saved_at_sigterm"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_killed_at_twenty_random_moments_ends_the_same_to_the_bit(recipe):
    summary = kill_test(recipe, "--kills", 20, timeout=1500)
    assert summary["kills"] == 20 and summary["during_save"] >= 3


class At(TrainerCallback):
    """Do something in a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.act(model)


def trainer_for(directory, **more):
    args = PAdamTrainingArguments(
        **options(directory, optim_args=None, p_norm=0.5, lambda_p=0.3, max_steps=8, logging_steps=3) | more
    )
    model = tiny_llama(attention_dropout=0.1)
    return PAdamTrainer(model=model, args=args, train_dataset=blocks(), eval_dataset=blocks(4))


def rows(trainer):
    return [{k: v for k, v in row.items() if "runtime" not in k} for row in trainer.state.log_history if "loss" in row]


def weights(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


@pytest.fixture
def warnings_said(monkeypatch):
    """What the Trainer warns of, whatever other tests have done to the loggers of this process."""
    said = []
    monkeypatch.setattr(resumable.logger, "warning", lambda text, *values: said.append(text % values))
    return said


def test_sigterm_in_a_users_script_saves_and_exits_with_143(tmp_path, warnings_said):
    whole = trainer_for(tmp_path / "whole")
    whole.train()
    stopped = trainer_for(tmp_path / "stopped")
    stopped.add_callback(At(4, lambda _: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit) as stop:
        stopped.train()
    assert stop.value.code == 143 and "SIGTERM: saved checkpoint-5" in " ".join(warnings_said)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed = trainer_for(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert rows(resumed) == rows(whole)


def test_sigterm_saves_whatever_other_callbacks_want_and_all_are_told(tmp_path, warnings_said, caplog):
    """Also one that comes after the Trainer's own, and sets what is to be done at every step."""

    class Own(TrainerCallback):
        saved = 0

        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step % 100 == 0

        def on_save(self, args, state, control, **kwargs):
            self.saved = state.global_step

    own = Own()
    stopped = trainer_for(tmp_path, lambda_p=None, target_sparsity=0.5)
    stopped.add_callback(At(2, lambda _: signal.raise_signal(signal.SIGTERM)))
    stopped.add_callback(own)
    with pytest.raises(SystemExit):
        stopped.train()
    assert "SIGTERM: saved checkpoint-3" in " ".join(warnings_said) and own.saved == 3
    assert "before target_sparsity" not in caplog.text, "the run is to go on"


def test_checkpoints_in_the_middle_of_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint saves in the middle of a step"):
        trainer_for(tmp_path, enable_jit_checkpoint=True)


def test_another_batch_size_than_the_one_that_was_found_is_said(tmp_path, caplog):
    first = trainer_for(tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    first.train()
    file = next(path for path in (tmp_path / "checkpoint-4").glob("*.json") if '"draws_apart"' in path.read_text())
    state = json.loads(file.read_text())
    assert state["settings"]["train_batch_size"] == first.args.train_batch_size
    state["settings"]["train_batch_size"] -= 1  # auto_find_batch_size had to make it smaller
    file.write_text(json.dumps(state))
    trainer_for(tmp_path, max_steps=5).train(resume_from_checkpoint=True)
    assert "train_batch_size" in caplog.text


def test_what_sigterm_saves_can_be_gone_on_from_though_checkpoints_are_of_the_model_only(tmp_path):
    whole = trainer_for(tmp_path / "whole")
    whole.train()
    stopped = trainer_for(tmp_path / "stopped", save_only_model=True)
    stopped.add_callback(At(4, lambda _: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit):
        stopped.train()
    assert stopped.args.save_only_model
    resumed = trainer_for(tmp_path / "stopped", save_only_model=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._first_step == 5 and torch.equal(weights(resumed.model), weights(whole.model))


def test_a_forked_process_ends_by_sigterm_while_a_run_goes_on():
    """A metric that runs code with a time limit, for example."""
    with interruption.StopSignal() as stop:
        context = multiprocessing.get_context("fork")
        begun = context.Event()
        process = context.Process(target=lambda: begun.set() or time.sleep(60))
        process.start()
        assert begun.wait(20)
        process.terminate()
        process.join(20)
        assert process.exitcode == -signal.SIGTERM and not stop.agreed()


def test_sigterm_in_the_last_evaluation_saves_too(tmp_path, warnings_said):
    """After the last step's end, when a Trainer asks for nothing more."""

    class Evaluated(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step == 8:
                signal.raise_signal(signal.SIGTERM)

    stopped = trainer_for(tmp_path, eval_strategy="steps", eval_steps=4)
    stopped.add_callback(Evaluated())
    with pytest.raises(SystemExit) as stop:
        stopped.train()
    assert stop.value.code == 143 and "SIGTERM: saved checkpoint-8" in " ".join(warnings_said)
    resumed = trainer_for(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8 and torch.equal(weights(resumed.model), weights(stopped.model))


@pytest.mark.parametrize("strategy", ["best", "steps", "no"])
def test_sigterm_saves_whatever_the_strategy_and_the_evaluation_say(strategy, tmp_path):
    best = {"metric_for_best_model": "sparsity", "greater_is_better": False}  # the first, and none that follows
    trainer = trainer_for(
        tmp_path, save_strategy=strategy, save_steps=100, eval_strategy="steps", eval_steps=1, **best
    )
    trainer.add_callback(At(2, lambda _: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 143 and (tmp_path / "checkpoint-3").is_dir()


def test_a_handler_of_the_users_own_is_left_alone(tmp_path):
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda *_: seen.append("SIGTERM"))
    try:
        trainer = trainer_for(tmp_path)
        trainer.add_callback(At(4, lambda _: signal.raise_signal(signal.SIGTERM)))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen == ["SIGTERM"] and trainer.state.global_step == 8


def spoil(value):
    def act(model):
        next(model.parameters()).grad[0, 0] = value

    return act


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_stop_the_run_before_the_weights_change(tmp_path, value, monkeypatch):
    trainer = trainer_for(tmp_path)
    before = []
    clip = trainer._clip_grad_norm

    def spoiled(model):
        if trainer.state.global_step == 4:
            spoil(value)(model)
            before.append(weights(model))
        return clip(model)

    monkeypatch.setattr(trainer, "_clip_grad_norm", spoiled)
    with pytest.raises(FloatingPointError, match="gradient norm of step 5 is (nan|inf); the step is not taken"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before[0])


def test_a_skipped_step_changes_neither_weights_nor_moments(tmp_path, monkeypatch, caplog):
    trainer = trainer_for(tmp_path, nonfinite_gradients="skip", max_steps=5)
    clip, before = trainer._clip_grad_norm, []

    def spoiled(model):
        if trainer.state.global_step == 4:
            spoil(float("nan"))(model)
            moments = [state["exp_avg"].clone() for state in trainer.optimizer.state.values()]
            before.append((weights(model), moments))
        return clip(model)

    monkeypatch.setattr(trainer, "_clip_grad_norm", spoiled)
    trainer.train()
    assert trainer.state.global_step == 5 and "norm of step 5 is nan: its update is skipped" in caplog.text
    assert torch.equal(weights(trainer.model), before[0][0])
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, before[0][1], strict=True))
    with pytest.raises(ValueError, match="nonfinite_gradients='ignore' must be one of stop, skip"):
        trainer_for(tmp_path, nonfinite_gradients="ignore")


def test_a_checkpoint_of_other_settings_is_used_with_a_warning_that_lists_them(tmp_path, caplog):
    trainer_for(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    changed = trainer_for(tmp_path, max_steps=4, lambda_p=0.5, learning_rate=1e-3, adam_beta2=0.98, seed=7)
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (message,) = [r.getMessage() for r in caplog.records if "other settings" in r.getMessage()]
    for line in (
        "lambda_p: 0.3 -> 0.5 (the saved value is used)",
        "lr: 0.003 -> 0.001 (the saved value is used)",
        "betas: (0.9, 0.999) -> (0.9, 0.98) (the saved value is used)",
        "seed: 42 -> 7 (the new value is used)",
    ):
        assert line in message
    assert message.count(" -> ") == 5  # the heading's included
    assert changed.optimizer.param_groups[0]["lambda_p"] == 0.3


@pytest.mark.parametrize(
    ("change", "line"),
    [({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.0 -> 0.1"),
     ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: None -> 5.0"),
     ({"dataloader_drop_last": True}, "dataloader_drop_last: False -> True"),
     ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy: random -> sequential"),
     ({"rows": 24}, "training_rows: 32 -> 24")],
)  # fmt: skip
def test_what_else_changes_the_training_is_listed_too(change, line, tmp_path, caplog):
    trainer_for(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    changed = trainer_for(tmp_path, max_steps=4, **{k: v for k, v in change.items() if k != "rows"})
    changed.train_dataset = changed.train_dataset[: change.get("rows")]
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (message,) = [r.getMessage() for r in caplog.records if "other settings" in r.getMessage()]
    assert f"{line} (the new value is used)" in message and message.count(" -> ") == 2


@pytest.mark.parametrize("recipe", [pytest.param(RECIPES[0], marks=pytest.mark.slow), *RECIPES[1:]])
def test_the_recipes_report_bad_gradients_and_other_settings(tmp_path, model_dir, text_file, recipe):
    settings = {"model_name_or_path": model_dir, "train_file": text_file, "max_steps": 4, "save_strategy": "steps"}
    out = tmp_path / "out"
    config = write_config(tmp_path, **settings, output_dir=out, save_steps=2)
    assert run_recipe(recipe, config).returncode == 0
    checkpoint = out / "checkpoint-2"
    more = ["--resume_from_checkpoint", checkpoint, "--lambda_p", 0.5, "--seed", 5]
    result = run_recipe(recipe, config, *more)
    assert result.returncode == 0 and "lambda_p: 0.3 -> 0.5 (the saved value is used)" in result.stderr
    assert "seed: 3 -> 5 (the new value is used)" in result.stderr
    result = run_recipe(recipe, config, "--learning_rate", 1e30, "--output_dir", tmp_path / "other")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: the gradient norm of step" in result.stderr
    (checkpoint / "scheduler.pt").unlink(missing_ok=True)
    (checkpoint / "scheduler.bin").unlink(missing_ok=True)
    result = run_recipe(recipe, config, *more)
    assert result.returncode == 2 and "checkpoint-2 is not a complete checkpoint: it has no schedule" in result.stderr


@pytest.mark.parametrize("recipe", [pytest.param(RECIPES[0], marks=pytest.mark.slow), *RECIPES[1:]])
def test_the_recipes_refuse_a_checkpoint_that_does_not_fit(tmp_path, model_dir, text_file, recipe):
    shutil.copytree(model_dir, tmp_path / "other")
    tiny_llama(hidden_size=48).save_pretrained(tmp_path / "other")
    settings = {"model_name_or_path": model_dir, "train_file": text_file, "max_steps": 2, "save_strategy": "steps"}
    config = write_config(tmp_path, **settings, output_dir=tmp_path / "out", save_steps=1)
    assert run_recipe(recipe, config).returncode == 0
    cases = [
        (("--decay_embeddings", "true"), "the p-norm decay acts on .*, here on"),
        (("--model_name_or_path", tmp_path / "other"), "checkpoint-1 is of another model"),
        (("--optim", "adamw_torch"), "holds the state of optim='padam', which 'adamw_torch' cannot go on from"),
    ]
    for more, message in cases[: 3 if recipe == "finetune_clm.py" else 2]:
        result = run_recipe(recipe, config, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1", *more)
        assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
        assert re.search(f"error: .*{message}", result.stderr), result.stderr[-2000:]


def small_disk(directory, size):
    """A command prefix under which `directory` is a disk of its own, or None where that is not permitted."""
    prefix = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs {directory} && "$@"', "sh"]
    try:
        return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else None
    except FileNotFoundError:
        return None


LISTING = """
import os, runpy, sys
try: runpy.run_path(sys.argv.pop(1), run_name="__main__")
finally: print(os.listdir({out!r}))
"""


@pytest.mark.parametrize("recipe", [*RECIPES[:1], pytest.param(RECIPES[1], marks=pytest.mark.slow)])
def test_a_full_disk_ends_in_one_message_and_keeps_the_earlier_checkpoint(tmp_path, model_dir, text_file, recipe):
    out = tmp_path / "disk"
    out.mkdir()
    prefix = small_disk(out, "620k")  # a checkpoint takes some 400 kB
    if prefix is None:
        pytest.skip("runs where a user may mount a tmpfs in a namespace of their own (unshare -rm)")
    settings = {"model_name_or_path": model_dir, "train_file": text_file, "max_steps": 4, "save_strategy": "steps"}
    config = write_config(tmp_path, **settings, output_dir=out, save_steps=2)
    script = str(REPOSITORY / "recipes" / recipe)
    command = [*prefix, sys.executable, "-c", LISTING.format(out=str(out)), script, str(config)]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'recipes'}"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert f"error: {out}/checkpoint-4 could not be saved" in result.stderr
    assert f"The disk at {out} has 0.000 of 0.001 GB free" in result.stderr and "make room" in result.stderr
    assert result.stdout.splitlines()[-1] == "['checkpoint-2']"


def test_a_file_that_may_not_grow_ends_in_the_same_message(tmp_path):
    """The limit on file sizes works everywhere, as quotas do."""
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=2)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    trainer.add_callback(At(3, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))))
    try:
        with pytest.raises(RuntimeError, match="checkpoint-4 could not be saved: .*File too large.*The disk at /"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]


HIT = REPOSITORY / "tests/resuming/interrupted.py"


def launch(processes, *arguments):
    """Run it under torchrun, which says what happened to whom."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(HIT), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def final(directory):
    log = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return (directory / "model.safetensors").read_bytes(), [row for row in log if "loss" in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two processes make that nothing interrupts."""
    directory = tmp_path_factory.mktemp("whole")
    result = run_script(HIT, directory, "", "", "inf", processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "AGREED [1, 11, 18]" in result.stdout
    return directory


@pytest.mark.parametrize(
    ("step", "seconds", "stop", "agreed_after"),
    [
        pytest.param(8, 0, 8, [*range(1, 9)], id="long steps: after the step", marks=pytest.mark.slow),
        pytest.param(3, "inf", 11, [1, 11], id="short steps: at most ten later"),
        pytest.param(14, "inf", 18, [1, 11, 18], id="at the end: before it", marks=pytest.mark.slow),
    ],
)
def test_two_processes_stop_at_the_same_step_though_one_got_the_signal(
    tmp_path, whole, step, seconds, stop, agreed_after
):
    result = run_script(HIT, tmp_path, "SIGTERM", step, seconds, processes=2)
    assert result.returncode == 143, result.stderr[-3000:]
    assert f"AGREED {agreed_after}" in result.stdout
    saved = {f"checkpoint-{step}" for step in (stop, *range(6, stop, 6))}
    assert {path.name for path in tmp_path.iterdir()} == saved
    assert len(list((tmp_path / f"checkpoint-{stop}").glob("rng_state_*.pth"))) == 2
    result = run_script(HIT, tmp_path, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert final(tmp_path) == final(whole)


def test_processes_agree_about_once_a_second_whatever_their_steps_take(monkeypatch):
    """With a clock of our own: steps that become longer, and shorter again."""
    now, step, agreed_after = 0.0, 0, []

    def reduce(values, reduction):
        agreed_after.append(step)
        return values

    monkeypatch.setattr(interruption, "reduce", reduce)
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now)
    monkeypatch.setattr(interruption, "PartialState", lambda: SimpleNamespace(num_processes=2, device="cpu"))
    with interruption.StopSignal() as stop:
        for seconds in [0.01] * 30 + [0.3] * 30 + [40.0] * 10 + [0.01] * 30:
            now, step = now + seconds, step + 1
            assert not stop.agreed()
    gaps = [after - before for before, after in pairwise(agreed_after)]
    assert max(gaps) == interruption.MOST_STEPS and len(agreed_after) < 40
    assert [step for step in agreed_after if step <= 22] == [1, 11, 21]
    assert [step for step in agreed_after if 31 <= step <= 50] == [31, 41, 44, 47, 50]
    assert {*range(62, 71)} <= set(agreed_after)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_soon_and_the_run_can_go_on(tmp_path):
    began = time.monotonic()
    result = launch(2, tmp_path, "SIGKILL")
    assert time.monotonic() - began < 120
    assert result.returncode != 0 and "Signal 9 (SIGKILL) received by PID" in result.stderr, result.stderr[-3000:]
    result = launch(1, tmp_path)  # on what is left
    assert result.returncode == 0, result.stderr[-3000:]
    assert "processes: 2 -> 1 (the new value is used)" in result.stderr
