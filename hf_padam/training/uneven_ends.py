"""How many rows of a batch count, where accelerate fills up the last ones so that all processes have equal shares."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import DataLoader, IterableDataset

_KEY = "rows_that_count"


def rows_that_count(inputs: Any, labels: Any, accelerator: Accelerator) -> int | None:
    """Return how many of this process's rows are not repeated from the beginning of the data; they come first.

    None if that is not known: sequences are joined in one row (`DataCollatorWithFlattening`).

    Args:
        inputs: The batch; what `marking_repeated_rows` has added to it is removed.
        labels: Its labels, one row each; or None.
        accelerator: Knows whether it is the last batch, and how many rows are left for it.
    """
    batch_size = 0 if labels is None else len(labels)
    marked = inputs.pop(_KEY, None)
    if marked is not None:
        return marked
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return batch_size
    loader, processes = state.active_dataloader, accelerator.num_processes
    joined = batch_size == 1 and getattr(loader, "total_batch_size", 0) > processes and "position_ids" in inputs
    if joined and processes > 1 and not isinstance(loader, DataLoaderDispatcher):  # whose last batches are smaller
        return None
    sampler = getattr(loader, "batch_sampler", None)
    share = getattr(sampler, "process_index", accelerator.process_index)  # processes that share a batch share this too
    return max(0, min(batch_size, state.remainder - share * batch_size))


@contextlib.contextmanager
def marking_repeated_rows(loader: DataLoader) -> Iterator[None]:
    """Have the batches of a stream that every process reads whole say how many of their rows count.

    The length of a stream is not known to accelerate, which therefore cannot say; with ``dispatch_batches=True`` it
    can, and nothing is changed.
    """
    shard, base = getattr(loader, "dataset", None), getattr(loader, "base_dataloader", loader)
    if not isinstance(shard, IterableDatasetShard) or isinstance(shard.dataset, _Marked):
        yield
        return
    marked = _Marked(shard, base.collate_fn)
    rows, collate = shard.dataset, base.collate_fn
    shard.dataset, base.collate_fn = marked, marked.collate
    try:
        yield
    finally:
        shard.dataset, base.collate_fn = rows, collate


class _Marked(IterableDataset):
    """A stream that counts its rows, and collates them with what the count says. Each worker has one of its own."""

    def __init__(self, shard: IterableDatasetShard, collate: Callable[[list[Any]], Any]) -> None:
        self._rows, self._collate = shard.dataset, collate
        self._index = shard.process_index
        self._share = shard.batch_size // shard.num_processes if shard.split_batches else shard.batch_size
        self._total = self._share * shard.num_processes
        self._seen = self._batches = 0

    def __iter__(self) -> Iterator[Any]:
        self._seen = self._batches = 0
        for row in self._rows:
            self._seen += 1
            yield row

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self._rows, name)  # set_epoch, generator

    def collate(self, rows: list[Any]) -> Any:
        """Collate a batch; by now the stream is read as far as the batches of all processes reach."""
        batch = self._collate(rows)
        start = self._batches * self._total + self._index * self._share
        self._batches += 1
        if isinstance(batch, MutableMapping):
            batch[_KEY] = max(0, min(len(rows), self._seen - start))
        return batch
