"""Write files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file beside its destination, flush it to disk, then rename it there."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with staged(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, of the same suffix; rename it there if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_directory(directory: str | Path, last: str | None = None) -> Iterator[Path]:
    """Yield a temporary directory inside `directory`; rename its files into `directory` if the block succeeds.

    Args:
        directory: Where the files go; created if missing.
        last: Name of the file to move last: the one whose presence tells readers that the rest is there.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=directory) as name:
        temporary = Path(name)
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda f: (f.name == last, f.name)):
            target = directory / file.name
            if file.is_dir() and target.is_dir():
                shutil.rmtree(target)
            os.replace(file, target)


def _umask() -> int:
    """Return the process's umask: mkstemp makes files private, and the rename would keep them so."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
