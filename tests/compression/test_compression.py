"""Compressed checkpoints: nothing is lost, nothing altered goes unnoticed, and what loads trains on as before."""

import filecmp
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import zstandard
from conftest import REPOSITORY, blocks, character_tokenizer, tiny_gpt2, tiny_llama
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_padam import compress, decompress, save_compressed
from hf_padam.__main__ import main
from hf_padam.compression import model_directory
from hf_padam.compression.model_directory import ModelDirectory, unpack
from hf_padam.compression.packing import CompressionError, TensorInfo, pack_chunk
from hf_padam.files import WriteError


def prune(model, share=0.6, seed=0):
    """Set a share of every matrix to zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param[torch.rand(param.shape, generator=generator) < share] = 0
    return model


def tiny_mixtral():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return MixtralForCausalLM(MixtralConfig(vocab_size=50, num_key_value_heads=1, num_local_experts=4, **sizes))


MODELS = {
    "llama, tied": lambda: tiny_llama(),
    "gpt2, bf16": lambda: tiny_gpt2().bfloat16(),
    "llama, fp16, sharded": lambda: tiny_llama(tie_word_embeddings=False).half(),
    "mixtral, converted on loading": lambda: tiny_mixtral(),
}


@pytest.fixture(params=MODELS)
def dense(request, tmp_path) -> Path:
    """The directory of a sparse model as save_pretrained writes it."""
    prune(MODELS[request.param]()).save_pretrained(
        tmp_path / "dense", max_shard_size="30KB" if "sharded" in request.param else "1GB"
    )
    return tmp_path / "dense"


@pytest.fixture
def sparse_llama(tmp_path) -> Path:
    prune(tiny_llama()).save_pretrained(tmp_path / "dense")
    character_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def assert_same_files(left: Path, right: Path):
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    assert filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


def assert_same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def test_decompressing_gives_every_file_back_byte_by_byte(dense, tmp_path):
    character_tokenizer().save_pretrained(dense)
    (dense / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    compressed = compress(dense, tmp_path / "compressed")
    assert compressed.bytes == sum(file.stat().st_size for file in (tmp_path / "compressed").glob("*.safetensors"))
    assert "| decayed weights |" in (tmp_path / "compressed" / "README.md").read_text()
    decompress(tmp_path / "compressed", tmp_path / "back")
    assert_same_files(dense, tmp_path / "back")


def test_files_in_other_layouts_than_transformers_own_come_back_byte_by_byte(tmp_path):
    source = tmp_path / "dense"
    source.mkdir()
    save_file({"a": torch.ones(3)}, source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text('{"weight_map":{"a":"model-00001-of-00001.safetensors"}}')
    (source / "config.json").write_bytes('{"model_type":"llama","note":"größer"}'.encode())
    (source / "README.md").write_bytes(b"# A card\r\nin Latin-1: \xe4\r\n")
    save_file({"b": torch.zeros(3)}, source / "adapter_model.safetensors")
    compress(source, tmp_path / "compressed")
    decompress(tmp_path / "compressed", tmp_path / "back")
    assert_same_files(source, tmp_path / "back")


def header(entries: object, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        header({"__metadata__": None}),
        header({"__metadata__": {"format": 1}}),
        header({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, bytes(4)),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}, bytes(4)),
        header({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        header({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, bytes(4)),
        header({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 4]}}, bytes(4)),
        header({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 4]}}, bytes(4)),
        header({"a": {"dtype": "U8", "shape": "", "data_offsets": [0, 1]}}, bytes(1)),
        header({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, bytes(1)),
        header({"a": {"dtype": "U8", "shape": [1] * 65, "data_offsets": [0, 1]}}, bytes(1)),
        header({"a": {"dtype": "U8", "shape": [1 << 62, 4, 0], "data_offsets": [0, 0]}}),
        header({"a": {"dtype": "U8", "shape": [10**4000], "data_offsets": [0, 10**4000]}}),
        header({"\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, bytes(1)),
        header({"__metadata__": {"format": "\ud800"}}),
        header({"a": {"dtype": "F4", "shape": [0, 4], "data_offsets": [0, 8]}}, bytes(8)),
        header({"a": 3}),
        header(b"[" * 100_000),
        header(b"[]"),
        b"",
    ],
    ids=range(20),
)
def test_a_header_that_cannot_be_right_is_one_clear_error(content, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CompressionError, match="model.safetensors is damaged: .*Get the file again"):
        ModelDirectory(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../dense/model.safetensors"}}, "not a safetensors file beside it"),
        ({"weight_map": {"a": "part/model.safetensors"}}, "not a safetensors file beside it"),
        ({"weight_map": {"a": 3}}, "not a safetensors file beside it"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({}, "has neither model.safetensors nor"),
    ],
)
def test_an_index_names_files_beside_it(index, message, sparse_llama, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CompressionError, match=message):
        ModelDirectory(tmp_path)


def test_odd_tensors_survive_bit_by_bit(tmp_path):
    source = tmp_path / "dense"
    source.mkdir()
    bits = torch.randint(-(2**15), 2**15, (3, 50_001), generator=torch.Generator().manual_seed(0)).short()
    negative_zeros = torch.tensor([0.0, -0.0, 1.0, float("nan"), float("inf"), 1e-45] * 50)
    tensors = {
        "any_bits": bits.view(torch.bfloat16),  # more than one chunk, signalling NaNs included
        "negative_zeros": negative_zeros,
        "float8": negative_zeros.to(torch.float8_e4m3fn),
        "double": torch.randn(4, 5).double(),
        "integers": torch.tensor([[0, -1], [2**62, 0]]),
        "booleans": torch.tensor([True, False, False]),
        "scalar": torch.tensor(3.5),
        "zero": torch.zeros(()),
        "empty": torch.zeros(0, 7),
        "all_zero": torch.zeros(300, 500, dtype=torch.float16),
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt", "made_by": "a test"})
    (source / "config.json").write_text('{\n  "model_type": "llama"\n}\n')
    compress(source, tmp_path / "compressed")
    decompress(tmp_path / "compressed", tmp_path / "back")
    assert (source / "model.safetensors").read_bytes() == (tmp_path / "back" / "model.safetensors").read_bytes()
    with ModelDirectory(tmp_path / "compressed") as model:
        for stored in model.stored:
            info, unpacked = unpack(memoryview(stored.read()), stored.where)
            tensor = tensors[info.name]
            assert unpacked.shape == tensor.shape and unpacked.dtype == tensor.dtype
            assert torch.equal(unpacked.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


@pytest.mark.parametrize("zeros", [0.5, 0.7, 0.9])
def test_weights_pack_below_the_bitmask_arithmetic_and_below_zstd_and_gzip(zeros):
    count = 1 << 18
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(count, generator=generator) * 0.02
    weights[torch.rand(count, generator=generator) < zeros] = 0
    data = weights.bfloat16().view(torch.uint8).numpy().tobytes()
    info = TensorInfo("w", "BF16", (count,), len(data))
    packed = sum(len(pack_chunk(info, data[start : start + size])) for start, size in info.chunks)
    assert packed < count / 8 + 2 * int((weights != 0).sum())
    assert packed < len(zstandard.compress(data, 19)) and packed < len(gzip.compress(data, 9))


def test_from_pretrained_loads_it_as_an_ordinary_model(dense, tmp_path):
    compress(dense, tmp_path / "compressed")
    expected = AutoModelForCausalLM.from_pretrained(dense)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert_same_weights(loaded, expected)
    assert not loaded.is_quantized and not hasattr(loaded.config, "quantization_config")
    assert all(param.requires_grad for param in loaded.parameters())
    for name, model in ("saved", loaded), ("expected", expected):
        model.save_pretrained(tmp_path / name, max_shard_size="30KB")
    assert_same_files(tmp_path / "expected", tmp_path / "saved")


def test_loading_takes_dtype_and_device_map(sparse_llama, tmp_path):
    compress(sparse_llama, tmp_path / "compressed")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", dtype=torch.bfloat16)
    assert_same_weights(half, AutoModelForCausalLM.from_pretrained(sparse_llama, dtype=torch.bfloat16))
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "compressed",
        device_map={"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
                    "model.layers.0": "cpu", "model.layers.1": "disk"},
        offload_folder=str(tmp_path / "offload"),
    )  # fmt: skip
    ids = torch.tensor([[5, 6, 7]])
    expected = AutoModelForCausalLM.from_pretrained(sparse_llama)(ids).logits
    assert torch.equal(offloaded(ids).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "compressed")("a").input_ids


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_where_the_config_names_no_dtype_it_is_that_of_the_dense_model(key, sparse_llama, tmp_path):
    """The first tensor's by name, as Transformers has it, though others be of another and come first in the file."""
    weights = load_file(sparse_llama / "model.safetensors")
    mixed = {name: t.float() if "norm" in name else t.bfloat16() for name, t in weights.items()}
    save_file(mixed, sparse_llama / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((sparse_llama / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "dtype"} | ({key: None} if key else {})
    (sparse_llama / "config.json").write_text(json.dumps(config))
    compress(sparse_llama, tmp_path / "compressed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert loaded.dtype == torch.bfloat16
    assert_same_weights(loaded, AutoModelForCausalLM.from_pretrained(sparse_llama))


def tiny_llama4(**text):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(vocab_size=97, intermediate_size_mlp=64, num_key_value_heads=2, head_dim=8, num_local_experts=2)
    vision = dict(image_size=8, patch_size=4, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
    vision |= sizes | dict(intermediate_size=128)
    return Llama4ForConditionalGeneration(
        Llama4Config(text_config=sizes | text | {"pad_token_id": 0}, vision_config=vision)
    )


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_language_model_of_a_multimodal_one_loads_alone(dtype, tmp_path):
    """Transformers looks for its dtype, and for how it is packed, in its part of the config."""
    tiny_llama4(**({"dtype": dtype} if dtype else {})).bfloat16().save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "compressed")
    for kind in (AutoModelForCausalLM, Llama4ForCausalLM, Llama4ForConditionalGeneration):
        loaded = kind.from_pretrained(tmp_path / "compressed")
        assert_same_weights(loaded, kind.from_pretrained(tmp_path / "dense"))
        loaded.save_pretrained(tmp_path / "again")
        assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()


def test_fine_tuning_goes_on_from_it_and_keeps_every_zero(sparse_llama, tmp_path):
    compress(sparse_llama, tmp_path / "compressed")

    def trainer(steps):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
        options = dict(optim="padam", optim_args="p_norm=0.8,lambda_p=0.01", learning_rate=1e-3, report_to="none")
        args = TrainingArguments(tmp_path / "run", max_steps=steps, save_steps=2, use_cpu=True, seed=1, **options)
        return Trainer(model=model, args=args, train_dataset=blocks())

    before = load_file(sparse_llama / "model.safetensors")
    first = trainer(4)
    first.train()
    first.save_model(tmp_path / "tuned")
    after = load_file(tmp_path / "tuned" / "model.safetensors")
    assert after.keys() == before.keys()
    decayed = [name for name in before if "layers" in name and before[name].dim() > 1]
    for name in decayed:
        assert bool((after[name][before[name] == 0] == 0).all()) and not torch.equal(after[name], before[name])
    assert "quantization_config" not in json.loads((tmp_path / "tuned" / "config.json").read_text())
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_weights(resumed.model, first.model)
    save_compressed(first.model, tmp_path / "again")
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), first.model)


def test_any_altered_byte_is_noticed_and_its_file_named(sparse_llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(sparse_llama).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    compressed = compress(tmp_path / "sharded", tmp_path / "compressed").directory
    files = [*compressed.glob("*.safetensors"), compressed / "config.json", *compressed.glob("*.index.json")]
    assert len(files) == 5
    for file in files:
        data = file.read_bytes()
        positions = {*range(0, min(len(data), 12)), *range(0, len(data), len(data) // 60), len(data) - 1}
        for position in positions:
            altered = bytes([data[position] ^ (1 << position % 8)])
            for damaged in (data[:position] + altered + data[position + 1 :], data[:position]):
                file.write_bytes(damaged)
                with pytest.raises(CompressionError, match=file.name), ModelDirectory(compressed) as model:
                    model.check()
        file.write_bytes(data)
    with ModelDirectory(compressed) as model:
        model.check()


@pytest.mark.parametrize("use", [AutoModelForCausalLM.from_pretrained, lambda path: decompress(path, f"{path}-back")])
def test_damaged_weights_are_neither_loaded_nor_decompressed(use, sparse_llama, tmp_path):
    file = compress(sparse_llama, tmp_path / "compressed").directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CompressionError, match="model.safetensors.*tensor model.norm.weight is damaged"):
        use(file.parent)
    assert not (tmp_path / "compressed-back").exists()


@pytest.mark.parametrize("use", [AutoModelForCausalLM.from_pretrained, lambda path: decompress(path, f"{path}-back")])
def test_an_unknown_version_is_refused_by_name(use, sparse_llama, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("hf_padam.compression.compress.FORMAT_VERSION", 7)
        patch.setattr(model_directory, "FORMAT_VERSION", 7)
        compress(sparse_llama, tmp_path / "compressed")
    with pytest.raises(
        CompressionError, match="version '?7'? of hf_padam's format; this installation reads version 1"
    ):
        use(tmp_path / "compressed")


def test_a_kill_leaves_no_directory_and_the_next_attempt_works(tmp_path):
    source, destination = tmp_path / "dense", tmp_path / "compressed"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama"}')
    save_file({"w": torch.randn(6000, 6000)}, source / "model.safetensors")
    command = [sys.executable, "-m", "hf_padam", "compress", str(source), str(destination)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        staging = tmp_path / ".compressed.incomplete" / "model.safetensors"
        while process.poll() is None and not (staging.is_file() and staging.stat().st_size > 1_000_000):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not destination.exists()
    assert staging.is_file()  # killed while it was writing
    save_file({"w": torch.ones(4, 4)}, source / "model.safetensors")
    compress(source, destination)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compressed", "dense"]


def test_what_exists_is_replaced_only_with_force_and_only_if_it_is_a_model(sparse_llama, tmp_path, capsys):
    arguments = ["compress", str(sparse_llama), str(tmp_path / "out")]
    main(arguments)
    marker = tmp_path / "out" / "marker.txt"
    marker.touch()
    with pytest.raises(SystemExit, match="out exists already.*--force"):
        main(arguments)
    assert marker.exists()
    main([*arguments, "--force"])
    assert not marker.exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").touch()
    with pytest.raises(SystemExit, match="not a model's directory"):
        main(["compress", str(sparse_llama), str(tmp_path / "letters"), "--force"])
    with pytest.raises(SystemExit, match="holds the model to read"):
        main(["compress", str(sparse_llama), str(tmp_path), "--force"])
    main(["decompress", str(tmp_path / "out"), str(tmp_path / "back")])
    assert_same_files(sparse_llama, tmp_path / "back")
    assert "MB" in capsys.readouterr().out


@pytest.mark.parametrize("directory", ["checkpoint-10", ".git"])
def test_force_spares_what_else_is_in_a_models_directory(directory, sparse_llama, tmp_path):
    out = compress(sparse_llama, tmp_path / "out").directory
    (out / directory).mkdir()
    (out / directory / "kept").touch()
    model = AutoModelForCausalLM.from_pretrained(sparse_llama)
    for again in (lambda: compress(sparse_llama, out, force=True), lambda: save_compressed(model, out, force=True)):
        with pytest.raises(FileExistsError, match=f"holds {directory}/ beside a model, so --force spares it"):
            again()
    assert (out / directory / "kept").exists()


def test_a_replacement_that_fails_leaves_what_was_there(sparse_llama, tmp_path, monkeypatch):
    out = compress(sparse_llama, tmp_path / "out").directory
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    rename = os.rename

    def fails(source, destination):
        if ".incomplete" in str(source):
            raise OSError("no")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="out could not be written: no"):
        compress(sparse_llama, out, force=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    monkeypatch.undo()
    out.rename(tmp_path / ".out.replaced")  # a kill between the two renames
    with pytest.raises(FileExistsError):
        compress(sparse_llama, out)
    compress(sparse_llama, out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.parametrize("mode", [0o700, 0o2770])
@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_is_there_keeps_its_permissions(mode, force, sparse_llama, tmp_path):
    destination = tmp_path / "private"
    if force:
        shutil.copytree(sparse_llama, destination)
    else:
        destination.mkdir()
    destination.chmod(mode)
    compress(sparse_llama, destination, force=force)
    assert destination.stat().st_mode & 0o7777 == mode


def test_a_disk_that_fills_up_while_safetensors_writes_is_a_write_error(tmp_path, monkeypatch):
    model = tiny_llama()
    full = mock.Mock(side_effect=SafetensorError("I/O error: No space left on device"))
    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(WriteError, match="could not be written.*No space left"):
        save_compressed(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_in_other_formats_are_left_out(sparse_llama, tmp_path):
    names = ("rust_model.ot", "64.tflite", "model.onnx_data", "x.npz", "weights.pkl", "openvino_model.xml")
    for name in names:
        (sparse_llama / name).write_bytes(b"large")
    compressed = compress(sparse_llama, tmp_path / "compressed")
    assert set(names) <= set(compressed.left_out)
    assert not [name for name in names if (tmp_path / "compressed" / name).exists()]


def test_a_link_stays_a_link(sparse_llama, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    compress(sparse_llama, tmp_path / "link")
    compress(sparse_llama, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "model.safetensors").is_file()


def test_a_dense_model_compresses_with_a_note(model_dir, tmp_path):
    assert "compression gains little" in str(compress(model_dir, tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "only pytorch_model.bin"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}'), "fp8"),
        (lambda path: (path / "config.json").write_text('{"quantization_config": [4]}'), "quantization_config is .4."),
        (
            lambda path: (path / "config.json").write_text(
                '{"text_config": {"quantization_config": {"quant_method": "awq"}}}'
            ),
            "is quantized .awq.",
        ),
        (lambda path: os.truncate(path / "model.safetensors", 5000), "model.safetensors is damaged"),
        (lambda path: shutil.rmtree(path), "neither a directory nor a model's id"),
        (lambda path: compress(path, path / "c") and shutil.copytree(path / "c", path, dirs_exist_ok=True), "already"),
    ],
)
def test_what_cannot_be_compressed_is_refused_with_the_reason(change, message, sparse_llama, tmp_path):
    change(sparse_llama)
    with pytest.raises(CompressionError, match=message):
        compress(sparse_llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_header_of_another_writer_comes_back_byte_by_byte(sparse_llama, tmp_path):
    """Entries in another order than the data, as in some files of the Hub, indented and not padded."""
    file = sparse_llama / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = dict(reversed(json.loads(content[8 : 8 + length]).items()))
    text = json.dumps(entries, indent=1).encode()
    text += b" " * (1 - len(text) % 2)  # an odd length
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    compress(sparse_llama, tmp_path / "small")
    decompress(tmp_path / "small", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == file.read_bytes()
    assert_same_weights(
        AutoModelForCausalLM.from_pretrained(tmp_path / "small"), AutoModelForCausalLM.from_pretrained(sparse_llama)
    )


def test_save_compressed_uploads_what_it_has_written(tmp_path):
    with mock.patch("huggingface_hub.HfApi") as api:
        api.return_value.create_repo.return_value.repo_id = "me/sparse"
        result = save_compressed(prune(tiny_llama()), tmp_path / "out", push_to_hub="sparse", max_shard_size="30KB")
    api.return_value.create_repo.assert_called_once_with("sparse", private=True, exist_ok=True)
    assert api.return_value.upload_folder.call_args.kwargs["folder_path"] == str(tmp_path / "out")
    deleted = api.return_value.upload_folder.call_args.kwargs["delete_patterns"]
    weights = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    kept = ["config.json", "adapter_model.safetensors", "last-checkpoint/model.safetensors", "onnx/model-1-of-2.bin"]
    assert list(filter_repo_objects(weights + kept, allow_patterns=deleted)) == weights
    assert result.directory == tmp_path / "out" and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert not list((tmp_path / "out").glob("dense*"))
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), prune(tiny_llama()))


def test_a_model_of_the_hub_is_downloaded_without_its_other_formats(sparse_llama, tmp_path):
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(sparse_llama)) as download:
        compress("somebody/sparse-llama", tmp_path / "out")
    assert download.call_args.args == ("somebody/sparse-llama",)
    wanted = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.bpe",
              "config.json", "qwen.tiktoken", "tokenizer.spm", "LICENSE", "adapter_model.safetensors"]  # fmt: skip
    unwanted = [
        "pytorch_model.bin",
        "original/model.safetensors",
        "consolidated.safetensors",
        "model.fp16.safetensors",
    ]
    fetched = filter_repo_objects(wanted + unwanted, **download.call_args.kwargs)
    assert list(fetched) == wanted
    decompress(tmp_path / "out", tmp_path / "back")
    assert_same_files(sparse_llama, tmp_path / "back")
