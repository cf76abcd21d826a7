"""Which checkpoints count as complete, which one a run goes on from, which ones are deleted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import REPOSITORY, blocks, options, tiny_llama
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_padam import PAdamTrainer, PAdamTrainingArguments
from hf_padam.resuming.checkpoints import (
    CheckpointError,
    find_defect,
    is_whole,
    newest_checkpoint,
    resolve_checkpoint,
    rotate_checkpoints,
    staged_checkpoint,
)
from hf_padam.resuming.settings import check_world_size


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """What the plain Trainer writes."""
    directory = tmp_path_factory.mktemp("plain")
    args = TrainingArguments(**options(directory, max_steps=4, save_strategy="steps", save_steps=2))
    Trainer(model=tiny_llama(), args=args, train_dataset=blocks()).train()
    return directory


@pytest.fixture
def run_dir(plain_run, tmp_path):
    return shutil.copytree(plain_run, tmp_path / "run")


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def zero_the_middle(file):
    """As after a power loss: the file has its length, but not all of its contents."""
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(64))


def empty(file):
    os.truncate(file, 0)


def overwrite(file):
    file.write_bytes(bytes(range(1, 200)))


def make_unreadable(file):
    """Even for root."""
    file.unlink()
    file.symlink_to(file)


@pytest.mark.parametrize(
    ("name", "harm"),
    [(name, harm)
     for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
     for harm in (os.unlink, halve, empty, overwrite)]
    + [("optimizer.pt", zero_the_middle), ("optimizer.pt", make_unreadable), ("training_args.bin", halve),
       ("config.json", halve)],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_passed_over_and_left_alone(run_dir, caplog, name, harm):
    newest, older = run_dir / "checkpoint-4", run_dir / "checkpoint-2"
    assert newest_checkpoint(run_dir) == newest and not caplog.records
    harm(newest / name)
    before = sorted(newest.iterdir())
    assert newest_checkpoint(run_dir) == older
    (record,) = caplog.records
    assert "checkpoint-4 is incomplete" in record.getMessage() and name.split(".")[0] in record.getMessage()
    assert sorted(newest.iterdir()) == before
    args = PAdamTrainingArguments(**options(run_dir, max_steps=6, optim_args=None))
    trainer = PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks())
    with pytest.raises(CheckpointError, match="checkpoint-4 is not a complete checkpoint.*Name another, or give"):
        trainer.train(resume_from_checkpoint=str(newest))


def test_missing_shards_and_transformers_own_mark_are_recognised(run_dir):
    checkpoint = run_dir / "checkpoint-4"
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    assert find_defect(checkpoint) is None
    shutil.move(checkpoint / "model-00001-of-00001.safetensors", checkpoint / "model-00002-of-00002.safetensors")
    assert "names model-00001-of-00001.safetensors, which is missing" in find_defect(checkpoint)
    (run_dir / "checkpoint-2" / "checkpoint-is-incomplete.txt").touch()
    assert "checkpoint-is-incomplete.txt" in find_defect(run_dir / "checkpoint-2")
    assert newest_checkpoint(run_dir) is None


def test_a_plain_trainers_run_goes_on_under_padam_trainer(run_dir):
    empty(run_dir / "checkpoint-4" / "trainer_state.json")
    args = PAdamTrainingArguments(**options(run_dir, max_steps=4, save_strategy="steps", save_steps=2))
    trainer = PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert find_defect(run_dir / "checkpoint-4") is None, "the half-written one was written anew"


def test_without_a_checkpoint_training_starts_from_the_beginning_and_says_so(tmp_path, caplog):
    args = PAdamTrainingArguments(**options(tmp_path / "new", max_steps=2))
    trainer = PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    assert "has no complete checkpoint: training starts from the beginning" in caplog.text


def test_checkpoints_of_an_earlier_run_are_pointed_out(tmp_path, caplog):
    checkpoint_at(tmp_path, 4, 100)
    assert resolve_checkpoint(None, tmp_path) is None
    assert "checkpoint-4 is of an earlier run" in caplog.text


def test_a_checkpoint_of_the_last_step_is_not_trained_further(tmp_path):
    args = PAdamTrainingArguments(**options(tmp_path, max_steps=3, save_strategy="steps", save_steps=2))
    models = []
    for resume in (None, True):
        trainer = PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks())
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 3
        models.append(trainer.model.state_dict())
    assert all((models[0][name] == models[1][name]).all() for name in models[0])


def test_the_best_checkpoint_is_known_by_its_final_name_and_kept(tmp_path):
    args = PAdamTrainingArguments(
        **options(tmp_path, max_steps=6, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
                  save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="sparsity",
                  greater_is_better=False)
    )  # fmt: skip
    trainer = PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks(), eval_dataset=blocks(4))
    trainer.train()  # the sparsity rises, so an early checkpoint is the best
    best = trainer.state.best_model_checkpoint
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert best == str(tmp_path / left[0]) and len(left) == 2 and left[1] == "checkpoint-6"
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best


class Kill(TrainerCallback):
    """End a run as soon as the checkpoint of a step is saved."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def evaluated(directory, callbacks=(), resume=None, **more):
    """Train with an evaluation and a checkpoint of every step, of which the first is the best."""
    settings = options(directory, max_steps=8, save_strategy="steps", save_steps=1, eval_strategy="steps",
                       eval_steps=1, load_best_model_at_end=True, metric_for_best_model="sparsity",
                       greater_is_better=False) | more  # fmt: skip
    trainer = PAdamTrainer(
        model=tiny_llama(), args=PAdamTrainingArguments(**settings), train_dataset=blocks(), eval_dataset=blocks(4),
        callbacks=list(callbacks),
    )  # fmt: skip
    with suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("change", ["renamed", "copied", "another working directory"])
def test_the_best_checkpoint_is_kept_and_loaded_wherever_the_run_is_now(change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluated(Path("run"), [Kill(4)], save_total_limit=2)
    now = tmp_path / ("run" if change == "another working directory" else "now")
    if change == "renamed":
        os.rename("run", now)
    elif change == "copied":
        shutil.copytree("run", now)
        (tmp_path / "run" / "checkpoint-1" / "model.safetensors").unlink()  # that directory is another run's by now
    else:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    trainer = evaluated(now, resume=True, save_total_limit=2)
    assert sorted(os.listdir(now)) == ["checkpoint-1", "checkpoint-8"]
    assert trainer.state.best_model_checkpoint == str(now / "checkpoint-1")
    best = load_file(now / "checkpoint-1" / "model.safetensors")
    assert all((trainer.model.state_dict()[name] == best[name]).all() for name in best)


@pytest.mark.parametrize("step", [3, 4])  # the last one before it stops, and that in which it does
def test_early_stopping_waits_no_longer_in_a_resumed_run(step, tmp_path):
    def patient():
        return [EarlyStoppingCallback(9), EarlyStoppingCallback(3)]

    evaluated(tmp_path, [*patient(), Kill(step)])
    trainer = evaluated(tmp_path, patient(), resume=True)
    assert trainer.state.global_step == 4
    assert [callback.early_stopping_patience_counter for callback in trainer.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)] == [3, 3]  # fmt: skip


def test_a_callback_that_the_checkpoint_does_not_know_begins_anew(tmp_path):
    evaluated(tmp_path, [Kill(2)])
    assert evaluated(tmp_path, [EarlyStoppingCallback(3)], resume=True).state.global_step == 5


def checkpoint_at(directory, step, seconds):
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        torch.save({}, path / name)
    os.utime(path, (seconds, seconds))
    return path


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), halve], ids=["missing", "cut short"])
def test_rotation_neither_counts_nor_deletes_half_written_checkpoints(tmp_path, damage):
    old, half = checkpoint_at(tmp_path, 4, 100), checkpoint_at(tmp_path, 8, 200)
    damage(half / "optimizer.pt")
    new = checkpoint_at(tmp_path, 6, 200)
    rotate_checkpoints(new, 2)
    assert old.exists() and half.exists() and new.exists()
    rotate_checkpoints(new, 1)
    assert not old.exists() and half.exists() and new.exists()


def test_a_checkpoint_that_was_about_to_be_replaced_comes_back(tmp_path):
    """A kill came between the two renames, which take the old one away and put the new one there."""
    old = checkpoint_at(tmp_path, 4, 100)
    (tmp_path / ".incomplete").mkdir()
    old.rename(tmp_path / ".incomplete" / "replaced-checkpoint-4")
    assert newest_checkpoint(tmp_path) == old and old.is_dir()


@pytest.mark.parametrize("choice", ["true", "True", True])
def test_the_newest_may_be_asked_for_in_words(tmp_path, choice):
    assert resolve_checkpoint(choice, tmp_path) is None
    assert resolve_checkpoint("false", tmp_path) is None
    there = checkpoint_at(tmp_path, 4, 100)
    assert resolve_checkpoint(choice, tmp_path) == there


def test_only_deepspeeds_partitions_need_the_same_number_of_processes():
    check_world_size("checkpoint-4", 8, 4, DistributedType.MULTI_GPU)
    check_world_size("checkpoint-4", 8, 8, DistributedType.DEEPSPEED)
    with pytest.raises(CheckpointError, match="checkpoint-4 was saved by 8 processes and this run has 4"):
        check_world_size("checkpoint-4", 8, 4, DistributedType.DEEPSPEED)


def test_rotation_goes_by_time_and_keeps_the_newest_and_the_best(tmp_path):
    earlier_run = [checkpoint_at(tmp_path, step, 100 + step) for step in (10, 20)]
    best, new = checkpoint_at(tmp_path, 2, 200), checkpoint_at(tmp_path, 4, 300)
    rotate_checkpoints(new, 3, best)
    assert [path.exists() for path in earlier_run] == [False, True] and best.exists() and new.exists()
    rotate_checkpoints(new, 1, best)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4"]


def test_a_failed_save_leaves_what_there_was(tmp_path):
    with staged_checkpoint(tmp_path / "checkpoint-1") as staging:
        staging.mkdir(parents=True)
        (staging / "file").write_text("first")
    with pytest.raises(
        CheckpointError, match="checkpoint-1 could not be saved: broken. The disk at /.* has .* GB free"
    ):
        with staged_checkpoint(tmp_path / "checkpoint-1") as staging:
            staging.mkdir(parents=True)
            (staging / "file").write_text("second")
            raise RuntimeError("broken")
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "first"


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    rename = os.rename

    def full(source, destination):
        if (Path(source) / "second").exists():
            raise OSError("no space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", full)
    for name in ("first", "second"):
        with nullcontext() if name == "first" else pytest.raises(CheckpointError, match="no space left"):
            with staged_checkpoint(tmp_path / "checkpoint-1") as staging:
                staging.mkdir(parents=True)
                (staging / name).touch()
    assert os.listdir(tmp_path) == ["checkpoint-1"] and (tmp_path / "checkpoint-1" / "first").exists()


class Writes(TrainerCallback):
    """Put a file into every checkpoint, or change one that is there."""

    def __init__(self, name, text):
        self.name, self.text = name, text

    def on_save(self, args, state, control, **kwargs):
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.name).write_text(self.text)


def saved(directory, callbacks=(), **more):
    settings = options(directory, optim_args=None, max_steps=4, save_strategy="steps", save_steps=1) | more
    trainer = PAdamTrainer(
        model=tiny_llama(), args=PAdamTrainingArguments(**settings), train_dataset=blocks(), callbacks=list(callbacks)
    )
    trainer.train()
    return sorted(path.name for path in directory.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("name", "text"),
    [("predictions.json", '{"a": 1}\n{"a": 2}\n'), ("optimizer_notes.pt", "no archive"), ("notes.safetensors", "not"),
     ("config.json", "// changed"), ("training_args.bin", "changed")],
)  # fmt: skip
def test_what_else_is_put_into_a_checkpoint_does_not_make_it_incomplete(name, text, tmp_path):
    assert saved(tmp_path, [Writes(name, text)], save_total_limit=2) == ["checkpoint-3", "checkpoint-4"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


@pytest.mark.parametrize("harm", [os.unlink, halve, empty])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_ours_that_has_lost_something_since_is_passed_over(name, harm, tmp_path):
    saved(tmp_path)
    harm(tmp_path / "checkpoint-4" / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize(
    ("state_file", "name"),
    [("trainer_state.json", "run_state.json"), ("custom_checkpoint_0.pkl", "sampler.bin"),
     ("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"), ("custom_checkpoint_0.pkl", "scaler.pt")],
)  # fmt: skip
def test_what_a_run_has_written_besides_is_missed_too(state_file, name, tmp_path):
    for step in (1, 2):
        with staged_checkpoint(tmp_path / f"checkpoint-{step}") as staging:
            checkpoint_at(staging.parent, step, 100)
            (staging / name).write_text("{}")
            torch.save({}, staging / "custom_checkpoint_0.pkl")
    assert newest_checkpoint(tmp_path, state_file) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / name).unlink()
    assert newest_checkpoint(tmp_path, state_file) == tmp_path / "checkpoint-1"
    assert find_defect(tmp_path / "checkpoint-2", state_file) == f"{name} is missing"


@pytest.mark.parametrize("harm", [halve, empty, overwrite])
def test_what_says_where_a_checkpoint_of_ours_is_may_be_damaged_too(harm, tmp_path, caplog):
    saved(tmp_path)
    for step, name in (4, "trainer_state.json"), (3, "run_state.json"), (2, "hf_padam_complete.json"):
        harm(tmp_path / f"checkpoint-{step}" / name)
        caplog.clear()
        assert newest_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step - 1}"
        assert f"{name} cannot be read" in caplog.records[-1].getMessage()
        assert is_whole(tmp_path / f"checkpoint-{step}")


@pytest.mark.parametrize(
    "text", ["[[1, 2]]", '{"optimizer.pt": Infinity}', '{"optimizer.pt": "large"}', '{"optimizer.pt": null}', "3"]
)
def test_a_marker_of_another_shape_is_damage(text, tmp_path):
    saved(tmp_path)
    (tmp_path / "checkpoint-4" / "hf_padam_complete.json").write_text(text)
    assert "hf_padam_complete.json cannot be read" in find_defect(tmp_path / "checkpoint-4")


def test_checkpoints_of_the_model_only_are_rotated_and_not_gone_on_from(tmp_path):
    assert saved(tmp_path, save_only_model=True, save_total_limit=2) == ["checkpoint-3", "checkpoint-4"]
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="checkpoint-4 is not a complete checkpoint: it has no optimizer"):
        resolve_checkpoint(str(tmp_path / "checkpoint-4"), tmp_path)
    assert saved(tmp_path, save_total_limit=2, save_steps=3, max_steps=7) == ["checkpoint-6", "checkpoint-7"]


def test_a_second_run_into_the_same_directory_is_told_before_it_trains(tmp_path):
    code = f"import sys; from files import locked\nwith locked({str(tmp_path)!r}): print(); sys.stdin.read()"
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "env": os.environ | {"PYTHONPATH": str(REPOSITORY / "hf_padam")},
    }
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(CheckpointError, match="cannot hold this run's checkpoints: another process is writing"):
            saved(tmp_path)
        with pytest.raises(CheckpointError, match="another process is writing there"):
            with staged_checkpoint(tmp_path / "checkpoint-1"):
                pass
        assert saved(tmp_path, save_strategy="no") == []
        other.stdin.close()
    assert len(saved(tmp_path)) == 4
    assert sorted(os.listdir(tmp_path)) == [f"checkpoint-{step}" for step in range(1, 5)]
