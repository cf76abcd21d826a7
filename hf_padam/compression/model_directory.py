"""A model's directory, dense or compressed: its config, its tensors one at a time, and whether all of it is intact."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from .packing import (
    FORMAT_VERSION,
    MAX_HEAD,
    REMEDY,
    CompressionError,
    TensorInfo,
    records,
    unpack_chunk,
    unpack_head,
)
from .parallel import in_order
from .tensor_files import INDEX, SINGLE, StoredTensor, TensorFile

CONFIG = "config.json"
QUANT_METHOD = "hf_padam"
"""How a compressed model's config.json names the format, under `quantization_config`."""
VERSION_KEY = "hf_padam_format"
"""The key of the format's version in the metadata of a compressed safetensors file."""

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".distcp")
"""How files of weights end that are not read here."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NOT_FETCHED = [f"*{suffix}" for suffix in OTHER_WEIGHTS]
_NOT_FETCHED += ["*/*.safetensors", "consolidated*.safetensors", "model*.fp16*.safetensors", "*.msgpack.index.json"]
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip


def checksum(data: bytes) -> str:
    """Return the checksum by which a compressed file knows its config.json and its index."""
    return xxhash.xxh3_64_hexdigest(data)


def check_version(version: Any, where: str) -> None:
    """Refuse a version of the format that this package does not know.

    Raises:
        CompressionError: Names the version.
    """
    if str(version) != str(FORMAT_VERSION):
        raise CompressionError(
            f"{where} is in version {version!r} of hf_padam's format; this installation reads version "
            f"{FORMAT_VERSION}. Install the hf_padam that it was compressed with, or a newer one"
        )


class ModelDirectory:
    """The weights and the config of a model, opened for reading.

    Args:
        path: A directory with `model.safetensors`, or an index and its shards.

    Raises:
        CompressionError: If there are no such files, or one is missing, truncated or cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_bytes = self._read(CONFIG)
        self.config: dict[str, Any] = self._parse(CONFIG, b"{}" if self.config_bytes is None else self.config_bytes)
        self.index_bytes = None if (self.path / SINGLE).is_file() else self._read(INDEX)
        self.index: dict[str, Any] = self._parse(INDEX, b"{}" if self.index_bytes is None else self.index_bytes)
        self.files: list[TensorFile] = []
        try:
            for name in self._file_names():
                self.files.append(TensorFile(self.path / name))
        except BaseException as error:
            self.close()
            if isinstance(error, FileNotFoundError):
                message = f"{self.path / INDEX} names {error.filename}, which is missing. {REMEDY}"
                raise CompressionError(message) from None
            raise

    @classmethod
    def find(cls, source: str | Path) -> ModelDirectory:
        """Open a local directory, or a model on the Hugging Face Hub by its id.

        Raises:
            CompressionError: As for the class, and if it is neither.
        """
        if Path(source).is_dir():
            return cls(source)
        if Path(source).exists() or not _HUB_ID.fullmatch(str(source)):
            raise CompressionError(f"{str(source)!r} is neither a directory nor a model's id on the Hub")
        from huggingface_hub import snapshot_download

        try:
            return cls(snapshot_download(str(source), ignore_patterns=_NOT_FETCHED))
        except (OSError, ValueError) as error:
            if isinstance(error, CompressionError):
                raise
            message = f"{str(source)!r} is no directory here, and could not be had from the Hub: {error}"
            raise CompressionError(message) from error

    @cached_property
    def compressed(self) -> bool:
        """Whether hf_padam compressed it."""
        method = self.quantization.get("quant_method")
        return method == QUANT_METHOD or any(VERSION_KEY in file.metadata for file in self.files)

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The config's `quantization_config`, empty where there is none.

        Raises:
            CompressionError: If it is no JSON object.
        """
        quantization = self.config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise CompressionError(
                f"{self.path / CONFIG} is damaged: its quantization_config is {quantization!r}. {REMEDY}"
            )
        return quantization or {}

    def texts(self, prefix: str) -> dict[str, str]:
        """Return the text of config.json and, if there is one, of the index, by a prefix and their names.

        Raises:
            CompressionError: If they are no text in UTF-8.
        """
        read = {CONFIG: self.config_bytes, INDEX: self.index_bytes}
        try:
            return {prefix + name: data.decode() for name, data in read.items() if data is not None}
        except UnicodeDecodeError as error:
            raise CompressionError(f"{self.path}: {CONFIG} or {INDEX} is not in UTF-8: {error}") from error

    @property
    def stored(self) -> list[StoredTensor]:
        """The tensors as they are stored, in order: packed ones as bytes."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def nbytes(self) -> int:
        """The size of the weight files."""
        return sum(file.path.stat().st_size for file in self.files)

    def info(self, stored: StoredTensor) -> TensorInfo:
        """Return what a tensor is when it is dense.

        Raises:
            CompressionError: If it is damaged.
        """
        if not self.compressed:
            return stored.info
        beginning = memoryview(stored.read(0, min(stored.info.nbytes, MAX_HEAD)))
        return unpack_head(beginning, stored.where, stored.info.nbytes)[0]

    def reader(self, stored: StoredTensor) -> tuple[TensorInfo, Callable[[int, int], bytearray | memoryview]]:
        """Return what a tensor is when it is dense, and what reads its dense bytes: so many from a place on.

        A dense tensor is read from the file as asked. A packed one is unpacked now, whole.

        Raises:
            CompressionError: If it is damaged.
        """
        if not self.compressed:
            return stored.info, stored.read
        info, tensor = unpack(memoryview(stored.read()), stored.where)
        data = tensor.flatten().view(torch.uint8).numpy().data
        return info, lambda start, size: data[start : start + size]

    def check(self) -> None:
        """Check every byte of a compressed model against the checksums that were written with it.

        Raises:
            CompressionError: Names the file, and the tensor, that has been altered.
        """
        for file in self.files:
            if VERSION_KEY not in file.metadata:
                raise CompressionError(
                    f"{file.path} is damaged, or not compressed although {CONFIG} says so. {REMEDY}; of a model whose "
                    f"weights are dense, delete quantization_config from {CONFIG}"
                )
            check_version(file.metadata[VERSION_KEY], str(file.path))
            file.check_header()
            for name, data in (CONFIG, self.config_bytes), (INDEX, self.index_bytes):
                if data is not None or name == INDEX:  # weights may be loaded with a config from elsewhere
                    self._check_companion(name, data or b"", file.metadata)
            for stored in file.tensors:
                self._check_tensor(stored)

    def _check_companion(self, name: str, data: bytes, metadata: dict[str, str]) -> None:
        if metadata.get(name) != checksum(data):
            raise CompressionError(
                f"{self.path / name} is not the file that was written with the compressed weights: it is damaged, or "
                "was edited. Restore it. To change a setting, change it in the program that loads the model (pass "
                "config=... to from_pretrained), or change the original and compress it again"
            )

    def _check_tensor(self, stored: StoredTensor) -> None:
        if stored.info.dtype != "U8" or len(stored.info.shape) != 1:
            raise CompressionError(f"{stored.where} is not packed, although its file says so: it is damaged. {REMEDY}")
        packed = memoryview(stored.read())
        try:
            info, start = unpack_head(packed, stored.where)
            if info.name != stored.info.name:
                raise CompressionError(f"{stored.where} holds {info.name}: the file is damaged. {REMEDY}")
            for _ in records(info, packed, start):
                pass
        except CompressionError as error:
            if str(stored.file.path) in str(error):
                raise
            raise CompressionError(f"{stored.file.path}: {error}") from None

    def _file_names(self) -> list[str]:
        if self.index:
            weight_map = self.index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CompressionError(f"{self.path / INDEX} is damaged: it has no weight_map. {REMEDY}")
            for name in weight_map.values():
                if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                    raise CompressionError(
                        f"{self.path / INDEX} names {name!r}, which is not a safetensors file beside it. Load the "
                        "model with Transformers and write it with save_pretrained, which makes such files"
                    )
            return sorted(set(weight_map.values()))
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        others = sorted(file.name for file in self.path.glob("*") if file.suffix in (".bin", ".safetensors", ".gguf"))
        raise CompressionError(
            f"{self.path} has neither {SINGLE} nor {INDEX}"
            + (f", only {', '.join(others[:3])}. " if others else ". ")
            + "Load the model with Transformers and write it with save_pretrained, which makes these files"
        )

    def _read(self, name: str) -> bytes | None:
        path = self.path / name
        return path.read_bytes() if path.is_file() else None

    def _parse(self, name: str, data: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(data)
            if isinstance(parsed, dict):
                return parsed
        except (ValueError, RecursionError):
            pass
        raise CompressionError(f"{self.path / name} is damaged: it does not hold a JSON object. {REMEDY}")

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> ModelDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """Return a tensor's dtype.

    Raises:
        CompressionError: If torch has none for it.
    """
    if info.dtype not in _DTYPES:
        raise CompressionError(f"tensor {info.name} has the dtype {info.dtype}; known are {', '.join(_DTYPES)}")
    return _DTYPES[info.dtype]


def unpack(packed: memoryview, where: str) -> tuple[TensorInfo, Tensor]:
    """Unpack a tensor, with the memory of the dense one and a little more.

    Args:
        packed: The packed tensor.
        where: Names it in errors.

    Raises:
        CompressionError: If it is damaged.
    """
    info, start = unpack_head(packed, where)
    dtype = torch_dtype(info)
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    dense = data.numpy()
    jobs = ((info, record, size) for record, (_, size) in zip(records(info, packed, start), info.chunks, strict=True))
    for words, (offset, size) in zip(in_order(unpack_chunk, jobs), info.chunks, strict=True):
        dense[offset : offset + size].view(info.word)[:] = words
    return info, data.view(dtype).reshape(info.shape)
