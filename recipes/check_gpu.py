"""Check everything that needs a GPU with one command, in under ten minutes; write a report to paste into an issue.

    python recipes/check_gpu.py --output gpu_report

leaves gpu_report.md and gpu_report.json: the hardware, and for each part whether it passed, and its figures. Exits
with 0 if all passed, 1 if one failed, and 2 on a machine without a GPU, after it has said what it would do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from support.gpu_checks import PARTS, Part, PartFailed

import hf_padam
from hf_padam.files import write_atomically

AIMS = (
    ("PAdam triton", "ratio_to_fused_adamw", 1.05, "a step takes at most 1.05 of fused AdamW's time"),
    ("Trainer padam", "ratio_to_fused_adamw", 1 / 0.98,
     "the Trainer makes at least 0.98 of fused AdamW's tokens a second"),
    ("Trainer padam, distilled", "ratio_to_fused_adamw", 1.4, "a distilled step takes at most 1.4 of fused AdamW's"),
)  # fmt: skip
"""An optimizer of `benchmark_step.py`, a key of its rows, the most that it should be, and what that means."""

COPY_SHARE, EXTRA_SHARE = 0.90, 0.01
"""Of the bandwidth of a copy, at least so much; of the memory that stands, at most so much more at the peak."""


def hardware(device: torch.device) -> dict[str, Any]:
    """Name the machine and the versions."""
    named = {"processor": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        named |= {
            "GPU": properties.name,
            "GPU memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "compute capability": f"{properties.major}.{properties.minor}",
            "CUDA": str(torch.version.cuda or torch.version.hip),
        }
    elif device.type != "cpu":
        named["accelerator"] = device.type
    try:
        import triton

        named["Triton"] = triton.__version__
    except ImportError:
        named["Triton"] = "not installed"
    modules = (torch, transformers, hf_padam)
    return named | {module.__name__: module.__version__ for module in modules}


def check(parts: Sequence[Part], device: torch.device) -> list[dict[str, Any]]:
    """Run parts one after another; one that fails does not keep the others from running."""
    results = []
    for part in parts:
        start = time.perf_counter()
        result: dict[str, Any] = {"name": part.name, "what": part.what, "passed": True}
        try:
            result["figures"] = part.check(device)
        except Exception as error:  # whatever it is, it goes into the report
            result |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
            result |= {"figures": error.figures} if isinstance(error, PartFailed) else {}
        result["seconds"] = round(time.perf_counter() - start, 1)
        print(f"{part.name}: {'passed' if result['passed'] else result['error']} ({result['seconds']} s)", flush=True)
        results.append(result)
    return results


def aims(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Compare rows of `benchmark_step.py` with what is aimed at: a line for each, met or not."""
    lines = []
    copies = {(row["model"], row["dtype"]): row["gb_per_s"] for row in rows if row["optimizer"] == "copy"}
    for row in rows:
        where = f"{row['model']}, {row['dtype']}" + (f", p = {row['p_norm']}" if row["p_norm"] else "")
        compared = [(what, row[key], most) for name, key, most, what in AIMS if row["optimizer"] == name]
        if row["optimizer"] == "PAdam triton" and row["model"] == "llama-1.1b":
            share = row["gb_per_s"] / copies[row["model"], row["dtype"]]
            compared.append(
                (f"at least {COPY_SHARE} of a copy's bandwidth, as the inverse", 1 / share, 1 / COPY_SHARE)
            )
            bytes_held = row["gb_per_s"] * row["milliseconds"] * 1e6 * 4 / 7  # weight, gradient, moments
            extra = row["peak_extra_bytes"] / bytes_held
            compared.append((f"at most {EXTRA_SHARE:.0%} more memory at the peak", extra, EXTRA_SHARE))
        for what, value, most in compared:
            lines.append(f"- {'met' if value <= most else '**missed**'}: {what}: {value:.3g} ({where})")
    return lines


def markdown(named: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    """Write the report."""
    lines = ["# hf_padam on a GPU", "", *(f"- {key}: {value}" for key, value in named.items()), ""]
    lines += ["| part | result | seconds | what it does |", "|---|---|---|---|"]
    for r in results:
        lines.append(f"| {r['name']} | {'passed' if r['passed'] else '**failed**'} | {r['seconds']} | {r['what']} |")
    rows = [row for r in results for row in r.get("figures", {}).get("rows", [])]
    lines += ["", *aims(rows)]
    for r in results:
        figures = {key: value for key, value in r.get("figures", {}).items() if key != "rows"}
        if figures or not r["passed"]:
            lines += ["", f"## {r['name']}", ""]
            lines += [f"- {key}: {value:.4g}" if isinstance(value, float) else f"- {key}: {value}"
                      for key, value in figures.items()]  # fmt: skip
            lines += ["```", r["error"], "```"] if not r["passed"] else []
    if rows:
        keys = ("model", "dtype", "p_norm", "optimizer", "milliseconds", "ratio_to_fused_adamw", "gb_per_s",
                "peak_extra_bytes", "tokens_per_s", "peak_bytes")  # fmt: skip
        lines += ["", "## times", "", f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
        for row in rows:
            cells = [row.get(key) for key in keys]
            texts = ["" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells]
            lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu_report", help="path of the report, without .md and .json")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="some of the parts only")
    options = parser.parse_args(argv)
    parts = [part for part in PARTS if not options.parts or part.name in options.parts]
    # One GPU: over several, the plain Trainer would run DataParallel, of which the figures know nothing.
    names = {"CUDA_VISIBLE_DEVICES", *({"HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"} & os.environ.keys())}
    first = {name: os.environ.get(name, "0").split(",")[0] for name in names}
    narrower = any(os.environ.get(name) != value for name, value in first.items())
    os.environ.update(first)
    if narrower and torch.cuda.device_count() > 1:  # an import has counted them before
        return subprocess.run([sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]).returncode
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if device.type not in ("cuda", "xpu"):
        print(f"No GPU that Triton knows was found ({device.type} only). On one, this would:")
        for part in parts:
            print(f"- {part.name}: {part.what}")
        return 2
    named, results = hardware(device), []
    for part in parts:  # what is done is written, should a later part be killed
        results += check([part], device)
        write_atomically(f"{options.output}.json", json.dumps({"hardware": named, "parts": results}, indent=1))
        write_atomically(f"{options.output}.md", markdown(named, results))
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
