"""Count zeros: the one function behind every sparsity that this package logs, returns or draws."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parameter import is_lazy

NEAR_ZERO = 1e-8
"""Default threshold below which the magnitude of a non-zero weight counts as near zero."""


_WRAPPER = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What wrapping a model puts into its parameters' names."""

_TWO_IN_A_BYTE = getattr(torch, "float4_e2m1fn_x2", None)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@dataclass(frozen=True)
class TensorCount:
    """What was counted in one tensor."""

    name: str
    elements: int
    zeros: int  # exactly zero
    near_zeros: int | None  # not zero, but smaller in magnitude than the threshold; None where not asked for
    decayed: bool  # whether the p-norm decay acts on it
    known: bool = True  # whether `elements` and `zeros` are of weights: not so where these are packed

    @property
    def sparsity(self) -> float:
        """Share of exact zeros, 0 to 1."""
        return self.zeros / self.elements if self.elements else 0.0


def countable(dtype: torch.dtype) -> bool:
    """Whether a stored zero is a weight that is zero: with floating-point, complex, 8-bit integer and boolean ones.

    The bytes and larger integers of other quantisations hold several weights each, in codes of their own.
    """
    return dtype != _TWO_IN_A_BYTE and (
        dtype.is_floating_point or dtype.is_complex or dtype in (torch.int8, torch.bool)
    )


def _readable(tensor: Tensor) -> bool:
    """Whether torch can look at the elements of a local tensor, one by one.

    Not so of sparse and nested ones, of those without values (meta, uninitialised), and of wrappers of quantised ones.
    """
    if is_lazy(tensor) or tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided:
        return False
    wraps = hasattr(type(tensor), "__tensor_flatten__")
    return not wraps and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype in _INTEGERS)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return a DTensor's local shard: the update is elementwise, so stepping the shards steps the tensor exactly."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_coordinate(tensor: Tensor) -> tuple[int, ...]:
    """Return which shard of a tensor this process holds; replicas of one shard get the same answer."""
    if not isinstance(tensor, DTensor):
        sharding = local_shard(tensor)[1]
        return () if sharding is None else (dist.get_rank(sharding),)
    coordinate = tensor.device_mesh.get_coordinate() or ()
    return tuple(c for c, p in zip(coordinate, tensor.placements, strict=False) if not p.is_replicate())


def local_shard(tensor: Tensor) -> tuple[Tensor, Any]:
    """Return the part of a tensor that is held here, and how the tensor is sharded (None where it is not).

    DTensors are sharded by fully_shard and tensor parallelism. DeepSpeed's ZeRO-3 leaves an empty placeholder with the
    shard in an attribute: flat, and padded to the same size on every rank. FSDP1's parameters are shards themselves,
    and so are the pieces that DeepSpeed gives to its optimizer.
    """
    if isinstance(tensor, DTensor):
        return tensor.to_local(), (tensor.device_mesh, tensor.placements)
    if hasattr(tensor, "ds_tensor"):
        placeholder: Any = tensor
        shard, group = placeholder.ds_tensor.detach(), placeholder.ds_process_group
        return shard[: max(0, placeholder.ds_numel - dist.get_rank(group) * shard.numel())], group
    return tensor, dist.group.WORLD if hasattr(tensor, "_fsdp_flattened") or is_piece(tensor) else None


def is_piece(tensor: Tensor) -> bool:
    """Whether DeepSpeed has made this of many parameters, for its optimizer: it is none itself, and DeepSpeed runs."""
    trained = tensor.requires_grad and tensor.is_leaf and not isinstance(tensor, torch.nn.Parameter)
    return trained and getattr(sys.modules.get("deepspeed.comm.comm"), "cdb", None) is not None


def sum_over_shards(values: Tensor, sharding: Any) -> Tensor:
    """Add up values that were each computed from one shard; every rank gets the sum.

    Args:
        values: Any shape, the same on every rank.
        sharding: From `local_shard`.
    """
    if sharding is None:
        return values
    if isinstance(sharding, dist.ProcessGroup):
        kinds = [device.type for device in sharding._device_types]
        place = values.device if values.device.type in kinds else torch.device(kinds[0])
        total = values.to(place, copy=True)  # NCCL cannot add up what DeepSpeed has offloaded
        dist.all_reduce(total, group=sharding)
        return total.to(values.device)
    mesh, placements = sharding
    partial = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(values, mesh, partial).full_tensor()


def _comparable(tensor: Tensor) -> Tensor:
    """Return a tensor as one that torch can compare, with zeros where it has them."""
    if tensor.dtype == _TWO_IN_A_BYTE:
        return tensor.view(torch.uint8)
    if tensor.is_complex():
        return tensor.abs()
    return tensor.half() if tensor.element_size() == 1 else tensor


def zeros_in(tensor: Tensor) -> Tensor:
    """Count the zeros of a local tensor, of either sign."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    if not tensor.is_floating_point() or integer is None:
        return torch.count_nonzero(tensor == 0)
    # Torch counts non-zero integers several times faster than it compares floats; abs makes one zero of the two.
    return tensor.numel() - torch.count_nonzero(tensor.abs().view(integer))


@torch.no_grad()
def count_zeros(
    tensors: Mapping[str, Tensor], decayed: Collection[str] = (), near_zero: float | None = None
) -> list[TensorCount]:
    """Count the zeros of each tensor, with one transfer to the host per device and sharding.

    Args:
        tensors: Name to tensor, each of any shape. A sharded one is counted over all its shards, on every rank alike.
        decayed: Names of the tensors that the p-norm decay acts on.
        near_zero: If given, also count non-zero elements of a magnitude below this.

    Returns:
        One count per tensor, in order. Of those that cannot be looked at, zeros are not `known`.
    """
    batches: defaultdict[tuple, dict[str, list[Tensor]]] = defaultdict(dict)
    unreadable: set[str] = set()
    elements: defaultdict[tuple, list[int]] = defaultdict(list)
    for name, tensor in tensors.items():
        local, sharding = local_shard(tensor)
        device = local.device
        if _readable(local):
            comparable = _comparable(local)
            counts = [zeros_in(comparable)]
            if near_zero is not None:
                magnitudes = comparable.abs()
                if magnitudes.dtype == torch.float16:  # knows no number so small, but zero
                    magnitudes = magnitudes.float()
                counts.append(torch.count_nonzero(magnitudes < near_zero) - counts[0])
        else:
            unreadable.add(name)
            device = torch.device("cpu") if local.is_meta else device
            counts = [torch.zeros((), dtype=torch.int64, device=device)] * (1 if near_zero is None else 2)
        batches[device, sharding][name] = counts
        elements[device, sharding].append(0 if is_lazy(local) else local.numel())
    values: dict[str, list[int]] = {}
    for key, batch in batches.items():
        device, sharding = key
        counted = torch.stack([count for counts in batch.values() for count in counts])
        stacked = torch.cat([torch.tensor(elements[key], device=device), counted])
        summed = sum_over_shards(stacked, sharding).tolist()
        sizes, flat = summed[: len(batch)], iter(summed[len(batch) :])
        for (name, counts), size in zip(batch.items(), sizes, strict=True):
            values[name] = [size, *(next(flat) for _ in counts)]
    return [
        TensorCount(
            name=name,
            elements=values[name][0],
            zeros=values[name][1],
            near_zeros=values[name][2] if near_zero is not None else None,
            decayed=name in decayed,
            known=name not in unreadable and countable(tensor.dtype),
        )
        for name, tensor in tensors.items()
    ]


def count_model_zeros(
    model: nn.Module, decayed: Collection[str] = (), near_zero: float | None = None
) -> list[TensorCount]:
    """Count the zeros of every parameter of a model, frozen ones included and tied ones once; see `count_zeros`.

    Names are compared as they are without wrappers, be the model wrapped, or have been when `decayed` was made.
    """
    tensors = {bare_name(name): param for name, param in model.named_parameters()}
    return count_zeros(tensors, set(map(bare_name, decayed)), near_zero)


def bare_name(name: str) -> str:
    """Return a parameter's name without what FSDP, its activation checkpointing and torch.compile put into it."""
    return _WRAPPER.sub("", name)


def summarize(counts: Iterable[TensorCount]) -> dict[str, float | int | None]:
    """Reduce counts to the two shares of exact zeros, over the decayed weights and over all, and their sizes.

    What is not known is None: the share of the decayed weights where there are none, and both where weights of theirs
    are packed, so that neither zeros nor weights can be counted.
    """
    counts = list(counts)
    summary: dict[str, float | int | None] = {}
    for part, share, size in (
        ([c for c in counts if c.decayed], "sparsity", "decayed_parameters"),
        (counts, "sparsity_total", "total_parameters"),
    ):
        known = all(c.known for c in part)
        elements = sum(c.elements for c in part)
        summary[share] = sum(c.zeros for c in part) / elements if known and elements else None
        summary[size] = elements if known else None
    return {key: summary[key] for key in ("sparsity", "sparsity_total", "decayed_parameters", "total_parameters")}
