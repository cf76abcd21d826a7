"""Stop at the end of a step when a cluster's scheduler sends SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

import torch
from accelerate import PartialState
from accelerate.utils import reduce

EXIT_STATUS = 128 + signal.SIGTERM
"""143, as a shell reports of a process that SIGTERM ended; not 0, which would say that the run is done."""

MOST_STEPS, SECONDS = 10, 1.0
"""Several processes agree after so many steps, or fewer that take so long together; after each step that is longer.

To agree, the host waits for the device. That is nothing beside a long step, and rare among short ones.
"""


class StopSignal:
    """While the context is entered, SIGTERM is remembered instead of ending the process.

        with StopSignal() as stop:
            for batch in loader:
                ...  # a step
                if stop.agreed(last=...):
                    ...  # save a checkpoint
                    sys.exit(EXIT_STATUS)

    A process alone stops after the step in which the signal comes. Several agree to stop after the same step: at most
    `MOST_STEPS` later, and within about `SECONDS`, or one step where steps are longer.

    A handler that the program has installed itself is left alone, and outside the main thread nothing is done. Forked
    processes end by it as ever.
    SIGINT keeps its meaning: Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self._received = self._agreed = self._installed = False

    def __enter__(self) -> StopSignal:
        self._began, self._steps, self._interval = time.monotonic(), 0, 1  # since the last agreement; to the next
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._remember)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._installed = False
            if self._received and error is None:  # it came after the last step: what it asked for is due now
                signal.raise_signal(signal.SIGTERM)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self, last: bool = False) -> bool:
        """Whether to stop now: the processes have agreed that one of them has had a SIGTERM.

        Every process must ask after every step, and all hear the same.

        Args:
            last: Whether no other step follows, so that now is the time to agree.
        """
        processes = PartialState()
        if processes.num_processes == 1 or self._agreed:
            return self._received
        self._steps += 1
        if self._steps < self._interval and not last:
            return False
        now = time.monotonic()
        mine = torch.tensor([float(self._received), (now - self._began) / self._steps], device=processes.device)
        share, pace = reduce(mine, reduction="mean").tolist()  # of processes; seconds a step
        self._began, self._steps = now, 0
        self._interval = max(1, int(min(MOST_STEPS, SECONDS / max(pace, 1e-9))))
        self._agreed = self._received = share > 0
        return self._agreed


def _spare_forked_processes() -> None:
    if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), StopSignal):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_spare_forked_processes)
