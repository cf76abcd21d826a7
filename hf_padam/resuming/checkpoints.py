"""Checkpoints that outlive a kill at any moment: written whole or not at all, judged by what they hold, found again.

A checkpoint is written below `.incomplete`, flushed to the disk, and renamed to its place only then, with a file in it
that says so. Those that other code wrote in place, the plain Trainer for one, are judged by what their files hold.

Two questions are apart: whether a run can go on from it (`find_defect`), and whether it may be deleted once there are
newer ones (`is_whole`): one of `save_only_model` may, and one that may be of a save still under way may not.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..files import INCOMPLETE, BusyError, describe_disk, discard, flush, locked, publish, unshared

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
"""The file that a Trainer writes last."""

RUN_STATE = "run_state.json"
"""The file of what a Trainer's state lacks, see `resumable`."""

MARKER = "hf_padam_complete.json"
"""The file by which a checkpoint of ours says that it is whole: the files that a run needs, and their bytes."""

_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = {
    "model weights": (
        "model*.safetensors", "pytorch_model*", "adapter_model*", "*/adapter_model*", "global_step*"
    ),
    "optimizer": ("optimizer*", "latest"),  # DeepSpeed writes `latest` after its optimizer's files
    "schedule": ("scheduler*", "latest"),
    "random state": ("rng_state*", "random_states*"),
}  # fmt: skip
"""What a run needs to go on exactly, and the names that Trainer, accelerate, FSDP, DeepSpeed and PEFT give to it."""

_ALSO_USED = (RUN_STATE, "scaler*", "sampler*", "dl_state_dict*", "custom_checkpoint*")
"""What a run goes on from besides, if it has written it."""

_TORCH_FILE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|rng_state|random_states|custom_checkpoint|pytorch_model|adapter_model"
    r"|training_args|\w+_states).*\.(pt|pth|bin|pkl)"
)
KNOWN_JSON = re.compile(
    r"(config|generation_config|adapter_config|\w*processor_config|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab|\w+_state|.*\.index)\.json"
)
"""The files of these names hold JSON. Others may hold what their writer likes, a document a line for example."""

_SENTINEL = "checkpoint-is-incomplete.txt"  # of transformers' enable_jit_checkpoint


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written: the message says which, why, and what to do."""


def newest_checkpoint(directory: str | Path, state_file: str = TRAINER_STATE) -> Path | None:
    """Return the newest complete ``checkpoint-N`` of a directory, or None; warn about every one that is passed over.

    Args:
        directory: A run's output directory; it need not exist.
        state_file: The file that holds the run's progress; a checkpoint without it is incomplete.
    """
    found: Path | None = None
    left = [path for home in _leftovers(Path(directory)) for path in sorted(home.iterdir()) if path.is_dir()]
    for replaced in [path for path in left if path.name.startswith("replaced-")]:  # a kill between two renames
        original = Path(directory) / replaced.name.removeprefix("replaced-")
        if not original.exists():
            os.rename(replaced, original)
    for checkpoint in sorted(_checkpoints(Path(directory)), key=_step, reverse=True):
        defect = find_defect(checkpoint, state_file)
        if defect is None:
            found = checkpoint
            break
        logger.warning("%s is incomplete and passed over: %s. It is left as it is.", checkpoint, defect)
    for leftover in [path for path in left if path.exists()]:
        logger.warning("%s is what an interrupted save left; it is passed over, the next save clears it.", leftover)
    return found


def check_checkpoint(checkpoint: str | Path, state_file: str = TRAINER_STATE) -> Path:
    """Return the path of a checkpoint that was asked for by name.

    Raises:
        CheckpointError: If it is not a complete checkpoint.
    """
    checkpoint = Path(checkpoint)
    defect = find_defect(checkpoint, state_file) if checkpoint.is_dir() else "there is no such directory"
    if defect is not None:
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint: {defect}. Name another, or give `true` for the newest "
            "complete one in the output directory"
        )
    return checkpoint


def resolve_checkpoint(
    choice: str | bool | None, directory: str | Path, state_file: str = TRAINER_STATE
) -> Path | None:
    """Return the checkpoint that a run goes on from, the same on every process; None to start from the beginning.

    Args:
        choice: A checkpoint's path; True for the newest complete one, if there is one; None or False for none.
        directory: Where the newest is looked for.
        state_file: As for `newest_checkpoint`.

    Raises:
        CheckpointError: If the named checkpoint is not complete.
    """
    if isinstance(choice, str) and choice.lower() in ("true", "false"):  # from a command line
        choice = choice.lower() == "true"
    if choice and choice is not True:
        return check_checkpoint(choice, state_file)
    found: list[Path | None] = [None]
    if choice and PartialState().is_main_process:
        found = [newest_checkpoint(directory, state_file)]
        if found == [None]:
            logger.warning("%s has no complete checkpoint: training starts from the beginning.", directory)
    elif not choice and PartialState().is_main_process and _checkpoints(Path(directory)):
        newest = max(_checkpoints(Path(directory)), key=_step)
        logger.warning(
            "%s is of an earlier run, and would be taken for this one's when it is resumed: remove it, or give "
            "another output directory.",
            newest,
        )
    return broadcast_object_list(found)[0] if choice else None


def find_defect(checkpoint: Path, state_file: str = TRAINER_STATE, checksums: bool = True) -> str | None:
    """Say what keeps a run from going on from a checkpoint, naming the file; None if nothing does.

    Args:
        checkpoint: Its directory.
        state_file: As for `newest_checkpoint`.
        checksums: Whether to check, of a checkpoint that other code wrote, torch's checksums besides the lengths of
            torch's and safetensors' files, which reads all of them.
    """
    if (checkpoint / _SENTINEL).exists():
        return f"it holds {_SENTINEL}"
    for what, patterns in {"state of the run": (state_file,), **_NEEDED}.items():
        if not any(file for pattern in patterns for file in checkpoint.glob(pattern)):
            return f"it has no {what} ({patterns[0]})"
    files = sorted(checkpoint.rglob("*"))
    marker = checkpoint / MARKER
    if marker.is_file():
        try:
            sizes = {Path(name): int(size) for name, size in dict(json.loads(marker.read_bytes())).items()}
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            return f"{MARKER} cannot be read ({error})"
        for name, size in sizes.items():
            file = checkpoint / name
            read = str(name) in (state_file, RUN_STATE)  # below, where errors say what is wrong
            if not file.is_file() or (file.stat().st_size != size and not read):
                return f"{name} {'has not the size that it was written with' if file.exists() else 'is missing'}"
        files = [file for file in files if file.name in (state_file, RUN_STATE) and file.parent == checkpoint]
    for file in files:
        try:
            defect = None if file.is_dir() else _file_defect(file, checksums)
        except Exception as error:  # of a damaged file, parsers complain in every way
            defect = f"cannot be read ({error})"
        if defect is not None:
            return f"{file.relative_to(checkpoint)} {defect}"
    return None


def is_whole(checkpoint: Path, state_file: str = TRAINER_STATE) -> bool:
    """Whether all of a checkpoint is there that was to be written, be it enough to go on from or not."""
    return (checkpoint / MARKER).is_file() or find_defect(checkpoint, state_file, checksums=False) is None


def _mark(checkpoint: Path) -> None:
    """Write the marker."""
    patterns = [*(pattern for needed in _NEEDED.values() for pattern in needed), *_ALSO_USED]
    found = {file for pattern in patterns for match in checkpoint.glob(pattern) for file in (match, *match.rglob("*"))}
    sizes = {str(file.relative_to(checkpoint)): file.stat().st_size for file in sorted(found) if file.is_file()}
    (checkpoint / MARKER).write_text(json.dumps(sizes, indent=1))


def _file_defect(file: Path, checksums: bool) -> str | None:
    if file.suffix == ".safetensors":
        size = file.stat().st_size
        with open(file, "rb") as stream:
            header = json.loads(stream.read(min(size, int.from_bytes(stream.read(8), "little"))))
            start = stream.tell()
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        expected = start + max(ends, default=0)
        return None if size == expected else f"has {size:,} bytes where its header says {expected:,}"
    if KNOWN_JSON.fullmatch(file.name):
        content = json.loads(file.read_text(encoding="utf-8"))
        shards = set(content.get("weight_map", {}).values()) if file.name.endswith(".index.json") else set()
        missing = sorted(shard for shard in shards if not (file.parent / shard).is_file())
        return f"names {missing[0]}, which is missing" if missing else None
    if file.suffix == ".distcp":  # torch.distributed.checkpoint writes .metadata after all shards
        return None if (file.parent / ".metadata").is_file() else "has no .metadata beside it"
    if _TORCH_FILE.fullmatch(file.name):
        with open(file, "rb") as stream:
            if stream.read(1) == b"\x80":  # torch.save's format without an archive, which has no checksums
                return None
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip() if checksums else None
        return f"is damaged: the checksum of {damaged} is wrong" if damaged else None
    return None


@contextmanager
def loading(checkpoint: str | Path) -> Iterator[None]:
    """Say, where a checkpoint is loaded, that its weights are of another model or its parameter groups others.

    Raises:
        CheckpointError: In place of torch's error.
    """
    try:
        yield
    except ValueError as error:
        if "parameter group" not in str(error):
            raise
        raise CheckpointError(
            f"the optimizer's state in {checkpoint} is of other parameter groups: {error}. Give target_scope, "
            "target_sparsity and what chooses the weights that decay (decay_embeddings, dense_modules, "
            "optim_target_modules) as they were, or start a new run with its weights as the model"
        ) from error
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise CheckpointError(
            f"{checkpoint} is of another model: {error}\nGive the model that the run began with, or start a new run "
            "in another directory"
        ) from error


@contextmanager
def claimed(directory: str | Path) -> Iterator[bool]:
    """Let no other run write checkpoints into a directory meanwhile. Every process of this one enters and leaves.

    Yields:
        Whether that is certain; see `locked`.

    Raises:
        CheckpointError: If another run has it.
    """
    outcome: list[bool | str] = [False]
    with ExitStack() as stack:
        if PartialState().is_main_process:
            Path(directory).mkdir(parents=True, exist_ok=True)
            try:
                outcome = [stack.enter_context(locked(directory))]
            except BusyError as error:
                outcome = [str(error)]
        alone = broadcast_object_list(outcome)[0]
        if isinstance(alone, str):
            raise CheckpointError(f"{directory} cannot hold this run's checkpoints: {alone}")
        yield alone


@contextmanager
def staged_checkpoint(checkpoint: str | Path) -> Iterator[Path]:
    """Yield the directory to write a checkpoint into; when the block is left, flush it and rename it to `checkpoint`.

    Every process enters and leaves together, each having written its part. A checkpoint that is there already is
    replaced.

    Raises:
        CheckpointError: If it could not be written, for want of space for example. What there was is untouched.
    """
    checkpoint = Path(checkpoint)
    processes = PartialState()
    with claimed(checkpoint.parent) as alone:
        home = broadcast_object_list([unshared(checkpoint.parent / INCOMPLETE, alone)])[0]
        if processes.is_local_main_process:
            for leftover in _leftovers(checkpoint.parent) if alone else ():
                discard(leftover)
        processes.wait_for_everyone()
        publishes = _publishes(home)
        try:
            yield home / checkpoint.name
            processes.wait_for_everyone()
            with processes.main_process_first():
                if publishes and (home / checkpoint.name).is_dir():
                    _publish(home / checkpoint.name, checkpoint)
        except Exception as error:  # safetensors, torch and the system tell a full disk in ways of their own
            message = (
                f"{checkpoint} could not be saved: {error}. {describe_disk(checkpoint.parent)}. Earlier checkpoints "
                "are untouched: make room or mend the disk, then resume from the newest with "
                "--resume_from_checkpoint true"
            )
            if processes.is_local_main_process:
                discard(home)
            raise CheckpointError(message) from error


def _publishes(home: Path) -> bool:
    """Whether this process publishes what is written in a directory: one on each file system that nodes do not share.

    The main one leaves a file of a name that no node can have in its cache, as one could the checkpoint's directory.
    """
    processes = PartialState()
    mark = home / broadcast_object_list([f"main-{secrets.token_hex(8)}"])[0]
    if processes.is_main_process:
        with suppress(OSError):  # writing the checkpoint will say so
            home.mkdir(parents=True, exist_ok=True)
            mark.touch()
    processes.wait_for_everyone()
    return processes.is_main_process or (processes.is_local_main_process and not mark.exists())


def _publish(staging: Path, checkpoint: Path) -> None:
    _mark(staging)
    if checkpoint.exists():
        logger.warning("%s is replaced by a new one of the same step.", checkpoint)
    publish(staging, checkpoint, staging.with_name(f"replaced-{checkpoint.name}"))
    flush(checkpoint.parent)
    discard(staging.parent)


def _leftovers(directory: Path) -> list[Path]:
    """Return the directories of what is being written to a run's directory, or a kill has left half-written there."""
    return sorted(directory.glob(f"{INCOMPLETE}*"))


def rotate_checkpoints(
    newest: Path, limit: int | None, best: str | Path | None = None, state_file: str = TRAINER_STATE
) -> None:
    """Delete the oldest checkpoints beside `newest` beyond `limit`. Half-written ones neither count nor are deleted.

    Args:
        newest: The checkpoint just written, which is kept.
        limit: How many to keep, `newest` and `best` included; None or 0 for all.
        best: Another one to keep.
        state_file: As for `newest_checkpoint`.
    """
    kept = {path.resolve() for path in (newest, Path(best or newest))}
    others = [c for c in _checkpoints(newest.parent) if c.resolve() not in kept]
    others = [c for c in others if is_whole(c, state_file)]
    others.sort(key=lambda c: (int(c.stat().st_mtime), _step(c)))  # by time: steps of an earlier run may be higher
    surplus = len(others) + len(kept) - limit if limit else 0
    for checkpoint in others[: max(surplus, 0)]:
        # Renamed first: a kill while deleting must not leave half of it under its name.
        trash = unshared(newest.parent / INCOMPLETE, alone=False)
        trash.mkdir()
        os.rename(checkpoint, trash / checkpoint.name)
        discard(trash)


def _checkpoints(directory: Path) -> list[Path]:
    return [path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
