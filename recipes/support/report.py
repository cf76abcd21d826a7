"""What a run leaves behind: `results.json`, a table, pictures, and `report.md` that holds them together."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import accelerate
import datasets
import evaluate
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.training_args import OptimizerNames

import hf_padam
from hf_padam import PAdamTrainingArguments
from hf_padam.files import write_atomically
from hf_padam.optim import steering_of
from hf_padam.sparsity import NEAR_ZERO, TensorCount, count_model_zeros, summarize
from hf_padam.training.other_optimizers import asks_for_decay

from .config_files import save_config
from .pictures import Magnitudes, draw_layers, draw_magnitudes, draw_training

RESULT_KEYS = (
    "validation_loss", "validation_perplexity", "sparsity", "sparsity_total", "decayed_parameters", "total_parameters",
    "train_steps", "train_tokens_per_second", "seed",
)  # fmt: skip
"""What every recipe's `results.json` holds at least. Losses in nats per token, sparsities as shares of exact zeros."""


@dataclass
class Run:
    """Everything that the report shows of one run; see `conclude`."""

    title: str
    results: dict[str, Any]
    history: list[dict[str, Any]]
    before: Magnitudes
    after: Magnitudes
    counts: list[TensorCount]
    command: str
    sources: dict[str, str]
    distilled: bool


def write_report(directory: Path, run: Run) -> None:
    """Write `results.json`, the pictures and `report.md` into `directory`, and print the table.

    Args:
        directory: The run's output directory.
        run: What to report; `run.results` must hold `RESULT_KEYS`.

    Raises:
        KeyError: If a result is missing.
    """
    missing = [key for key in RESULT_KEYS if key not in run.results]
    if missing:
        raise KeyError(f"results lack {', '.join(missing)}")
    draw_training(directory / "training.png", run.history, run.distilled)
    draw_magnitudes(directory / "weight_magnitudes.png", run.before, run.after)
    draw_layers(directory / "sparsity_by_layer.png", run.counts)
    rows = _rows(run)
    write_atomically(directory / "report.md", _markdown(run, rows))
    # Last: whoever finds results.json finds all the rest.
    stamp = {"_timestamp": datetime.now().astimezone().isoformat(timespec="seconds"), "_versions": versions()}
    write_atomically(directory / "results.json", json.dumps(run.results | stamp, indent=1) + "\n")
    table = Table(title=run.title)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(f"Model, results.json, report.md and pictures are in {directory}")


def conclude(
    directory: Path,
    model: nn.Module,
    decayed: list[str],
    *,
    title: str,
    model_source: str,
    before: Magnitudes,
    history: list[dict[str, Any]],
    arguments: tuple[Any, ...],
    is_main_process: bool,
    **values: Any,
) -> None:
    """Complete the results of a run with the counts of its final weights, then write everything.

    Every process must call this: sharded weights are counted together. Only the main one writes.

    Args:
        directory: The run's output directory.
        model: The model as it was saved.
        decayed: Names of its decayed weights.
        title: Heads the table and the report.
        model_source: Where the model comes from, for the report.
        before: The decayed weights before training.
        history: Rows with "step" and any of "loss", "sparsity", "eval_perplexity".
        arguments: The parsed arguments, of the model and the data first; they are saved as `run_config.yaml`.
        is_main_process: Whether this process writes.
        values: Perplexities and the other `RESULT_KEYS`, and whatever else is to be found in `results.json`; the
            losses follow from the perplexities.
    """
    counts = count_model_zeros(model, decayed, near_zero=NEAR_ZERO)
    after = Magnitudes.of(model, decayed)
    if not is_main_process:
        return
    config = directory / "run_config.yaml"
    save_config(config, *arguments)
    results = {
        **{
            f"{split}_loss": math.log(values[f"{split}_perplexity"])
            for split in ("validation", "test")
            if f"{split}_perplexity" in values
        },
        **values,
        **summarize(counts),
        "near_zeros": sum(c.near_zeros or 0 for c in counts if c.decayed),
        "near_zero_threshold": NEAR_ZERO,
        "hardware": hardware(),
    }
    data_args = arguments[1]
    run = Run(
        title=title,
        results=results,
        history=history,
        before=before,
        after=after,
        counts=counts,
        command=f"python {shlex.quote(sys.argv[0])} {shlex.quote(str(config))}",
        sources={
            "model": model_source,
            "text": str(data_args.dataset_name or data_args.train_file),
        },
        distilled=any(getattr(given, "distill_from", None) for given in arguments),
    )
    write_report(directory, run)


def optimizer_name(args: PAdamTrainingArguments) -> str:
    """Name what trains, for titles."""
    name = OptimizerNames(args.optim).value
    return f"{name} and a p-norm decay" if asks_for_decay(args) and args.lambda_p else name


def target(optimizer: Any) -> dict[str, Any]:
    """Return what became of a target sparsity, if there was one, for the results."""
    steering = steering_of(optimizer)
    if steering is None:
        return {}
    number, threshold = steering.zeroed()
    return {"target_sparsity": steering.target, "target_zeroed": number, "target_threshold": threshold}


def hardware() -> str:
    """Name the machine that this runs on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a run."""
    modules = (torch, transformers, datasets, accelerate, evaluate, hf_padam)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}


def _rows(run: Run) -> list[tuple[str, str, str]]:
    r = run.results
    before_sparsity = run.before.zeros / run.before.elements
    test, linear, asked = [], [], []
    if "target_sparsity" in r:
        share = r["target_zeroed"] / max(1, round(r["sparsity"] * r["decayed_parameters"]))
        asked = [
            ("zeros asked for", "", f"{r['target_sparsity']:.2%}"),
            (
                f"of these, zeroed at the end of the ramp, importance up to {r['target_threshold']:.2g}",
                "",
                f"{share:.2%}",
            ),
        ]
    if "test_perplexity" in r:
        test = [("test perplexity", f"{r['test_perplexity_before']:.2f}", f"{r['test_perplexity']:.2f}")]
    one_shot = [
        (f"loss with {row['share']:.0%} pruned at once, {row['method']}", "", f"{row['validation_loss']:.4f}")
        for row in r.get("one_shot", [])
    ]
    if "linear_sparsity" in r:
        linear = [("zeros among the weights of linear layers", "", f"{r['linear_sparsity']:.2%}")]
    return [
        *test,
        ("validation perplexity", "", f"{r['validation_perplexity']:.2f}"),
        ("validation loss (nats per token)", "", f"{r['validation_loss']:.4f}"),
        *one_shot,
        ("zeros among the decayed weights", f"{before_sparsity:.2%}", f"{r['sparsity']:.2%}"),
        *linear,
        ("zeros among all weights", "", f"{r['sparsity_total']:.2%}"),
        *asked,
        (f"decayed weights below {NEAR_ZERO:g}, not zero", "", f"{r['near_zeros'] / r['decayed_parameters']:.2%}"),
        ("decayed weights / all weights", "", f"{r['decayed_parameters']:,} / {r['total_parameters']:,}"),
        ("training steps", "", f"{r['train_steps']:,}"),
        ("training tokens per second", "", f"{r['train_tokens_per_second']:,.0f}"),
    ]


def _markdown(run: Run, rows: list[tuple[str, str, str]]) -> str:
    lines = [f"# {run.title}", "", "| | before | after |", "|---|---:|---:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {key}: {value}" for key, value in run.sources.items())]
    lines += [f"- hardware: {hardware()}", f"- versions: {', '.join(f'{k} {v}' for k, v in versions().items())}"]
    lines += ["", "Repeat this run:", "", f"    {run.command}", ""]
    for picture, caption in (
        ("training.png", "Loss and sparsity over the training steps"),
        ("weight_magnitudes.png", "Magnitudes of the decayed weights, before and after"),
        ("sparsity_by_layer.png", "Share of exact zeros by layer"),
    ):
        lines += [f"![{caption}]({picture})", ""]
    return "\n".join(lines)
