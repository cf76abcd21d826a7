"""Let the processes that a script starts by multiprocessing know "padam", where `hf-padam run` runs the script.

A forked process inherits the registration. One that is spawned (by `torch.multiprocessing`, a process pool, the
workers of a DataLoader) starts a new Python, which knows only what its parent prepares it with: a pickled dictionary,
read before anything else. An entry of ours, which is not used further, imports this package when it is read.
"""

from __future__ import annotations

from multiprocessing import spawn
from typing import Any

_get_preparation_data = spawn.get_preparation_data


class _Registers:
    """Unpickled as a call of `register_in_children`, so that the children of children know the name too."""

    def __reduce__(self) -> tuple[Any, ...]:
        return register_in_children, ()


def register_in_children() -> None:
    """Make every process that this one spawns import this package; and every Trainer say what decays."""
    from .announcement import DecayAnnouncement
    from .registration import add_callback_to_every_trainer

    add_callback_to_every_trainer(DecayAnnouncement)
    spawn.get_preparation_data = lambda name: {**_get_preparation_data(name), "hf_padam": _Registers()}
