"""Write files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INCOMPLETE = ".incomplete"
"""The directory, in a run's output directory, of what is being written and has not been renamed to its place yet."""


class WriteError(OSError):
    """A file could not be written: the message says which, why, and how full its disk is."""


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
    except OSError as error:
        raise WriteError(f"{path} could not be written: {error}. {describe_disk(path.parent)}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_directory(directory: str | Path, last: str | None = None) -> Iterator[Path]:
    """Yield a temporary directory inside `directory`; rename its files into `directory` if the block succeeds.

    Args:
        directory: Where the files go; created if missing.
        last: Name of the file to move last: the one whose presence tells readers that the rest is there.

    Raises:
        WriteError: If the files could not be written, for want of space for example.
    """
    directory = Path(directory)
    temporary = directory / INCOMPLETE
    discard(temporary)  # what a kill has left
    temporary.mkdir(parents=True)
    try:
        yield temporary
        flush_tree(temporary)
        for file in sorted(temporary.iterdir(), key=lambda f: (f.name == last, f.name)):
            target = directory / file.name
            if file.is_dir() and target.is_dir():
                shutil.rmtree(target)
            os.replace(file, target)
    except Exception as error:
        raise WriteError(f"{directory} could not be written: {error}. {describe_disk(directory)}") from error
    finally:
        discard(temporary)


@contextmanager
def staged_new_directory(directory: str | Path, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden directory beside `directory`; rename it to `directory` if the block succeeds.

    A kill leaves what was there, and what it leaves beside that is deleted by the next attempt. (Between two renames
    nothing is there for a moment; a kill then is mended by the next attempt.)

    Args:
        directory: What is to appear, whole. It may exist if it is empty, or if `replace` is set.
        replace: Whether to put it in the place of what is there.

    Raises:
        FileExistsError: If there is something already.
        WriteError: If it could not be written, for want of space for example. What was there is untouched.
    """
    directory = Path(directory).resolve()  # of a link, what it leads to
    temporary = directory.with_name(f".{directory.name}{INCOMPLETE}")
    replaced = directory.with_name(f".{directory.name}.replaced")
    if replaced.exists() and not directory.exists():  # a kill between the two renames below
        os.rename(replaced, directory)
    if not replace and directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists already: name another directory, or delete that one first")
    discard(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        flush_tree(temporary)
        if replace and directory.exists():
            discard(replaced)
            os.rename(directory, replaced)
        try:
            os.rename(temporary, directory)
        except OSError:
            if replaced.exists():
                os.rename(replaced, directory)
            raise
        flush_directory(directory.parent)
        discard(replaced)
    except OSError as error:
        raise WriteError(f"{directory} could not be written: {error}. {describe_disk(directory.parent)}") from error
    finally:
        discard(temporary)


def discard(directory: Path) -> None:
    """Delete a directory of temporary files, if it is there."""
    shutil.rmtree(directory, ignore_errors=True)


def flush_tree(directory: Path) -> None:
    """Make sure that a directory and all it holds is on the disk."""
    for path in [*directory.rglob("*"), directory]:
        flush_directory(path)


def flush_directory(path: Path) -> None:
    """Make sure that a directory's entries, or a file's contents, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe_disk(directory: Path) -> str:
    """Name the disk that holds a directory, and its free space."""
    mount = directory.resolve()
    while not mount.is_mount():
        mount = mount.parent
    usage = shutil.disk_usage(mount)
    return f"The disk at {mount} has {usage.free / 1e9:.3f} of {usage.total / 1e9:.3f} GB free"


def _umask() -> int:
    """Return the process's umask: mkstemp makes files private, and the rename would keep them so."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
