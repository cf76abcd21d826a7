"""Read and write safetensors files piece by piece: no tensor need fit into memory, no library copies one.

The format: 8 bytes, the length of a JSON header; the header, which names every tensor's dtype, shape and place; data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from .packing import REMEDY, CompressionError, TensorInfo

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # safetensors' own limit
_BLANK = "0" * 16


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    info: TensorInfo
    file: TensorFile
    start: int  # within the file

    def read(self, offset: int = 0, size: int | None = None) -> bytearray:
        """Read bytes of the tensor, all of them by default. Safe to call from several threads."""
        size = self.info.nbytes - offset if size is None else size
        return self.file.read(self.start + offset, size)

    @property
    def where(self) -> str:
        """How errors name it."""
        return f"tensor {self.info.name} in {self.file.path}"


class TensorFile:
    """A safetensors file that is open for reading, with its `metadata` and `tensors` in the order of the data.

    Raises:
        CompressionError: If it is truncated, or its header cannot be right.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._unreadable(error) from None
        try:
            self._read_header(os.fstat(self._handle).st_size)
        except BaseException:
            self.close()
            raise

    def _read_header(self, size: int) -> None:
        try:
            length = int.from_bytes(self.read(0, 8), "little")
            if length > min(size - 8, _MAX_HEADER):
                raise self._damaged(f"its header has {length:,} bytes, the file {size:,}")
            self.header = bytes(self.read(8, length))
            entries: dict[str, Any] = json.loads(self.header.decode())
            self.metadata = checked_metadata(entries.pop("__metadata__", {}))
            self.tensors = []
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
                start, end = entry["data_offsets"]
                if type(start) is not int or type(end) is not int:
                    raise ValueError(f"the place that it says {name[:100]!r} has is of the wrong kind")
                info = TensorInfo.checked(name, entry["dtype"], entry["shape"], end - start)
                self.tensors.append(StoredTensor(info, self, 8 + length + start))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            if isinstance(error, CompressionError):
                raise
            raise self._damaged(f"its header cannot be read: {error}") from None
        end = 8 + length
        for tensor in self.tensors:
            if tensor.start != end:
                raise self._damaged(f"its header says that {tensor.info.name} is where it cannot be")
            end += tensor.info.nbytes
        if end != size:
            raise self._damaged(f"it has {size:,} bytes where its header says {end:,}")

    def check_header(self) -> None:
        """Check the header against the checksum that `TensorWriter` put into its metadata.

        Raises:
            CompressionError: If it has been altered.
        """
        checksum = self.metadata.get("checksum", "")
        blanked = self.header.replace(checksum.encode(), _BLANK.encode(), 1)
        if len(checksum) != len(_BLANK) or xxhash.xxh3_64_hexdigest(blanked) != checksum:
            raise self._damaged("its header is not what was written")

    def read(self, start: int, size: int) -> bytearray:
        """Read bytes at a place. Safe to call from several threads."""
        data = bytearray(size)
        done = 0
        while done < size:  # the system reads 2 GB at most at a time
            try:
                count = os.preadv(self._handle, [memoryview(data)[done:]], start + done)
            except OSError as error:
                raise self._unreadable(error) from None
            if not count:
                raise self._damaged(f"it ends {size - done:,} bytes too early")
            done += count
        return data

    def _unreadable(self, error: OSError) -> CompressionError:
        return CompressionError(f"{self.path} cannot be read: {error}. {REMEDY}")

    def _damaged(self, what: str) -> CompressionError:
        return CompressionError(f"{self.path} is damaged: {what}. {REMEDY}")

    def close(self) -> None:
        """Close it; reading fails from now on."""
        os.close(self._handle)


class TensorWriter:
    """Write a safetensors file whose tensors' sizes are known only once they are written.

    The space that the header may take is left free, and what is not needed of it is filled with blanks.

    Args:
        path: The file.
        bounds: The tensors in order, `nbytes` being the most that each can take.
        metadata: What the header says besides: text by name. `finish` may change a text, but not its length.
        checksum: Whether to add the header's checksum, for `TensorFile.check_header`.
        header: The header to write in place of one that is made, for tensors of the sizes of `bounds`.
    """

    def __init__(
        self,
        path: Path,
        bounds: Iterable[TensorInfo],
        metadata: dict[str, str],
        checksum: bool,
        header: bytes | None = None,
    ) -> None:
        self._metadata, self._checksum = metadata | ({"checksum": _BLANK} if checksum else {}), checksum
        self._given = header
        self._length = len(made_header(bounds, self._metadata) if header is None else header)
        self._file = open(path, "wb")  # `finish` or `close` closes it
        self._file.seek(8 + self._length)
        self._entries: dict[str, Any] = {}
        self._end = 0

    def add(self, info: TensorInfo, pieces: Iterable[bytes]) -> int:
        """Write a tensor, piece by piece, and return how many bytes that took.

        Args:
            info: The tensor; if of bytes (U8, one dimension), its size is that of the pieces.
            pieces: Its bytes.
        """
        size = 0
        for piece in pieces:
            self._file.write(piece)
            size += len(piece)
        shape = (size,) if info.dtype == "U8" and len(info.shape) == 1 else info.shape
        self._entries[info.name] = _entry(replace(info, shape=shape, nbytes=size), self._end)
        self._end += size
        return size

    def finish(self, **changes: str) -> None:
        """Write the header, and close the file.

        Args:
            changes: Metadata that was not known at first.
        """
        self._metadata |= changes
        header = self._given or _dump(self._entries, self._metadata).ljust(self._length)
        if self._checksum:
            self._metadata["checksum"] = xxhash.xxh3_64_hexdigest(header)
            header = _dump(self._entries, self._metadata).ljust(self._length)
        if len(header) != self._length:
            raise RuntimeError(f"the header of {self._file.name} has outgrown the space that was left for it")
        self._file.seek(0)
        self._file.write(self._length.to_bytes(8, "little") + header)
        self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()


def made_header(tensors: Iterable[TensorInfo], metadata: dict[str, str]) -> bytes:
    """Return the header that the safetensors library, and `TensorWriter`, make for tensors one after another."""
    entries, end = {}, 0
    for info in tensors:
        entries[info.name] = _entry(info, end)
        end += info.nbytes
    header = _dump(entries, metadata)
    return header.ljust(len(header) + -len(header) % 8)


def _dump(entries: dict[str, Any], metadata: dict[str, str]) -> bytes:
    header = ({"__metadata__": metadata} if metadata else {}) | entries
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def checked_metadata(metadata: Any) -> dict[str, str]:
    """Return what is the metadata of a safetensors file.

    Raises:
        ValueError: If it cannot be.
    """
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__ is not text by name")
    "".join(metadata.values()).encode()  # escapes of JSON can be what no text has
    return metadata


def _entry(info: TensorInfo, start: int) -> dict[str, Any]:
    return {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, start + info.nbytes]}
