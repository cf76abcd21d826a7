"""The part of a model card that tells of a compressed model: added to the card that is there, and taken out again."""

from __future__ import annotations

from pathlib import Path

from .sparsity_report import SparsityReport

_START, _END = "<!-- hf_padam: sparsity -->\n", "<!-- hf_padam: end of sparsity -->\n"
_HEAD = "---\nlibrary_name: transformers\ntags:\n- padam\n- sparse\n---\n"
_LOADING = """## Compressed weights

The zeros of this model are stored as bitmasks, without loss. It loads as any other model where
`hf_padam` is installed:

```python
import hf_padam
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this model's id or directory")
```

For programs without hf_padam, `hf-padam decompress` makes a standard checkpoint, with the same weights bit for bit.

"""


def add_sparsity(card: Path, report: SparsityReport, dense_bytes: int, compressed_bytes: int) -> None:
    """Append loading, sizes and the sparsity table to a card in a directory that is not in its place yet.

    Args:
        card: The README.md; made if there is none.
        report: The sparsity.
        dense_bytes: Of the dense weight files.
        compressed_bytes: Of the compressed ones.
    """
    text = _read(card) if card.is_file() else _HEAD
    sizes = f"{compressed_bytes / 1e6:,.1f} MB instead of {dense_bytes / 1e6:,.1f} MB. {_zeros(report)}\n\n"
    heading, *rows = report.table()
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    table = "".join(f"| {' | '.join(row)} |\n" for row in lines)
    section = f"{_START}{_LOADING}{sizes}{table}{_END}"
    _write(card, _without_section(text) + section)


def _zeros(report: SparsityReport) -> str:
    totals = report.totals
    parts = [
        f"{totals[share]:.2%} of {what}"
        for share, what in (
            ("sparsity", f"the {totals['decayed_parameters'] or 0:,} decayed weights"),
            ("sparsity_total", f"all {totals['total_parameters'] or 0:,}"),
        )
        if totals[share] is not None
    ]
    known = f"Zeros: {', '.join(parts)}." if parts else "How many of its weights are zero is not known."
    return known if report.decayed_known else f"{known} ({report.decayed_by}.)"


def remove_sparsity(card: Path) -> None:
    """Take out what `add_sparsity` added; nothing is left of a card that it made."""
    if not card.is_file():
        return
    text = _without_section(_read(card))
    if text == _HEAD:
        card.unlink()
    else:
        _write(card, text)


def _read(card: Path) -> str:
    return card.read_bytes().decode(errors="surrogateescape")  # as it is, whatever its encoding and line ends


def _write(card: Path, text: str) -> None:
    card.write_bytes(text.encode(errors="surrogateescape"))


def _without_section(text: str) -> str:
    before, start, rest = text.partition(_START)
    return before + rest.partition(_END)[2] if start else text
