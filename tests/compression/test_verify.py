"""`hf-padam verify`: whatever is wrong with a model's directory is said, and nothing of one that is whole."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import character_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file

from hf_padam import compress
from hf_padam.__main__ import main
from hf_padam.compression.packing import CompressionError
from hf_padam.compression.verify import verify

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("originals")
    for name, size in ("single", "1GB"), ("sharded", "40KB"):
        tiny_llama().save_pretrained(path / name, max_shard_size=size)
        character_tokenizer().save_pretrained(path / name)
        (path / name / "adapter_model.safetensors").write_bytes(b"")
        save_file({"a": torch.ones(2)}, path / name / "adapter_model.safetensors")
        (path / name / "vocabulary.txt").touch()
        compress(path / name, path / f"{name}, compressed")
    return path


@pytest.fixture(params=["single", "sharded", "single, compressed", "sharded, compressed"])
def directory(request, originals, tmp_path) -> Path:
    return shutil.copytree(originals / request.param, tmp_path / request.param)


@pytest.fixture(params=["sharded", "sharded, compressed"])
def sharded(request, originals, tmp_path) -> Path:
    return shutil.copytree(originals / request.param, tmp_path / request.param)


@pytest.fixture(params=["single, compressed", "sharded, compressed"])
def compressed(request, originals, tmp_path) -> Path:
    return shutil.copytree(originals / request.param, tmp_path / request.param)


def run(directory, capsys) -> tuple[int, str]:
    """The exit status, and what was printed."""
    status = 0
    try:
        main(["verify", str(directory)])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out


def weights(directory: Path) -> list[Path]:
    return sorted(directory.glob("model*.safetensors"))


def problems(directory, capsys) -> list[str]:
    """What is wrong, which the command says, with the exit status 1."""
    status, output = run(directory, capsys)
    assert status == 1 and "NOT INTACT" in output
    found = verify(directory).problems
    assert found and all(f"PROBLEM: {problem}" in output for problem in found)
    return found


def test_what_is_whole_is_intact_and_every_file_is_named(directory, capsys):
    status, output = run(directory, capsys)
    assert status == 0 and "PROBLEM" not in output
    compressed = "compressed" in directory.name
    assert output.endswith("Intact.\n" if compressed else "Intact, as far as can be told without checksums.\n")
    assert ("the checksums of its header" in output) == compressed
    assert all(file.name in output for file in directory.iterdir())
    assert "not checked, for nothing says what they should hold: " in output and "vocabulary.txt" in output


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_of_weights_is_a_problem(size, directory, capsys):
    for file in weights(directory):
        os.truncate(file, size % file.stat().st_size)
    found = problems(directory, capsys)
    assert [str(file) in problem for file, problem in zip(weights(directory), found, strict=True)]


def test_a_flipped_bit_of_a_compressed_directory_is_a_problem_of_its_file_alone(compressed, capsys):
    *others, last = [*weights(compressed), compressed / "config.json"]
    others += [compressed / INDEX] if (compressed / INDEX).exists() else []
    for file in (*others, last):
        data = file.read_bytes()
        for position in (len(data) // 3, len(data) - 1):
            file.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
            found = problems(compressed, capsys)
            assert all(str(file) in problem for problem in found), found
        file.write_bytes(data)
    assert run(compressed, capsys)[0] == 0


def test_every_damaged_file_is_named_not_only_the_first(sharded, capsys):
    first, second, *_ = weights(sharded)
    os.truncate(first, 100)
    second.unlink()
    found = problems(sharded, capsys)
    for name, what in (first, "is damaged"), (second, "which is missing"):
        assert any(str(name) in problem and what in problem for problem in found)


def test_a_missing_index_or_config_is_a_problem(sharded, capsys):
    (sharded / "config.json").unlink()
    assert f"{sharded / 'config.json'} is missing" in problems(sharded, capsys)
    (sharded / INDEX).unlink()
    assert "has neither model.safetensors nor" in problems(sharded, capsys)[0]


@pytest.mark.parametrize("name", ["model-00009-of-00009.safetensors", INDEX, "model.safetensors"])
def test_a_file_of_weights_that_is_no_part_of_the_model_is_a_problem(name, originals, tmp_path, capsys):
    single = name == INDEX
    source = originals / ("single, compressed" if single else "sharded, compressed")
    directory = shutil.copytree(source, tmp_path / "more")
    shutil.copy(originals / "sharded" / INDEX if single else weights(directory)[0], directory / name)
    left_over = INDEX if name == "model.safetensors" else name  # which comes before an index
    found = problems(directory, capsys)
    assert any(f"{directory / left_over} is no part of the model" in problem for problem in found)


@pytest.mark.parametrize("change", ["a name less", "a name more", "another file"])
def test_an_index_that_does_not_say_what_the_files_hold_is_a_problem(change, sharded, capsys):
    index = json.loads((sharded / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    if change == "a name less":
        del index["weight_map"][name]
    else:
        other = next(other for other in index["weight_map"].values() if other != file)
        index["weight_map"] |= {"more": file} if change == "a name more" else {name: other}
    (sharded / INDEX).write_text(json.dumps(index))
    found = problems(sharded, capsys)
    assert any(INDEX in problem and ("more" if change == "a name more" else name) in problem for problem in found)


@pytest.mark.parametrize("change", ["twice", "missing"])
def test_shards_that_overlap_or_lack_something_are_neither_intact_nor_compressed(change, originals, tmp_path, capsys):
    directory = shutil.copytree(originals / "sharded", tmp_path / "model")
    first, second, *_ = weights(directory)
    tensors, others = load_file(first), load_file(second)
    name = next(iter(tensors))
    if change == "twice":
        save_file(others | {name: tensors[name]}, second)
    else:
        del tensors[name]
        save_file(tensors, first)
    assert name in problems(directory, capsys)[0]
    with pytest.raises(CompressionError, match=name):
        compress(directory, tmp_path / "compressed")
    assert not (tmp_path / "compressed").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_what_is_no_json_is_a_problem(name, directory, capsys):
    (directory / name).write_text('{"a": ')
    assert any(str(directory / name) in problem for problem in problems(directory, capsys))


def test_a_damaged_adapter_is_a_problem(directory, capsys):
    os.truncate(directory / "adapter_model.safetensors", 20)
    assert "adapter_model.safetensors is damaged" in problems(directory, capsys)[0]


def test_a_dense_file_among_compressed_ones_is_a_problem(originals, tmp_path, capsys):
    directory = shutil.copytree(originals / "sharded, compressed", tmp_path / "mixed")
    dense = weights(originals / "sharded")[1]
    shutil.copy(dense, directory / dense.name)
    [problem] = problems(directory, capsys)
    assert dense.name in problem and "not compressed although config.json says so" in problem


@pytest.mark.parametrize("what", ["nothing", "a file", "empty", "letters", "an adapter", "another format"])
def test_what_is_no_model_is_a_clear_error_with_a_status_of_its_own(what, originals, tmp_path, capsys):
    path = tmp_path / "model"
    if what == "a file":
        path.write_text("text")
    elif what != "nothing":
        path.mkdir()
    if what == "letters":
        (path / "letter.json").write_text("{}")
    elif what == "an adapter":
        shutil.copy(originals / "single" / "adapter_model.safetensors", path)
        (path / "adapter_config.json").write_text("{}")
    elif what == "another format":
        shutil.copy(originals / "single" / "config.json", path)
        (path / "pytorch_model.bin").touch()
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(path)])
    streams = capsys.readouterr()
    assert stop.value.code == 2 and not streams.out
    assert streams.err.startswith("hf-padam verify: ") and str(path) in streams.err and streams.err.count("\n") == 1


def test_a_file_that_is_a_document_a_line_is_the_users_affair(directory, capsys):
    (directory / "predictions.json").write_text('{"a": 1}\n{"a": 2}\n')
    status, said = run(directory, capsys)
    assert status == 0 and "checked predictions.json: it is JSON" in said
    (directory / "modules.json").write_text('{\n "a": 1')
    assert run(directory, capsys)[0] == 1
    (directory / "modules.json").unlink()
    (directory / "generation_config.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert run(directory, capsys)[0] == 1


def test_a_file_that_the_disk_does_not_give_back_is_one_of_the_problems(directory, capsys, monkeypatch):
    read = os.preadv

    def fails(handle, buffers, offset):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(weights(directory)[-1].name):
            raise OSError(5, "Input/output error")
        return read(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails)
    status, said = run(directory, capsys)
    assert status == 1 and f"{weights(directory)[-1].name} cannot be read: " in said
