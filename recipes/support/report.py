"""What a run leaves behind: `results.json`, a table, pictures, and `report.md` that holds them together."""

from __future__ import annotations

import json
import math
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import accelerate
import datasets
import evaluate
import matplotlib
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.training_args import OptimizerNames

import hf_padam
from hf_padam import PAdamTrainingArguments
from hf_padam.files import staged, write_atomically
from hf_padam.optim.target_sparsity import steering_of
from hf_padam.sparsity import (
    NEAR_ZERO,
    TensorCount,
    count_model_zeros,
    count_zeros,
    local_shard,
    sum_over_shards,
    summarize,
)
from hf_padam.training.other_optimizers import asks_for_decay

from .arguments import save_config

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend must be chosen first)
from matplotlib.ticker import MaxNLocator  # noqa: E402

RESULT_KEYS = (
    "validation_loss", "validation_perplexity", "sparsity", "sparsity_total", "decayed_parameters", "total_parameters",
    "train_steps", "train_tokens_per_second", "seed",
)  # fmt: skip
"""What every recipe's `results.json` holds at least. Losses in nats per token, sparsities as shares of exact zeros."""

_MAGNITUDE_RANGE = (-10.0, 1.0)  # log10 of the magnitudes that are drawn
_BINS = 220


@dataclass
class Magnitudes:
    """A histogram of log10 |w| over the non-zero decayed weights, and the number of zeros among them."""

    counts: torch.Tensor
    zeros: int
    elements: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, decayed: list[str]) -> Magnitudes:
        """Count a model's decayed weights."""
        tensors = {name: param for name, param in model.named_parameters() if name in decayed}
        totals = count_zeros(tensors)
        counts = torch.zeros(_BINS)
        low, high = _MAGNITUDE_RANGE
        for tensor in tensors.values():
            local, sharding = local_shard(tensor)
            logs = local[local != 0].float().abs().log10().clamp(low, high)
            counts += sum_over_shards(torch.histc(logs, bins=_BINS, min=low, max=high), sharding).cpu()
        return cls(counts, sum(c.zeros for c in totals), sum(c.elements for c in totals))


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
    _draw_training(directory / "training.png", run)
    _draw_magnitudes(directory / "weight_magnitudes.png", run)
    _draw_layers(directory / "sparsity_by_layer.png", run)
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
        share = r["target_zeroed"] / r["decayed_parameters"]
        asked = [
            ("zeros asked for", "", f"{r['target_sparsity']:.2%}"),
            (f"of these, zeroed at the end of the ramp, below {r['target_threshold']:.2g}", "", f"{share:.2%}"),
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


def _draw_training(path: Path, run: Run) -> None:
    losses = [(row["step"], row["loss"]) for row in run.history if "loss" in row]
    sparsities = [(row["step"], 100 * row["sparsity"]) for row in run.history if "sparsity" in row and "loss" in row]
    evaluations = [(row["step"], math.log(row["eval_perplexity"])) for row in run.history if "eval_perplexity" in row]
    figure, axis = plt.subplots(figsize=(7, 4))
    if losses:
        axis.plot(*zip(*losses, strict=True), color="tab:blue", label="training loss")
    if evaluations:
        axis.plot(*zip(*evaluations, strict=True), "o", color="tab:orange", label="validation loss")
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    other = axis.twinx()
    if sparsities:
        other.plot(*zip(*sparsities, strict=True), color="tab:green", label="zeros")
    other.set_ylabel("zeros among the decayed weights (%)")
    other.set_ylim(bottom=0)
    handles = [line for a in (axis, other) for line in a.get_lines()]
    axis.legend(handles, [str(line.get_label()) for line in handles], loc="upper center", ncols=3)
    axis.margins(y=0.2)
    _save(figure, path)


def _draw_magnitudes(path: Path, run: Run) -> None:
    low, high = _MAGNITUDE_RANGE
    edges = torch.linspace(low, high, _BINS + 1)
    centers = (10 ** ((edges[:-1] + edges[1:]) / 2)).tolist()
    figure, axis = plt.subplots(figsize=(7, 4))
    for magnitudes, label, color in ((run.before, "before", "tab:gray"), (run.after, "after", "tab:green")):
        shares = (magnitudes.counts / magnitudes.elements * 100).tolist()
        zeros = 100 * magnitudes.zeros / magnitudes.elements
        axis.step(centers, shares, where="mid", color=color, label=f"{label}: {zeros:.1f} % exactly zero")
    axis.set(xscale="log", yscale="log", xlabel="magnitude of a decayed weight", ylabel="share of weights per bin (%)")
    axis.legend()
    _save(figure, path)


def _draw_layers(path: Path, run: Run) -> None:
    """Draw a map of kinds of weights by layers, the first number in a weight's name; without one, all is layer 0."""
    cells: dict[str, dict[int, float]] = {}
    for count in run.counts:
        if count.decayed:
            match = re.search(r"\.(\d+)\.", count.name)
            kind = re.sub(r"\.\d+\.", ".N.", count.name, count=1).rpartition(".N.")[2].removesuffix(".weight")
            cells.setdefault(kind, {})[int(match[1]) if match else 0] = 100 * count.sparsity
    layers = max(max(by_layer) for by_layer in cells.values()) + 1
    grid = [[by_layer.get(layer, math.nan) for layer in range(layers)] for by_layer in cells.values()]
    figure, axis = plt.subplots(figsize=(max(4.0, 2.5 + 0.28 * layers), 1.5 + 0.32 * len(cells)))
    image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axis.set_yticks(range(len(cells)), list(cells))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer")
    figure.colorbar(image, label="exact zeros (%)")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    with staged(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
