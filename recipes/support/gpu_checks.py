"""The parts of `check_gpu.py`: each a function of a device that returns its figures, or raises what is wrong."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_padam
from hf_padam.optim.backends import BACKENDS, eager
from hf_padam.optim.random_bits import Rounding
from hf_padam.optim.update import initial_s, prepare

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "recipes"
Figures = dict[str, Any]


class PartFailed(RuntimeError):
    """A part failed, but not before it had some figures."""

    def __init__(self, what: str, figures: Figures) -> None:
        super().__init__(what)
        self.figures = figures


def run(*command: object, timeout: float = 300) -> str:
    """Run a Python program of the repository; return what it printed.

    Raises:
        RuntimeError: If it fails, with the end of what it said.
    """
    line = [sys.executable, *map(str, command)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line[1:])}: exit {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def marked_tests(device: torch.device) -> Figures:
    """Run the tests that are marked as needing a GPU."""
    return {"pytest": run("-m", "pytest", "-n0", "-q", "-m", "gpu", "tests").strip().splitlines()[-1]}


DTYPES = {
    "fp32": (torch.float32,) * 4,
    "bf16": (torch.bfloat16,) * 4,
    "bf16, fp32 moments": (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16, torch.float32, torch.float32),
    "bf16, fp16 gradients": (torch.bfloat16, torch.float16, torch.float32, torch.float32),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "magnitude": {}, "fisher": {"importance": "fisher"}, "late decay": {"late_decay": True}, "s": {"s_rate": 0.3},
    "pruning": {"reference": 0.05}, "pruning by fisher": {"importance": "fisher", "reference": 0.005},
    "holding zeros": {"reference": 0.0},
}  # fmt: skip
"""What is compared. The last three are what a step of `target_sparsity` does by default."""


SIZES = (100_000, 100_003, 4096)
"""Elements of the tensors that are stepped together: those of aligned tensors are read 16 bytes at a time."""


def parity(device: torch.device, backend: str = "triton", sizes: tuple[int, ...] = SIZES) -> Figures:
    """Step the same tensors with the backend and eagerly: all dtypes, both importances, with and without rounding."""
    worst: dict[str, float] = {}
    ways: tuple[Callable[..., None], ...] = (eager.step, BACKENDS[backend].step)
    for (name, dtypes), rounds in itertools.product(DTYPES.items(), (False, True)):
        for variant, options in VARIANTS.items() if not rounds or dtypes[0] == torch.bfloat16 else ():
            steep = (-math.inf,) if "reference" in options else (-1.0,) if variant != "s" else ()
            for p_norm in (*(() if "reference" in options else (0.8, 0.5, 1.0, 3.0)), *steep):
                scalars = prepare(20, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, p_norm=p_norm, lambda_p=0.05,
                                  weight_decay=0.1, **options)  # fmt: skip
                generator = torch.Generator().manual_seed(0)
                raw = [[torch.randn(size, generator=generator) / 10 for size in sizes] for _ in dtypes]
                raw[3] = [t.square() + 1e-6 for t in raw[3]]
                for t in raw[0]:
                    t[: len(t) // 10] = 0
                results = []
                for take_step in ways:
                    own = [[t.to(device, dtype, copy=True) for t in ts] for ts, dtype in zip(raw, dtypes, strict=True)]
                    s = [initial_s(t, p_norm) for t in own[0]] if variant == "s" else None
                    keys = Rounding(1, list(range(2, 2 + len(sizes)))) if rounds else None
                    take_step(*own, scalars, keys, s)
                    results.append([torch.cat(ts) for ts in own])
                for expected, got, dtype in zip(*results, dtypes, strict=True):
                    # Of those that round to a neighbour, a few differ by all that lies between two numbers.
                    unit = max(torch.finfo(dtype).eps, 4e-6) if dtype != torch.float32 else 4e-6
                    # GPUs divide and take roots to a unit in the last place, of updates of some 1e-2.
                    error = (got.double() - expected.double()).abs() / (expected.double().abs() + 2.5e-3)
                    off = float((error > 1.01 * unit).double().mean())
                    worst[name] = max(worst.get(name, 0.0), float(error.max()) if dtype == torch.float32 else 0.0)
                    if off > 1e-4:
                        raise AssertionError(
                            f"{backend} differs from eager: {name}, {variant}, p={p_norm}, {rounds=}: {off:.2%}"
                        )
    return {f"largest relative difference, {name}": value for name, value in worst.items() if value}


def overflow(device: torch.device) -> Figures:
    """Force an fp16 overflow: that step must change nothing at all, and the next one goes on."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, device=device)
    optimizer = hf_padam.PAdam(model.parameters(), lr=1e-2, check_zero_start=False)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60)
    start = model.weight.detach().clone()
    for _ in range(80):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = model(torch.ones(4, 64, device=device)).float().square().mean()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            break
        if optimizer.state or not torch.equal(model.weight, start):
            raise AssertionError("a step whose gradients had overflown changed something")
    if scaler.get_scale() == 2.0**60 or torch.equal(model.weight, start):
        raise AssertionError("there was no overflow, or no step after it")
    return {"scale at which steps went on": scale}


TRAININGS: dict[str, dict[str, Any]] = {
    "bf16 autocast": {"bf16": True},
    "fp16": {"fp16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "torch_compile": {"torch_compile": True},
}


def trainings(device: torch.device, ways: tuple[str, ...] = tuple(TRAININGS), steps: int = 30) -> Figures:
    """Train a tiny model with the plain Trainer in each way: losses are finite, and weights become zero."""
    figures: Figures = {}
    ids = torch.randint(2, 90, (64, 64), generator=torch.Generator().manual_seed(0)).tolist()
    data = [dict(input_ids=row, labels=row) for row in ids]
    shape: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    for way in ways:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **shape))
        with tempfile.TemporaryDirectory() as scratch:
            args = TrainingArguments(
                scratch, optim="padam", optim_args="p_norm=0.5,lambda_p=0.3", learning_rate=3e-3, max_steps=steps,
                per_device_train_batch_size=8, report_to=[], save_strategy="no", disable_tqdm=True,
                use_cpu=device.type == "cpu", **TRAININGS[way],
            )  # fmt: skip
            loss = Trainer(model=model, args=args, train_dataset=data).train().training_loss
        weights = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
        zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
        if not math.isfinite(loss) or not 0 < zeros < 1:
            raise AssertionError(f"{way}: loss {loss}, {zeros:.1%} zeros")
        figures |= {f"{way}, loss": loss, f"{way}, zeros": zeros}
    return figures


def speed(device: torch.device) -> Figures:
    """Time one step at three sizes beside AdamW for-loop, foreach and fused and a measured copy; and peak memory."""
    rows: list[dict[str, Any]] = []
    for model in ("smollm2-135m", "gpt2", "llama-1.1b"):
        try:
            rows += _benchmark("--models", model, "--p_norms", "0.8", "1.0")
        except Exception as error:  # for want of memory, say
            raise PartFailed(f"{model}: {error}", {"rows": rows}) from error
    if not any(row["optimizer"] == "PAdam triton" for row in rows):
        raise AssertionError(f"the Triton backend did not run: {BACKENDS['triton'].unavailable(device)}")
    return {"rows": rows}


def trainer_speed(device: torch.device) -> Figures:
    """Time the Trainer's tokens a second with PAdam and with `adamw_torch_fused`."""
    models = ("--models", "smollm2-135m", "--dtypes", "fp32", "--p_norms", "0.8", "--repeats", "3")
    return {"rows": _benchmark(*models, "--trainer_steps", "12")}


def _benchmark(*options: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.json"
        run(RECIPES / "benchmark_step.py", *options, "--output", file)
        return json.loads(file.read_text())


def fsdp2(device: torch.device) -> Figures:
    """Start five steps of the quickstart under FSDP2's launch file, with one process."""
    with tempfile.TemporaryDirectory() as scratch:
        launch = ("-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate" / "fsdp2.yaml")
        return _finetune(scratch, *launch, "--num_processes", "1", steps=5)


def quickstart(device: torch.device) -> Figures:
    """Run the quickstart, all of it; its model and text come through pip."""
    with tempfile.TemporaryDirectory() as scratch:
        return _finetune(scratch)


def _finetune(scratch: str, *launch: object, steps: int | None = None) -> Figures:
    options = ("--max_steps", steps, "--max_eval_samples", 4) if steps else ()
    config = RECIPES / "configs" / "quickstart.yaml"
    run(*launch, RECIPES / "finetune_clm.py", config, "--output_dir", scratch, "--report_to", "none", *options)
    results = json.loads((Path(scratch) / "results.json").read_text())
    perplexity = results["test_perplexity"]
    learns = steps or perplexity < results["test_perplexity_before"]
    if not math.isfinite(perplexity) or not learns or abs(results["sparsity"] - 0.5) > 1e-3:
        raise AssertionError(f"perplexity {perplexity} with {results['sparsity']:.2%} zeros")
    return {name: results[name] for name in ("test_perplexity_before", "test_perplexity", "sparsity")}


@dataclass(frozen=True)
class Part:
    """One part, as the report names it."""

    name: str
    check: Callable[[torch.device], Figures]

    @property
    def what(self) -> str:
        """What it does."""
        return (self.check.__doc__ or "").strip()


PARTS = [
    Part("marked tests", marked_tests), Part("parity", parity), Part("fp16 overflow", overflow),
    Part("ways of training", trainings), Part("speed", speed), Part("Trainer", trainer_speed), Part("FSDP2", fsdp2),
    Part("quickstart", quickstart),
]  # fmt: skip
