r"""Time one optimizer step: PAdam's backends beside torch's AdamW and the two-pass method, over real models' tensors.

    python recipes/benchmark_step.py --output runs/benchmark.json --picture runs/benchmark.png

Everything runs in one process; the optimizers take turns, and the median of the turns counts. Weights are random
(nothing is downloaded). A GPU is used if there is one. A part of it, and the whole Trainer on top (tokens a second):

    python recipes/benchmark_step.py --models smollm2-135m --dtypes fp32 --p_norms 0.8 1 --repeats 15
    python recipes/benchmark_step.py --models gpt2 --dtypes fp32 --p_norms 0.8 --trainer_steps 6
    python recipes/benchmark_step.py --models smollm2-135m --importances magnitude fisher --p_norms 0.8 -1 \
        --dtypes fp32 --backends compiled --repeats 15

The time that a step keeps the host busy before the GPU has anything to do, on tiny CPU tensors; it needs no GPU:

    OMP_NUM_THREADS=1 python recipes/benchmark_step.py --host --repeats 101

What to expect of SmolLM2 on 2 CPU cores (EPYC, AVX-512), in 1.5 minutes, as multiples of AdamW fused (58 ms):

    AdamW for-loop 2.6, foreach 3.3; PAdam compiled 1.06 (p = 0.8), 1.05 (p = 1); two-pass 8.7, 6.9; eager 29, 13

GPU: not measured. "GB/s" divides the least traffic an Adam step can have (28 bytes a parameter in fp32, 14 in bf16) by
the time, so it compares with the row "copy". "two-pass" is the method as its authors released it: clone the
parameters, take AdamW's step, then decay in a second pass. A first step with nothing cached compiles for 10 s or so.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from support.host_time import time_host
from support.step_table import Row, draw, show
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_padam import PAdam, PAdamTrainer, PAdamTrainingArguments
from hf_padam.files import write_atomically
from hf_padam.optim.backends import BACKENDS
from hf_padam.optim.update import IMPORTANCES

MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
    "gpt2": dict(model_type="gpt2"),
    "llama-1.1b": dict(model_type="llama", vocab_size=32000, hidden_size=2048, intermediate_size=5632,
                       num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LR, LAMBDA_P = 1e-6, 0.1


def build(name: str) -> torch.nn.Module:
    """Build a model from its config, with random weights (none at all under ``torch.device("meta")``)."""
    options = dict(MODELS[name])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator, so that the clock sees the work and not its launch."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Time one call."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def peak_extra_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Return how far memory rises above where it stood, during one call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def contenders(
    params: Sequence[Tensor], p_norms: list[float], importances: Sequence[str], backends: Sequence[str]
) -> list[tuple[str, float | None, Callable[[], Any]]]:
    """Return (name, p_norm, step) for everything timed. All share one pair of moments, so that large models fit.

    They are said to have taken 100 steps, for in the first ones "fisher" decays nothing.
    """
    moments = {param: dict(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param)) for param in params}

    def sharing(optimizer: torch.optim.Optimizer, step_device: torch.device) -> torch.optim.Optimizer:
        for param in params:
            optimizer.state[param] = dict(step=torch.full((), 100.0, device=step_device), **moments[param])
        return optimizer

    cpu, device = torch.device("cpu"), params[0].device
    adamw = {
        "AdamW for-loop": sharing(torch.optim.AdamW(params, lr=LR, foreach=False), cpu),
        "AdamW foreach": sharing(torch.optim.AdamW(params, lr=LR, foreach=True), cpu),
        "AdamW fused": sharing(torch.optim.AdamW(params, lr=LR, fused=True), device),
    }
    timed: list[tuple[str, float | None, Callable[[], Any]]] = [(n, None, o.step) for n, o in adamw.items()]

    @torch.no_grad()
    def two_pass(p_norm: float) -> None:
        old = [param.clone() for param in params]
        adamw["AdamW for-loop"].step()
        for param, before in zip(params, old, strict=True):
            param.div_(1 + LR * LAMBDA_P * before.abs() ** (p_norm - 2))

    def padam(optimizer: torch.optim.Optimizer, p_norm: float, importance: str) -> None:
        optimizer.param_groups[0] |= {"p_norm": p_norm, "importance": importance}
        optimizer.step()

    for name in backends:
        if BACKENDS[name].unavailable(device) is None:
            optimizer = sharing(PAdam(params, lr=LR, lambda_p=LAMBDA_P, weight_decay=0.0, backend=name), cpu)
            for importance, p_norm in itertools.product(importances, p_norms):
                label = f"PAdam {name}" + (f", {importance}" if importance != "magnitude" else "")
                timed.append((label, p_norm, functools.partial(padam, optimizer, p_norm, importance)))
    return timed + [("two-pass", p_norm, lambda p=p_norm: two_pass(p)) for p_norm in p_norms]


def time_steps(
    model: str,
    dtype: str,
    p_norms: list[float],
    importances: Sequence[str],
    backends: Sequence[str],
    repeats: int,
    device: torch.device,
) -> list[Row]:
    """Time every contender on one model's parameter list."""
    with torch.device("meta"):
        shapes = [param.shape for param in build(model).parameters()]
    torch.manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(shape, device=device) / 50).to(DTYPES[dtype])) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) / 100
    timed = contenders(params, p_norms, importances, backends)
    source = torch.empty(2**26 if device.type == "cpu" else 2**28, device=device).normal_()  # not a launch's time
    target = torch.empty_like(source)
    timed.append(("copy", None, lambda: target.copy_(source)))
    first = [seconds(step, device) for _, _, step in timed]
    peaks = [peak_extra_bytes(step, device) for _, _, step in timed]
    times = [[seconds(step, device) for _, _, step in timed] for _ in range(repeats)]
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    fused = medians[[name for name, _, _ in timed].index("AdamW fused")]
    traffic = 7 * sum(param.nbytes for param in params)  # weight, moments: read, written; gradient: read
    rows = []
    for (name, p_norm, _), median, peak, first_step in zip(timed, medians, peaks, first, strict=True):
        moved = 2 * source.nbytes if name == "copy" else traffic
        ratio = None if name == "copy" else median / fused
        rows.append(dict(model=model, dtype=dtype, device=device.type, p_norm=p_norm, optimizer=name,
                         milliseconds=1e3 * median, ratio_to_fused_adamw=ratio, gb_per_s=moved / median / 1e9,
                         peak_extra_bytes=peak, first_step_seconds=first_step))  # fmt: skip
    return rows


class Clock(TrainerCallback):
    """Note the time at the end of every step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note it."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())


def _on_one_gpu(args: TrainingArguments) -> TrainingArguments:
    """Keep a run to one GPU; over all of a machine the Trainer would run DataParallel."""
    args._n_gpu = min(1, args.n_gpu)
    return args


def time_trainer(
    model: str, dtype: str, steps: int, batch: int, length: int, device: torch.device, scratch: str
) -> list[Row]:
    """Train for `steps` steps in each way, twice in turn; the first two steps of each run do not count.

    On a GPU under bf16 autocast. Of each the highest memory, too, with weights, gradients and optimizer; on a CPU that
    of two more steps, which are not timed. The teacher of "distilled" is as large as the model.
    """
    torch.manual_seed(0)
    network, teacher = (build(model).to(DTYPES[dtype]) for _ in range(2))
    ids = torch.randint(2, MODELS[model].get("vocab_size", 50257), (batch * steps, length)).tolist()
    data = [dict(input_ids=row, labels=row) for row in ids]
    on_gpu = device.type == "cuda"
    common: dict[str, Any] = dict(
        output_dir=scratch, max_steps=steps, per_device_train_batch_size=batch, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, bf16=on_gpu,
    )  # fmt: skip
    distilling: dict[str, Any] = dict(optim="padam", distill_from="teacher")
    distilling["distill_dtype"] = "bfloat16" if on_gpu else "auto"
    ways: dict[str, Callable[[], Trainer]] = {
        "adamw_torch_fused": lambda: Trainer(
            network, _on_one_gpu(TrainingArguments(optim="adamw_torch_fused", **common))
        ),
        "padam": lambda: Trainer(network, _on_one_gpu(TrainingArguments(optim="padam", **common))),
        "padam, distilled": lambda: PAdamTrainer(
            network, _on_one_gpu(PAdamTrainingArguments(**distilling, **common)), teacher=teacher
        ),
    }
    size = sum(p.nbytes for p in network.parameters())
    durations: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int | None] = {name: None for name in ways}
    for turn, name in itertools.product(range(3 if device.type == "cpu" else 2), ways):
        clock, trainer = Clock(), ways[name]()
        trainer.add_callback(clock)
        trainer.train_dataset = data
        if turn == 2:
            trainer.args.max_steps = 2
            peaks[name] = (2 if "distilled" in name else 1) * size + peak_extra_bytes(trainer.train, device)
            clock.ends.clear()
        else:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
            peaks[name] = torch.cuda.max_memory_allocated() if on_gpu else None
        durations[name] += [b - a for a, b in zip(clock.ends[1:], clock.ends[2:], strict=False)]
        network.zero_grad(set_to_none=True)
        del trainer
        teacher.to("cpu")
        gc.collect()  # the optimizer's state, which a cycle holds
    medians = {name: statistics.median(values) for name, values in durations.items()}
    fused = medians["adamw_torch_fused"]
    return [dict(model=model, dtype=dtype, device=device.type, p_norm=None, optimizer=f"Trainer {name}",
                 milliseconds=1e3 * median, ratio_to_fused_adamw=median / fused, gb_per_s=None, peak_extra_bytes=None,
                 first_step_seconds=None, tokens_per_s=batch * length / median, peak_bytes=peaks[name])
            for name, median in medians.items()]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler is chatty
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fitting = [name for name in MODELS if device.type != "cpu" or name != "llama-1.1b"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=fitting)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--p_norms", nargs="+", type=float, default=[0.5, 0.8, 1.0, 1.5])
    parser.add_argument("--importances", nargs="+", choices=IMPORTANCES, default=["magnitude"])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--repeats", type=int, default=7, help="turns that each optimizer takes")
    parser.add_argument("--trainer_steps", type=int, default=0, help="also time the Trainer, over so many steps")
    parser.add_argument("--trainer_batch", type=int, nargs=2, default=[8, 512] if device.type != "cpu" else [1, 128],
                        metavar=("ROWS", "TOKENS"))  # fmt: skip
    parser.add_argument("--host", action="store_true", help="time the host's side of a step, and nothing else")
    parser.add_argument("--output", help="JSON file for the rows")
    parser.add_argument("--picture", help="file for the picture, .png or .svg")
    options = parser.parse_args(argv)
    rows: list[Row] = time_host(options.repeats) if options.host else []
    for model in options.models if not options.host else ():
        for dtype in options.dtypes:
            kinds = (options.p_norms, options.importances, options.backends)
            rows += time_steps(model, dtype, *kinds, options.repeats, device)
            if options.trainer_steps:
                with tempfile.TemporaryDirectory() as scratch:
                    batch, length = options.trainer_batch
                    rows += time_trainer(model, dtype, options.trainer_steps, batch, length, device, scratch)
            if options.output:  # after every part: a long run that is cut short keeps what it has
                write_atomically(options.output, json.dumps(rows, indent=1))
    if options.host and options.output:
        write_atomically(options.output, json.dumps(rows, indent=1))
    show(rows)
    if options.picture:
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
