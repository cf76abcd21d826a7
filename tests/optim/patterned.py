"""A model trained to an N:M pattern, whole and sharded in two processes; a job of test_patterns.py."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from processes import leave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_padam import PAdam, TargetSparsity
from hf_padam.optim.patterns import PATTERN

STEPS = 30


class Model(nn.Module):
    """Layers of 13 rows and of one: two processes share them unevenly, or leave one with nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 13), nn.Linear(8, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).sum(1, keepdim=True) + self.last(x)


def train(model: nn.Module, importance: str, pattern: str = "2:4") -> None:
    named = [(name, param) for name, param in model.named_parameters() if name.endswith(".weight")]
    group = {"params": named, "target_sparsity": 0.5, PATTERN: pattern}
    optimizer = PAdam([group], lr=1e-3, p_norm=-torch.inf, importance=importance)
    TargetSparsity(optimizer, None, STEPS)
    for step in range(STEPS):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    params = ((name, param.detach()) for name, param in model.named_parameters())
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in params if name.endswith(".weight")}


def main(directory: str) -> dict:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    errors, differences = {}, {}
    for importance in ("magnitude", "fisher"):
        model = Model()
        for part in (model.first, model.last, model):
            fully_shard(part)
        train(model, importance)
        whole = torch.load(Path(directory) / f"{importance}.pt")
        found = weights(model)
        differences[importance] = max((found[name] - whole[name]).abs().max().item() for name in whole)
        differences[f"{importance}, zeros"] = sum(((found[n] == 0) != (whole[n] == 0)).sum().item() for n in whole)
    model = parallelize_module(Model(), mesh, {"first": ColwiseParallel(output_layouts=Replicate())})
    train(model, "magnitude")
    differences["columns"] = sum(((weights(model)[n] == 0) != (v == 0)).sum().item() for n, v in plain().items())
    for way, build in {
        "rows": lambda: parallelize_module(Model(), mesh, {"first": RowwiseParallel(input_layouts=Replicate())}),
        "fsdp1": lambda: FSDP(Model(), use_orig_params=True, device_id=torch.device("cpu")),
    }.items():
        try:
            train(build(), "magnitude")
            errors[way] = ""
        except ValueError as error:
            errors[way] = str(error)
    return {"differences": differences, "errors": errors}


def plain() -> dict[str, torch.Tensor]:
    model = Model()
    train(model, "magnitude")
    return weights(model)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
