"""Whether a model's directory is whole and intact: all that is wrong with it, not only the first thing.

Of a compressed model every byte of the weights, config.json and the index has a checksum. Of a standard one there are
none: its headers, sizes and names are compared with each other, and a flipped bit of a weight goes unnoticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..resuming.checkpoints import KNOWN_JSON
from .hub import find
from .model_directory import CONFIG, OTHER_WEIGHTS, ModelDirectory
from .packing import REMEDY, CompressionError
from .tensor_files import INDEX, TensorFile

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
"""The names of a model's weight files, as Transformers writes them."""


@dataclass
class Verification:
    """What `verify` has found."""

    directory: Path
    compressed: bool | None = None  # None where its config or its index cannot say so
    checked: list[str] = field(default_factory=list)  # a line per file, which says what was
    unchecked: list[str] = field(default_factory=list)  # files of which nothing says what they should hold
    problems: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether there is nothing wrong, as far as was checked."""
        return not self.problems

    def __str__(self) -> str:
        kind = {True: " (compressed)", False: " (a standard checkpoint, without checksums)", None: ""}[self.compressed]
        lines = [f"{self.directory}{kind}", *(f"  checked {line}" for line in self.checked)]
        if self.unchecked:
            lines.append(f"  not checked, for nothing says what they should hold: {', '.join(self.unchecked)}")
        lines += [f"  PROBLEM: {problem}" for problem in self.problems]
        count = len(self.problems)
        verdict = f"NOT INTACT: {count} problem{'s' * (count > 1)}."
        if self.intact:
            verdict = "Intact." if self.compressed else "Intact, as far as can be told without checksums."
        return "\n".join([*lines, verdict])


def verify(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Verification:
    """Check a model's directory, compressed or standard, as completely as can be. A bar shows the progress.

    Args:
        source: The directory, or the id of a model on the Hub, which is downloaded.
        revision: The branch, tag or commit on the Hub.
        token: The access token for the Hub; by default that of HF_TOKEN or `hf auth login`.

    Raises:
        CompressionError: If there is no model there of the kind that can be checked. What is wrong with one that is
            there is no error, but among the `problems`.
    """
    path = find(source, revision, token)
    names = sorted(file.name for file in path.iterdir() if not file.is_dir())
    if not any(_WEIGHTS.fullmatch(name) or name == INDEX for name in names) and (
        CONFIG not in names or any(name.endswith(OTHER_WEIGHTS) for name in names)
    ):
        raise CompressionError(
            f"{path} is not the directory of a model with safetensors files: it has "
            f"{', '.join(names[:5]) or 'no files'}{', ...' * (len(names) > 5)}"
        )
    found = Verification(path)
    damaged: list[CompressionError] = []
    try:
        model = ModelDirectory(path, damaged)
    except CompressionError as error:
        found.problems.append(str(error))
        return found
    with model:
        found.problems += map(str, damaged)
        _check_weights(model, found)
        if model.index and not damaged:
            _check_index(model, found)
        _check_others(model, names, found)
    return found


def _check_weights(model: ModelDirectory, found: Verification) -> None:
    try:
        compressed = model.compressed
    except CompressionError as error:  # its config cannot say so
        found.problems.append(str(error))
        return
    found.compressed = compressed
    if model.config_bytes is None:
        found.problems.append(f"{model.path / CONFIG} is missing")
    for file in tqdm(model.files, desc="Verifying", unit="file", disable=None):
        tensors = f"{len(file.tensors)} tensor{'s' * (len(file.tensors) != 1)}"
        if not compressed:
            found.checked.append(f"{file.path.name}: its header, and the sizes and places of {tensors}")
        elif _holds(found, model.check_header, file):
            _holds(found, model.check_companions, file)
            for stored in file.tensors:
                _holds(found, model.check_tensor, stored, unpacking=True)
            found.checked.append(f"{file.path.name}: the checksums of its header, {CONFIG}, index, and {tensors}")


def _check_index(model: ModelDirectory, found: Verification) -> None:
    """Compare the names in the index with those in the files."""
    listed: dict[str, str] = model.index["weight_map"]
    stored = {(tensor.info.name, tensor.file.path.name) for tensor in model.stored}
    for name, file in sorted(listed.items() - stored):
        found.problems.append(f"{INDEX} says that {file} holds {name}, which it does not")
    for name, file in sorted(stored - listed.items()):
        found.problems.append(f"{file} holds {name}, and {INDEX} does not say so")
    found.checked.append(f"{INDEX}: it names the tensors of {len(model.files)} files")


def _check_others(model: ModelDirectory, names: list[str], found: Verification) -> None:
    """Check what is beside the weights, as far as its format says what it should be."""
    used = {*model.file_names(), *([INDEX] if model.index else [])}
    for name in names:
        path = model.path / name
        if name in used:
            continue
        if _WEIGHTS.fullmatch(name) or name == INDEX:
            found.problems.append(f"{path} is no part of the model: delete it, or get the other files again")
        elif name.endswith(".safetensors"):
            if _holds(found, lambda file: TensorFile(file).close(), path):
                found.checked.append(f"{name}: its header, and the sizes and places of its tensors")
        elif name.endswith(".json"):
            if _holds(found, _parse, path):
                found.checked.append(f"{name}: it is JSON")
        else:
            found.unchecked.append(name)
    found.unchecked += sorted(f"{directory.name}/" for directory in model.path.iterdir() if directory.is_dir())


def _holds(found: Verification, check: Callable[..., None], *arguments: Any, **options: Any) -> bool:
    """Run a check; note what it raises, once."""
    try:
        check(*arguments, **options)
    except CompressionError as error:
        if str(error) not in found.problems:
            found.problems.append(str(error))
        return False
    return True


def _parse(path: Path) -> None:
    try:
        text = path.read_bytes()
        for document in [text] if KNOWN_JSON.fullmatch(path.name) else _documents(text):
            json.loads(document)
    except (ValueError, RecursionError) as error:
        raise CompressionError(f"{path} is damaged: it does not hold JSON ({error}). {REMEDY}") from None
    except OSError as error:
        raise CompressionError(f"{path} cannot be read: {error}. {REMEDY}") from None


def _documents(text: bytes) -> list[bytes]:
    """Return the lines of a text if the first of them is a document by itself, else the text."""
    lines = text.strip().splitlines() or [text]
    try:
        json.loads(lines[0])
    except ValueError:
        return [text]
    return lines
