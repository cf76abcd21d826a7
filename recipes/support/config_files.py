"""Config files, YAML or JSON: read as command-line options, and written so that they repeat a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_padam.files import write_atomically

from .errors import UsageError, suggest

_FILES, _DATASET = {"train_file", "validation_file", "test_file"}, {"dataset_name", "dataset_config_name"}
_IN_PLACE_OF = {
    **{
        name: {"lambda_p", "target_sparsity", "target_pattern"} - {name}
        for name in ("lambda_p", "target_sparsity", "target_pattern")
    },
    **{name: _FILES for name in _DATASET},
    **{name: _DATASET for name in _FILES},
}
"""Keys of a config file that give way to an option of the command line which excludes them."""

_JSON_LISTS = {"optim_target_modules", "dense_modules"}
"""Fields that take a string or a list: argparse would take the first item for the string."""

_NOT_OPTIONS = {
    "resume_from_checkpoint",
    "preset",  # the saved options are complete without
    "local_rank",
    "token",
    "hub_token",
    "push_to_hub_token",
    "logging_dir",
    "disable_tqdm",
}


def config_as_options(path: Path, known: set[str], overrides: Sequence[str]) -> list[str]:
    """Read a config file and write it as command-line options, so that both are parsed and overridden alike.

    Args:
        path: Of the file.
        known: Names of all options.
        overrides: Options on the command line; keys that they exclude are left out.

    Raises:
        UsageError: If the file cannot be read, or has a key that is no option.
    """
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in overrides if word.startswith("--")}
    overridden = {key for key, others in _IN_PLACE_OF.items() if given & others}
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UsageError(f"{path} is not a config file: it must end in .yaml, .yml or .json; options start with --")
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"the config file {path} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the config file {path} is malformed: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"the config file {path} must hold a mapping of option names to values")
    for key in config:
        if key not in known:
            raise UsageError(
                f"{path}: unknown key {key!r}{suggest(str(key), known)}. Keys are option names without --"
            )
    return as_arguments({key: value for key, value in config.items() if key not in overridden})


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Write options as a command line; those without a value, which have their defaults, are left out."""
    arguments = []
    for name, value in options.items():
        if value is None or value == []:
            continue
        if isinstance(value, list) and name not in _JSON_LISTS:
            arguments += [f"--{name}", *map(str, value)]
        else:  # with "=", so that "-inf" is not taken for an option
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, dict | list) else value}")
    return arguments


def save_config(path: Path, *parsed: Any) -> None:
    """Write every option that differs from its default, so that the file repeats the run as ``SCRIPT FILE``."""
    config = {}
    for arguments in parsed:
        defaults = type(arguments).__dataclass_fields__
        for f in dataclasses.fields(arguments):
            value = getattr(arguments, f.name)
            value = getattr(value, "value", value)  # enums
            default = defaults[f.name].default
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            if isinstance(value, AcceleratorConfig):
                value, default = value.to_dict(), type(value)().to_dict()
            if f.init and f.name not in _NOT_OPTIONS and isinstance(value, str | int | float | bool | list | dict):
                if value != getattr(default, "value", default) and value not in ([], {}):
                    config[f.name] = value
    write_atomically(path, yaml.safe_dump(config, sort_keys=False))
