"""How large the decay takes weights to be: their sizes ``x``, and the scalar ``mu`` that gives these their unit.

A step computes ``x`` where it needs it, in registers. This is for what is done now and then: choosing ``mu``, and the
quantiles of `target_sparsity`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sparsity import is_piece, local_shard, local_tensor, shard_coordinate, sum_over_shards
from .plan import gradients
from .random_bits import random_key
from .update import LARGEST, YOUNG_RATIO, YOUNG_STEPS

logger = logging.getLogger(__name__)

REFERENCE = "reference"
"""The key of a steered group for the size that `update.prepare` takes in place of lambda_p."""

SCALE, SCALE_STEP, TAKEN = "importance_scale", "importance_step", "importance_taken"
"""Keys of a group under "fisher": mu, after how many steps it was computed, and how many were taken."""

SCALE_STATE = {SCALE: 1.0, SCALE_STEP: 0, TAKEN: 0}
"""Where they start. They are there from the beginning: what a group lacks, FSDP does not load into it."""

_GROWTH = 1.2
"""mu is computed anew when the number of steps has grown by this factor: 16 times in the first 200 steps, 50 times in
100,000. It takes as long as a step or two, and on a GPU the host waits for it."""

_SLICE, _CACHED_SLICE = 2**22, 2**17
"""Elements that are read at a time: on a GPU, and on a CPU, whose caches hold them."""


class Measured(NamedTuple):
    """A parameter as far as it is held here, and what the sizes of its weights come from."""

    weight: Tensor  # any shape
    second: (
        Any  # under "fisher" the second moments, same shape or, before the first gradient, a single zero; else None
    )
    factor: float | Tensor  # x = |weight| * sqrt(second) * factor
    sharding: Any  # see `sparsity.local_shard`
    key: int  # random, another for each parameter and shard, the same on replicas
    latest: tuple[tuple[Any, float], ...] = ()  # what, times a factor and squared, may tell that a weight is young
    young: float = 0.0  # see `update.Scalars`
    spared: Tensor | None = None  # which weights are not to die, whatever their sizes; same shape

    def stride(self, sample: int | None) -> int:
        """Return a distance between elements that yields about so many, in all columns; all of them if None."""
        step = max(1, self.weight.numel() // sample) if sample else 1
        while self.weight.ndim and math.gcd(step, self.weight.shape[-1]) > 1 < self.weight.shape[-1]:
            step += 1  # else it would see some columns only
        return step

    def slices(self, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every `step`-th weight and its size, in fp32 and flat, a part of the tensor at a time.

        A weight that has had no gradient under "fisher" has an infinite size, unless it is zero; see `measure`, too.
        So has one that is spared.
        """
        flat = self.weight.detach().reshape(-1)
        spared = None if self.spared is None else self.spared.reshape(-1)
        second_moments, latest = _flat(self.second), [(_flat(values), factor) for values, factor in self.latest]
        for part in self._parts(step):
            weight = flat[part]
            x = weight.abs().float()
            if self.second is not None:
                second = _read(second_moments, part).float()
                young = second == 0
                for values, factor in latest:
                    young = young | ((factor * _read(values, part).float()).square() * self.young >= second)
                x = torch.where(young & (x > 0), math.inf, x * second.sqrt().clamp(max=LARGEST) * self.factor)
            if spared is not None:
                x = x.masked_fill(spared[part], math.inf)
            yield weight, x

    def squares(self, step: int = 1) -> Tensor:
        """Return the sums of x^2 and w^2 over the weights, every `step`-th, that have had gradients; fp64, (2,)."""
        precise = torch.float32 if self.weight.device.type == "mps" else torch.float64
        sums = self.weight.new_zeros(2, dtype=precise)
        if self.second is None or not isinstance(self.factor, float):
            raise TypeError("squares are of sizes under fisher, in units of their own")
        flat, second_moments = self.weight.detach().reshape(-1), _flat(self.second)
        for part in self._parts(step):
            weight = flat[part]
            second = _read(second_moments, part).expand(weight.shape)
            known = (second > 0) & second.isfinite()  # one that has overflown would make all others small
            squared = torch.where(known, weight, 0.0).to(precise).square()
            sums[0] += torch.dot(squared, torch.where(known, second, 0.0).to(precise))
            sums[1] += squared.sum()
        sums[0] *= self.factor**2
        return sums * step

    def _parts(self, step: int) -> Iterator[slice]:
        size = step * (_CACHED_SLICE if self.weight.device.type == "cpu" else _SLICE)
        return (slice(start, start + size, step) for start in range(0, self.weight.numel(), size))


def measure(
    optimizer: Optimizer,
    groups: Iterable[dict[str, Any]],
    scale: float | Tensor = 1.0,
    *,
    known: int = 1,
    spare_young: bool = False,
) -> list[Measured]:
    """Return what the sizes of the trainable weights of some groups come from.

    Args:
        optimizer: `PAdam`, or a relative of Adam that keeps `exp_avg_sq`.
        groups: Of the optimizer.
        scale: mu; or a tensor with it, which is not read here.
        known: After how many steps of a parameter its second moments count; before, its sizes are infinite.
        spare_young: Under "fisher" let those weights too have infinite sizes that have had just a few gradients, and
            that the step to come would leave alone.
    """
    measured: list[Measured] = []
    for group in groups:
        grads = gradients(group["params"]) if spare_young else [None] * len(group["params"])
        for param, grad in zip(group["params"], grads, strict=True):
            if not param.requires_grad:
                continue
            weight, sharding = local_shard(param)
            second: Any = None
            factor: float | Tensor = 1.0
            latest: list[tuple[Any, float]] = []
            correction = 0.0
            if group.get("importance") == "fisher":
                second = weight.new_zeros(())
                state = optimizer.state.get(param) or {}
                if "exp_avg_sq" in state and state["step"] >= max(1, known):  # 0 if its first step has failed
                    second = local_tensor(state["exp_avg_sq"])
                    if spare_young:
                        latest = [(local_tensor(state["exp_avg"]), 1.0), *([] if grad is None else [(grad, 0.5)])]
                    own = scale.to(weight.device) if isinstance(scale, Tensor) else scale
                    correction = 1 - float(group["betas"][1]) ** float(state["step"])
                    factor = correction**-0.5 / own
            key = random_key(len(measured), *shard_coordinate(param))
            measured.append(Measured(weight, second, factor, sharding, key, tuple(latest), correction / YOUNG_RATIO))
    return measured


def _flat(values: Any) -> Any:
    """Return a tensor as a row, for `_read`; packed ones and single zeros as they are."""
    return values if values is None or hasattr(values, "codes") or values.ndim == 0 else values.reshape(-1)


def _read(values: Any, part: slice) -> Tensor:
    """Return some elements of what `_flat` returns, unpacked; of a single zero itself."""
    if hasattr(values, "codes"):
        codes = values.codes.view(-1)[part]
        places = torch.arange(*part.indices(values.codes.numel()), device=codes.device)
        return values.qmap[codes.int()] * values.scale[places // (values.codes.numel() // values.scale.numel())]
    return values if values.ndim == 0 else values[part]


def fisher_scale(measured: Iterable[Measured], sample: int | None = None, nothing: float = 1.0) -> Tensor:
    """Return mu, with which the mean of x^2 is that of w^2, over all weights that have had gradients, on all shards.

    Args:
        measured: From `measure`, under "fisher" with a scale of 1.
        sample: Look at about this many elements of each shard at most.
        nothing: What to return if no weight has had a gradient.

    Returns:
        A 0-dim tensor on a device of theirs: for who needs it there, nothing is transferred.
    """
    totals: dict[tuple, Tensor] = {}
    for tensor in measured:
        sums = tensor.squares(tensor.stride(sample))
        key = tensor.weight.device, tensor.sharding
        totals[key] = totals[key] + sums if key in totals else sums
    if not totals:
        return torch.tensor(nothing, device="cpu")
    squared_x, squared_w = sum_totals(totals).unbind()
    return torch.where(squared_x > 0, (squared_x / squared_w).sqrt(), nothing)


def sum_totals(totals: Mapping[tuple, Tensor]) -> Tensor:
    """Add up tensors over all shards, devices and kinds of sharding, without a transfer to the host.

    Args:
        totals: By device and sharding, the latter as `local_shard` returns it; each of the same shape.
    """
    sums = [sum_over_shards(total, sharding) for (_, sharding), total in totals.items()]
    return torch.stack([total.to(sums[0].device) for total in sums]).sum(0)


def needs_scale(group: Mapping[str, Any]) -> bool:
    """Whether a group is of those that `update_scale` is about: under "fisher", and nothing steers it."""
    return group.get("importance") == "fisher" and group["lambda_p"] > 0 and REFERENCE not in group


def check_steered(group: Mapping[str, Any]) -> None:
    """Check that a group that is to arrive at a target has been given to what steers it there.

    Raises:
        RuntimeError: If not: its decay would know no end.
    """
    decays = group["lambda_p"] > 0 and float(group["lr"]) > 0  # not in the step in which FSDP creates a state to load
    target = group.get("target_sparsity")
    if decays and REFERENCE not in group and (target is not None or "target_step" in group):
        raise RuntimeError(
            f"a parameter group is to arrive at a target_sparsity{'' if target is None else f'={target!r}'}, and "
            "nothing steers it there: all of its weights would die. Make TargetSparsity(optimizer, total_steps=...) "
            "before the first step, or take p_norm=0.8 and a lambda_p without a target"
        )
    if decays and group["p_norm"] == -math.inf and REFERENCE not in group:
        _warn_of_pruning()


@functools.cache
def _warn_of_pruning() -> None:
    logger.warning(
        "p_norm=-inf without a target zeroes every weight whose size is below 1, in one step. To prune to a share, "
        "make TargetSparsity(optimizer, target, total_steps) before the first step"
    )


def update_scale(optimizer: Optimizer, taken: int) -> None:
    """Compute mu of the groups under "fisher" that nothing steers, if it is time to; to be called before a step.

    Since all processes, and a resumed run, have the same weights and moments after the same steps, they have the same
    mu. Between two computations nothing is read from the device.

    Args:
        optimizer: See `measure`.
        taken: How many steps these groups have taken at least, as the states say that are held here.
    """
    pool = [group for group in optimizer.param_groups if needs_scale(group)]
    _check_whole(optimizer, pool)
    taken = max([taken, *(group.get(TAKEN, 0) for group in pool)])  # a process may hold none of these weights
    for group in pool:
        group[TAKEN] = taken
    if taken < YOUNG_STEPS:
        return
    computed = [group.get(SCALE_STEP, 0) for group in pool]  # after so many steps; states may have been cleared since
    if any(taken >= _GROWTH * steps or taken < steps for steps in computed):
        # Not from the first few gradients of what thaws later.
        scale = float(fisher_scale(measure(optimizer, pool, known=YOUNG_STEPS), nothing=0.0))
        for group in pool if scale > 0 else ():  # else all are frozen, or young
            group |= {SCALE: scale, SCALE_STEP: taken}


def count_anew(optimizer: Optimizer, grads: Iterable[Tensor | None]) -> None:
    """Count from zero again where all states have been cleared; not where there are none for want of gradients."""
    if not optimizer.state and any(grad is not None for grad in grads):
        for group in optimizer.param_groups:
            group |= {TAKEN: 0} if TAKEN in group else {}


def count_step(optimizer: Optimizer) -> None:
    """Count a step for `update_scale`, once it is taken."""
    for group in optimizer.param_groups:
        if needs_scale(group) and any(param.requires_grad for param in group["params"]):  # on all processes alike
            group[TAKEN] = group.get(TAKEN, 0) + 1


def _check_whole(optimizer: Optimizer, pool: list[dict[str, Any]]) -> None:
    """Check that a step is about all weights that share a scale: DeepSpeed steps the pieces of its own one by one."""
    pieces = {id(param) for group in pool for param in group["params"] if is_piece(param)}
    if pieces and not pieces <= vars(optimizer).setdefault("_padam_pieces", pieces):
        raise RuntimeError(
            'importance="fisher" measures all decayed weights in one unit, but DeepSpeed steps them in several parts: '
            "keep them in one parameter group and, under ZeRO-3, set zero_optimization.sub_group_size to their number "
            "at least; or use FSDP2 (recipes/accelerate/fsdp2.yaml)"
        )
