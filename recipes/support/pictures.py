"""The pictures of a run: loss and zeros over the steps, magnitudes of weights, zeros by layer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from hf_padam.files import staged
from hf_padam.sparsity import TensorCount, bare_name, count_zeros, local_shard, sum_over_shards

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
        bare = set(map(bare_name, decayed))  # the model may be wrapped, or have been when these were named
        tensors = {name: param for name, param in model.named_parameters() if bare_name(name) in bare}
        totals = count_zeros(tensors)
        counts = torch.zeros(_BINS)
        low, high = _MAGNITUDE_RANGE
        for tensor in tensors.values():
            local, sharding = local_shard(tensor)
            logs = local[local != 0].float().abs().log10().clamp(low, high)
            counts += sum_over_shards(torch.histc(logs, bins=_BINS, min=low, max=high), sharding).cpu()
        return cls(counts, sum(c.zeros for c in totals), sum(c.elements for c in totals))


def draw_training(path: Path, history: list[dict[str, Any]], distilled: bool = False) -> None:
    """Draw the losses and the share of zeros over the steps, from rows as `report.conclude` takes them.

    Args:
        path: The picture; its suffix decides the format.
        history: The rows.
        distilled: Whether the training loss is in part the divergence from a teacher.
    """
    losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
    sparsities = [(row["step"], 100 * row["sparsity"]) for row in history if "sparsity" in row and "loss" in row]
    evaluations = [(row["step"], math.log(row["eval_perplexity"])) for row in history if "eval_perplexity" in row]
    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    if losses:
        axis.plot(*zip(*losses, strict=True), color="tab:blue", label=f"training loss{', distilled' * distilled}")
    if evaluations:
        axis.plot(*zip(*evaluations, strict=True), "o", color="tab:orange", label="validation loss")
    axis.set(xlabel="step", ylabel="loss (nats per token)")
    other = axis.twinx()
    if sparsities:
        other.plot(*zip(*sparsities, strict=True), color="tab:green", label="zeros")
    other.set_ylabel("zeros among the decayed weights (%)")
    other.set_ylim(bottom=0)
    handles = [line for a in (axis, other) for line in a.get_lines()]
    labels = [str(line.get_label()) for line in handles]
    axis.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    save(figure, path)


def draw_magnitudes(path: Path, before: Magnitudes, after: Magnitudes) -> None:
    """Draw how the magnitudes of the decayed weights are distributed before training and after."""
    low, high = _MAGNITUDE_RANGE
    edges = torch.linspace(low, high, _BINS + 1)
    centers = (10 ** ((edges[:-1] + edges[1:]) / 2)).tolist()
    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    for magnitudes, label, color in ((before, "before", "tab:gray"), (after, "after", "tab:green")):
        shares = (magnitudes.counts / magnitudes.elements * 100).tolist()
        zeros = 100 * magnitudes.zeros / magnitudes.elements
        axis.step(centers, shares, where="mid", color=color, label=f"{label}: {zeros:.1f} % exactly zero")
    axis.set(xscale="log", yscale="log", xlabel="magnitude of a decayed weight", ylabel="share of weights per bin (%)")
    axis.legend()
    save(figure, path)


def draw_layers(path: Path, counts: list[TensorCount]) -> None:
    """Draw a map of kinds of weights by layers, the first number in a weight's name; without one, all is layer 0."""
    cells: dict[str, dict[int, float]] = {}
    for count in counts:
        if count.decayed:
            match = re.search(r"\.(\d+)\.", count.name)
            kind = re.sub(r"\.\d+\.", ".N.", count.name, count=1).rpartition(".N.")[2].removesuffix(".weight")
            cells.setdefault(kind, {})[int(match[1]) if match else 0] = 100 * count.sparsity
    layers = max(max(by_layer) for by_layer in cells.values()) + 1
    grid = [[by_layer.get(layer, math.nan) for layer in range(layers)] for by_layer in cells.values()]
    figure = Figure(figsize=(max(4.0, 2.5 + 0.28 * layers), 1.5 + 0.32 * len(cells)))
    axis = figure.subplots()
    image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    axis.set_yticks(range(len(cells)), list(cells))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer")
    figure.colorbar(image, label="exact zeros (%)")
    save(figure, path)


def save(figure: Figure, path: Path, dpi: float = 120) -> None:
    """Write a picture, whole or not at all."""
    figure.tight_layout()
    with staged(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
