"""Stop at the end of a step when a cluster's scheduler sends SIGTERM."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import torch
from accelerate import PartialState
from accelerate.utils import reduce

EXIT_STATUS = 128 + signal.SIGTERM
"""143, as a shell reports of a process that SIGTERM ended; not 0, which would say that the run is done."""


class StopSignal:
    """While the context is entered, SIGTERM is remembered instead of ending the process.

        with StopSignal() as stop:
            for batch in loader:
                ...  # a step
                if stop.agreed():
                    ...  # save a checkpoint
                    sys.exit(EXIT_STATUS)

    A handler that the program has installed itself is left alone, and outside the main thread nothing is done.
    SIGINT keeps its meaning: Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self._received = self._installed = False

    def __enter__(self) -> StopSignal:
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

    def agreed(self) -> bool:
        """Whether any process has had a SIGTERM. Every process must ask after the same step, and all hear the same."""
        processes = PartialState()
        if processes.num_processes == 1:
            return self._received
        received = torch.tensor(int(self._received), device=processes.device)
        return bool(reduce(received, reduction="sum").item())
