"""Work through jobs in threads, in order, without holding many results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


def in_order(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Call a function for every job, in as many threads as torch uses, and yield what it returns, in order.

    Only a few results are held at a time, however slowly they are taken. In these threads torch does not start more of
    its own: they would wait for each other after every operation.
    """
    workers = torch.get_num_threads()
    pending: deque[Future] = deque()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for job in jobs:
                pending.append(pool.submit(function, *job))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(workers)  # threads that start later take the number that was set last
