"""Jobs that test_distributed.py runs in several real processes; each prints a JSON line on the first of them."""

from __future__ import annotations

import math
import os
import runpy
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import blocks, tiny_llama
from processes import leave
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import default_data_collator

from hf_padam import (
    PAdam,
    PAdam8bit,
    PAdamTrainer,
    PAdamTrainingArguments,
    add_pnorm_decay,
    decayed_parameters,
    get_param_groups,
    sequence_nll,
)
from hf_padam.sparsity import count_model_zeros, summarize
from hf_padam.training.distillation import Distillation
from hf_padam.training.teacher import Teacher


def evaluate(output_dir: str, per_device_batch_size: str, accumulation: str) -> dict:
    """Train 6 steps of 8 sequences in all; evaluate on 13 ragged rows, which two processes cannot share evenly."""
    from test_trainer import pad, ragged

    args = PAdamTrainingArguments(
        output_dir,
        max_steps=6,
        per_device_train_batch_size=int(per_device_batch_size),
        gradient_accumulation_steps=int(accumulation),
        per_device_eval_batch_size=2,
        learning_rate=3e-3,
        p_norm=0.5,
        lambda_p=0.3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = ragged((4, 4, 5))
    # One batch is all of the data, so its order cannot matter.
    trainer = PAdamTrainer(
        model=tiny_llama(), args=args, train_dataset=blocks(8), eval_dataset=rows, data_collator=pad_any(pad)
    )
    trainer.train()
    metrics = trainer.evaluate()
    keys = ("eval_perplexity", "eval_sparsity", "eval_sparsity_total")
    return {key: metrics[key] for key in keys} | {"processes": trainer.accelerator.num_processes}


def pad_any(pad):
    """Training rows come without masks."""

    def collate(rows):
        return pad([{"input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in rows])

    return collate


class Stream(torch.utils.data.IterableDataset):
    """Rows of unknown number; each of several workers reads its own."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        return iter(self.rows[worker.id :: worker.num_workers] if worker else self.rows)


def perplexities(output_dir: str) -> dict:
    """Evaluate in every way that rows come to processes; the expected value is of one row at a time."""
    from test_trainer import pad, ragged

    model = tiny_llama(initializer_range=0.3).eval()
    whole = {False: blocks(9, 8), True: ragged((4, 5))}
    expected = {}
    for is_ragged, rows in whole.items():
        for count in (1, 9):
            sums = torch.zeros(2, dtype=torch.float64)
            for row in rows[:count]:
                batch = {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}
                with torch.no_grad():
                    nll, tokens = sequence_nll(model(input_ids=batch["input_ids"]).logits, batch["labels"])
                sums += torch.stack([nll[0], tokens[0]])
            expected[is_ragged, count] = math.exp(sums[0] / sums[1])
    undispatched = {"accelerator_config": {"dispatch_batches": False}}
    split = {"accelerator_config": {"split_batches": True, "dispatch_batches": False}}
    size = {"per_device_eval_batch_size": 2}
    split_size = {"per_device_eval_batch_size": 2 * dist_size()}
    situations: dict[str, tuple[bool, bool, int, dict]] = {
        "with a length": (False, False, 9, size),
        "with a length, ragged": (True, False, 9, size),
        "with a length, split": (False, False, 9, split | split_size),
        "dispatched": (False, True, 9, size),
        "stream": (False, True, 9, size | undispatched),
        "ragged stream": (True, True, 9, size | undispatched),
        "split stream": (False, True, 9, split | split_size),
        "stream of one": (False, True, 1, size | undispatched),
        "stream in workers": (True, True, 9, size | undispatched | {"dataloader_num_workers": 2}),
    }
    found = {}
    for name, (is_ragged, streams, count, more) in situations.items():
        rows = whole[is_ragged][:count]
        args = PAdamTrainingArguments(output_dir, use_cpu=True, report_to="none", disable_tqdm=True, **more)
        data = Stream(rows) if streams else rows
        trainer = PAdamTrainer(model=model, args=args, eval_dataset=data, data_collator=pad)
        found[name] = trainer.evaluate()["eval_perplexity"]
    return {"found": found, "expected": {name: expected[kind[0], kind[2]] for name, kind in situations.items()}}


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def shard() -> dict:
    """Train 20 steps sharded by fully_shard and unsharded; sizes do not divide by the number of processes."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # Without key biases, whose gradients are all rounding noise, which Adam would blow up.
    config = dict(hidden_size=40, intermediate_size=63, num_attention_heads=4, attention_bias=False)
    options = dict(p_norm=0.5, lambda_p=0.3)
    plain, sharded = tiny_llama(**config), tiny_llama(**config)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    optimizers = [PAdam(get_param_groups(model, **options), lr=3e-3) for model in (plain, sharded)]
    batch = {key: torch.tensor([row[key] for row in blocks(4)]) for key in ("input_ids", "labels")}
    for _ in range(20):
        for model, optimizer in zip((plain, sharded), optimizers, strict=True):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    state = next(iter(optimizers[1].state.values()))
    assert isinstance(state["exp_avg"], DTensor)
    differences = [
        (p - q.full_tensor()).abs().max().item() for p, q in zip(plain.parameters(), sharded.parameters(), strict=True)
    ]
    names = decayed_parameters(sharded)
    sums = [summarize(count_model_zeros(model, names, near_zero=1e-8)) for model in (plain, sharded)]
    with torch.no_grad():
        for param in sharded.model.layers[0].mlp.parameters():
            param.zero_()
    try:
        PAdam(get_param_groups(sharded, **options))
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {"difference": max(differences), "plain": sums[0], "sharded": sums[1], "refusal": refusal}


def gradient_placements() -> dict:
    """A replicated weight whose gradient is a partial sum: both replicas must step with the whole gradient."""
    dist.init_process_group("gloo")
    from torch.distributed.tensor import Partial, Replicate

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = torch.nn.Parameter(distribute_tensor(torch.full((4,), 0.5), mesh, [Replicate()]))
    optimizer = PAdam([weight], lr=0.1, lambda_p=0.0)
    partial = torch.full((4,), 3.0 if dist.get_rank() == 0 else -1.0)
    weight.grad = DTensor.from_local(partial, mesh, [Partial()])
    optimizer.step()
    gathered = [torch.zeros(4) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, weight.to_local().detach())
    return {"replicas": [replica.tolist() for replica in gathered]}


def stochastic_rounding() -> dict:
    """Decay bf16 ones: a sharded tensor, and one that every process has."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ones = torch.ones(4000, dtype=torch.bfloat16)
    params = [torch.nn.Parameter(t) for t in (distribute_tensor(ones, mesh, [Shard(0)]), ones)]
    optimizer = PAdam(params, lr=1e-3, weight_decay=1.0, lambda_p=0, bf16_stochastic_round=True)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    gathered: list[list[list[bool]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, [(t == 1).tolist() for t in (params[0].to_local(), params[1])])
    return {"shards": [shard for shard, _ in gathered], "replicas": [replica for _, replica in gathered]}


def eight_bit(directory: str) -> dict:
    """Train with 8-bit moments, whole and sharded; the sharded run is saved and loaded half-way."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def start(shard: bool) -> tuple[torch.nn.Module, PAdam8bit]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False), torch.nn.Linear(64, 3, bias=False))
        model = fully_shard(model, mesh=mesh) if shard else model
        return model, PAdam8bit(model.parameters(), lr=1e-2, p_norm=0.8, lambda_p=0.05)

    def train(model: torch.nn.Module, optimizer: PAdam8bit, steps: range) -> None:
        for step in steps:
            x = torch.randn(32, 256, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = start(shard=False)
    train(whole, optimizer, range(6))
    sharded, optimizer = start(shard=True)
    train(sharded, optimizer, range(3))
    weights, state = get_state_dict(sharded, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=directory)
    resumed, optimizer = start(shard=True)
    weights, state = get_state_dict(resumed, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=directory)
    set_state_dict(resumed, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(resumed, optimizer, range(3, 6))
    packed = [hasattr(state["exp_avg"].to_local(), "codes") for state in optimizer.state.values()]
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    return {"packed": packed, "difference": max((p - q.full_tensor()).abs().max().item() for p, q in pairs)}


def added_decay() -> dict:
    """Train with SGD and the decay added to it, whole and sharded, with names for the weights that decay."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def train(shard: bool) -> torch.nn.Module:
        torch.manual_seed(0)
        model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Linear(13, 3))
        model = fully_shard(model, mesh=mesh) if shard else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        decayed = [(name, param) for name, param in model.named_parameters() if name.endswith("weight")]
        add_pnorm_decay(optimizer, p_norm=0.5, lambda_p=0.1, params=decayed)
        for step in range(20):
            x = torch.randn(32, 7, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    whole, sharded = train(shard=False), train(shard=True)
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    return {
        "difference": max((p - q.full_tensor()).abs().max().item() for p, q in pairs),
        "is_sharded": all(isinstance(p, DTensor) for p in sharded.parameters()),
        "zeros": [sum(count.zeros for count in count_model_zeros(model)) for model in (whole, sharded)],
    }


def distil(directory: str, batch_size: str) -> dict:
    """Train with a teacher, and predict different numbers of tokens of each row."""
    data = blocks(16)
    for i, row in enumerate(data):
        row["labels"] = [-100 if j < i else label for j, label in enumerate(row["labels"])]
    model, teacher = tiny_llama(), tiny_llama(hidden_size=40)
    place = f"{directory}/teacher{os.environ.get('RANK', 0)}"
    teacher.save_pretrained(place)
    options = dict(distill_from=place, distill_temperature=2.0, per_device_train_batch_size=int(batch_size))
    args = PAdamTrainingArguments(
        output_dir=directory, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=4,
        learning_rate=0.5, logging_steps=4, optim="sgd", **options,
    )  # fmt: skip
    before = [param.detach().clone() for param in model.parameters()]
    trainer = PAdamTrainer(model, args, train_dataset=data, data_collator=default_data_collator)
    trainer.evaluate(data[:4])  # after which a Trainer would not average gradients
    trainer.train()
    return {
        "processes": args.world_size,
        "teacher": trainer._distillation.teacher.fingerprint,
        "moved": [(p - q).norm().item() for p, q in zip(before, model.parameters(), strict=True)],
        "loss": trainer.state.log_history[0]["loss"],
    }


def distil_sharded() -> dict:
    """Distil a model sharded by fully_shard, and the same one whole."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain, sharded = tiny_llama(attention_bias=False), tiny_llama(attention_bias=False)
    teacher = Teacher(tiny_llama(attention_bias=False, hidden_size=40), name="teacher")
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    distillation = Distillation(teacher)
    batch = {key: torch.tensor([row[key] for row in blocks(4)]) for key in ("input_ids", "labels")}
    for model in (plain, sharded):
        optimizer = PAdam(get_param_groups(model, p_norm=0.5, lambda_p=0.3), lr=3e-3)
        for _ in range(10):
            with distillation(model, batch):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(plain.parameters(), sharded.parameters(), strict=True)
    return {"difference": max((p - q.full_tensor()).abs().max().item() for p, q in pairs)}


def over_gloo(script: str, *arguments: str) -> None:
    """Run a script under DeepSpeed on CPUs: accelerate knows a backend for GPUs only, unless it is told."""
    from accelerate import PartialState

    PartialState(backend="gloo")
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    leave(globals()[sys.argv[1]](*sys.argv[2:]))
