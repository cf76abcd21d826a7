"""Write files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "_hf_padam.lock"
"""Of a directory. The Hub gets no files of such names from a Trainer."""

INCOMPLETE = ".incomplete"
"""The directory, in a run's output directory, of what is being written and has not been renamed to its place yet."""


_UMASK = os.umask(0)  # asking for it sets it, for every thread: once, before there are any
os.umask(_UMASK)


class WriteError(OSError):
    """A file could not be written: the message says which, why, and how full its disk is."""


class BusyError(WriteError):
    """Another process, or another thread of this one, is writing there."""


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Write a file beside its destination, flush it to disk, then rename it there.

    What is no file, but a pipe or one of the devices that /dev names, is written to.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    if _is_device(path):
        with _explained(path):
            path.write_bytes(data)
        return
    with staged(path) as temporary:
        temporary.write_bytes(data)
        flush(temporary)


@contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, of the same suffix; rename it there if the block succeeds.

    A link stays one: what it leads to is replaced. A file keeps its permissions.
    """
    path = Path(path)
    target = real(path) if path.is_symlink() else path
    _make_directory(target.parent)
    with _explained(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _explained(path):
            yield temporary
            # mkstemp makes files private, and the rename would keep them so.
            mode = stat.S_IMODE(target.stat().st_mode) if target.is_file() else 0o666 & ~_UMASK
            with suppress(PermissionError):  # on a file system without modes
                os.chmod(temporary, mode)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def real(path: str | Path) -> Path:
    """Return what a path leads to. A circle of links leads nowhere and stays: `resolve` would raise a RuntimeError."""
    return Path(os.path.realpath(path))


def _is_device(path: Path) -> bool:
    """Whether a path names a pipe, a terminal or the like, in whose place no file may be put."""
    if path.parts[:2] == ("/", "dev") and path.parts[2:3] != ("shm",):  # /dev/stdout, which may be a file
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"the directory {directory} cannot be made: {error}") from error


@contextmanager
def locked(path: str | Path) -> Iterator[bool]:
    """Let nobody else who asks for the same lock run the block meanwhile; this thread may ask again inside.

    Args:
        path: A directory, in which a file is made for it; or that file. It is deleted afterwards. A process that is
            killed holds no lock, whatever file it leaves.

    Yields:
        Whether that is certain: some network file systems have no locks.

    Raises:
        BusyError: If another process holds the lock, or another thread.
    """
    path = real(path)
    if path in _locked:
        handle, thread = _locked[path]
        if thread != threading.get_ident():
            raise BusyError(_BUSY.format("another thread of this process", path))
        yield handle is not None
        return
    handle = _lock(path)
    _locked[path] = handle, threading.get_ident()
    try:
        yield handle is not None
    finally:
        if path in _locked:  # which it is not in a forked process
            del _locked[path]
            if handle is not None:
                with suppress(OSError):  # another user's
                    _lock_file(path).unlink(missing_ok=True)
                os.close(handle)


_locked: dict[Path, tuple[int | None, int]] = {}
"""The locks that this process holds: their handles, None where there are none, and their threads."""

_BUSY = "{} is writing there, which holds the lock on {}: wait until it has ended, or give another directory"


def _leave_locks() -> None:
    """Keep a forked process, one that loads data for example, from holding its parent's locks beyond its death."""
    for handle, _ in _locked.values():
        if handle is not None:
            os.close(handle)
    _locked.clear()


os.register_at_fork(after_in_child=_leave_locks)


def _lock_file(path: Path) -> Path:
    """Return the file to lock: of network file systems, other machines do not see the locks on directories."""
    return path / LOCK if path.is_dir() else path


def _lock(path: Path) -> int | None:
    """Lock a file or directory and return its handle; None where there are no locks."""
    file = _lock_file(path)
    while True:
        try:
            mode = os.O_RDWR if os.access(file, os.W_OK) or not file.exists() else os.O_RDONLY  # another user's
            handle = os.open(file, mode | os.O_CREAT, 0o666)  # NFS refuses locks to those who may only read
        except OSError:  # in a directory that cannot be written to; whoever writes will say so
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
            os.close(handle)  # its holder has deleted it since
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                if mode == os.O_RDWR:  # for nothing, then
                    file.unlink(missing_ok=True)
                return None
            raise BusyError(_BUSY.format("another process", path)) from None


def unshared(path: Path, alone: bool) -> Path:
    """Return a path that no other process uses: itself where this one is `alone`, else one with a random ending."""
    return path if alone else path.with_name(f"{path.name}-{secrets.token_hex(4)}")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield an empty directory, which is deleted afterwards."""
    discard(path)  # what a kill has left
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        discard(path)


@contextmanager
def staged_directory(directory: str | Path, last: str | None = None) -> Iterator[Path]:
    """Yield a temporary directory inside `directory`; rename its files into `directory` if the block succeeds.

    Args:
        directory: Where the files go; created if missing.
        last: Name of the file to move last: the one whose presence tells readers that the rest is there.

    Raises:
        BusyError: If another process is writing there.
        WriteError: If the files could not be written, for want of space for example.
    """
    directory = Path(directory)
    _make_directory(directory)
    with locked(directory) as alone, _explained(directory, Exception):
        with _temporary(unshared(directory / INCOMPLETE, alone)) as temporary:
            yield temporary
            flush_tree(temporary)
            for file in sorted(temporary.iterdir(), key=lambda f: (f.name == last, f.name)):
                target = directory / file.name
                if file.is_dir() and target.is_dir():
                    shutil.rmtree(target)
                os.replace(file, target)


@contextmanager
def staged_new_directory(directory: str | Path, replace: bool = False, last: str | None = None) -> Iterator[Path]:
    """Yield a hidden directory beside `directory`; rename it to `directory` if the block succeeds.

    A kill leaves what was there, and what it leaves beside that is deleted by the next attempt. (Between two renames
    nothing is there for a moment; a kill then is mended by the next attempt.) What cannot be renamed, a mount point,
    the working directory, or one in a directory that this user may not write to, must be empty, and gets its files one
    by one.

    Args:
        directory: What is to appear, whole. It may exist if it is empty, or if `replace` is set.
        replace: Whether to put it in the place of what is there.
        last: See `staged_directory`, for what cannot be renamed.

    Raises:
        FileExistsError: If there is something already.
        BusyError: If another process is writing there.
        WriteError: If it could not be written, for want of space for example. What was there is untouched.
    """
    directory = real(directory)
    if directory.is_dir() and _is_fixed(directory):
        if not is_free(directory):
            raise FileExistsError(
                f"{directory} cannot be replaced as a whole (a mount point, or the working directory?): empty it first"
            )
        with staged_directory(directory, last) as temporary:
            yield temporary
        return
    hidden = directory.with_name(f".{directory.name}")
    replaced = Path(f"{hidden}.replaced")
    _make_directory(directory.parent)
    with _explained(directory), locked(f"{hidden}.lock") as alone:
        if replaced.exists() and not directory.exists():  # a kill between the two renames below
            os.rename(replaced, directory)
        if not replace and not is_free(directory):
            raise FileExistsError(f"{directory} exists already: name another directory, or delete that one first")
        with _temporary(unshared(Path(f"{hidden}{INCOMPLETE}"), alone)) as temporary:
            yield temporary
            publish(temporary, directory, replaced)
            if replaced.exists():  # deleted in a moment: neither it nor half of it is to come back after a kill
                os.rename(replaced, temporary)
            flush(directory.parent)


def publish(temporary: Path, directory: Path, replaced: Path) -> None:
    """Rename a directory to its place, once it is on the disk; the caller flushes the place.

    What is there goes to `replaced`, or stays; its permissions are the new one's.
    """
    flush_tree(temporary)
    if directory.exists():
        there = directory.stat()
        with suppress(PermissionError):  # a file system without them, or another's group
            os.chmod(temporary, stat.S_IMODE(there.st_mode))
            os.chown(temporary, -1, there.st_gid)
            os.chmod(temporary, stat.S_IMODE(there.st_mode))  # which a new group takes some of away
    if directory.is_dir() and is_free(directory):  # renamed over
        (directory / LOCK).unlink(missing_ok=True)
        discard(directory / INCOMPLETE)
    elif directory.exists():
        discard(replaced)
        os.rename(directory, replaced)
    try:
        os.rename(temporary, directory)
    except BaseException:
        if replaced.exists() and not directory.exists():
            os.rename(replaced, directory)
        raise


def is_free(directory: Path) -> bool:
    """Whether nothing is there, or an empty directory. What a new file system holds by itself does not count."""
    if not directory.exists():
        return True
    return directory.is_dir() and all(path.name in (INCOMPLETE, LOCK, "lost+found") for path in directory.iterdir())


def _is_fixed(directory: Path) -> bool:
    """Whether a directory cannot be renamed, or would be gone for whoever works in it."""
    mounts = Path("/proc/self/mountinfo")  # of a bind mount from the same disk, nothing else knows
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    # Spaces and the like are written as \040.
    names = [re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in lines]
    fixed = directory.is_mount() or str(directory) in names or not os.access(directory.parent, os.W_OK)
    return fixed or os.path.samefile(directory, ".")


@contextmanager
def _explained(path: Path, kind: type[Exception] = OSError) -> Iterator[None]:
    """Say of an error what could not be written, and how full its disk is."""
    try:
        yield
    except (BusyError, FileExistsError, ValueError):  # what is written is at fault
        raise
    except kind as error:
        raise WriteError(f"{path} could not be written: {error}. {describe_disk(path.parent)}") from error


def discard(directory: Path) -> None:
    """Delete a directory of temporary files, if it is there."""
    shutil.rmtree(directory, ignore_errors=True)


def flush_tree(directory: Path) -> None:
    """Make sure that a directory and all it holds is on the disk."""
    for path in [*directory.rglob("*"), directory]:
        flush(path)


def flush(path: Path) -> None:
    """Make sure that a file's contents are on the disk, or a directory's entries where its file system can tell."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS)):
            raise
    finally:
        os.close(handle)


def describe_disk(directory: Path) -> str:
    """Name the disk that holds a directory, and its free space."""
    mount = real(directory)
    while not mount.is_mount():
        mount = mount.parent
    usage = shutil.disk_usage(mount)
    return f"The disk at {mount} has {usage.free / 1e9:.3f} of {usage.total / 1e9:.3f} GB free"
