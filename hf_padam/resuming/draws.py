"""Let what the preparation of data draws depend on a batch's place in the run alone, so that a resumed run repeats it.

Collators that mask, datasets that crop, samplers that shuffle draw from Python's, NumPy's or torch's generator, or
from one of their own; in this process, which fetches a batch ahead, or in worker processes, whose states nobody sees.
No checkpoint could hold all that. So the state in which a batch is prepared is set from the seed, the epoch, the
process and the batch's number, and the model's own draws (dropout) are kept apart from it.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from types import BuiltinMethodType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

logger = logging.getLogger(__name__)

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_DEPTH, _WIDTH = 12, 100  # how far, and through how large containers of data, generators are looked for
_NOT_SEARCHED = (torch.Tensor, torch.nn.Module, ModuleType, type, logging.Logger, str, int, float, bytes, type(None))
_SEARCHED = (*_GENERATORS, FunctionType, BuiltinMethodType, MethodType, GeneratorType, partial, dict, list, tuple)
_OF_ALL = (random.random.__self__, np.random.mtrand._rand, torch.default_generator)  # type: ignore[attr-defined]
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "transformers", "datasets", "accelerate", "hf_padam"}
"""Not searched for what functions use of them."""

_METHODS = ("__call__", "__getitem__", "__getitems__", "__iter__", "torch_call")


class Place:
    """Where a run is in its data, as far as the processes that prepare it must know.

    Args:
        seed: The run's.
        process: The index of this process.
        apart: Whether preparation gets states of its own; else it is only watched, and a draw warned of.
    """

    def __init__(self, seed: int, process: int, apart: bool = True) -> None:
        self.seed, self.process, self.apart = seed, process, apart
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may outlive an epoch
        self._warned = False

    @property
    def epoch(self) -> int:
        """The epoch; setting it tells the workers."""
        return int(self._epoch.numpy())  # always on the CPU: nothing to wait for

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def key(self, *place: object) -> int:
        """Return the seed of a place in the epoch."""
        text = repr((self.seed, self.epoch, *place))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    @contextmanager
    def prepares(self, seed: int) -> Iterator[None]:
        """Prepare something in a state of its own, or watch whether the run's is used."""
        if self.apart:
            with _state(seed):
                yield
            return
        before = _digest(_get_state())
        yield
        if _digest(_get_state()) != before:
            self.warn()

    def iterate(self, iterable: Iterable[Any], seed: int) -> Iterator[Any]:
        """Iterate in a state of its own: what is drawn between two items does not disturb it, nor it that."""
        iterator = None
        with _state(seed):
            inner = _get_state()
        while True:
            with self.prepares(seed):
                if self.apart:
                    _set_state(inner)
                iterator = iter(iterable) if iterator is None else iterator
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                inner = _get_state()
            yield item

    def warn(self) -> None:
        """Warn, once, that what is drawn is not what the interrupted run would have drawn."""
        if not self._warned:
            self._warned = True
            logger.warning(
                "The data are prepared with random draws (masking, for example), and the checkpoint that this run "
                "goes on from, which other code or an older version wrote, does not say which are next: what follows "
                "is not exactly what the interrupted run would have done.",
            )


def settle_draws(loader: Any, place: Place) -> None:
    """Let everything that a data loader draws depend on the place of a batch in the run.

    Args:
        loader: A data loader that accelerate has prepared; it is changed, unless it is of an unknown kind.
        place: Where the run is; the trainer keeps its epoch up to date.
    """
    base = getattr(loader, "base_dataloader", None)
    stream = isinstance(getattr(base, "dataset", None), IterableDataset)
    if type(base) is not DataLoader or (base.batch_size is None and base.batch_sampler is None):
        return
    prepare = _Prepare(base.dataset, base.collate_fn, place, stream)
    changes: dict[str, Any] = {
        "dataset": _Stream(base.dataset, prepare) if stream else _Indices(base.dataset),
        "collate_fn": prepare,
    }
    if not stream:
        changes["batch_sampler"] = _Numbers(base.batch_sampler, place)
    vars(base).update(changes)  # past torch's guard, which is for changes of what is loaded
    if place.apart and base.persistent_workers and base.generator is None:
        # Workers are started once in a run, in a resumed run twice: what that draws must not be the model's.
        vars(base).update(generator=torch.Generator().manual_seed(place.key("workers")))


def are_settled(loader: Any) -> bool:
    """Whether `settle_draws` has changed a loader."""
    return isinstance(getattr(loader, "collate_fn", None), _Prepare)


class _Prepare:
    """The `collate_fn`: fetch the samples of a batch too, if they are not a stream's, and collate them."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], place: Place, stream: bool) -> None:
        self.dataset, self.collate, self.place, self.stream = dataset, collate, place, stream
        self.number = 0  # of a stream's next batch in this epoch, in this worker
        self.warned, self.told = False, -1
        for part in list(_held(collate)):  # Transformers' collators make theirs in each worker otherwise
            if hasattr(part, "create_rng") and part.seed is not None and part.generator is None:
                part.create_rng()
        self.initial = [_first_state(generator) for generator in self._generators()]
        if stream and place.apart and len(list(_owned((collate, dataset), mapped=True))) > len(self.initial):
            logger.warning(
                "Functions that a stream of datasets maps, or is made from, draw from random generators of their own: "
                "a resumed run does not draw what the interrupted one would have drawn. Draw in the collator instead."
            )

    def __call__(self, batch: Any) -> Any:
        worker = get_worker_info() if self.stream else None
        number = (worker and worker.id, self.number) if self.stream else batch.number
        self.number += 1
        seed = self.place.key("batch", self.place.process, number)
        if not self.stream:
            self.tell_epoch()
        with self.place.prepares(seed):
            self.reseed(seed)
            return self.collate(batch if self.stream else _fetch(self.dataset, batch))

    def tell_epoch(self) -> None:
        """Tell the dataset the epoch, if it wants to know it: persistent workers would hear of the first alone."""
        epoch, tell = self.place.epoch, getattr(self.dataset, "set_epoch", None)
        if callable(tell) and self.place.apart and epoch != self.told:
            tell(epoch)
            self.told = epoch

    def reseed(self, seed: int) -> None:
        """Set the generators that collator, dataset and their functions own, by the states that they began with."""
        generators = self._generators()
        _reseed(generators, self.initial, self.place, seed)
        if self.place.apart and len(generators) > len(self.initial) and not self.warned:
            self.warned = True
            logger.warning(
                "The data are prepared with a random generator that was made while they are (%s): what a resumed run "
                "draws from it is not what the interrupted run would have drawn. Make it beforehand.",
                type(generators[-1]).__name__,
            )

    def _generators(self) -> list[Any]:
        return list(_owned((self.collate, self.dataset)))


class _Indices(Dataset):
    """A dataset that leaves it to `_Prepare` to fetch the samples of a batch."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> Sequence[int]:
        return indices

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return _delegate(self, "dataset", name)


class _Stream(IterableDataset):
    """A stream whose own draws are apart, and the same in every process, which may take turns at it."""

    def __init__(self, dataset: Any, prepare: _Prepare) -> None:
        self.dataset, self.prepare = dataset, prepare

    def __iter__(self) -> Iterator[Any]:
        self.prepare.number = 0
        self.prepare.tell_epoch()
        place, worker = self.prepare.place, get_worker_info()
        seed = place.key("stream", worker and worker.id)
        if place.epoch:  # as for the order
            self.prepare.reseed(seed)
        return place.iterate(self.dataset, seed)

    def __len__(self) -> int:
        return len(self.dataset)  # a TypeError, as without this method, if it has no length

    def __getattr__(self, name: str) -> Any:
        return _delegate(self, "dataset", name)


class _Numbers:
    """A batch sampler whose own draws are apart, and whose batches know their number in the epoch."""

    def __init__(self, sampler: Any, place: Place) -> None:
        self.inner, self.place = sampler, place
        self.initial = [_first_state(generator) for generator in _owned(sampler)]

    def __iter__(self) -> Iterator[_Batch]:
        seed = self.place.key("order")
        if self.place.epoch:  # in the first, its own generators are as they were made
            _reseed(_owned(self.inner), self.initial, self.place, seed)
        for number, indices in enumerate(self.place.iterate(self.inner, seed)):
            batch = _Batch(indices)
            batch.number = number
            yield batch

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return _delegate(self, "inner", name)


class _Batch(list[int]):
    """The indices of a batch."""

    number: int


def _delegate(wrapper: Any, inner: str, name: str) -> Any:
    if name.startswith("__") or inner not in vars(wrapper):  # while it is being unpickled
        raise AttributeError(name)
    return getattr(vars(wrapper)[inner], name)


def _fetch(dataset: Any, indices: Sequence[int]) -> Any:
    """Fetch samples as torch's loader does."""
    together = getattr(dataset, "__getitems__", None)
    return together(list(indices)) if together else [dataset[index] for index in indices]


def _get_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()


def _set_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(torch.from_numpy(state[2]))


@contextmanager
def _state(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators for a block, and put them back as they were."""
    outer = _get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which would seed every device
    try:
        yield
    finally:
        _set_state(outer)


def _owned(thing: Any, mapped: bool = False) -> Iterator[Any]:
    """Yield the random generators that an object or function holds, always in the same order; see `_held`."""
    parts = _held(thing, mapped=mapped)
    return (part for part in parts if isinstance(part, _GENERATORS) and all(part is not own for own in _OF_ALL))


def _held(thing: Any, depth: int = _DEPTH, seen: dict[int, Any] | None = None, mapped: bool = False) -> Iterator[Any]:
    """Yield an object, and the objects that it holds.

    Generators of the datasets library's streams are left out: what they draw depends on their seed and the epoch as
    it is. So are, unless `mapped`, the functions that the streams map or are made from: when the library calls them is
    not known, and generators that are set in between were seen to draw what no second run repeats.
    """
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # and alive, for its id to stay its own
    yield thing
    streams = type(thing).__module__.startswith("datasets.iterable_dataset")
    left_out = _NOT_SEARCHED
    if streams:
        left_out = (*left_out, *_GENERATORS, *(() if mapped else (FunctionType, MethodType, partial)))
    for part in _parts(thing) if depth else ():
        if not isinstance(part, left_out):
            yield from _held(part, depth - 1, seen, mapped)


def _parts(thing: Any) -> Iterable[Any]:
    if isinstance(thing, dict | list | tuple):
        parts = list(thing.values()) if isinstance(thing, dict) else thing
        return parts if len(parts) <= _WIDTH or isinstance(parts[0], (*_GENERATORS, Dataset)) else ()
    if isinstance(thing, partial):
        return (thing.func, thing.args, thing.keywords, vars(thing))
    if isinstance(thing, MethodType):
        return (thing.__self__, thing.__func__)
    if isinstance(thing, BuiltinMethodType):
        return (thing.__self__,) if isinstance(thing.__self__, _GENERATORS) else ()
    if isinstance(thing, GeneratorType):
        return thing.gi_frame.f_locals.values() if thing.gi_frame is not None else ()
    if isinstance(thing, FunctionType):
        return _used(thing)
    slots, shared = _of_class(type(thing))  # type: ignore[arg-type]  # a class is hashable
    return [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots), *shared]


@cache
def _of_class(kind: type) -> tuple[list[str], list[Any]]:
    """Return the names of a class's slots, and its generators and methods."""
    slots, generators = [], []
    for table in map(vars, kind.__mro__[:-1]):
        names = table.get("__slots__", ())
        slots += [names] if isinstance(names, str) else list(names)
        generators += [value for value in table.values() if isinstance(value, _GENERATORS)]
    methods = [getattr(kind, name, None) for name in _METHODS]
    return slots, generators + [method for method in methods if isinstance(method, FunctionType)]


def _used(function: FunctionType) -> Iterable[Any]:
    """Return what a function uses: variables around it, defaults, attributes; what it names, but of libraries."""
    used = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            used.append(cell.cell_contents)
    if _is_of_library(function.__module__):
        return used
    names = _named(function.__code__)
    for value in [function.__globals__[name] for name in names if name in function.__globals__]:
        if isinstance(value, ModuleType):
            own = () if _is_of_library(value.__name__) else names
            used += [vars(value)[name] for name in own if name in vars(value)]
        elif isinstance(value, _SEARCHED) or not _is_of_library(type(value).__module__):
            used.append(value)
    return used


def _named(code: CodeType) -> list[str]:
    """Return the names of globals and attributes in a function's code, and in that of functions within it."""
    return [
        *code.co_names,
        *(name for inner in code.co_consts if isinstance(inner, CodeType) for name in _named(inner)),
    ]


def _is_of_library(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in _LIBRARIES


def _first_state(generator: Any) -> str:
    """Return a hash of the state that a generator had when it was first seen: it stands for the user's own seed."""
    if id(generator) not in _first_states:
        _first_states[id(generator)] = (generator, _digest(_state_of(generator)))
    return _first_states[id(generator)][1]


_first_states: dict[int, tuple[Any, str]] = {}


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def _digest(state: Any) -> str:
    return hashlib.blake2b(pickle.dumps(state), digest_size=8).hexdigest()


def _reseed(generators: Iterable[Any], initial: Sequence[str], place: Place, seed: int) -> None:
    """Set generators by a seed and the states that they began with; where draws are not apart, warn of them."""
    for index, (generator, began) in enumerate(zip(generators, initial, strict=False)):
        if not place.apart:
            place.warn()
            return
        _seed(generator, place.key(seed, index, began))


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    else:
        generator.seed(seed % 2**32)
