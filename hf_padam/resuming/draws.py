"""Let what the preparation of data draws depend on a batch's place in the run alone, so that a resumed run repeats it.

Collators that mask, datasets that crop, samplers that shuffle draw from Python's, NumPy's or torch's generator, or
from one of their own; in this process, which fetches a batch ahead, or in worker processes, whose states nobody sees.
No checkpoint could hold all that. So the state in which a batch is prepared is set from the seed, the epoch, the
process and the batch's number, and the model's own draws (dropout) are kept apart from it.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from .generators import digest, first_state, held, owned, set_seed

logger = logging.getLogger(__name__)


class Place:
    """Where a run is in its data, as far as the processes that prepare it must know.

    Args:
        seed: The run's.
        process: The index of this process.
        apart: Whether preparation gets states of its own; else it is only watched, and a draw warned of.
    """

    def __init__(self, seed: int, process: int, apart: bool = True) -> None:
        self.seed, self.process, self.apart = seed, process, apart
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()  # workers may outlive an epoch
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
            with seeded(seed):
                yield
            return
        before = digest(_get_state())
        yield
        if digest(_get_state()) != before:
            self.warn()

    def iterate(self, iterable: Iterable[Any], seed: int) -> Iterator[Any]:
        """Iterate in a state of its own: what is drawn between two items does not disturb it, nor it that."""
        iterator = None
        with seeded(seed):
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
        generator = torch.Generator(torch.get_default_device())  # where the loader draws their seed
        vars(base).update(generator=generator.manual_seed(place.key("workers")))


def are_settled(loader: Any) -> bool:
    """Whether `settle_draws` has changed a loader."""
    return isinstance(getattr(loader, "collate_fn", None), _Prepare)


class _Prepare:
    """The `collate_fn`: fetch the samples of a batch too, if they are not a stream's, and collate them."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], place: Place, stream: bool) -> None:
        self.dataset, self.collate, self.place, self.stream = dataset, collate, place, stream
        self.number = 0  # of a stream's next batch in this epoch, in this worker
        self.warned, self.told = False, -1
        for part in list(held(collate)):  # Transformers' collators make theirs in each worker otherwise
            if hasattr(part, "create_rng") and part.seed is not None and part.generator is None:
                part.create_rng()
        self.initial = [first_state(generator) for generator in self._generators()]
        if stream and place.apart and len(list(owned((collate, dataset), mapped=True))) > len(self.initial):
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
            if not self.stream:  # fetch the samples, as torch's loader does
                together = getattr(self.dataset, "__getitems__", None)
                batch = together(list(batch)) if together else [self.dataset[index] for index in batch]
            return self.collate(batch)

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
        return list(owned((self.collate, self.dataset)))


class _Wrapper:
    """Has the length, and all else that it lacks itself, of what it wraps."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)  # a TypeError, as without this method, if it has no length

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


class _Indices(_Wrapper, Dataset):
    """A dataset that leaves it to `_Prepare` to fetch the samples of a batch."""

    def __getitems__(self, indices: Sequence[int]) -> Sequence[int]:
        return indices

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


class _Stream(_Wrapper, IterableDataset):
    """A stream whose own draws are apart, and the same in every process, which may take turns at it."""

    def __init__(self, dataset: Any, prepare: _Prepare) -> None:
        super().__init__(dataset)
        self.prepare = prepare

    def __iter__(self) -> Iterator[Any]:
        self.prepare.number = 0
        self.prepare.tell_epoch()
        place, worker = self.prepare.place, get_worker_info()
        seed = place.key("stream", worker and worker.id)
        if place.epoch:  # as for the order
            self.prepare.reseed(seed)
        return place.iterate(self.inner, seed)


class _Numbers(_Wrapper):
    """A batch sampler whose own draws are apart, and whose batches know their number in the epoch."""

    def __init__(self, sampler: Any, place: Place) -> None:
        super().__init__(sampler)
        self.place = place
        self.initial = [first_state(generator) for generator in owned(sampler)]

    def __iter__(self) -> Iterator[_Batch]:
        seed = self.place.key("order")
        part = self.inner
        while part is not None:  # behind a sampler that skips, accelerate does not find the one that is to know
            getattr(part, "set_epoch", lambda epoch: None)(self.place.epoch)
            inner = getattr(part, "batch_sampler", None)
            part = getattr(part, "sampler", None) if inner is None else inner
        if self.place.epoch:  # in the first, its own generators are as they were made
            _reseed(owned(self.inner), self.initial, self.place, seed)
        for number, indices in enumerate(self.place.iterate(self.inner, seed)):
            batch = _Batch(indices)
            batch.number = number
            yield batch


class _Batch(list[int]):
    """The indices of a batch."""

    number: int


def _get_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()


def _set_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(torch.from_numpy(state[2]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators for a block, and put them back as they were."""
    outer = _get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which would seed every device
    try:
        yield
    finally:
        _set_state(outer)


def _reseed(generators: Iterable[Any], initial: Sequence[str], place: Place, seed: int) -> None:
    """Set generators by a seed and the states that they began with; where draws are not apart, warn of them."""
    for index, (generator, began) in enumerate(zip(generators, initial, strict=False)):
        if not place.apart:
            place.warn()
            return
        set_seed(generator, place.key(seed, index, began))
