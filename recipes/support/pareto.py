"""Loss against sparsity: points, their Pareto front, the table, the CSV file and the picture."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hf_padam.files import write_atomically

from .pictures import save

ADAMW = ("adamw_torch", "adamw_torch_fused")
"""What AdamW is called as `optim`: a loop over the weights, and one kernel for them."""


@dataclass
class Point:
    """One setting of one method, over its seeds."""

    method: str
    setting: str
    losses: list[float] = field(default_factory=list)  # validation, nats per token, one for each seed
    sparsities: list[float] = field(default_factory=list)  # shares of exact zeros among the decayed weights
    others: dict[str, list[float]] = field(default_factory=dict)  # further sparsities, by name
    best_losses: list[float] = field(default_factory=list)  # the least of each run, where it was evaluated on the way
    test_losses: list[float | None] = field(default_factory=list)  # for each seed, where there is a test text
    seeds: list[int] = field(default_factory=list)  # 0, 1, ... where none are given

    @property
    def by_seed(self) -> dict[int, tuple[float, float]]:
        """Sparsity and loss of each seed."""
        return dict(
            zip(self.seeds or range(len(self.losses)), zip(self.sparsities, self.losses, strict=True), strict=True)
        )

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def test_loss(self) -> float | None:
        """Mean over the seeds, if all of them have one."""
        known = [loss for loss in self.test_losses if loss is not None]
        return statistics.fmean(known) if len(known) == len(self.losses) else None

    @property
    def sparsity(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.sparsities)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both loss and sparsity, the densest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.sparsity, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front[::-1]


def loss_at(points: Sequence[tuple[float, float]], sparsity: float) -> float | None:
    """Interpolate a loss at a sparsity, linearly between the nearest of (sparsity, loss); None beyond their ends."""
    ordered = sorted(points)
    for (low, low_loss), (high, high_loss) in zip(ordered, ordered[1:], strict=False):
        if low <= sparsity <= high:
            return low_loss + (sparsity - low) / max(high - low, 1e-12) * (high_loss - low_loss)
    return None


def differences(point: Point, reference: Sequence[Point]) -> list[float]:
    """Return, for each seed, a point's loss less that of the reference at the same sparsity.

    Runs of one seed share their data and their initial weights, so their difference varies less than either.
    """
    pairs = []
    for seed, (sparsity, loss) in point.by_seed.items():
        other = loss_at([p.by_seed[seed] for p in reference if seed in p.by_seed], sparsity)
        if other is None:
            return []
        pairs.append(loss - other)
    return pairs


class Comparison:
    """Points of several methods, and how they are shown.

    Args:
        points: In the order of the table.
        dense: Name of the method without zeros with whose best loss others are compared, if any.
        reference: Name of the method whose loss at the same sparsity is compared with, if any.
        unconnected: Names of methods whose points are no line.
    """

    def __init__(
        self,
        points: Sequence[Point],
        dense: str | None = None,
        reference: str | None = None,
        unconnected: Collection[str] = (),
    ) -> None:
        self.points, self._unconnected = list(points), unconnected
        self.front = pareto_front(points)
        self._tested = any(p.test_loss is not None for p in points)
        best = {statistics.fmean(p.best_losses or p.losses): p for p in points if p.method == dense}
        self._dense = min(best, default=None)
        losses = [] if self._dense is None else best[self._dense].best_losses or best[self._dense].losses
        self._dense_of = {} if self._dense is None else dict(zip(best[self._dense].by_seed, losses, strict=True))
        self._reference_name = reference
        self._reference = [p for p in points if p.method in (reference, dense)]

    def columns(self) -> list[str]:
        """Return the names of the table's columns."""
        others = [f"zeros, {name}" for name in self.points[0].others]
        columns = ["method", "setting", "zeros", *others, "loss", "± over seeds", "perplexity"]
        columns += [*(["test loss"] if self._tested else []), "seeds"]
        if self._dense is not None:
            columns.append("loss over dense's best")
        if self._reference_name is not None:
            columns.append(f"loss less {self._reference_name}'s")
        return [*columns, "on the front"]

    def rows(self) -> list[list[str]]:
        """Return the table's cells."""
        rows = []
        for p in self.points:
            spread = f"{statistics.stdev(p.losses):.4f}" if len(p.losses) > 1 else ""
            row = [p.method, p.setting, f"{p.sparsity:.2%}"]
            row += [f"{statistics.fmean(values):.2%}" for values in p.others.values()]
            row += [f"{p.loss:.4f}", spread, f"{math.exp(p.loss):.3f}"]
            if self._tested:
                row.append("" if p.test_loss is None else f"{p.test_loss:.4f}")
            row.append(str(len(p.losses)))
            if self._dense is not None:  # of the same seeds, if it has them
                own = [self._dense_of[seed] for seed in p.by_seed if seed in self._dense_of]
                dense = statistics.fmean(own) if len(own) == len(p.losses) else self._dense
                row.append(f"{p.loss / dense - 1:+.2%}")
            if self._reference_name is not None:
                pairs = differences(p, self._reference) if p not in self._reference else []
                row.append(f"{statistics.fmean(pairs):+.4f}" if pairs else "")
                if len(pairs) > 1:
                    row[-1] += f" ± {statistics.stdev(pairs):.4f}"
            rows.append([*row, "yes" if any(p is q for q in self.front) else ""])
        return rows

    def print(self, title: str) -> None:
        """Print the table."""
        table = Table(title=title)
        for i, name in enumerate(self.columns()):
            table.add_column(name, justify="left" if i < 2 else "right")
        for row in self.rows():
            table.add_row(*row)
        Console(width=None if Console().is_terminal else 160).print(table)

    def write(self, directory: Path, title: str, note: str) -> None:
        """Write `pareto.png`, `pareto.csv` (a row for each seed) and `pareto.md` (the table) into a directory.

        Args:
            directory: Exists.
            title: Heads table and picture.
            note: Hardware and the like, below the table.
        """
        self.draw(directory / "pareto.png", title)
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        tested = ["test_loss"] if self._tested else []
        names = list(self.points[0].others)
        writer.writerow(["method", "setting", "seed", "loss", *tested, "sparsity", *names, "on_front"])
        for p in self.points:
            tests = dict(enumerate(p.test_losses))
            for i, (seed, (sparsity, loss)) in enumerate(p.by_seed.items()):
                others = [values[i] for values in p.others.values()]
                test = [tests.get(i)] if self._tested else []
                on_front = any(p is q for q in self.front)
                writer.writerow([p.method, p.setting, seed, loss, *test, sparsity, *others, on_front])
        write_atomically(directory / "pareto.csv", buffer.getvalue())
        columns = self.columns()
        lines = [f"# {title}", "", f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
        lines += [f"| {' | '.join(row)} |" for row in self.rows()]
        write_atomically(
            directory / "pareto.md", "\n".join([*lines, "", note, "", "![Loss and zeros](pareto.png)", ""])
        )

    def draw(self, path: Path, title: str) -> None:
        """Draw loss against zeros, a line for each method, bars from the least to the largest over the seeds."""
        methods: dict[str, list[Point]] = {}
        for point in self.points:
            methods.setdefault(point.method, []).append(point)
        figure = Figure(figsize=(8, 5))
        axis = figure.subplots()
        markers = "osD^v<>PX*hd"
        for i, (method, points) in enumerate(methods.items()):
            points = sorted(points, key=lambda p: p.sparsity)
            x, y = [100 * p.sparsity for p in points], [p.loss for p in points]
            low_high = [[p.loss - min(p.losses) for p in points], [max(p.losses) - p.loss for p in points]]
            color, marker = colormaps["tab20"](i % 20), markers[i % len(markers)]
            width = 0 if method in self._unconnected else 1.3
            axis.errorbar(
                x, y, yerr=low_high, label=method, color=color, marker=marker, markersize=5, linewidth=width, capsize=2
            )
        if self._dense is not None:
            axis.axhline(self._dense, color="gray", linewidth=0.8, linestyle=":")
            low, high = self._dense, max(min(max(p.loss for p in self.points), 1.2 * self._dense), 1.02 * self._dense)
            axis.set_ylim(min(low, *(p.loss for p in self.points)) - 0.05 * (high - low), high + 0.05 * (high - low))
            above = sum(p.loss > high for p in self.points)
            note = f"not shown, above: {above}" if above else ""
            axis.text(0.99, 0.99, note, ha="right", va="top", transform=axis.transAxes, fontsize=8)
        axis.set(xlabel="exact zeros among the decayed weights (%)", ylabel="validation loss (nats per token)")
        axis.set_title(title)
        axis.legend(fontsize=8)
        save(figure, path, dpi=110)


def setting(options: Mapping[str, Any]) -> str:
    """Write a setting's options for people: all but AdamW, which most methods are compared on, and evaluations.

    Nor what is saved on the way and gone on from: in a plan that spares steps, and changes no run.
    """
    hidden = {"one_shot", "one_shot_by", "save_strategy", "save_steps", "resume_from_checkpoint"}
    hidden |= {"optim"} if options.get("optim") in ADAMW else set()
    return ", ".join(f"{name} {value}" for name, value in options.items() if name not in hidden)
