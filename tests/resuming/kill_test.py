"""Kill a fine-tuning run again and again, resume it with the same command, compare the end with an undisturbed run.

    python tests/resuming/kill_test.py finetune_clm.py --kills 20 --seed 0
    python tests/resuming/kill_test.py finetune_clm_no_trainer.py --moments optimizer publish results

SIGKILL comes at random moments, half of them while a checkpoint is being written; or at the moments named. With
`--signal SIGTERM`, a run that is training saves a checkpoint and exits with status 143; before and after, it just
dies. The real recipe runs on a tiny model with dropout; weights, results and pictures must come out the same to the
bit. Every attempt is a process of its own, forked from this one, which has done nothing but the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "recipes"), str(REPOSITORY / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

import conftest  # noqa: E402  (sets the environment; must come before transformers)
import torch  # noqa: E402

SETTINGS = {
    "block_size": 32, "max_steps": 60, "per_device_train_batch_size": 4, "logging_steps": 5, "p_norm": 0.5,
    "lambda_p": 0.3, "learning_rate": 3e-3, "max_eval_samples": 8, "seed": 3, "report_to": "none",
    "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "resume_from_checkpoint": "true",
}  # fmt: skip
SAME_FILES = ("model.safetensors", "training.png", "weight_magnitudes.png", "sparsity_by_layer.png")
SAME_RESULTS = ("test_perplexity", "test_perplexity_before", "validation_perplexity", "sparsity", "train_steps")


def start(recipe: str, inputs: Path, output: Path, moment: str | None = None) -> int:
    """Fork an attempt, which ends itself at a named moment; return its process id."""
    process = os.fork()
    if process:
        return process
    log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if moment:
        die_at(moment)
    options = SETTINGS | {"model_name_or_path": inputs, "train_file": inputs / "text.txt", "output_dir": output}
    script = REPOSITORY / "recipes" / recipe
    sys.argv = [str(script), *(f"--{key}={value}" for key, value in options.items())]
    status = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def die_at(moment: str) -> None:
    """Arrange for SIGKILL: before the optimizer of the second checkpoint, before its renaming, before the results."""
    calls = 0

    def deadly(function, fatal):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += fatal(*args)
            if calls == 2 or (calls == 1 and moment == "results"):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    if moment == "optimizer":
        torch.save = deadly(torch.save, lambda _, file, *rest: Path(file).name.startswith("optimizer"))
    elif moment == "publish":
        os.rename = deadly(os.rename, lambda source, _: ".incomplete" in str(source))
    elif moment == "results":
        os.replace = deadly(os.replace, lambda _, target: Path(target).name == "results.json")


def kill_randomly(
    process: int, output: Path, longest: float, generator: random.Random, number: signal.Signals
) -> int | None:
    """Send a signal at a random moment, or once a checkpoint is being written; return its exit code if in time."""
    during_save, limit = generator.random() < 0.5, time.monotonic() + generator.uniform(0, longest)
    saving = None
    while True:
        if os.waitpid(process, os.WNOHANG)[0]:
            return None
        now = time.monotonic()
        if during_save and now > limit and saving is None and any(output.glob(".incomplete/checkpoint-*")):
            saving = now + generator.uniform(0, 0.02)
        if now > (saving or float("inf")) or (not during_save and now > limit):
            os.kill(process, number)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(0.0002)


def end_state(output: Path, number: signal.Signals = signal.SIGKILL) -> dict:
    """What must not depend on interruptions by a signal."""
    results = json.loads((output / "results.json").read_text())
    state = {name: (output / name).read_bytes() for name in SAME_FILES} | {key: results[key] for key in SAME_RESULTS}
    # A kill between the last checkpoint and the deletion of the oldest leaves that one too.
    newest = sorted((path.name for path in output.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))
    return state | {
        # SIGTERM saves one more, of the step that it came in, which may take the place of the one before the last.
        "checkpoints": newest[-(1 if number == signal.SIGTERM else SETTINGS["save_total_limit"]) :],
        "incomplete": (output / ".incomplete").exists(),
    }


def main() -> None:
    """Run the test and print a summary as JSON; the exit status is 1 if anything came out different."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", choices=["finetune_clm.py", "finetune_clm_no_trainer.py"])
    parser.add_argument("--kills", type=int, default=0, help="random kills; runs are repeated until all have happened")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["SIGKILL", "SIGTERM"], default="SIGKILL")
    parser.add_argument("--moments", nargs="*", default=[], choices=["optimizer", "publish", "results"])
    args = parser.parse_args()
    generator = random.Random(args.seed)
    runpy.run_path(str(REPOSITORY / "recipes" / args.recipe))  # imports what every attempt needs

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        inputs = work / "inputs"
        conftest.tiny_llama(attention_dropout=0.1).save_pretrained(inputs)
        conftest.character_tokenizer().save_pretrained(inputs)
        (inputs / "text.txt").write_text(conftest.TEXT)

        begin = time.monotonic()
        process = start(args.recipe, inputs, work / "undisturbed")
        while not list(work.glob("undisturbed/checkpoint-*")) and time.monotonic() < begin + 120:
            time.sleep(0.01)
        first_save = time.monotonic() - begin
        _, status = os.waitpid(process, 0)
        longest = first_save + (time.monotonic() - begin - first_save) / 5  # so that a run takes several kills
        if status:
            sys.exit((work / "undisturbed.log").read_text())
        expected = end_state(work / "undisturbed", signal.Signals[args.signal])

        summary = {"recipe": args.recipe, "kills": 0, "during_save": 0, "saved_at_sigterm": 0, "runs": 0}
        summary |= {"passed_over": 0, "different": []}
        number, moments = signal.Signals[args.signal], list(args.moments)
        while summary["kills"] < args.kills or moments or not summary["runs"]:
            output = work / f"run-{summary['runs']}"
            while True:
                moment = moments.pop(0) if moments else None
                process = start(args.recipe, inputs, output, moment)
                if moment is None and summary["kills"] < args.kills:
                    code = kill_randomly(process, output, longest, generator, number)
                else:
                    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                if code in (0, None):
                    break
                if code not in (-signal.SIGKILL, -number, 128 + number):
                    sys.exit(f"an attempt failed:\n{Path(f'{output}.log').read_text()}")
                summary["kills"] += 1
                summary["saved_at_sigterm"] += code == 143
                summary["during_save"] += any(output.glob(".incomplete/checkpoint-*"))
            log = Path(f"{output}.log").read_text()
            summary["passed_over"] += log.count("passed over")
            if not (output / "results.json").is_file():
                sys.exit(f"an attempt failed:\n{log}")
            state = end_state(output, number)
            summary["different"] += [key for key in expected if state[key] != expected[key]]
            summary["runs"] += 1
    print(json.dumps(summary))  # noqa: T201
    sys.exit(bool(summary["different"]))


if __name__ == "__main__":
    main()
