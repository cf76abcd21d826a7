"""Register "padam" and "padam_8bit" with Transformers. The only file that changes anything in Transformers.

`TrainingArguments` turns `optim` into a member of the enum `OptimizerNames`; the Trainer looks the member up in a
table of handlers. Registration adds a member and a row for each. Such a member is pickled as a call of this package,
so `training_args.bin` and the arguments of a spawned process can be read where nothing has imported it. Besides:

* every Trainer gets a callback, which steers a PAdam that was asked for a target sparsity, and warns of what no user
  of these optimizers can want;
* the parser of `optim_args` lets pass what padam's own reads further (spaces, commas and "=" within a value), and says
  what is wrong with a string that is malformed.

These are private parts of Transformers, as of 5.4 to 5.23. What other files override or read is theirs to name.
"""

from __future__ import annotations

import enum
import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import transformers
from aenum import extend_enum
from packaging.version import Version
from torch import nn
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames, TrainingArguments

from ..optim import PAdam, PAdam8bit
from ..optim.eight_bit import S_REFUSAL, check_installed
from ..optim.hyperparameters import DEFAULT_LAMBDA_P, check_hyperparameters
from ..optim.target_options import ramp
from .callbacks import CHECK_LATER, CallbackFromGroups
from .optim_args import malformed, parse_optim_args, split_optim_args
from .options import OPTIONS, check_target, check_under_deepspeed, options_of, read, with_defaults
from .param_groups import CHOICES, get_param_groups, remember_choice

NAME = "padam"
OPTIMIZERS: dict[str, type[PAdam]] = {NAME: PAdam, "padam_8bit": PAdam8bit}
SUPPORTED = "transformers>=5.4,<6"


def optimizer_options(args: TrainingArguments) -> dict[str, Any]:
    """Collect everything that `build_optimizer` needs from the training arguments, checked.

    Typed fields of `PAdamTrainingArguments` and keys of `optim_args` name the same options; giving one of them twice,
    with different values, is an error.

    Raises:
        ImportError: If what the optimizer needs is not installed.
        ValueError: On an unknown key, a bad value, an option given twice, or 8-bit moments under a full FSDP state.
    """
    optimizer_class = OPTIMIZERS[OptimizerNames(args.optim).value]
    if optimizer_class is PAdam8bit:
        check_installed()
        plugin = getattr(args, "fsdp_plugin_args", None) or {}
        kind = plugin.get("state_dict_type") or os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
        sharded = plugin or os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if sharded and "FULL_STATE_DICT" in str(kind).upper():
            raise ValueError(
                'optim="padam_8bit" cannot save its packed moments with fsdp_state_dict_type: FULL_STATE_DICT, which '
                'gathers them. Use SHARDED_STATE_DICT (and resume with as many processes), or optim="padam"'
            )
    typed = options_of(args)
    options = {key: read(key, getattr(typed, key)) for key in OPTIONS}
    for key, value in parse_optim_args(args.optim_args).items():
        if options[key] not in (value, OPTIONS[key].default):
            raise ValueError(f"{key} is given twice: {options[key]!r}, and {value!r} in optim_args. Drop one of them")
        options[key] = value
    options = with_defaults(options)
    check_target(options | {"p_norm_schedule": typed.p_norm_schedule})
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or args.deepspeed:
        check_under_deepspeed(options)
    options.update(
        optimizer_class=optimizer_class,
        lambda_p=DEFAULT_LAMBDA_P if options["lambda_p"] is None else options["lambda_p"],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        rounding_seed=args.seed if options["bf16_stochastic_round"] else 0,
        target_modules=read("optim_target_modules", args.optim_target_modules),
    )
    check_hyperparameters(options)
    if optimizer_class is PAdam8bit and options["s_rate"] < 1:
        raise ValueError(S_REFUSAL.format(options["s_rate"]))
    return options


def build_optimizer(model: nn.Module, *, optimizer_class: type[PAdam] = PAdam, **options: Any) -> PAdam:
    """Build PAdam over a model's trainable parameters, decaying those that `param_groups` chooses.

    Args:
        model: The model to train.
        optimizer_class: `PAdam` or a subclass.
        options: Those of the optimizer's constructor and of `get_param_groups`; `target_start` and `target_end` are
            kept in the groups that have a target, for the callback that steers them.

    Raises:
        ValueError: As `PAdam` and `get_param_groups` do.
    """
    plan = {key: options.pop(key) for key in ("target_start", "target_end") if key in options}
    for_groups = {key: options.pop(key) for key in inspect.signature(get_param_groups).parameters if key in options}
    groups = get_param_groups(model, **for_groups)
    remember_choice(model, **{key: for_groups[key] for key in CHOICES if key in for_groups})
    steered = [group for group in groups if "target_sparsity" in group]
    if steered:
        largest = max(group["target_sparsity"] for group in steered)
        start, end = ramp(largest, plan.get("target_start"), plan.get("target_end"))
        for group in steered:
            group |= {"target_start": start, "target_end": end}
    return optimizer_class(groups, **options)


class _Factory:
    """Called by the Trainer as ``_Factory()(model, **options)``, for it is not an Optimizer class."""

    def __call__(self, model: nn.Module, *, p_norm_schedule: str = "constant", **options: Any) -> PAdam:
        if p_norm_schedule != "constant":
            raise ValueError(
                f"p_norm_schedule={p_norm_schedule!r} would have no effect: this Trainer does not move p. Use "
                'PAdamTrainer; or leave p_norm_schedule at "constant" and add PNormScheduleCallback to the callbacks'
            )
        optimizer = build_optimizer(model, **options, check_zero_start=False)
        setattr(optimizer, CHECK_LATER, True)
        return optimizer


def _handler(context: Any) -> tuple[type[_Factory], dict[str, Any]]:
    schedule = options_of(context.args).p_norm_schedule
    return _Factory, optimizer_options(context.args) | {"p_norm_schedule": schedule}


def register() -> None:
    """Make ``optim="padam"`` and ``optim="padam_8bit"`` known to Transformers. Calling it again changes nothing.

    Raises:
        ImportError: If the installed Transformers is not a supported version.
    """
    version = Version(transformers.__version__)
    if not Version("5.4") <= Version(version.base_version) < Version("6"):
        raise ImportError(
            f"hf_padam cannot register with transformers {version}: it supports {SUPPORTED}. "
            f'Install a supported version: pip install "{SUPPORTED}".'
        )
    from transformers import trainer, trainer_optimizer

    for name in OPTIMIZERS:
        if name not in OptimizerNames._value2member_map_:
            extend_enum(OptimizerNames, name.upper(), name)
        elif trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(name)].__module__ != __name__:
            raise ImportError(f"transformers {version} or another package already has an optimizer named {name!r}.")
        trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(name)] = _handler
    add_callback_to_every_trainer(CallbackFromGroups)
    trainer._parse_optim_args = _lenient(trainer._parse_optim_args)  # type: ignore[assignment]  # its own name
    OptimizerNames.__reduce_ex__ = _reduce  # type: ignore[assignment,method-assign]  # a method, as meant


def add_callback_to_every_trainer(callback: type[TrainerCallback]) -> None:
    """Give every Trainer that is made from now on a callback, once."""
    from transformers import trainer

    if callback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(callback)  # type: ignore[arg-type]  # inferred of one class


def optimizer_name(value: str) -> OptimizerNames:
    """Return a member that registration has added, as pickles name it."""
    return OptimizerNames(value)


def _reduce(member: OptimizerNames, protocol: Any) -> Any:
    if member.value in OPTIMIZERS:
        return optimizer_name, (member.value,)
    return enum.Enum.__reduce_ex__(member, protocol)


def _lenient(parse: Callable[[str | None], dict[str, str]]) -> Callable[[str | None], dict[str, str]]:
    """Wrap Transformers' parser of `optim_args`, which runs first, whatever the optimizer."""
    if inspect.unwrap(parse) is not parse:  # wrapped already
        return parse

    @functools.wraps(parse)
    def lenient(optim_args: str | None) -> dict[str, str]:
        try:
            return parse(optim_args)
        except (ValueError, AttributeError) as error:
            pairs = split_optim_args(optim_args)
            if not pairs.keys() <= OPTIONS.keys():
                raise ValueError(malformed(optim_args)) from error
            return pairs

    return lenient
