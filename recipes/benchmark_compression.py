r"""Measure compressed checkpoints: their sizes beside the dense file's, its zstd and gzip; and speed and peak memory.

    python recipes/benchmark_compression.py --output runs/compression.json

Nothing is downloaded: checkpoints in bf16 are made from the models' configs, with random normal weights, and zeros at
random places in the linear layers, which is the hardest case (trained weights and the zeros of a decay have more
order). Every round trip is compared byte by byte with the original file. The speeds are of a 1.1 B Llama, each in a
process of its own; MB are of the dense file, and memory is what the process holds beside mapped files, as such and,
without the loaded model, in multiples of the largest tensor. It takes 6 GB of memory, 8 GB of disk, and 4 minutes on
two CPU cores. What to expect, in MB, and of the speeds, with 50 and 90 % zeros, on two cores of a Xeon:

    SmolLM2-135M, 269 dense: 121 with 50 % zeros (bitmask 176, zstd 157, gzip 158), 92 with 70 %, 58 with 90 %
    GPT-2-small, 249 dense: 119 with 50 % zeros (bitmask 174, zstd 152, gzip 153), 96 with 70 %, 69 with 90 %
    compress 284 and 301 MB/s, load 532 and 605, decompress 338 and 506; 0.7, 0.1 and 1.4 largest tensors

A part of it: --models gpt2 --zeros 0.9 --speed_model none
"""

from __future__ import annotations

import argparse
import filecmp
import json
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import zstandard
from benchmark_step import MODELS, build
from transformers import AutoModelForCausalLM

from hf_padam import compress, decayed_parameters, decompress
from hf_padam.files import write_atomically

SIZE_COLUMNS = ("model", "zeros", "dense", "bitmask", "zstd", "gzip", "hf_padam")
SPEED_COLUMNS = ("operation", "zeros", "seconds", "cpu_seconds", "mb_per_second", "peak_mb", "largest_tensors")


def make(name: str, zeros: float, directory: Path) -> int:
    """Save a bf16 model with random zeros in its linear layers.

    Returns:
        The bytes that a bitmask and the survivors take, the other weights in full.
    """
    torch.manual_seed(0)
    model: Any = build(name).bfloat16()
    bits = 0
    decayed = decayed_parameters(model)
    linear = {id(parameter) for parameter in decayed.values()}
    with torch.no_grad():
        for parameter in decayed.values():
            parameter[torch.rand(parameter.shape, dtype=torch.float32) < zeros] = 0
        for parameter in model.parameters():
            decays = id(parameter) in linear
            bits += 16 * int(torch.count_nonzero(parameter) if decays else parameter.numel())
            bits += parameter.numel() if decays else 0
    model.save_pretrained(directory, max_shard_size="50GB")
    return bits // 8


def squeezed(file: Path, compressor: Any) -> int:
    """Return the size of a file after a streaming compressor."""
    size = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 24):
            size += len(compressor.compress(block))
    return size + len(compressor.flush())


def measure_sizes(name: str, zeros: float, directory: Path) -> dict[str, Any]:
    """Compress one checkpoint every way."""
    dense, packed, back = (directory / part for part in ("dense", "packed", "back"))
    bitmask = make(name, zeros, dense)
    file = dense / "model.safetensors"
    result = compress(dense, packed)
    decompress(packed, back)
    if not filecmp.cmp(file, back / file.name, shallow=False):
        raise RuntimeError(f"{name} with {zeros:.0%} zeros did not survive the round trip")
    sizes = {
        "dense": file.stat().st_size,
        "bitmask": bitmask,
        "zstd": squeezed(file, zstandard.ZstdCompressor(level=3).compressobj()),
        "gzip": squeezed(file, zlib.compressobj(6, wbits=31)),
        "hf_padam": result.bytes,
    }
    return {"model": name, "zeros": zeros, **{key: value / 1e6 for key, value in sizes.items()}}


def private_bytes() -> int:
    """Return the memory that belongs to this process alone, mapped files left out (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon: memory is measured on Linux only")


def perform(operation: str, source: str, destination: str) -> dict[str, float]:
    """Time one operation in this process, and watch its memory from a thread."""
    before, peak, done = private_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    if operation == "compress":
        compress(source, destination)
    elif operation == "decompress":
        decompress(source, destination)
    else:
        AutoModelForCausalLM.from_pretrained(source)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    done.set()
    watcher.join()
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak - before}


def measure_speed(name: str, zeros: float, directory: Path) -> list[dict[str, Any]]:
    """Compress, load and decompress one checkpoint, each in a fresh process."""
    dense, packed, back = (directory / part for part in ("dense", "packed", "back"))
    make(name, zeros, dense)
    size = (dense / "model.safetensors").stat().st_size
    with torch.device("meta"):
        largest = 2 * max(parameter.numel() for parameter in build(name).parameters())
    rows = []
    for operation, source in (("compress", dense), ("load", packed), ("decompress", packed)):
        destination = packed if operation == "compress" else back
        command = [sys.executable, __file__, "--perform", operation, str(source), str(destination)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures = json.loads(output.splitlines()[-1])
        row = {"operation": operation, "zeros": zeros, **figures, "mb_per_second": size / 1e6 / figures["seconds"]}
        beyond_the_model = figures["peak"] - (size if operation == "load" else 0)
        rows.append(row | {"peak_mb": figures.pop("peak") / 1e6, "largest_tensors": beyond_the_model / largest})
    return rows


def show(rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print rows as a Markdown table."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = [f"{row[column]:.2f}" if isinstance(row[column], float) else str(row[column]) for column in columns]
        print(f"| {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2-135m", "gpt2"])
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.5, 0.7, 0.9], help="shares of the linear layers")
    parser.add_argument("--speed_model", choices=[*MODELS, "none"], default="llama-1.1b")
    parser.add_argument("--speed_zeros", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--directory", help="where the checkpoints are made and deleted (the system's by default)")
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.add_argument("--perform", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.perform:
        print(json.dumps(perform(*args.perform)))
        return
    results: dict[str, list[dict[str, Any]]] = {"sizes": [], "speed": []}
    for name in args.models:
        for zeros in args.zeros:
            with tempfile.TemporaryDirectory(dir=args.directory) as directory:
                results["sizes"].append(measure_sizes(name, zeros, Path(directory)))
    show(results["sizes"], SIZE_COLUMNS)
    for zeros in args.speed_zeros if args.speed_model != "none" else ():
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            results["speed"] += measure_speed(args.speed_model, zeros, Path(directory))
    if results["speed"]:
        show(results["speed"], SPEED_COLUMNS)
    if args.output:
        write_atomically(args.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
