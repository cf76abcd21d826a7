"""The sparsity of a checkpoint, layer by layer, read from its files: the model is never built.

Each weight tensor is a row: its zeros, its near-zeros, and how many of its N:M blocks hold (2:4 by default: of four
weights that follow one another along the input, two at least are zero), which is what sparse tensor cores need.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..files import staged
from ..sparsity import NEAR_ZERO, TensorCount, count_zeros, summarize
from ..training.param_groups import decayed_parameters
from .model_directory import ModelDirectory, torch_dtype
from .packing import TensorInfo
from .parallel import in_order

_NOT_DECAYED = re.compile(r"embed|wte|wpe|lm_head|norm|(^|[._])ln_?(\d|f|[._])|bias|adapter|lora", re.IGNORECASE)
_PART = 1 << 20  # bytes that are counted at a time


@dataclass(frozen=True)
class LayerSparsity:
    """One tensor's row."""

    count: TensorCount
    dtype: str
    shape: tuple[int, ...]
    blocks: int  # N:M blocks; 0 where the tensor is no matrix, or M does not divide its input
    holding: int  # of which so many hold


@dataclass(frozen=True)
class SparsityReport:
    """The rows of a checkpoint, in its order, and how they were made."""

    source: str
    rows: list[LayerSparsity]
    pattern: tuple[int, int]  # N, M
    near_zero: float | None  # None where near-zeros were not counted
    decayed_by: str  # how the decayed weights were told from the others

    @classmethod
    def of(
        cls, model: ModelDirectory, pattern: tuple[int, int] = (2, 4), near_zero: float | None = NEAR_ZERO
    ) -> SparsityReport:
        """Read a checkpoint, dense or compressed, part by part, in as many threads as torch uses.

        Args:
            model: The checkpoint.
            pattern: N and M: a block of M weights holds if N of them at least are zero.
            near_zero: The magnitude below which a weight that is not zero is near zero; None to count none.

        Raises:
            CompressionError: If a file is damaged.
        """
        names = [stored.info.name for stored in model.stored]
        decayed, along_rows, decayed_by = _decayed(model, names)

        def jobs() -> Iterator[tuple[Any, ...]]:
            for stored in model.stored:
                info, read = model.reader(stored)
                for start, size in _parts(info, pattern[1]):
                    yield info, read, start, size, info.name in along_rows, pattern, near_zero

        counted = in_order(_count_part, jobs())
        rows = []
        for stored in tqdm(model.stored, desc="Counting zeros", unit="tensor", disable=None):
            info = model.info(stored)
            sums = [0, 0, 0, 0]
            for _ in _parts(info, pattern[1]):
                sums = [total + part for total, part in zip(sums, next(counted), strict=True)]
            zeros, near_zeros, blocks, holding = sums
            is_decayed = info.name in decayed if decayed else _looks_decayed(info)
            near = near_zeros if near_zero is not None else None
            count = TensorCount(info.name, info.elements, zeros, near, is_decayed)
            rows.append(LayerSparsity(count, info.dtype, info.shape, blocks, holding))
        return cls(str(model.path), rows, pattern, near_zero, decayed_by)

    @property
    def totals(self) -> dict[str, float | int]:
        """The shares of zeros and sizes of `summarize`, and the share of the decayed weights' blocks that hold."""
        decayed = [row for row in self.rows if row.count.decayed]
        blocks = sum(row.blocks for row in decayed)
        share = sum(row.holding for row in decayed) / blocks if blocks else 0.0
        return summarize(row.count for row in self.rows) | {f"{self._pattern}_blocks": share}

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
                "decayed": row.count.decayed,
                "elements": row.count.elements,
                "zeros": row.count.zeros,
                "near_zeros": row.count.near_zeros,
                "sparsity": row.count.sparsity,
                f"{self._pattern}_blocks": row.holding / row.blocks if row.blocks else None,
            }
            for row in self.rows
        ]
        head = {"source": self.source, "near_zero": self.near_zero, "decayed_by": self.decayed_by, **self.totals}
        return json.dumps(head | {"tensors": rows}, indent=1) + "\n"

    def table(self) -> list[list[str]]:
        """Return a heading, a row per decayed weight (per matrix where there are none), and two rows of totals."""
        shown = [row for row in self.rows if row.count.decayed] or [row for row in self.rows if len(row.shape) > 1]
        table = [["weight", "shape", "zeros", f"below {self.near_zero or 0:g}", f"{self._pattern} blocks"]]
        totals = self.totals
        decayed = [row for row in self.rows if row.count.decayed]
        for title, size, rows, share in [
            *((row.count.name, " x ".join(map(str, row.shape)), [row], row.count.sparsity) for row in shown),
            ("decayed weights", "", decayed, totals["sparsity"]),
            ("whole model", "", self.rows, totals["sparsity_total"]),
        ]:
            elements, blocks = sum(row.count.elements for row in rows), sum(row.blocks for row in rows)
            near = sum(row.count.near_zeros or 0 for row in rows) / max(elements, 1)
            holding = f"{sum(row.holding for row in rows) / blocks:.1%}" if blocks else "-"
            table.append([title, size or f"{elements:,}", f"{share:.2%}", f"{near:.2%}", holding])
        if self.near_zero is None:
            table = [[*cells[:3], cells[4]] for cells in table]
        return table

    def __str__(self) -> str:
        table = self.table()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
            for cells in (list(zip(row, widths, strict=True)) for row in table)
        ]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:], f"({self.decayed_by})"])

    def draw(self, path: str | Path) -> None:
        """Draw the share of zeros of every decayed weight, in the checkpoint's order; the suffix decides the format.

        Raises:
            ImportError: If matplotlib is not installed.
        """
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


def _parts(info: TensorInfo, m: int) -> list[tuple[int, int]]:
    """Split a tensor into rows, in multiples of M: start and size of each part, in bytes."""
    if not info.nbytes:
        return []
    row = info.nbytes // info.shape[0] if len(info.shape) > 1 else info.nbytes // info.elements
    size = max(1, _PART // (m * row)) * m * row
    return [(start, min(size, info.nbytes - start)) for start in range(0, info.nbytes, size)]


def _count_part(
    info: TensorInfo,
    read: Callable[[int, int], Any],
    start: int,
    size: int,
    along_rows: bool,
    pattern: tuple[int, int],
    near_zero: float | None,
) -> tuple[int, int, int, int]:
    """Count zeros, near-zeros, blocks, and blocks that hold, in one of the `_parts` of a tensor."""
    part = torch.frombuffer(read(start, size), dtype=torch_dtype(info))
    if part.is_complex():
        part = part.abs()
    elif not part.is_floating_point() or part.element_size() == 1:  # float8, integers: torch cannot compare them all
        part = part.double()
    [count] = count_zeros({info.name: part}, near_zero=near_zero)
    blocks = holding = 0
    n, m = pattern
    if len(info.shape) == 2 and info.shape[0 if along_rows else 1] % m == 0:
        zeros = (part.view(-1, info.shape[1]) == 0).view(torch.uint8)
        if not along_rows and m in (2, 4, 8):  # the zeros of a block are the bits of one integer: faster
            total = torch.from_numpy(np.bitwise_count(zeros.numpy().view(f"u{m}")))
        else:
            positions = [zeros[i::m] if along_rows else zeros[:, i::m] for i in range(m)]
            total = sum(positions[1:], positions[0].clone())
        blocks, holding = total.numel(), int(torch.count_nonzero(total >= n))
    return count.zeros, count.near_zeros or 0, blocks, holding


def _decayed(model: ModelDirectory, names: list[str]) -> tuple[set[str], set[str], str]:
    """Return the names of the decayed tensors and of the matrices whose input is their rows, and how they were found.

    The config's model class is built without weights to ask it; the first set is empty where that cannot be.
    """
    try:
        skeleton = _skeleton(model)
    except Exception as error:  # an unknown class, or code of its own that is not run here
        return set(), set(), f"decayed: guessed from names and shapes, for want of the model's class ({error})"
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."

    def aliases(name: str) -> set[str]:
        return {name, prefix + name, name.removeprefix(prefix)}

    decayed = {alias for name in decayed_parameters(skeleton) for alias in aliases(name)}
    conv1d = [f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, Conv1D)]
    along_rows = {alias for name in conv1d for alias in aliases(name)}
    found = decayed & set(names)
    if not found:
        return set(), along_rows, "decayed: guessed from names and shapes, which the model's class has others for"
    return found, along_rows & set(names), f"decayed: what decays by default in {type(skeleton).__name__}"


def _skeleton(model: ModelDirectory) -> nn.Module:
    if not model.config:
        raise ValueError("no config.json")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config: Any = AutoConfig.from_pretrained(model.path, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if named is not None:
                return named(config)
            automatic = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
            return automatic.from_config(config)
    finally:
        logging.set_verbosity(verbosity)


def _looks_decayed(info: TensorInfo) -> bool:
    return len(info.shape) > 1 and not _NOT_DECAYED.search(info.name)
