"""The sparsity of a checkpoint, layer by layer, read from its files: the model is built without weights only.

Each weight tensor is a row: its zeros, its near-zeros, and how many of its N:M blocks hold (2:4 by default: of four
weights that follow one another along the input, two at most are not zero), which is what sparse tensor cores need.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..files import staged
from ..sparsity import NEAR_ZERO, TensorCount, count_zeros, countable, summarize
from .decayed_on_disk import DecayedOnDisk
from .model_directory import ModelDirectory, torch_dtype
from .packing import TensorInfo
from .parallel import in_order

_PART = 1 << 20  # bytes that are counted at a time


@dataclass(frozen=True)
class LayerSparsity:
    """One tensor's row."""

    count: TensorCount
    dtype: str
    shape: tuple[int, ...]
    blocks: int  # N:M blocks; 0 where the tensor is no matrix, or M does not divide its input
    holding: int  # of which so many hold
    is_parameter: bool  # whether the model counts it: not so buffers and copies of tied weights


@dataclass(frozen=True)
class SparsityReport:
    """The rows of a checkpoint, in its order, and how they were made."""

    source: str
    rows: list[LayerSparsity]
    pattern: tuple[int, int]  # N, M
    near_zero: float | None  # None where near-zeros were not counted
    decayed_by: str  # how the decayed weights were told from the others, or why they were not
    decayed_known: bool  # whether they were

    @classmethod
    def of(
        cls, model: ModelDirectory, pattern: tuple[int, int] = (2, 4), near_zero: float | None = NEAR_ZERO
    ) -> SparsityReport:
        """Read a checkpoint, dense or compressed, part by part, in as many threads as torch uses.

        Args:
            model: The checkpoint.
            pattern: N and M, as in `target_pattern`: a block of M weights holds if N of them at most are not zero.
            near_zero: The magnitude below which a weight that is not zero is near zero; None to count none.

        Raises:
            CompressionError: If a file is damaged.
        """
        on_disk = DecayedOnDisk.of(model)

        def jobs() -> Iterator[tuple[Any, ...]]:
            for stored in model.stored:
                info, read = model.reader(stored)
                name, along_rows = info.name, info.name in on_disk.along_rows
                stacked = len(info.shape) == 3 and name in (on_disk.decayed or ())  # matrices, of experts
                blocks = pattern if stacked or len(info.shape) == 2 else None
                for start, size in _parts(info, pattern[1]):
                    yield info, read, start, size, along_rows, blocks, near_zero

        counted = in_order(_count_part, jobs())
        rows = []
        for stored in tqdm(model.stored, desc="Counting zeros", unit="tensor", disable=None):
            info = model.info(stored)
            sums = [0, 0, 0, 0]
            for _ in _parts(info, pattern[1]):
                sums = [total + part for total, part in zip(sums, next(counted), strict=True)]
            zeros, near_zeros, blocks, holding = sums
            near = near_zeros if near_zero is not None else None
            is_decayed = info.name in (on_disk.decayed or ())
            known = countable(torch_dtype(info))
            count = TensorCount(info.name, info.elements, zeros, near, is_decayed, known)
            is_parameter = info.name in on_disk.parameters
            rows.append(LayerSparsity(count, info.dtype, info.shape, blocks, holding, is_parameter))
        return cls(str(model.path), rows, pattern, near_zero, on_disk.source, on_disk.decayed is not None)

    @property
    def totals(self) -> dict[str, float | int | None]:
        """The shares of zeros and sizes of `summarize`, and the share of the decayed weights' blocks that hold.

        They are those of the model in memory. Where it is not known which weights decay, what is said of these is
        None, and the others are of all that is stored.
        """
        decayed = [row for row in self.rows if row.count.decayed]
        blocks = sum(row.blocks for row in decayed)
        share = sum(row.holding for row in decayed) / blocks if blocks else None
        totals = summarize(row.count for row in self.rows if row.is_parameter) | {f"{self._pattern}_blocks": share}
        return totals if self.decayed_known else totals | {"decayed_parameters": None}

    @property
    def _pattern(self) -> str:
        return f"{self.pattern[0]}:{self.pattern[1]}"

    def as_json(self) -> str:
        """Return everything, every tensor included, as JSON; shares from 0 to 1."""
        rows = [
            {
                "name": row.count.name,
                "dtype": row.dtype,
                "shape": row.shape,
                "decayed": row.count.decayed if self.decayed_known else None,
                "elements": row.count.elements,
                "zeros": row.count.zeros,
                "near_zeros": row.count.near_zeros,
                "sparsity": row.count.sparsity if row.count.known else None,
                f"{self._pattern}_blocks": row.holding / row.blocks if row.blocks else None,
            }
            for row in self.rows
        ]
        head = {"source": self.source, "near_zero": self.near_zero, "decayed_by": self.decayed_by, **self.totals}
        return json.dumps(head | {"tensors": rows}, indent=1) + "\n"

    def table(self) -> list[list[str]]:
        """Return a heading, a row per decayed weight (per matrix where there are none), and one or two of totals.

        Layers are in the order of their numbers; in files they are often in that of letters: 1, 10, 11, 2.
        """
        decayed = [row for row in self.rows if row.count.decayed]
        shown = decayed or [row for row in self.rows if len(row.shape) > 1]
        shown = sorted(shown, key=lambda row: _by_number(row.count.name))
        table = [["weight", "shape", "zeros", f"below {self.near_zero or 0:g}", f"{self._pattern} blocks"]]
        totals = [("whole model", "", [row for row in self.rows if row.is_parameter])]
        if self.decayed_known:
            totals.insert(0, ("decayed weights", "", decayed))
        for title, size, rows in [
            *((row.count.name, " x ".join(map(str, row.shape)), [row]) for row in shown),
            *totals,
        ]:
            elements, blocks = sum(row.count.elements for row in rows), sum(row.blocks for row in rows)
            known = all(row.count.known for row in rows) and elements > 0
            zeros = f"{sum(row.count.zeros for row in rows) / elements:.2%}" if known else "-"
            near = f"{sum(row.count.near_zeros or 0 for row in rows) / elements:.2%}" if known else "-"
            holding = f"{sum(row.holding for row in rows) / blocks:.1%}" if blocks else "-"
            table.append([title, size or f"{elements:,}", zeros, near, holding])
        if self.near_zero is None:
            table = [[*cells[:3], cells[4]] for cells in table]
        return table

    def __str__(self) -> str:
        table = self.table()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
        rule = "-" * len(lines[0])
        totals = -2 if self.decayed_known else -1
        return "\n".join([lines[0], rule, *lines[1:totals], rule, *lines[totals:], f"({self.decayed_by})"])

    def draw(self, path: str | Path) -> None:
        """Draw the share of zeros of every decayed weight, in the checkpoint's order; the suffix decides the format.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is no suffix, or no such format.
        """
        if not Path(path).suffix:
            raise ValueError(f"{str(path)!r} does not say which format the picture is to have: add .png, .svg or .pdf")
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError:
            raise ImportError('pictures need matplotlib: pip install "hf-padam[recipes]"') from None
        rows = [row for row in self.rows if row.count.decayed] or self.rows
        kinds: dict[str, list[tuple[int, float]]] = {}
        for position, row in enumerate(rows):
            layer = re.search(r"\.(\d+)\.", f".{row.count.name}.")
            kind = re.sub(r"(^|.*?\.)\d+\.", "", row.count.name).removesuffix(".weight")
            kinds.setdefault(kind, []).append((int(layer[1]) if layer else position, 100 * row.count.sparsity))
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        for kind, points in kinds.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, linewidth=1, label=kind)
        axes.set(xlabel="layer", ylabel="zeros (%)", ylim=(0, 100), title=f"Zeros by layer: {Path(self.source).name}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        with staged(path) as temporary:
            figure.savefig(temporary, dpi=130)


def _by_number(name: str) -> list[Any]:
    """Return what sorts names by the numbers in them, 2 before 10: texts and numbers in turn."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _parts(info: TensorInfo, m: int) -> list[tuple[int, int]]:
    """Split a tensor into rows, in multiples of M: start and size of each part, in bytes.

    Raises:
        CompressionError: If torch has not its dtype: its rows may end within a byte.
    """
    torch_dtype(info)
    if not info.nbytes:
        return []
    row = info.nbytes // math.prod(info.shape[:-1]) if len(info.shape) > 1 else info.nbytes // info.elements
    size = max(1, _PART // (m * row)) * m * row
    return [(start, min(size, info.nbytes - start)) for start in range(0, info.nbytes, size)]


def _count_part(
    info: TensorInfo,
    read: Callable[[int, int], Any],
    start: int,
    size: int,
    along_rows: bool,
    pattern: tuple[int, int] | None,
    near_zero: float | None,
) -> tuple[int, int, int, int]:
    """Count zeros, near-zeros and, if it is to have a pattern, blocks and blocks that hold, in a part of a tensor."""
    part = torch.frombuffer(read(start, size), dtype=torch_dtype(info))
    if part.is_complex():
        part = part.abs()
    elif not part.is_floating_point() or part.element_size() == 1:  # float8, integers: torch cannot compare them all
        part = part.double()
    [count] = count_zeros({info.name: part}, near_zero=near_zero)
    blocks = holding = 0
    if pattern is not None and info.shape[-2 if along_rows else -1] % pattern[1] == 0:
        n, m = pattern
        zeros = (part.view(-1, info.shape[-1]) == 0).view(torch.uint8)
        if not along_rows and m in (2, 4, 8):  # the zeros of a block are the bits of one integer: faster
            total = torch.from_numpy(np.bitwise_count(zeros.numpy().view(f"u{m}")))
        else:
            positions = [zeros[i::m] if along_rows else zeros[:, i::m] for i in range(m)]
            total = sum(positions[1:], positions[0].to(torch.int32))
        blocks, holding = total.numel(), int(torch.count_nonzero(total >= m - n))
    return count.zeros, count.near_zeros or 0, blocks, holding
