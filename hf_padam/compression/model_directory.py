"""A model's directory, dense or compressed: its config, its tensors one at a time, and whether all of it is intact."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest as checksum

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
TEXT_CONFIG = "text_config"
"""The key of the language model's part in the config of a multimodal model; its class may be loaded alone."""
QUANT_METHOD = "hf_padam"
"""How a compressed model's config.json names the format, under `quantization_config`."""
VERSION_KEY = "hf_padam_format"
"""The key of the format's version in the metadata of a compressed safetensors file."""

OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".distcp", ".ot", ".tflite",
    ".mlmodel", ".npz", ".pkl", ".nemo", ".pdparams", ".keras", "openvino_model.xml",
)  # fmt: skip
"""How files of weights end that are not read here."""

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip


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
        damaged: Takes the errors of weight files that cannot be opened, which are then left out, or hold the same.

    Raises:
        CompressionError: If there are no such files, or one is missing, truncated or cannot be read, or two hold the
            same tensor.
    """

    def __init__(self, path: str | Path, damaged: list[CompressionError] | None = None) -> None:
        self.path = Path(path)
        self.config_bytes = self._read(CONFIG)
        self.config: dict[str, Any] = self._parse(CONFIG, b"{}" if self.config_bytes is None else self.config_bytes)
        self.index_bytes = None if (self.path / SINGLE).is_file() else self._read(INDEX)
        self.index: dict[str, Any] = self._parse(INDEX, b"{}" if self.index_bytes is None else self.index_bytes)
        self.files: list[TensorFile] = []
        try:
            for name in self.file_names():
                try:
                    self.files.append(self._open(name))
                except CompressionError as error:
                    if damaged is None:
                        raise
                    damaged.append(error)
            self._check_once(damaged)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> TensorFile:
        try:
            return TensorFile(self.path / name)
        except FileNotFoundError:
            message = f"{self.path / INDEX} names {self.path / name}, which is missing. {REMEDY}"
            raise CompressionError(message) from None

    def _check_once(self, damaged: list[CompressionError] | None) -> None:
        """Check that no two files hold a tensor of one name: which of them is meant would be anybody's guess."""
        numbers = Counter(tensor.info.name for tensor in self.stored)
        for name in sorted(name for name, number in numbers.items() if number > 1):
            error = CompressionError(f"{self.path} is damaged: several of its files hold {name}. {REMEDY}")
            if damaged is None:
                raise error
            damaged.append(error)

    @cached_property
    def compressed(self) -> bool:
        """Whether hf_padam compressed it."""
        method = self.quantization.get("quant_method")
        return method == QUANT_METHOD or any(VERSION_KEY in file.metadata for file in self.files)

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """The config's `quantization_config`, or that of its language model; empty where there is none.

        Raises:
            CompressionError: If it is no JSON object.
        """
        quantization, text = self.config.get("quantization_config"), self.config.get(TEXT_CONFIG)
        if quantization is None and isinstance(text, dict):
            quantization = text.get("quantization_config")
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
            self.check_header(file)
            self.check_companions(file)
            for stored in file.tensors:
                self.check_tensor(stored)

    def check_header(self, file: TensorFile) -> None:
        """Do that part of `check` for the header of a file."""
        if VERSION_KEY not in file.metadata:
            raise CompressionError(
                f"{file.path} is damaged, or not compressed although {CONFIG} says so. {REMEDY}; of a model whose "
                f"weights are dense, delete quantization_config from {CONFIG}"
            )
        check_version(file.metadata[VERSION_KEY], str(file.path))
        file.check_header()

    def check_companions(self, file: TensorFile) -> None:
        """Do that part of `check` for config.json and the index, of which each weight file has the checksums."""
        for name, data in (CONFIG, self.config_bytes), (INDEX, self.index_bytes):
            # Weights may be loaded with a config from elsewhere.
            if (data is not None or name == INDEX) and file.metadata.get(name) != checksum(data or b""):
                raise CompressionError(
                    f"{self.path / name} is not the file that was written with the compressed weights: it is damaged, "
                    "or was edited. Restore it. To change a setting, change it in the program that loads the model "
                    "(pass config=... to from_pretrained), or change the original and compress it again"
                )

    def check_tensor(self, stored: StoredTensor, *, unpacking: bool = False) -> None:
        """Do that part of `check` for a tensor.

        Args:
            stored: The tensor.
            unpacking: Also unpack it, which checks what comes out against the checksums of that.
        """
        if stored.info.dtype != "U8" or len(stored.info.shape) != 1:
            raise CompressionError(f"{stored.where} is not packed, although its file says so: it is damaged. {REMEDY}")
        packed = memoryview(stored.read())
        try:
            info, start = unpack_head(packed, stored.where)
            if info.name != stored.info.name:
                raise CompressionError(f"{stored.where} holds {info.name}: the file is damaged. {REMEDY}")
            for _ in unpacked(info, packed, start) if unpacking else records(info, packed, start):
                pass
        except CompressionError as error:
            if str(stored.file.path) in str(error):
                raise
            raise CompressionError(f"{stored.file.path}: {error}") from None

    def file_names(self) -> list[str]:
        """Return the names of the weight files, whether or not they are there.

        Raises:
            CompressionError: If nothing says what they are.
        """
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
        try:
            return path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise CompressionError(f"{path} cannot be read: {error}. {REMEDY}") from None

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


def unpacked(info: TensorInfo, packed: memoryview, start: int) -> Iterator[np.ndarray]:
    """Unpack a tensor chunk by chunk, in as many threads as torch uses.

    Args:
        info: From `unpack_head`.
        packed: The packed tensor.
        start: The length of its head.

    Yields:
        The words of each chunk.

    Raises:
        CompressionError: If it is damaged.
    """
    jobs = ((info, record, size) for record, (_, size) in zip(records(info, packed, start), info.chunks, strict=True))
    yield from in_order(unpack_chunk, jobs)


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
    data = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")
    dense = data.numpy()
    for words, (offset, size) in zip(unpacked(info, packed, start), info.chunks, strict=True):
        dense[offset : offset + size].view(info.word)[:] = words
    return info, data.view(dtype).reshape(info.shape)
