"""The table and the picture of `benchmark_step.py`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from hf_padam.files import staged

Row = dict[str, Any]


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table("model", "dtype", "p", "optimizer", "ms", "x fused AdamW", "GB/s", "extra MB", "first step s",
                  "tokens/s", "peak GB")  # fmt: skip

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    for r in rows:
        extra = None if r["peak_extra_bytes"] is None else r["peak_extra_bytes"] / 1e6
        peak = r["peak_bytes"] / 1e9 if r.get("peak_bytes") else None
        table.add_row(r["model"], r["dtype"], str(r["p_norm"] or ""), r["optimizer"], number(r["milliseconds"], 1),
                      number(r["ratio_to_fused_adamw"], 2), number(r["gb_per_s"], 1), number(extra, 1),
                      number(r["first_step_seconds"], 2), number(r.get("tokens_per_s"), 0),
                      number(peak, 2))  # fmt: skip
    Console(width=140).print(table)


def draw(rows: list[Row], path: str) -> None:
    """Draw the ratios to fused AdamW as bars, one panel per model and dtype."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r["ratio_to_fused_adamw"] is not None]
    panels = list(dict.fromkeys((r["model"], r["dtype"]) for r in rows))
    figure = Figure(figsize=(6 * len(panels), 6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        part = [r for r in rows if (r["model"], r["dtype"]) == panel][::-1]
        labels = [r["optimizer"] + (f", p = {r['p_norm']}" if r["p_norm"] else "") for r in part]
        bars = axes.barh(labels, [r["ratio_to_fused_adamw"] for r in part])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.set(xscale="log", title=f"{panel[0]}, {panel[1]}, {part[0]['device']}", xlabel="time over fused AdamW")
    with staged(path) as temporary:
        figure.savefig(temporary)
