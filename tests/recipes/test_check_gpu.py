"""The command for whoever has a GPU, as far as a CPU can tell."""

import json
import math
import os
import subprocess

import benchmark_step
import check_gpu
import finetune_clm
import pytest
import torch
from support import gpu_checks
from transformers import TrainingArguments

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_what_it_would_do_and_exits_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert check_gpu.main(["--output", str(tmp_path / "report")]) == 2
    said = capsys.readouterr().out
    assert "No GPU" in said and all(f"- {part.name}: {part.what}" in said for part in gpu_checks.PARTS)
    assert not list(tmp_path.iterdir())


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored afterwards


RESULTS = dict(test_perplexity_before=2.0, test_perplexity=1.0, sparsity=0.5)


def test_it_names_every_option_of_what_it_starts(monkeypatch, tmp_path):
    """Each command is one that its program would accept."""
    commands = []

    def run(*command, **_):
        commands.append([str(word) for word in command])
        rows = [{"optimizer": "PAdam triton"}] if "llama-1.1b" in command else []
        for flag, text in (("--output", json.dumps(rows)), ("--output_dir", None)):
            if flag in commands[-1]:
                target = commands[-1][commands[-1].index(flag) + 1]
                file = target if text else f"{target}/results.json"
                with open(file, "w") as f:
                    f.write(text or json.dumps(RESULTS))
        return "1 passed"

    monkeypatch.setattr(gpu_checks, "run", run)
    outside = ("marked tests", "speed", "Trainer", "FSDP2", "quickstart")
    results = check_gpu.check([part for part in gpu_checks.PARTS if part.name in outside], CPU)
    assert [r["passed"] for r in results] == [True] * 5, results
    tests, *speeds, trainer, fsdp, whole = commands
    assert "gpu" in tests
    monkeypatch.setattr(benchmark_step, "time_steps", lambda *a: [])
    monkeypatch.setattr(benchmark_step, "time_trainer", lambda *a: [])
    assert len(speeds) == 3
    for command in (*speeds, trainer):
        assert command[0].endswith("benchmark_step.py")
        benchmark_step.main(command[1 : command.index("--output")])  # exits if it does not know an option
    assert whole[0].endswith("finetune_clm.py")
    assert fsdp[:2] == ["-m", "accelerate.commands.launch"] and fsdp[-2:] == ["--max_eval_samples", "4"]
    for wrong in ({"sparsity": 0.0}, {"test_perplexity": math.nan}, {"test_perplexity": 3.0}):
        monkeypatch.setattr(json, "loads", lambda text, wrong=wrong: {**RESULTS, **wrong})
        with pytest.raises(AssertionError, match="perplexity"):
            gpu_checks.quickstart(CPU)
    monkeypatch.undo()
    for command in (whole, fsdp[fsdp.index(whole[0]) :]):
        _, data, _, args = finetune_clm.parse([*command[1:], "--use_cpu"])
        assert data.max_eval_samples == (4 if command is not whole else 32) and args.max_steps in (5, 60)


def test_parity_is_checked_with_another_backend():
    figures = gpu_checks.parity(CPU, "eager", sizes=(1003, 512))
    assert set(figures.values()) <= {0.0}


def test_parity_sees_a_backend_that_differs(monkeypatch):
    from types import SimpleNamespace

    def wrong(params, grads, exp_avgs, exp_avg_sqs, scalars, *rest):
        gpu_checks.eager.step(params, grads, exp_avgs, exp_avg_sqs, scalars._replace(decay=2 * scalars.decay), *rest)

    monkeypatch.setitem(gpu_checks.BACKENDS, "wrong", SimpleNamespace(step=wrong))
    with pytest.raises(AssertionError, match="wrong differs from eager: fp32, magnitude"):
        gpu_checks.parity(CPU, "wrong", sizes=(1003, 512))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/optim/test_triton.py runs it")
def test_parity_holds_under_the_interpreter_of_triton(monkeypatch):
    # In fp32 only: the interpreter, not the GPU, truncates where 16 bits should be rounded.
    monkeypatch.setattr(gpu_checks, "DTYPES", {"fp32": gpu_checks.DTYPES["fp32"]})
    assert gpu_checks.parity(CPU, sizes=(2051, 4096, 48))


def test_an_overflow_is_forced_and_changes_nothing():
    assert 1 < gpu_checks.overflow(CPU)["scale at which steps went on"] < 2.0**60


@pytest.mark.parametrize("way", ["bf16 autocast", "gradient checkpointing"])
def test_ways_of_training_make_zeros(way):
    figures = gpu_checks.trainings(CPU, (way,), steps=20)
    assert 0 < figures[f"{way}, zeros"] < 1


ROW = dict(model="llama-1.1b", dtype="bf16", device="cuda", p_norm=0.8, milliseconds=10.0, first_step_seconds=1.0)


def test_the_report_names_the_hardware_what_failed_and_which_aims_are_missed(tmp_path, monkeypatch):
    rows = [
        ROW | dict(optimizer="copy", p_norm=None, gb_per_s=2000.0, ratio_to_fused_adamw=None, peak_extra_bytes=0),
        ROW | dict(optimizer="PAdam triton", gb_per_s=1900.0, ratio_to_fused_adamw=1.2, peak_extra_bytes=1000),
    ]

    def fails(device):
        """Fail."""
        raise ValueError("no such kernel")

    parts = [gpu_checks.Part("speed", lambda device: {"rows": rows}), gpu_checks.Part("broken", fails)]
    monkeypatch.setattr(check_gpu, "PARTS", parts)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    assert check_gpu.main(["--output", str(tmp_path / "report")]) == 1
    text, stored = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert [part["passed"] for part in stored["parts"]] == [True, False]
    assert f"torch: {torch.__version__}" in text and "accelerator: xpu" in text
    assert "ValueError: no such kernel" in text and "| broken | **failed** |" in text
    assert "**missed**: a step takes at most 1.05 of fused AdamW's time: 1.2" in text
    assert "- met: at least 0.9 of a copy's bandwidth" in text and "- met: at most 1% more memory" in text


def test_figures_from_before_a_model_that_does_not_fit_are_kept(monkeypatch):
    def benchmark(*options):
        if "llama-1.1b" in options:
            raise RuntimeError("CUDA out of memory")
        return [ROW | {"optimizer": "PAdam triton", "model": options[1]}]

    monkeypatch.setattr(gpu_checks, "_benchmark", benchmark)
    (result,) = check_gpu.check([part for part in gpu_checks.PARTS if part.name == "speed"], CPU)
    assert not result["passed"] and "llama-1.1b: CUDA out of memory" in result["error"]
    assert [row["model"] for row in result["figures"]["rows"]] == ["smollm2-135m", "gpt2"]


def test_it_keeps_to_one_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.setattr(check_gpu, "PARTS", [])
    check_gpu.main(["--output", str(tmp_path / "report")])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_where_several_gpus_have_been_counted_it_runs_anew_with_one(monkeypatch, tmp_path):
    """An import, of torchao for one, may have counted them; then the variable comes too late for this process."""
    ran = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(check_gpu, "PARTS", [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    finished = subprocess.CompletedProcess([], 7)
    monkeypatch.setattr(subprocess, "run", lambda command: ran.append(command) or finished)
    options = ["--output", str(tmp_path / "report")]
    assert check_gpu.main(options) == 7 and ran[0][-2:] == options and os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert check_gpu.main(options) != 7 and len(ran) == 1, "not for ever"


def test_the_trainers_speed_is_that_of_one_gpu(tmp_path):
    args = TrainingArguments(str(tmp_path))
    args._n_gpu = 4
    assert benchmark_step._on_one_gpu(args).n_gpu == 1
