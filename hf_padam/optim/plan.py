"""The plan of a step: what depends on which tensors there are, worked out once and kept while nothing has changed.

Only scalars and addresses are new in each step. A plan holds no weight, gradient or moment, so that what is moved
elsewhere between two steps is freed; the lists of a step are gathered anew, and compared with what was planned for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..sparsity import local_tensor, shard_coordinate
from .update import random_key


class Tensors(NamedTuple):
    """What one step is about: aligned lists, one element for each parameter that has a gradient; of DTensors shards."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    s: list[Tensor | None]  # None for parameters of groups that keep none; empty if no group does


@dataclass
class Bucket:
    """The tensors of one group, step number, device and set of dtypes: what a backend is given at a time."""

    group: int  # its number
    device: torch.device
    rounds: bool  # stochastically
    taken: int  # steps so far
    follows: bool  # whether there is `s`
    places: list[int] = field(default_factory=list)  # in `Tensors`
    keys: list[int] = field(default_factory=list)  # random, one for each tensor
    whole: bool = False  # whether the places are all there are, in order
    kept: dict[Any, Any] = field(default_factory=dict)  # see `backends`

    def lists(self, tensors: Tensors) -> tuple[list[Tensor], ...]:
        """Return its part of each list, four or, with `s`, five."""
        lists: tuple[list[Any], ...] = tensors[: 5 if self.follows else 4]
        return lists if self.whole else tuple([values[i] for i in self.places] for values in lists)


class Plan:
    """The buckets of a step, and how many steps their parameters have taken.

    The state's ``step`` tensors become views of one tensor, so that one addition counts for all of them. Whoever reads
    or edits one of them finds, and changes, the number that counts.

    Args:
        signature: What the plan is good for: see `signature`.
        groups: Of the optimizer.
        owners: Of each parameter with a gradient, the number of its group and its place in the optimizer.
        params: These parameters themselves.
        states: Theirs.
        tensors: Theirs.
    """

    def __init__(
        self,
        signature: Any,
        groups: Sequence[dict[str, Any]],
        owners: Sequence[tuple[int, int]],
        params: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        tensors: Tensors,
    ) -> None:
        """Sort the tensors into buckets, and unite their step numbers."""
        self.signature = signature
        self.elements: defaultdict[torch.device, int] = defaultdict(int)
        buckets: dict[tuple, Bucket] = {}
        lists = tensors if tensors.s else tensors[:4]
        for i, ((number, place), param, state) in enumerate(zip(owners, params, states, strict=True)):
            group, own = groups[number], [values[i] for values in lists]
            dtypes = tuple(t if t is None else t.dtype for t in own)
            taken, device = int(state["step"]), own[0].device
            rounds = group["bf16_stochastic_round"] and torch.bfloat16 in (dtypes[0], dtypes[3])
            new = Bucket(number, device, rounds, taken, len(own) == 5 and own[4] is not None)
            bucket = buckets.setdefault((number, taken, device, dtypes), new)
            bucket.places.append(i)
            bucket.keys.append(random_key(group["rounding_seed"], place, *shard_coordinate(param)))
            self.elements[device] += param.numel()
        self.buckets = list(buckets.values())
        numbers = [bucket.taken for bucket in self.buckets for _ in bucket.places]
        self._steps = torch.tensor(numbers, dtype=torch.float32, device="cpu")  # on a GPU, reading would wait for it
        self._expected = self._steps.clone()
        self._addresses = [0] * len(params)
        views = iter(self._steps.unbind())
        for bucket in self.buckets:
            bucket.whole = bucket.places == list(range(len(params)))
            for i in bucket.places:
                states[i]["step"] = next(views)
                self._addresses[i] = states[i]["step"].data_ptr()

    def fits(self, signature: Any, states: Sequence[dict[str, Any]]) -> bool:
        """Whether nothing has changed: neither the tensors and options, nor, by another hand, the step numbers."""
        if signature != self.signature or not torch.equal(self._steps, self._expected):
            return False
        try:
            return [state["step"].data_ptr() for state in states] == self._addresses
        except AttributeError:  # a number that is no tensor
            return False

    def count(self, finished: int) -> None:
        """Count a step of the parameters of the first so many buckets."""
        for bucket in self.buckets[:finished]:
            bucket.taken += 1
        parameters = sum(len(bucket.places) for bucket in self.buckets[:finished])
        self._steps[:parameters] += 1
        self._expected[:parameters] += 1


def signature(groups: Sequence[dict[str, Any]], has_gradient: list[bool], tensors: Tensors) -> tuple:
    """Return all that a plan depends on, but for the step numbers; to be compared with that of another step."""
    options = [(len(g["params"]), g["rounding_seed"], g["bf16_stochastic_round"]) for g in groups]
    s = [t for t in tensors.s if t is not None]
    kept = [t is not None for t in tensors.s]
    places = [t.numel() for t in tensors.params], [t.device for t in tensors.params]
    return options, has_gradient, kept, *places, *[_described(values) for values in (*tensors[:4], s)]


def _described(tensors: list[Tensor]) -> tuple:
    """Return types, dtypes and layouts; of tensors that wrap others, packed moments for example, the types only."""
    types = list(map(type, tensors))
    if any(hasattr(kind, "__tensor_flatten__") for kind in set(types)):
        tensors = [t for t in tensors if not hasattr(type(t), "__tensor_flatten__")]
    return types, [t.dtype for t in tensors], [t.stride() for t in tensors]


def local(tensors: list[Tensor]) -> list[Tensor]:
    """Return the local shards of DTensors, and other tensors as they are."""
    if any(issubclass(kind, DTensor) for kind in set(map(type, tensors))):
        return [local_tensor(t) for t in tensors]
    return tensors


def local_gradients(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Return gradients' local shards, sharded as the parameters are.

    Raises:
        RuntimeError: If a gradient is sparse.
    """
    for param, grad in zip(params, grads, strict=True):
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"PAdam needs dense gradients; one of shape {tuple(param.shape)} is {grad.layout}. "
                "Set sparse=False on the embedding, or use torch.optim.SparseAdam for it."
            )
    if not any(issubclass(kind, DTensor) for kind in set(map(type, grads))):
        return grads
    placed = []
    for param, grad in zip(params, grads, strict=True):
        if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
            # E.g. a replicated weight under sequence parallelism: its gradient is a sum yet to be completed.
            grad = grad.redistribute(placements=param.placements)
        placed.append(local_tensor(grad))
    return placed
