"""The Hugging Face Hub: models are opened by their ids there, and compressed ones uploaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .model_directory import OTHER_WEIGHTS, ModelDirectory
from .packing import CompressionError
from .tensor_files import INDEX

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_NOT_FETCHED = [f"*{suffix}" for suffix in OTHER_WEIGHTS]
_NOT_FETCHED += ["*/*.safetensors", "consolidated*.safetensors", "model*.fp16*.safetensors", "*.msgpack.index.json"]


def find(source: str | Path, revision: str | None = None, token: str | None = None) -> Path:
    """Return the directory of a model: a local one, or the download of one on the Hub.

    Args:
        source: The directory, or the id of a model on the Hub.
        revision: The branch, tag or commit to have from the Hub; its main branch by default.
        token: The access token for the Hub; by default that of HF_TOKEN or `hf auth login`.

    Raises:
        CompressionError: If it is neither, or cannot be had; or of a directory a revision is asked for.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise CompressionError(
                f"revision={revision!r} goes with the id of a model on the Hub, and {str(source)!r} is a directory "
                "here: leave it out"
            )
        return Path(source)
    if Path(source).exists() or not _HUB_ID.fullmatch(str(source)):
        raise CompressionError(f"{str(source)!r} is neither a directory nor a model's id on the Hub")
    from huggingface_hub import snapshot_download

    asked: dict[str, Any] = {"revision": revision, "token": token}
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        return Path(snapshot_download(str(source), ignore_patterns=_NOT_FETCHED, **given))
    except Exception as error:  # the library lets through what its own libraries raise
        at = "" if revision is None else f" at revision {revision!r}"
        message = f"{str(source)!r} is no directory here, and could not be had from the Hub{at}: {error}"
        raise CompressionError(message) from error


def upload(
    directory: str | Path,
    repository: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
) -> None:
    """Upload a compressed directory to the Hugging Face Hub, after checking that it is intact.

    Args:
        directory: Made by `compress` or `save_compressed`.
        repository: The repository's id; created if it does not exist.
        private: Whether it is private if it is created. One that exists stays as it is.
        revision: The branch to upload to, created if it does not exist; the main one by default.
        token: The access token for the Hub; by default that of HF_TOKEN or `hf auth login`.

    Raises:
        CompressionError: If the directory is not intact, or the upload fails.
    """
    from huggingface_hub import HfApi

    with ModelDirectory(directory) as model:
        model.check()
    api = HfApi(token=token)
    try:
        created = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(created, branch=revision, exist_ok=True)
        # Dense weights of an earlier upload would be loaded in place of the compressed ones. (A * takes in slashes,
        # too: nothing in the repository's folders, such as checkpoints, may match.)
        api.upload_folder(
            repo_id=created,
            folder_path=str(directory),
            revision=revision,
            delete_patterns=["model.safetensors", "model-*-of-*.safetensors", INDEX, "pytorch_model*.bin*"],
            commit_message="Upload compressed model",
        )
    except Exception as error:  # see `find`
        raise CompressionError(
            f"the upload to {repository!r} failed: {error}. {directory} is whole: "
            f"hf_padam.compression.hub.upload({str(directory)!r}, {repository!r}, {private=}, {revision=}) tries again"
        ) from error
