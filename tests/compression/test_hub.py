"""What is asked of the Hugging Face Hub, which is not there: revisions, tokens, and uploads that are private."""

import shutil
from pathlib import Path
from unittest import mock

import pytest
from conftest import tiny_llama

from hf_padam import compress, decompress, save_compressed
from hf_padam.__main__ import main
from hf_padam.compression.hub import upload
from hf_padam.compression.packing import CompressionError
from hf_padam.compression.verify import verify


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(path / "dense")
    compress(path / "dense", path / "compressed")
    return path


COMMANDS = {
    "compress": ("dense", lambda out: ["compress", "me/model", str(out)]),
    "decompress": ("compressed", lambda out: ["decompress", "me/model", str(out)]),
    "sparsity": ("compressed", lambda out: ["sparsity", "me/model"]),
    "verify": ("compressed", lambda out: ["verify", "me/model"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "asked", [{}, {"revision": "v1.0"}, {"token": "hf_secret"}, {"revision": "a1b2", "token": "x"}]
)
def test_a_model_of_the_hub_is_had_at_the_revision_and_with_the_token_asked_for(command, asked, models, tmp_path):
    source, arguments = COMMANDS[command]
    options = [f"--{name}={value}" for name, value in asked.items()]
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(models / source)) as download:
        main([*arguments(tmp_path / "out"), *options])
    [call] = download.call_args_list
    assert call.args == ("me/model",)
    assert {name: value for name, value in call.kwargs.items() if name != "ignore_patterns"} == asked


def test_what_python_calls_take_them_too(models, tmp_path):
    asked = {"revision": "v1.0", "token": "hf_secret"}
    for source, use in (
        ("dense", lambda: compress("me/model", tmp_path / "compressed", **asked)),
        ("compressed", lambda: decompress("me/model", tmp_path / "dense", **asked)),
        ("dense", lambda: verify("me/model", **asked)),
    ):
        with mock.patch("huggingface_hub.snapshot_download", return_value=str(models / source)) as download:
            use()
        assert asked.items() <= download.call_args.kwargs.items()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_revision_of_a_directory_here_is_refused(command, models, tmp_path, monkeypatch, capsys):
    source, arguments = COMMANDS[command]
    shutil.copytree(models / source, tmp_path / "me" / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*arguments(tmp_path / "out"), "--revision", "v1.0"])
    message = f"{stop.value.code}{capsys.readouterr().err}"
    assert "revision='v1.0' goes with the id of a model on the Hub, and 'me/model' is a directory here" in message
    assert not (tmp_path / "out").exists()


def test_a_revision_that_cannot_be_had_is_named_and_no_token_is(tmp_path):
    with (
        mock.patch("huggingface_hub.snapshot_download", side_effect=OSError("no such revision")),
        pytest.raises(SystemExit, match="could not be had from the Hub at revision 'v9': no such revision") as stop,
    ):
        main(["compress", "me/model", str(tmp_path / "out"), "--revision", "v9", "--token", "hf_secret"])
    assert "hf_secret" not in str(stop.value)


@pytest.mark.parametrize(
    ("options", "private", "token"),
    [([], True, None), (["--private"], True, None), (["--no-private", "--token", "hf_secret"], False, "hf_secret")],
)
def test_an_upload_makes_a_private_repository_unless_told_otherwise(options, private, token, models, tmp_path):
    out = tmp_path / "out"
    with mock.patch("huggingface_hub.HfApi") as api:
        api.return_value.create_repo.return_value.repo_id = "me/sparse"
        main(["compress", str(models / "dense"), str(out), "--push_to_hub", "sparse", *options])
    api.assert_called_once_with(token=token)
    api.return_value.create_repo.assert_called_once_with("sparse", private=private, exist_ok=True)
    api.return_value.create_branch.assert_not_called()
    uploaded = api.return_value.upload_folder.call_args.kwargs
    assert uploaded["repo_id"] == "me/sparse" and uploaded["folder_path"] == str(out) and uploaded["revision"] is None


def test_the_revision_of_an_upload_from_here_is_its_branch(models, tmp_path):
    with mock.patch("huggingface_hub.HfApi") as api:
        api.return_value.create_repo.return_value.repo_id = "me/sparse"
        options = ["--push_to_hub", "sparse", "--revision", "pruned"]
        main(["compress", str(models / "dense"), str(tmp_path / "out"), *options])
    api.return_value.create_branch.assert_called_once_with("me/sparse", branch="pruned", exist_ok=True)
    assert api.return_value.upload_folder.call_args.kwargs["revision"] == "pruned"


def test_nothing_is_uploaded_unless_asked_for(models, tmp_path):
    with mock.patch("huggingface_hub.HfApi") as api:
        main(["compress", str(models / "dense"), str(tmp_path / "out"), "--no-private"])
    api.assert_not_called()


def test_save_compressed_uploads_to_a_branch_as_it_is_told(tmp_path):
    with mock.patch("huggingface_hub.HfApi") as api:
        api.return_value.create_repo.return_value.repo_id = "me/sparse"
        options = dict(private=False, revision="pruned", token="hf_secret")
        save_compressed(tiny_llama(), tmp_path / "out", push_to_hub="sparse", **options)
    api.assert_called_once_with(token="hf_secret")
    api.return_value.create_repo.assert_called_once_with("sparse", private=False, exist_ok=True)
    api.return_value.create_branch.assert_called_once_with("me/sparse", branch="pruned", exist_ok=True)
    assert api.return_value.upload_folder.call_args.kwargs["revision"] == "pruned"


def test_what_is_damaged_is_not_uploaded(models, tmp_path):
    directory = shutil.copytree(models / "compressed", tmp_path / "damaged")
    (directory / "config.json").write_text("{}")
    with mock.patch("huggingface_hub.HfApi") as api, pytest.raises(CompressionError, match="config.json"):
        upload(directory, "me/sparse")
    api.assert_not_called()


def test_whatever_the_hubs_library_raises_is_told_in_a_line(models, tmp_path):
    class Unreachable(Exception):
        """As its HTTP library raises."""

    with mock.patch("huggingface_hub.snapshot_download", side_effect=Unreachable("no route")):
        with pytest.raises(SystemExit, match="hf-padam sparsity: .*could not be had from the Hub: no route"):
            main(["sparsity", "me/model"])
    with mock.patch("huggingface_hub.HfApi.create_repo", side_effect=Unreachable("no route")):
        with pytest.raises(SystemExit, match="the upload to 'me/small' failed: no route. .* is whole"):
            main(["compress", str(models / "dense"), str(tmp_path / "small"), "--push_to_hub", "me/small"])
    assert verify(tmp_path / "small").intact
