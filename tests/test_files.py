"""Files and directories appear whole or not at all, whoever else writes there, and wherever they are."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import REPOSITORY

from hf_padam import files
from hf_padam.files import (
    LOCK,
    BusyError,
    WriteError,
    discard,
    locked,
    staged_directory,
    staged_new_directory,
    write_atomically,
)

WAYS = {"into": staged_directory, "as": staged_new_directory}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY / "hf_padam")}  # which spares importing the rest of it
WRITER = """
import sys
from files import staged_directory, staged_new_directory
way = {"into": staged_directory, "as": staged_new_directory}[sys.argv[1]]
with way(sys.argv[2]) as staging:
    (staging / "file").write_text("theirs")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other_writer(tmp_path):
    """Another process that is writing to `out`, in a way that the test names; it ends when told so."""
    started = []

    def start(way):
        command = [sys.executable, "-c", WRITER, way, str(tmp_path / "out")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=ENVIRONMENT, **pipes))
        assert started[0].stdout.readline() == "writing\n"
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("way", WAYS)
def test_a_second_writer_is_told_and_the_first_ones_files_come_out_whole(way, other_writer, tmp_path):
    writer = other_writer(way)
    with pytest.raises(BusyError, match="another process is writing there.*wait until it has ended"):
        with WAYS[way](tmp_path / "out"):
            pass
    writer.communicate("\n")
    assert writer.returncode == 0 and (tmp_path / "out" / "file").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("way", WAYS)
def test_a_writer_that_is_killed_holds_nothing_up_and_leaves_nothing_behind(way, other_writer, tmp_path):
    writer = other_writer(way)
    writer.kill()
    writer.wait()
    with WAYS[way](tmp_path / "out") as staging:
        (staging / "file").write_text("mine")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("way", WAYS)
def test_where_nothing_can_be_locked_writers_have_directories_of_their_own(way, tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with WAYS[way](tmp_path / "out") as first:
        (first / "file").write_text("first")
        with monkeypatch.context() as other:
            other.setattr("hf_padam.files._locked", {})  # as in another process
            with WAYS[way](tmp_path / "out") as second:
                assert second != first and not list(second.iterdir())
                (second / "file").write_text("second")
        assert (first / "file").read_text() == "first"
        if way == "as":
            (tmp_path / "out" / "file").unlink()  # else it is not empty
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["file"]


def test_a_lock_may_be_asked_for_again_by_its_holder_but_not_inherited_by_its_children(tmp_path):
    with locked(tmp_path) as alone, locked(tmp_path) as again:
        assert alone and again and os.listdir(tmp_path) == [LOCK]  # a file, whose locks other machines see
        child = os.fork()
        if not child:
            try:
                with locked(tmp_path):
                    os._exit(0)
            except BusyError:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    with locked(tmp_path) as alone:
        assert alone
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("way", [staged_directory, staged_new_directory])
def test_what_is_wrong_with_the_contents_is_not_blamed_on_the_disk(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^no such dtype$"), way("."):
        raise ValueError("no such dtype")


@pytest.mark.parametrize("mount", ["mount -t tmpfs tmpfs 'my disk'", "mount --bind elsewhere 'my disk'"])
@pytest.mark.parametrize("way", WAYS)
def test_an_empty_mount_point_is_written_to(way, mount, tmp_path):
    (tmp_path / "my disk").mkdir()
    (tmp_path / "elsewhere" / "lost+found").mkdir(parents=True)
    prefix = ["unshare", "-rm", "sh", "-c", f"{mount} && \"$@\" && cat 'my disk/file'", "sh"]
    try:
        permitted = not subprocess.run([*prefix[:-2], f"{mount}", "sh"], cwd=tmp_path, capture_output=True).returncode
    except FileNotFoundError:
        permitted = False
    if not permitted:
        pytest.skip("runs where a user may mount in a namespace of their own (unshare -rm)")
    command = [*prefix, sys.executable, "-c", WRITER, way, "my disk"]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, input="\n", capture_output=True, text=True)
    assert run.stdout == "writing\ntheirs", run.stderr


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_directories_is_good_enough(code, tmp_path, monkeypatch):
    fsync = os.fsync

    def of_files_only(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", of_files_only)
    for way in WAYS.values():
        with way(tmp_path / way.__name__) as staging:
            (staging / "file").touch()
    write_atomically(tmp_path / "file", "text")


def test_a_flush_that_fails_is_an_error(tmp_path, monkeypatch):
    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    for way in WAYS.values():
        with pytest.raises(WriteError, match="could not be written: .*Input/output error.*GB free"):
            with way(tmp_path / "out") as staging:
                (staging / "file").touch()
    assert not list(Path(tmp_path).rglob("file"))


def test_written_files_have_the_modes_of_any_other(tmp_path):
    (tmp_path / "usual").touch()
    write_atomically(tmp_path / "ours", "text")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("way", WAYS)
def test_a_second_thread_is_told_and_the_first_ones_files_come_out_whole(way, tmp_path):
    errors = []

    def write():
        try:
            with WAYS[way](tmp_path / "out"):
                pass
        except BusyError as error:
            errors.append(str(error))

    with WAYS[way](tmp_path / "out") as staging:
        (staging / "before").touch()
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        (staging / "after").touch()
    assert len(errors) == 1 and "another thread of this process is writing there" in errors[0]
    assert sorted(os.listdir(tmp_path / "out")) == ["after", "before"]


def test_a_link_stays_a_link_and_a_file_keeps_its_permissions(tmp_path):
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real", tmp_path / "link"
    real.touch(0o600)
    link.symlink_to(real)
    write_atomically(link, "text")
    assert link.is_symlink() and real.read_text() == "text" and stat.S_IMODE(real.stat().st_mode) == 0o600
    assert sorted(os.listdir(tmp_path)) == ["link", "there"] and os.listdir(tmp_path / "there") == ["real"]


def test_pipes_and_devices_are_written_to_and_not_replaced(tmp_path):
    pipe, null = tmp_path / "pipe", tmp_path / "null"
    os.mkfifo(pipe)
    null.symlink_to("/dev/null")
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "text")
    reader.join()
    write_atomically(null, "text")
    assert read == ["text"] and pipe.is_fifo() and null.is_symlink() and null.is_char_device()


@pytest.mark.parametrize("write", [*WAYS.values(), lambda path: write_atomically(path, "text")])
def test_a_place_that_cannot_be_is_a_clear_error(write, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="the directory .*file.* cannot be made"):
        with write(tmp_path / "file" / "below" / "out"):
            pass


@pytest.mark.parametrize("write", [*WAYS.values(), lambda path: write_atomically(path / "file", "text")])
def test_a_circle_of_links_is_a_clear_error(write, tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(WriteError, match="circle"):
        with contextlib.ExitStack() as stack:
            if (context := write(tmp_path / "circle")) is not None:
                stack.enter_context(context)


@pytest.mark.parametrize("replace", [False, True])
def test_the_working_directory_gets_its_files_and_stays_the_same_directory(replace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged_new_directory(".", replace) as staging:
        (staging / "file").write_text("ours")
    assert os.listdir(".") == ["file"]  # of the directory that was entered, not of one by its name
    with pytest.raises(FileExistsError, match="working directory"):
        with staged_new_directory(".", replace):
            pass


def test_what_was_replaced_does_not_come_back_if_its_deletion_is_interrupted(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for content in ("first", "second"):
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr("hf_padam.files.discard", killed if content == "second" else discard)
            with staged_new_directory(out, replace=True) as staging:
                (staging / "file").write_text(content)
    assert (out / "file").read_text() == "second"
    discard(out)  # as the user may do
    with staged_new_directory(out) as staging:
        (staging / "file").write_text("third")
    assert os.listdir(tmp_path) == ["out"] and (out / "file").read_text() == "third"


@pytest.mark.parametrize("replace", [False, True])
def test_what_a_killed_run_has_left_in_an_empty_directory_is_in_nobodys_way(replace, tmp_path):
    out = tmp_path / "out"
    (out / ".incomplete").mkdir(parents=True)
    (out / LOCK).touch()
    with staged_new_directory(out, replace=replace) as staging:
        (staging / "file").touch()
    assert os.listdir(out) == ["file"]


def test_the_lock_of_another_user_is_respected_and_left(tmp_path, monkeypatch):
    with locked(tmp_path):
        (tmp_path / LOCK).chmod(0o444)
        monkeypatch.setattr("hf_padam.files._locked", {})  # as in another process
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # as it is for whoever is not root
        with pytest.raises(BusyError), locked(tmp_path):
            pass
        assert os.listdir(tmp_path) == [LOCK]


def killed(directory):
    if directory.is_dir():
        raise KeyboardInterrupt


def test_an_interrupt_between_the_two_renames_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    rename = os.rename

    def interrupted(source, target):
        if str(target) == str(tmp_path / "out") and "incomplete" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_new_directory(tmp_path / "out", replace=True) as staging:
        (staging / "new").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_replaced_does_not_come_back_if_the_last_flush_is_interrupted(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def interrupted(path):
        if (tmp_path / "out" / "new").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "flush", interrupted)
    with pytest.raises(KeyboardInterrupt), staged_new_directory(tmp_path / "out", replace=True) as staging:
        (staging / "new").touch()
    shutil.rmtree(tmp_path / "out")
    with staged_new_directory(tmp_path / "out") as staging:
        (staging / "newer").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["newer"]
