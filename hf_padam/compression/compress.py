"""Compress a model's directory, and get the standard one back: tensor by tensor, without loss, whole or not at all.

A compressed directory holds what the original held, in the same number of weight files of the same names: safetensors
files, in which every tensor is the bytes of its packed form (`packing`). Its config.json says so under
`quantization_config`, by which Transformers finds the loader (`loading`). Each weight file carries the
checksums of its own header, of config.json and of the index.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedModel

from ..files import LOCK, is_free, real, staged_new_directory
from .hub import find, upload
from .model_card import add_sparsity, remove_sparsity
from .model_directory import (
    CONFIG,
    OTHER_WEIGHTS,
    QUANT_METHOD,
    TEXT_CONFIG,
    VERSION_KEY,
    ModelDirectory,
    checksum,
    unpacked,
)
from .packing import (
    FORMAT_VERSION,
    REMEDY,
    CompressionError,
    TensorInfo,
    chain,
    pack_chunk,
    pack_head,
    unpack_head,
)
from .parallel import in_order
from .sparsity_report import SparsityReport
from .tensor_files import INDEX, StoredTensor, TensorFile, TensorWriter, checked_metadata, made_header

CARD = "README.md"
_NOT_COPIED = (*OTHER_WEIGHTS, ".safetensors", ".index.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_COPIED_DIRECTORIES = ("additional_chat_templates",)
_FEW_ZEROS = 0.1
_SOURCE = "source_"
"""How keys of the weight files' metadata begin that hold what was there before: each file's own metadata and, in the
first file, the text of config.json and of the index."""


@dataclass(frozen=True)
class Compressed:
    """What `compress` did."""

    directory: Path
    dense_bytes: int  # of the weight files, headers included
    bytes: int
    report: SparsityReport
    left_out: list[str]  # files of the original that were not copied

    def __str__(self) -> str:
        zeros = self.report.totals["sparsity_total"]
        lines = [
            f"{self.directory}: {self.bytes / 1e6:,.1f} MB, {self.bytes / self.dense_bytes:.1%} of the dense "
            f"{self.dense_bytes / 1e6:,.1f} MB" + ("." if zeros is None else f"; {zeros:.1%} of all weights are zero.")
        ]
        if zeros is not None and zeros < _FEW_ZEROS:
            lines.append(
                "Note: few of its weights are zero, so compression gains little: what it gains is that exponents of "
                'floats repeat. Fine-tune with optim="padam" for zeros.'
            )
        if self.left_out:
            lines.append(f"Left out: {', '.join(self.left_out)}.")
        return "\n".join(lines)


def compress(
    source: str | Path,
    destination: str | Path,
    *,
    force: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Compressed:
    """Compress a model's directory. A bar on stderr shows the progress, on a terminal.

    Args:
        source: A directory with safetensors files, or a model's id on the Hugging Face Hub.
        destination: The directory to make.
        force: Replace a model's directory that is there; not one that holds checkpoints or other directories.
        revision: The branch, tag or commit of a model on the Hub.
        token: The access token for the Hub; by default that of HF_TOKEN or `hf auth login`.

    Returns:
        The destination, its bytes and those of the source's weights, the sparsity, and what was not copied.

    Raises:
        CompressionError: If the source is damaged, has no config, is compressed or quantized.
        FileExistsError: If there is something at the destination.
        WriteError: If it could not be written.
    """
    with ModelDirectory(find(source, revision, token)) as model:
        if model.compressed:
            raise CompressionError(f"{source} is compressed already; `hf-padam decompress` makes it dense again")
        if model.config_bytes is None:
            raise CompressionError(f"{source} has no {CONFIG}, without which a compressed model cannot be loaded")
        lacking = model.index.get("weight_map", {}).keys() - {stored.info.name for stored in model.stored}
        if lacking:
            raise CompressionError(
                f"{source} is damaged: {INDEX} says that it holds {min(lacking)}, which no file does. Get it again"
            )
        if model.quantization:
            method = model.quantization.get("quant_method")
            raise CompressionError(
                f"{source} is quantized ({method}), and Transformers takes one quantization_config only. Compress the "
                "model as it was before"
            )
        with _new_directory(model.path, destination, force) as staging:
            report = SparsityReport.of(model, near_zero=None)
            left_out = _copy_others(model.path, staging)
            _compress_weights(model, staging)
            with ModelDirectory(staging) as written:
                written.check()
                compressed_bytes = written.nbytes
            add_sparsity(staging / CARD, report, model.nbytes, compressed_bytes)
        return Compressed(Path(destination), model.nbytes, compressed_bytes, report, left_out)


def decompress(
    source: str | Path,
    destination: str | Path,
    *,
    force: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Make the standard directory of a compressed model: the same weights, bit for bit, for programs without hf_padam.

    Args:
        source: A directory that `compress` made, or the id of one on the Hub.
        destination: The directory to make.
        force: Replace a model's directory that is there.
        revision: The branch, tag or commit of a model on the Hub.
        token: The access token for the Hub; by default that of HF_TOKEN or `hf auth login`.

    Returns:
        The destination.

    Raises:
        CompressionError: If the source is not compressed, or anything in it has been altered.
        FileExistsError: If there is something at the destination.
        WriteError: If it could not be written.
    """
    with ModelDirectory(find(source, revision, token)) as model:
        if not model.compressed:
            raise CompressionError(f"{source} is not compressed: its weights are dense already")
        model.check()
        with _new_directory(model.path, destination, force) as staging:
            _copy_others(model.path, staging)
            for file in tqdm(model.files, desc="Decompressing", unit="file", disable=None):
                _decompress_file(model, file, staging / file.path.name)
            for name in (CONFIG, INDEX):
                text = model.files[0].metadata.get(_SOURCE + name)
                if text is not None:
                    (staging / name).write_bytes(text.encode())
            remove_sparsity(staging / CARD)
    return Path(destination)


def save_compressed(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    force: bool = False,
    push_to_hub: str | None = None,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    **save_options: Any,
) -> Compressed:
    """Save a model, compressed. The disk holds the dense files beside it for a while; memory never does.

    Args:
        model: A Transformers model. Its weights are saved as they are, in their dtype.
        directory: The directory to make. `AutoModelForCausalLM.from_pretrained(directory)` loads it where hf_padam is
            imported. As with `save_pretrained`, the tokenizer is saved apart: afterwards, into the same directory.
        force: Replace a model's directory that is there, a tokenizer in it too; not one that holds checkpoints or
            other directories.
        push_to_hub: Also upload it, to the repository of this id, which is created if it does not exist.
        private: Whether that is private if it is created. One that exists stays as it is.
        revision: The branch to upload to; the main one by default.
        token: The access token for the Hub; by default that of HF_TOKEN or `hf auth login`.
        save_options: For `save_pretrained`, e.g. `max_shard_size`.

    Returns:
        As `compress` does.

    Raises:
        CompressionError: If a tensor cannot be packed.
        FileExistsError: If there is something at the destination.
        WriteError: If it could not be written.
    """
    with _new_directory(None, directory, force) as staging:
        dense, packed = staging / "dense", staging / "packed"
        try:
            model.save_pretrained(dense, **save_options)
        except SafetensorError as error:  # as which its library raises a full disk
            raise OSError(str(error)) from error
        result = compress(dense, packed)
        shutil.rmtree(dense)
        for file in packed.iterdir():
            file.rename(staging / file.name)
        packed.rmdir()
    if push_to_hub is not None:
        upload(directory, push_to_hub, private=private, revision=revision, token=token)
    return replace(result, directory=Path(directory))


def _new_directory(source: Path | None, destination: str | Path, force: bool) -> Any:
    """Open `staged_new_directory`, making sure that `force` deletes neither the source nor what is no model."""
    destination = Path(destination)
    if source is not None and real(source).is_relative_to(real(destination)):
        raise FileExistsError(f"{destination} holds the model to read: name another directory")
    if not is_free(destination):
        if not force:
            raise FileExistsError(
                f"{destination} exists already: name another directory, or replace it with --force (force=True)"
            )
        if not (destination / CONFIG).is_file():
            raise FileExistsError(f"{destination} is not a model's directory (no {CONFIG}), so --force spares it")
        others = sorted(p.name for p in destination.iterdir() if p.is_dir() and p.name not in _COPIED_DIRECTORIES)
        if others:
            held = ", ".join(f"{name}/" for name in others)
            raise FileExistsError(
                f"{destination} holds {held} beside a model, so --force spares it: name another directory, or move "
                "that away"
            )
    return staged_new_directory(destination, replace=force, last=CONFIG)


def _copy_others(source: Path, destination: Path) -> list[str]:
    """Copy tokenizer, generation config and the like; return the names of what is left out."""
    left_out = []
    for path in sorted(source.iterdir()):
        if path.name in (CONFIG, INDEX, LOCK) or path.name.startswith("."):
            continue
        if path.is_dir() and path.name in _COPIED_DIRECTORIES:
            shutil.copytree(path, destination / path.name)
        elif path.is_file() and (path.name in _ADAPTERS or not path.name.endswith(_NOT_COPIED)):
            shutil.copyfile(path, destination / path.name)
        else:
            left_out.append(path.name + "/" * path.is_dir())
    with ModelDirectory(source) as model:
        return [name for name in left_out if name not in {file.path.name for file in model.files}]


def _compress_weights(model: ModelDirectory, directory: Path) -> None:
    config = copy.deepcopy(model.config)
    for part in (config, config.get(TEXT_CONFIG)):
        if not isinstance(part, dict):
            continue
        if part.get("dtype") is None and part.get("torch_dtype") is None:
            part["dtype"] = _dtype(model)
        part["quantization_config"] = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
    (directory / CONFIG).write_bytes(_as_json(config))
    companions = {CONFIG: checksum(_as_json(config)), INDEX: checksum(b"")}
    writers: list[TensorWriter] = []
    total = 0
    try:
        with tqdm(total=model.nbytes, desc="Compressing", unit="B", unit_scale=True, disable=None) as bar:
            for file in model.files:
                bounds = [_as_bytes(stored.info, stored.info.max_packed_bytes()) for stored in file.tensors]
                metadata = {"format": "pt", VERSION_KEY: str(FORMAT_VERSION), **companions}
                metadata[f"{_SOURCE}metadata"] = json.dumps(file.metadata)
                if made_header([stored.info for stored in file.tensors], file.metadata) != file.header:
                    metadata[f"{_SOURCE}header"] = file.header.decode()  # of another writer, in another order
                if not writers:
                    metadata |= model.texts(_SOURCE)
                writers.append(TensorWriter(directory / file.path.name, bounds, metadata, checksum=True))
                total += _pack_file(file, writers[-1], bar)
        if model.index:
            index = _as_json(model.index | {"metadata": {"total_size": total}})
            (directory / INDEX).write_bytes(index)
            companions[INDEX] = checksum(index)
        for writer in writers:
            writer.finish(**companions)
    finally:
        for writer in writers:
            writer.close()


def _dtype(model: ModelDirectory) -> str:
    """Return the dtype that Transformers, where the config has none, takes from the dense weights: the first one's."""
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    first = {tensor.info.name: tensor.info.dtype for tensor in model.files[0].tensors} if model.files else {}
    return next((names[dtype] for _, dtype in sorted(first.items()) if dtype in names), "float32")


def _pack_file(file: TensorFile, writer: TensorWriter, bar: tqdm) -> int:
    """Pack every tensor of a file, chunk by chunk, in parallel across tensors too. Returns the packed size."""

    def pack(stored: StoredTensor, offset: int, size: int) -> bytes:
        return pack_chunk(stored.info, stored.read(offset, size))

    jobs = ((stored, offset, size) for stored in file.tensors for offset, size in stored.info.chunks)
    packed = in_order(pack, jobs)

    def pieces(info: TensorInfo) -> Iterator[bytes]:
        head = pack_head(info)
        yield head
        previous = head[-8:]
        for _, size in info.chunks:
            record = next(packed)
            previous = chain(record, previous)
            yield record
            yield previous
            bar.update(size)

    return sum(writer.add(_as_bytes(stored.info, 0), pieces(stored.info)) for stored in file.tensors)


def _decompress_file(model: ModelDirectory, file: TensorFile, path: Path) -> None:
    heads = [model.info(stored) for stored in file.tensors]
    metadata = _source_metadata(file)
    writer = TensorWriter(path, heads, metadata, checksum=False, header=_source_header(file, heads, metadata))
    try:
        for stored, info in zip(file.tensors, heads, strict=True):
            packed = memoryview(stored.read())
            start = unpack_head(packed, stored.where)[1]
            writer.add(info, (words.tobytes() for words in unpacked(info, packed, start)))
        writer.finish()
    finally:
        writer.close()


def _source_metadata(file: TensorFile) -> dict[str, str]:
    """Return the metadata that the file had before it was compressed."""
    try:
        return checked_metadata(json.loads(file.metadata[f"{_SOURCE}metadata"]))
    except (KeyError, ValueError, RecursionError):
        message = f"{file.path} is damaged: it does not say which metadata it had before. {REMEDY}"
        raise CompressionError(message) from None


def _source_header(file: TensorFile, heads: list[TensorInfo], metadata: dict[str, str]) -> bytes | None:
    """Return the header that the file had before it was compressed, if it is not the one that would be made."""
    header = file.metadata.get(f"{_SOURCE}header")
    if header is None:
        return None
    try:
        same = json.loads(header) == json.loads(made_header(heads, metadata))
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise CompressionError(f"{file.path} is damaged: the header that it had before is of other tensors. {REMEDY}")
    return header.encode()


def _as_bytes(info: TensorInfo, size: int) -> TensorInfo:
    return TensorInfo(info.name, "U8", (size,), size)


def _as_json(content: dict[str, Any]) -> bytes:
    """Return a file's contents in the layout of Transformers."""
    return (json.dumps(content, indent=2) + "\n").encode()
