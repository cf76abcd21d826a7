"""The plan of a step: what depends on which tensors there are, worked out once and kept while nothing has changed.

Only the scalars and the gradients' addresses are new in each step. A plan holds no gradient or moment, so that
what is moved elsewhere between two steps is freed: the lists of a step are gathered anew, and must be what was planned
for. All is written for the hundreds of small tensors of a language model, where each look-up costs.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import compress
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..sparsity import local_tensor, shard_coordinate
from .random_bits import random_key

MOMENTS = ("exp_avg", "exp_avg_sq")


class Tensors(NamedTuple):
    """What one step is about: aligned lists with an element for each parameter that has a gradient; local shards."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    s: list[Any]  # tensors, None for parameters of groups that keep none; empty if no group does


@dataclass
class Bucket:
    """The tensors of one group, step number, device and set of dtypes: what a backend is given at a time."""

    group: int  # its number
    device: torch.device
    rounds: bool  # stochastically
    taken: int  # steps so far
    dtypes: tuple[torch.dtype | None, ...]
    follows: bool  # whether there is `s`
    places: list[int] = field(default_factory=list)  # in `Tensors`
    keys: list[int] = field(default_factory=list)  # random, one for each tensor
    whole: bool = False  # whether the places are all there are, in order
    kept: dict[Any, Any] = field(default_factory=dict)  # see `backends`
    runs: dict[int, Bucket] = field(default_factory=dict)  # with so many buckets from this one on, see `united`

    def lists(self, tensors: Tensors) -> tuple[list[Tensor], ...]:
        """Return its part of each list, four or, with `s`, five."""
        lists: tuple[list[Any], ...] = tensors[: 5 if self.follows else 4]
        return lists if self.whole else tuple([values[i] for i in self.places] for values in lists)


def united(buckets: list[Bucket], tensors: Tensors) -> Bucket:
    """Return consecutive buckets as one, for what is done to all of them alike; the first keeps the latest such."""
    first, number = buckets[0], len(buckets)
    if number == 1:
        return first
    if number not in first.runs:
        places = [place for bucket in buckets for place in bucket.places]
        keys = [key for bucket in buckets for key in bucket.keys]
        whole = places == list(range(len(tensors.params)))
        first.runs = {number: replace(first, places=places, keys=keys, whole=whole, kept={}, runs={})}
    return first.runs[number]


class Plan:
    """The buckets of a step, and how many steps their parameters have taken.

    The state's ``step`` tensors become views of one tensor, so that one addition counts for all of them. Whoever reads
    or edits one of them finds, and changes, the number that counts.

    Args:
        optimizer: A `PAdam`, with the state of each parameter that has a gradient.
        grads: Of all its parameters, as `gradients` returns them.

    Raises:
        ValueError: If a gradient or a state has another shape than its parameter, or is on another device.
    """

    def __init__(self, optimizer: Any, grads: list[Tensor | None]) -> None:
        """Sort the tensors into buckets, unite their step numbers, and note all that must stay as it is."""
        groups, state = optimizer.param_groups, optimizer.state
        params = [param for group in groups for param in group["params"]]
        owners = [number for number, group in enumerate(groups) for _ in group["params"]]
        self._has_gradient = None if all(g is not None for g in grads) else [g is not None for g in grads]
        active = [place for place, grad in enumerate(grads) if grad is not None]
        states = [state[params[place]] for place in active]
        for place, own in zip(active, states, strict=True):
            if optimizer.keeps_s(groups[owners[place]]):
                if "s" not in own:
                    own["s"] = optimizer.new_s(params[place], groups[owners[place]]["p_norm"])
            else:
                own.pop("s", None)  # it would be stale when it is wanted again
        self._wrapped = any(_wraps(type(t)) for t in [*params, *(t for own in states for t in own.values())])
        self._follows = any("s" in own for own in states)
        own_params, own_grads = [params[place] for place in active], [grad for grad in grads if grad is not None]
        moments = [_local(values) for values in self._kept(states)[1:]]
        tensors = Tensors(_local(own_params), own_grads, *moments)
        _check_places(tensors)
        buckets: dict[tuple, Bucket] = {}
        for i, (place, own) in enumerate(zip(active, states, strict=True)):
            number, group = owners[place], groups[owners[place]]
            values: list[Any] = [t[i] for t in tensors if t]
            taken, device = int(own["step"]), values[0].device
            dtypes = tuple(t if t is None else t.dtype for t in values)
            rounds = group["bf16_stochastic_round"] and torch.bfloat16 in (dtypes[0], dtypes[3])
            new = Bucket(number, device, rounds, taken, dtypes, "s" in own)
            bucket = buckets.setdefault((number, taken, device, dtypes), new)
            bucket.places.append(i)
            bucket.keys.append(random_key(group["rounding_seed"], place, *shard_coordinate(params[place])))
        for bucket in buckets.values():
            bucket.whole = bucket.places == list(range(len(active)))
        self.buckets = list(buckets.values())
        self.elements: defaultdict[torch.device, int] = defaultdict(int)  # on each device
        for param in own_params:
            self.elements[param.device] += param.numel()
        numbers = [bucket.taken for bucket in self.buckets for _ in bucket.places]
        self._steps = torch.tensor(numbers, dtype=torch.float32, device="cpu")  # on a GPU, reading would wait for it
        self._expected = self._steps.clone()
        places = [i for bucket in self.buckets for i in bucket.places]
        for i, step in zip(places, self._steps.unbind(), strict=True):
            states[i]["step"] = step
        known = {id(param): i for i, param in enumerate(state)}
        order = [known[id(param)] for param in own_params]
        self._order = None if order == list(range(len(state))) else order
        kept = self._kept(states)
        self._options, self._params = _options(optimizer), list(map(id, params))
        self._state, self._seen = [list(map(id, values)) for values in kept[1:]], self._described(kept[0], tensors)
        self._lost: list[bool] = []  # filled when one of the tensors is gone: another may have got its identity
        self._held = params  # by the groups, too; a weak reference would keep a module from swapping them
        moments_and_s = [t for values in kept[1:] for t in values if t is not None]
        # Not a method: with it in what it holds, a plan that another has replaced would keep itself and its tables.
        lost = self._lost
        self._references = [weakref.ref(t, lambda _: lost.append(True)) for t in moments_and_s]

    def tensors(self, optimizer: Any, params: list[Tensor], grads: list[Tensor | None]) -> Tensors | None:
        """Return what the step is about if it is what was planned for, None if anything has changed.

        That is: parameters, states, which of them have a gradient, dtypes, layouts, addresses (but for gradients),
        options, and step numbers.

        Args:
            optimizer: The one that was planned for.
            params: All its parameters.
            grads: Theirs, as `gradients` returns them.
        """
        if self._lost or self._params != list(map(id, params)):
            return None
        active: list[Any] = grads
        if type(None) in set(map(type, grads)) or self._has_gradient is not None:
            if [grad is not None for grad in grads] != self._has_gradient:
                return None
            params, active = list(compress(params, self._has_gradient)), list(compress(grads, self._has_gradient))
        states = list(optimizer.state.values())
        try:
            if self._order is not None:
                states = [states[i] for i in self._order]
            steps, *moments = self._kept(states)
            if self._state != [list(map(id, values)) for values in moments] or self._options != _options(optimizer):
                return None
            if self._wrapped:
                params, *moments = map(_local, (params, *moments))
            tensors = Tensors(params, active, *moments)
            unchanged = torch.equal(self._steps, self._expected) and self._seen == self._described(steps, tensors)
        except (IndexError, KeyError, RuntimeError, TypeError):  # no state; no moments; a sparse gradient; no tensor
            return None
        return tensors if unchanged else None

    def count(self, finished: int) -> None:
        """Count a step of the parameters of the first so many buckets."""
        for bucket in self.buckets[:finished]:
            bucket.taken += 1
        parameters = sum([len(bucket.places) for bucket in self.buckets[:finished]])
        for steps in (self._steps, self._expected):
            (steps if finished == len(self.buckets) else steps[:parameters]).add_(1)

    def _kept(self, states: list[dict[str, Any]]) -> list[list[Any]]:
        """Return the step numbers, the moments and, or an empty list, what there is of `s`."""
        lists = [list(map(itemgetter(name), states)) for name in ("step", *MOMENTS)]
        return [*lists, [state.get("s") for state in states] if self._follows else []]

    def _described(self, steps: list[Tensor], tensors: Tensors) -> tuple:
        """Return what identity leaves open: addresses of parameters and states, and how gradients look.

        The parameters look the same: torch gives them no others.
        """
        lists: list[list[Any]] = [steps, tensors.params, *tensors[2:]]
        if self._wrapped or self._follows:  # packed moments have no address; there may be no `s`
            lists = [[t for t in values if t is not None and not _wraps(type(t))] for values in lists]
        addresses = [list(map(Tensor.data_ptr, values)) for values in lists]
        sizes, layouts = list(map(Tensor.numel, tensors.grads)), list(map(Tensor.stride, tensors.grads))
        return addresses, sizes, layouts, list(map(attrgetter("dtype"), tensors.grads))


def _check_places(tensors: Tensors) -> None:
    """Check all before kernels go by the parameters' sizes and device alone, and past the end of what is smaller."""
    for name, values in zip(("gradient", *MOMENTS, "s"), tensors[1:], strict=True):
        for param, value in zip(tensors.params, values or [], strict=bool(values)):
            if value is not None and (value.shape, value.device) != (param.shape, param.device):
                raise ValueError(
                    f"{name} of a parameter of shape {tuple(param.shape)} on {param.device} has the shape "
                    f"{tuple(value.shape)} and is on {value.device}: it is of another parameter, or the model was "
                    "moved, and its gradients or the optimizer's state were not"
                )


def _options(optimizer: Any) -> list[tuple]:
    keeps_s = optimizer.keeps_s
    return [
        (len(g["params"]), g["rounding_seed"], g["bf16_stochastic_round"], keeps_s(g)) for g in optimizer.param_groups
    ]


def _wraps(kind: type) -> bool:
    """Whether a class of tensors is a wrapper of others, as DTensor is."""
    return hasattr(kind, "__tensor_flatten__")


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """Return the local shards of DTensors, and other tensors as they are."""
    if any(issubclass(kind, DTensor) for kind in set(map(type, tensors))):
        return [local_tensor(t) for t in tensors]
    return tensors


def gradients(params: list[Tensor]) -> list[Any]:
    """Return the parameters' gradients, or None: of DTensors local shards, sharded as the parameters are."""
    grads: list[Any] = list(map(attrgetter("grad"), params))
    if not any(issubclass(kind, DTensor) for kind in set(map(type, grads))):
        return grads
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if isinstance(param, DTensor) and isinstance(grad, DTensor) and grad.placements != param.placements:
            # E.g. a replicated weight under sequence parallelism: its gradient is a sum yet to be completed.
            grads[i] = grad.redistribute(placements=param.placements)
    return _local(grads)


def check_dense(grads: list[Tensor | None]) -> None:
    """Check gradients before anything is changed.

    Raises:
        RuntimeError: If one is sparse.
    """
    for grad in grads:
        if grad is not None and grad.layout is not torch.strided:
            raise RuntimeError(
                f"PAdam needs dense gradients; one of shape {tuple(grad.shape)} is {grad.layout}. "
                "Set sparse=False on the embedding, or use torch.optim.SparseAdam for it."
            )
