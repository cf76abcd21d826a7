"""Pack one tensor without loss: the format of a compressed checkpoint, and nothing of files or models.

A packed tensor is a head (name, dtype, shape) and one record for every `CHUNK` words, a word being one element's bits.
A record stores a chunk in whichever of three ways is smallest:

    ZEROS   nothing
    DENSE   all words
    MASK    a bitmask of the words that are not zero, and those words

Zero means that all bits are: -0.0 is kept. The words are split into planes of bytes, of floats rotated by one bit so
that one plane holds nothing but the exponents, which compress well, where sign and mantissa do not. Bitmask and planes
are compressed with zstandard. Every record carries a checksum of its dense words and one of its own bytes, which is
chained to that of the record before it: nothing can be altered, lost or swapped unnoticed.
"""

from __future__ import annotations

import json
import math
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
import zstandard

FORMAT_VERSION = 1
CHUNK = 1 << 17
"""Words per record: small enough for a processor's cache, and for the tensors of small models to keep cores busy."""

MAX_HEAD = 1 << 16
"""The most bytes that the head of a packed tensor has."""

_MAX_DIMENSIONS, _TOO_LARGE = 64, 1 << 63  # torch's own limits
_ZEROS, _DENSE, _MASK = range(3)
_WORDS: dict[int, np.dtype] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_WORD_SIZES = {
    "BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8,
}  # fmt: skip
_SIZES = _WORD_SIZES | {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}
_FLOATS = ("BF16", "F16", "F32", "F64")
# Weights repeat hardly any sequence of bytes, but a few exponents are frequent. So zstandard's search is cut down to
# long matches in its smallest table, which leaves entropy coding: as small as level 19, at 800 MB/s.
_ZSTANDARD = {"strategy": zstandard.STRATEGY_FAST, "min_match": 7, "hash_log": 6}
_ALWAYS_MASK = 0.1  # from this share of zeros on, the mask is smaller; below, both are tried
_HEAD, _RECORD, _SIZE, _CHECKSUM = struct.Struct("<I"), struct.Struct("<BQ"), struct.Struct("<I"), struct.Struct("<Q")
_thread = threading.local()


class CompressionError(ValueError):
    """A checkpoint cannot be compressed or read: the message says which file or tensor, why, and what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """What a safetensors header says of a tensor, in its words."""

    name: str
    dtype: str  # "BF16", "F32", "I64", ...
    shape: tuple[int, ...]
    nbytes: int

    @property
    def word(self) -> np.dtype:
        """The unsigned integer that holds one element's bits; a byte where the dtype is an unusual one."""
        return _WORDS[_WORD_SIZES.get(self.dtype, 1)]

    @property
    def elements(self) -> int:
        """The number of elements: 1 for a tensor without dimensions."""
        return math.prod(self.shape)

    @classmethod
    def checked(cls, name: Any, dtype: Any, shape: Any, nbytes: Any) -> TensorInfo:
        """Take what a file says of a tensor, before any of it says how much memory to take.

        Raises:
            ValueError: If it is of another type, or the size is not that of so many elements. Of a dtype that is not
                known here, an element may have as little as a bit.
        """
        if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
            raise ValueError(f"what it says of {str(name)[:100]!r} is of the wrong kind")
        name.encode()  # escapes of JSON can be what no text has
        if len(shape) > _MAX_DIMENSIONS or any(
            type(n) is not int or not 0 <= n < _TOO_LARGE for n in (nbytes, *shape)
        ):
            raise ValueError(f"the sizes that it says {name[:100]!r} has cannot be")
        info, size = cls(name, dtype, tuple(shape), nbytes), _SIZES.get(dtype)
        if size is None:  # of an element, which takes a bit at least
            fits = info.elements <= 8 * nbytes and (info.elements > 0 or nbytes == 0)
        else:
            fits = info.elements * size == nbytes
        if not fits or math.prod(n or 1 for n in shape) >= _TOO_LARGE:  # which torch refuses, even if one is 0
            raise ValueError(f"{name[:100]!r} does not have the bytes of so many elements")
        return info

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Offset and size of every chunk, in bytes of the dense tensor."""
        size = CHUNK * self.word.itemsize
        return [(offset, min(size, self.nbytes - offset)) for offset in range(0, self.nbytes, size)]

    def min_packed_bytes(self) -> int:
        """A lower bound of what the packed tensor takes besides its head: every chunk takes some, even of zeros."""
        return -(-self.nbytes // (CHUNK * self.word.itemsize)) * (_RECORD.size + _CHECKSUM.size)

    def max_packed_bytes(self) -> int:
        """An upper bound of what the packed tensor takes, for headers that are written last."""
        return 2 * self.nbytes + 4096 * (1 + len(self.chunks)) + 8 * len(self.name)


def pack_head(info: TensorInfo) -> bytes:
    """Return the head of a packed tensor. Its last 8 bytes are its checksum, the first of the chain."""
    text = json.dumps({"name": info.name, "dtype": info.dtype, "shape": info.shape, "bytes": info.nbytes}).encode()
    head = _HEAD.pack(len(text)) + text
    return head + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head))


def pack_chunk(info: TensorInfo, data: bytes | bytearray) -> bytes:
    """Pack one chunk and prove, by unpacking it, that nothing is lost. Safe to call from several threads.

    Args:
        info: The tensor.
        data: The dense bytes of one of its chunks.

    Returns:
        A record without its chained checksum, see `chain`.
    """
    words = np.frombuffer(data, info.word)
    mask = words != 0
    kept = np.flatnonzero(mask)
    zero_share = 1 - kept.size / words.size
    if not kept.size:
        codec, sections = _ZEROS, []
    elif zero_share >= _ALWAYS_MASK:
        codec, sections = _MASK, _masked(info, words, mask, kept)
    else:
        codec, sections = _DENSE, _planes(info, words)
        if zero_share:
            masked = _masked(info, words, mask, kept)
            if sum(map(len, masked)) < sum(map(len, sections)):
                codec, sections = _MASK, masked
    sizes = b"".join(_SIZE.pack(len(section)) for section in sections)
    record = b"".join([_RECORD.pack(codec, xxhash.xxh3_64_intdigest(data)), sizes, *sections])
    if not np.array_equal(unpack_chunk(info, record, len(data)), words):
        raise CompressionError(f"packing {info.name} lost something: this machine's memory or libraries are at fault")
    return record


def unpack_chunk(info: TensorInfo, record: bytes | memoryview, size: int) -> np.ndarray:
    """Unpack one record. Safe to call from several threads.

    Args:
        info: The tensor.
        record: As `pack_chunk` returned it.
        size: Bytes of the dense chunk.

    Returns:
        The words, of shape [size / bytes per word].

    Raises:
        CompressionError: If they are not those that were packed.
    """
    count = size // info.word.itemsize
    codec, checksum = _RECORD.unpack_from(record)
    sections = _sections(info, record, codec)
    if codec == _ZEROS:
        words = np.zeros(count, info.word)
    elif codec == _DENSE:
        words = _join(info, [_decompress(info, section, count) for section in sections], count)
    else:
        bits = np.frombuffer(_decompress(info, sections[0], (count + 7) // 8), "u1")
        kept = np.flatnonzero(np.unpackbits(bits, count=count).view(bool))  # of booleans it is several times faster
        planes = [_decompress(info, section, kept.size) for section in sections[1:]]
        words = np.zeros(count, info.word)
        words[kept] = _join(info, planes, kept.size)
    if xxhash.xxh3_64_intdigest(words.data) != checksum:
        raise _damaged(info)
    return words


def chain(record: bytes | memoryview, previous: bytes | memoryview) -> bytes:
    """Return the checksum that follows a record.

    Args:
        record: As `pack_chunk` returned it.
        previous: The 8 bytes before the record: the checksum of the record before it, or of the head.
    """
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(record, seed=_CHECKSUM.unpack(previous)[0]))


def unpack_head(packed: memoryview, where: str, size: int | None = None) -> tuple[TensorInfo, int]:
    """Read the head of a packed tensor, and check all of it: its numbers say how much memory will be taken.

    Args:
        packed: The packed tensor, or its first `MAX_HEAD` bytes.
        where: Names the tensor in errors.
        size: The bytes of the whole packed tensor, where `packed` is not that.

    Returns:
        What it says, and its length in bytes.

    Raises:
        CompressionError: If it is damaged, or cannot be true of the packed tensor.
    """
    try:
        end = _HEAD.size + _HEAD.unpack_from(packed)[0]
        start = end + _CHECKSUM.size
        if start > MAX_HEAD:
            raise ValueError("it is too long")
        head = bytes(packed[:end])
        if _CHECKSUM.unpack_from(packed, end)[0] != xxhash.xxh3_64_intdigest(head):
            raise ValueError("its checksum is wrong")
        fields: dict[str, Any] = json.loads(head[_HEAD.size :])
        info = TensorInfo.checked(fields["name"], fields["dtype"], fields["shape"], fields["bytes"])
        if start + info.min_packed_bytes() > (len(packed) if size is None else size):
            raise ValueError(f"the file has no room for {info.nbytes:,} bytes, however they are packed")
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CompressionError(f"{where} is damaged: its head is not what was written ({error}). {REMEDY}") from None
    return info, start


def records(info: TensorInfo, packed: memoryview, start: int) -> Iterator[memoryview]:
    """Yield the records of a packed tensor, each after its checksum has been checked.

    Args:
        info: From `unpack_head`.
        packed: The packed tensor.
        start: The length of its head.

    Raises:
        CompressionError: If a record is damaged, or something is missing or left over.
    """
    previous = packed[start - _CHECKSUM.size : start]
    for _ in info.chunks:
        try:
            codec, _ = _RECORD.unpack_from(packed, start)
            sizes = _section_count(info, codec)
            stored = sum(_SIZE.unpack_from(packed, start + _RECORD.size + i * _SIZE.size)[0] for i in range(sizes))
        except struct.error:
            raise _damaged(info) from None
        end = start + _RECORD.size + sizes * _SIZE.size + stored
        record, checksum = packed[start:end], packed[end : end + _CHECKSUM.size]
        if len(checksum) < _CHECKSUM.size or chain(record, previous) != checksum:
            raise _damaged(info)
        yield record
        previous, start = checksum, end + _CHECKSUM.size
    if start != len(packed):
        raise _damaged(info)


REMEDY = "Get the file again, or compress the original once more"


def _damaged(info: TensorInfo) -> CompressionError:
    return CompressionError(f"tensor {info.name} is damaged: its checksum is wrong. {REMEDY}")


def _masked(info: TensorInfo, words: np.ndarray, mask: np.ndarray, kept: np.ndarray) -> list[bytes]:
    return [_compressor().compress(np.packbits(mask).data), *_planes(info, words[kept])]


def _planes(info: TensorInfo, words: np.ndarray) -> list[bytes]:
    """Compress the bytes of words plane by plane, the highest first."""
    bits = 8 * info.word.itemsize
    if info.dtype in _FLOATS:
        words = (words << 1) | (words >> (bits - 1))
    return [_compressor().compress((words >> shift).astype("u1").data) for shift in range(bits - 8, -8, -8)]


def _join(info: TensorInfo, planes: list[bytes], count: int) -> np.ndarray:
    """Undo `_planes`."""
    words = np.zeros(count, info.word)
    for plane in planes:
        words = (words << 8) | np.frombuffer(plane, "u1") if len(planes) > 1 else np.frombuffer(plane, info.word)
    return (words >> 1) | (words << (8 * info.word.itemsize - 1)) if info.dtype in _FLOATS else words


def _section_count(info: TensorInfo, codec: int) -> int:
    if codec not in (_ZEROS, _DENSE, _MASK):
        raise _damaged(info)
    return 0 if codec == _ZEROS else info.word.itemsize + (codec == _MASK)


def _sections(info: TensorInfo, record: bytes | memoryview, codec: int) -> list[memoryview]:
    count = _section_count(info, codec)
    start = _RECORD.size + count * _SIZE.size
    sections = []
    for i in range(count):
        end = start + _SIZE.unpack_from(record, _RECORD.size + i * _SIZE.size)[0]
        sections.append(memoryview(record)[start:end])
        start = end
    return sections


def _compressor() -> zstandard.ZstdCompressor:
    """One per thread: they are not safe to share."""
    if not hasattr(_thread, "compressor"):
        parameters = zstandard.ZstdCompressionParameters.from_level(1, **_ZSTANDARD)
        _thread.compressor = zstandard.ZstdCompressor(compression_params=parameters)
    return _thread.compressor


def _decompress(info: TensorInfo, section: memoryview, size: int) -> bytes:
    """Decompress a section that must yield `size` bytes: what is not ours cannot fill the memory."""
    if not hasattr(_thread, "decompressor"):
        _thread.decompressor = zstandard.ZstdDecompressor()
    try:
        if size and zstandard.frame_content_size(section) != size:
            raise _damaged(info)
        return _thread.decompressor.decompress(section) if size else b""
    except zstandard.ZstdError:
        raise _damaged(info) from None
