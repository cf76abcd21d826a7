"""Files whose checksums are right and whose numbers lie: refused before any says how much memory to take."""

import json
import struct
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
import torch
import xxhash
from conftest import tiny_llama
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_padam import compress, decompress
from hf_padam.compression.decayed_on_disk import DecayedOnDisk
from hf_padam.compression.model_directory import ModelDirectory, unpack
from hf_padam.compression.packing import MAX_HEAD, CompressionError, TensorInfo, pack_chunk, pack_head, unpack_head
from hf_padam.compression.sparsity_report import SparsityReport

TRUE = {"name": "w", "dtype": "F32", "shape": [4, 4], "bytes": 64}


def head(text: object) -> bytes:
    """A head with a right checksum."""
    data = text if isinstance(text, bytes) else json.dumps(text).encode()
    data = struct.pack("<I", len(data)) + data
    return data + struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


FORGED = {
    "a float for the size": TRUE | {"bytes": 64.0},
    "text for the size": TRUE | {"bytes": "64"},
    "a boolean for the size": TRUE | {"dtype": "U8", "shape": [1], "bytes": True},
    "no size": {name: value for name, value in TRUE.items() if name != "bytes"},
    "a negative size": TRUE | {"bytes": -64},
    "another size than the shape's": TRUE | {"bytes": 128},
    "no number for the size": b'{"name": "w", "dtype": "F32", "shape": [4, 4], "bytes": NaN}',
    "more digits than a number has": b'{"name": "w", "dtype": "F32", "shape": [4, 4], "bytes": 1' + b"0" * 5000 + b"}",
    "a huge size and shape": TRUE | {"bytes": 1 << 42, "shape": [1 << 40]},
    "a size beyond the address space": TRUE | {"bytes": 1 << 80, "shape": [1 << 78]},
    "a dimension that is a float": TRUE | {"shape": [4.0, 4]},
    "a dimension that is a boolean": TRUE | {"shape": [16, True]},
    "negative dimensions": TRUE | {"shape": [-4, -4]},
    "text for the shape": TRUE | {"shape": "44"},
    "empty text for the shape": TRUE | {"shape": "", "bytes": 4},
    "an object for the shape": TRUE | {"shape": {}, "bytes": 4},
    "a nested shape": TRUE | {"shape": [[4, 4]]},
    "no shape": TRUE | {"shape": None},
    "more dimensions than there are": TRUE | {"shape": [1] * 100 + [16]},
    "nothing, of a size that torch cannot count": TRUE | {"shape": [1 << 62, 4, 0], "bytes": 0},
    "another dtype": TRUE | {"dtype": "F64"},
    "an unknown dtype with more elements than bits": TRUE | {"dtype": "F1", "shape": [513]},
    "a number for the dtype": TRUE | {"dtype": 32},
    "a list for the dtype": TRUE | {"dtype": ["F32"]},
    "a number for the name": TRUE | {"name": 7},
    "what no text has for the name": TRUE | {"name": "\ud800"},
    "a list": [TRUE],
    "nested lists": b"[" * 20_000,
    "no JSON": b"{",
    "more than a head has": TRUE | {"name": "w" * MAX_HEAD},
}  # fmt: skip


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_forged_head_is_one_clear_error_and_takes_no_memory(forged):
    records = memoryview(head(forged) + bytes(1000))
    tracemalloc.start()
    try:
        for read in (unpack, unpack_head):
            with pytest.raises(CompressionError, match="^the file is damaged: its head is not what was written"):
                read(records, "the file")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_a_head_may_say_what_fits_and_nothing_larger():
    """All chunks of zeros take the least; a head that claims one more than the file can hold is refused."""
    info = TensorInfo("w", "F32", (3 * (1 << 17),), 3 * (1 << 19))
    record = pack_chunk(info, bytes(1 << 19))
    packed = pack_head(info) + 3 * (record + bytes(8))
    assert unpack_head(memoryview(packed), "the file")[0] == info
    with pytest.raises(CompressionError, match="no room for 1,572,864 bytes"):
        unpack_head(memoryview(packed[:-1]), "the file")
    beginning = memoryview(packed[: len(pack_head(info)) + 1])
    assert unpack_head(beginning, "the file", len(packed))[0] == info


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    save_file({"v": torch.ones(3), "w": torch.ones(4, 4)}, path / "model.safetensors", metadata={"format": "pt"})
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    return path


def report(path: Path) -> None:
    with ModelDirectory(path) as model:
        SparsityReport.of(model)


@pytest.mark.parametrize("forged", ["a huge size and shape", "text for the size", "negative dimensions"])
def test_a_directory_with_a_forged_head_is_refused_by_whoever_reads_it(forged, dense, tmp_path):
    def forge(info: TensorInfo) -> bytes:
        return pack_head(info) if info.name != "w" else head(FORGED[forged])

    with (
        mock.patch("hf_padam.compression.compress.pack_head", forge),
        mock.patch.object(ModelDirectory, "check", lambda model: None),
    ):
        compress(dense, tmp_path / "forged")
    for use in (AutoModelForCausalLM.from_pretrained, lambda path: decompress(path, tmp_path / "back"), report):
        with pytest.raises(CompressionError, match="tensor w in .*model.safetensors is damaged: its head"):
            use(tmp_path / "forged")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("metadata", [None, "", "[]", '{"format": 1}', '{"format": "\\ud800"}', "[" * 20_000, "{"])
def test_forged_metadata_of_the_original_is_refused(metadata, dense, tmp_path):
    def dumps(value: object, real=json.dumps, **options) -> str:
        return metadata if value == {"format": "pt"} and metadata is not None else real(value, **options)

    with mock.patch("hf_padam.compression.compress.json.dumps", dumps):
        compress(dense, tmp_path / "forged")
    if metadata is None:
        decompress(tmp_path / "forged", tmp_path / "back")
    else:
        with pytest.raises(CompressionError, match="model.safetensors is damaged: it does not say which metadata"):
            decompress(tmp_path / "forged", tmp_path / "back")


@pytest.mark.parametrize("dtype", ["F32", "I8"])
def test_a_dense_tensor_where_packed_ones_are_said_to_be_is_refused(dtype, dense, tmp_path):
    compress(dense, tmp_path / "forged")
    with ModelDirectory(tmp_path / "forged") as model:
        stored = model.stored[0]
        object.__setattr__(stored.info, "dtype", dtype)
        with pytest.raises(CompressionError, match="is not packed, although its file says so"):
            model.check_tensor(stored)


@pytest.mark.parametrize("config", ["[" * 20_000, b"\xff", "[]", '"text"'], ids=["nested", "bytes", "list", "text"])
def test_a_config_that_is_none_is_one_clear_error(config, dense, tmp_path):
    (tmp_path / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    (tmp_path / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    with pytest.raises(CompressionError, match="config.json is damaged: it does not hold a JSON object"):
        ModelDirectory(tmp_path)


@pytest.mark.parametrize(
    "numbers",
    [
        {"num_hidden_layers": 10**9},
        {"n_layers": 10**9},
        {"decoder_layers": 10**9},
        {"vision_config": {"num_hidden_layers": 10**9}},
        {"audio_config": {"encoder": [{"depth": 1e9}]}},
        {"num_local_experts": 10**9},
        {"depths": [2, 10**9]},
    ],
    ids=str,
)
def test_a_config_that_asks_for_a_billion_modules_makes_none(tmp_path, numbers):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | numbers))
    with ModelDirectory(tmp_path) as model:
        assert "=1000000000" in (said := DecayedOnDisk.of(model).source) or "=1000000000.0" in said


def test_labels_are_no_numbers_of_modules(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"label2id": {"CD player, record player": 9835}}))
    with ModelDirectory(tmp_path) as model:
        assert DecayedOnDisk.of(model).decayed
