"""A model whose sizes do not divide, trained whole and in every way that torch shards; a job of test_sharded.py."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import leave
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_padam import PAdam, TargetSparsity, get_param_groups
from hf_padam.optim.importance import SCALE
from hf_padam.sparsity import count_model_zeros, count_zeros, summarize

STEPS = 20


class OddModel(nn.Module):
    """Layers of 13 and 1 rows and a single gain: two processes share them unevenly, or leave one with nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 13), nn.Linear(13, 14, bias=False)
        self.last, self.gain = nn.Linear(14, 1, bias=False), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x))))) * self.gain


def optimizer_for(model: nn.Module, lr: float = 1e-2) -> PAdam:
    """Groups with hyperparameters of their own, variants included, by name; the names of FSDP1 are longer."""
    kinds: dict[str, list] = {"first.weight": [], "second.weight": [], "last.weight": [], "other": []}
    for name, param in model.named_parameters():
        plain = name.replace("_fsdp_wrapped_module.", "")
        kinds[plain if plain in kinds else "other"].append((name, param))
    decay = {"first.weight": (0.5, 0.3), "second.weight": (0.8, 0.1), "last.weight": (1.0, 0.02), "other": (0.8, 0.0)}
    groups = [{"params": kinds[k], "p_norm": p, "lambda_p": lambda_p} for k, (p, lambda_p) in decay.items()]
    groups[0]["s_rate"], groups[2]["late_decay"] = 0.3, True
    return PAdam([group for group in groups if group["params"]], lr=lr)


WAYS_TO_ZEROS: dict[str, dict[str, Any]] = {
    "magnitude, p = 1/2": {"p_norm": 0.5, "target": 0.5},
    "magnitude, p = -8": {"p_norm": -8.0, "target": 0.7},
    "fisher, p = -1": {"importance": "fisher", "p_norm": -1.0, "target": 0.5},
    "fisher, p = -inf": {"importance": "fisher", "p_norm": -math.inf, "target": 0.7},
    "fisher, p = -inf, by layer": {"importance": "fisher", "p_norm": -math.inf, "target": 0.5, "by_layer": True},
    "fisher, p = 1/2, no target": {"importance": "fisher", "p_norm": 0.5, "lambda_p": 0.3, "target": None},
}
"""Options of `train_to_zeros`."""


def train_to_zeros(model: nn.Module, target: float | None, by_layer: bool = False, **options: Any) -> float:
    """Train 30 steps, to a target over all shards or without one; return the share of zeros that was reached."""
    weights = [param for name, param in model.named_parameters() if name.endswith(".weight")]
    optimizer = PAdam([{"params": [weight]} for weight in weights], lr=1e-2, **options)
    if target:
        TargetSparsity(optimizer, target, 30, start=0.4, end=0.8, per_group=by_layer)
    train(model, optimizer, 0, 30)
    counts = count_zeros({str(i): param for i, param in enumerate(weights)})
    return sum(count.zeros for count in counts) / sum(count.elements for count in counts)


def train(model: nn.Module, optimizer: PAdam, first_step: int = 0, last_step: int = STEPS) -> None:
    for step in range(first_step, last_step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 7, generator=generator)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
        optimizer.step()


def resumed_through_torch(full: bool, target: float | None) -> float:
    """Stop half way, and go on with what torch's functions have saved and loaded, as accelerate calls them for FSDP2.

    They fill a new optimizer's groups, which have no other keys than those that they begin with. Returns how far the
    weights are from those of a run that was not stopped.
    """

    def begin() -> tuple[nn.Module, PAdam]:
        model = with_fully_shard()
        options = {"lr": 1e-2, "importance": "fisher", "p_norm": -math.inf if target else 0.5}
        return model, PAdam(get_param_groups(model, target_sparsity=target), **options)

    def steer(optimizer: PAdam) -> None:
        if target:
            TargetSparsity(optimizer, total_steps=30, start=0.4)

    models = []
    for stops in (False, True):
        model, optimizer = begin()
        steer(optimizer)
        train(model, optimizer, 0, 17)
        if stops:
            options = StateDictOptions(full_state_dict=full, cpu_offload=full)
            state, weights = get_optimizer_state_dict(model, optimizer, options=options), model.state_dict()
            state = copy.deepcopy(state)
            model, optimizer = begin()
            model.load_state_dict(weights)
            if full and dist.get_rank():
                state = {}
            options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
            set_optimizer_state_dict(model, optimizer, optim_state_dict=state, options=options)
            steer(optimizer)
        train(model, optimizer, 17, 30)
        models.append(full_weights(model))
    return difference_of(*models)


def scale_of_pieces(rank: int = 0, processes: int = 1) -> tuple[float, str]:
    """Train one of several pieces of a tensor, as DeepSpeed makes them; return its scale of importance.

    And what is said if another piece is stepped by itself, as ZeRO-3 does with sub-groups.
    """
    whole = torch.randn(64, generator=torch.Generator().manual_seed(0))
    piece, grad = (part.chunk(processes)[rank].clone() for part in (whole, torch.arange(64.0)))
    optimizer = PAdam([piece.requires_grad_()], importance="fisher")
    refusal = ""
    for step in range(STEPS):
        piece.grad = grad * (-1) ** step
        optimizer.step()
    optimizer.param_groups[0]["params"] = [piece.detach().clone().requires_grad_()]
    try:
        optimizer.step()
    except RuntimeError as error:
        refusal = str(error)
    return optimizer.param_groups[0][SCALE], refusal


def save(path: Path, model: nn.Module, optimizer: PAdam) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)


def load(path: Path, model: nn.Module, optimizer: PAdam) -> None:
    weights, state = get_state_dict(model, optimizer)  # on a new optimizer: runs a step with zero gradients and lr 0
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for name, param in model.named_parameters()
    }


def with_fully_shard() -> nn.Module:
    model = OddModel()
    for layer in (model.first, model.second, model.last):
        fully_shard(layer)
    return fully_shard(model)


def with_fsdp1() -> nn.Module:
    """Its checkpoints are not tested: torch 2.13 gives `exp_avg` back wrong on CPUs, that of torch.optim.Adam too."""
    model = OddModel()
    model.second = FSDP(model.second, use_orig_params=True, device_id=torch.device("cpu"))
    return FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))


def with_tensor_parallel() -> nn.Module:
    """DTensors of several placements, beside plain tensors in the same groups."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    # Whole between the layers: the shards of 13 units are uneven, which torch cannot tell from 14 halved.
    first = ColwiseParallel(output_layouts=Replicate())
    second = RowwiseParallel(input_layouts=Replicate())
    return parallelize_module(OddModel(), mesh, {"first": first, "second": second})


def zero3_placeholder() -> nn.Parameter:
    """Seven zeros as DeepSpeed's ZeRO-3 leaves them: four on each process, the last of which is padding."""
    param: Any = nn.Parameter(torch.empty(0))
    param.ds_numel, param.ds_process_group = 7, dist.group.WORLD
    param.ds_tensor = torch.tensor([0.0, 0.0, 0.0, float(dist.get_rank())])
    return param


def main(directory: str) -> dict:
    """Compare with what the one process of test_sharded.py left in `directory`, and leave checkpoints there."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    whole = torch.load(Path(directory) / "whole.pt")
    ways: dict[str, Callable[[], nn.Module]]
    ways = {"fully_shard": with_fully_shard, "fsdp1": with_fsdp1, "tensor_parallel": with_tensor_parallel}
    differences, sparsities = {}, {}
    for way, build in ways.items():
        model = build()
        optimizer = optimizer_for(model)
        train(model, optimizer, 0, STEPS // 2)
        if way == "fully_shard":
            save(Path(directory) / "two", model, optimizer)
        train(model, optimizer, STEPS // 2)
        decayed = [name for name, _ in model.named_parameters() if name.endswith(".weight")]
        sparsities[way] = summarize(count_model_zeros(model, decayed))
        differences[way] = difference(model, whole)
    zeros = {}
    for case, options in WAYS_TO_ZEROS.items():
        expected = torch.load(Path(directory) / f"{case.replace('/', '_')}.pt")
        for way, build in ways.items():
            model = build()
            zeros[f"{case}, {way}"] = train_to_zeros(model, **options), difference(model, expected)
    model = with_fully_shard()
    optimizer = optimizer_for(model, lr=123.0)  # the checkpoint's takes its place
    load(Path(directory) / "one", model, optimizer)
    train(model, optimizer, STEPS // 2)
    differences["from_one"] = difference(model, whole)
    resumed = {
        f"{'full' if full else 'sharded'}, {target}": resumed_through_torch(full, target)
        for full in (False, True)
        for target in (None, 0.5)
    }
    try:
        refusal = str(get_param_groups(FSDP(OddModel(), device_id=torch.device("cpu"))))
    except ValueError as error:
        refusal = str(error)
    try:
        zero3_refusal = str(PAdam([("head", zero3_placeholder())]))
    except ValueError as error:
        zero3_refusal = str(error)
    apart = scale_of_pieces(dist.get_rank(), dist.get_world_size())
    started: Any = ModuleType("deepspeed.comm.comm")
    sys.modules[started.__name__], started.cdb = started, "a backend"
    pieces = scale_of_pieces(dist.get_rank(), dist.get_world_size())
    state = optimizer.state[model.last.weight]
    empty = [0 for _ in range(dist.get_world_size())]
    dist.all_gather_object(empty, state["exp_avg"].to_local().numel())
    return {
        "differences": differences,
        "sparsities": sparsities,
        "zeros": zeros,
        "shards_of_last": empty,
        "resumed": resumed,
        "apart": apart,
        "pieces": pieces,
        "refusal": refusal,
        "zero3_refusal": zero3_refusal,
        "step_is_a_cpu_scalar": type(state["step"]) is Tensor and state["step"].shape == (),
    }


def difference(model: nn.Module, expected: dict[str, Tensor]) -> float:
    if isinstance(model, FSDP):
        with FSDP.summon_full_params(model):
            weights = {k.replace("_fsdp_wrapped_module.", ""): v for k, v in full_weights(model).items()}
    else:
        weights = full_weights(model)
    return difference_of(weights, expected)


def difference_of(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert weights.keys() == expected.keys()
    return max((weights[name] - expected[name]).abs().max().item() for name in expected)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
