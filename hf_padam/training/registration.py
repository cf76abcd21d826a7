"""Register "padam" and "padam_8bit" with Transformers. The only file that touches Transformers' internals.

`TrainingArguments` turns `optim` into a member of the enum `OptimizerNames`; the Trainer looks the member up in a
table of handlers. Registration adds a member and a row for each. Nothing else of Transformers changes, except that
every Trainer gets a callback that acts only on a PAdam that was asked for a target sparsity, and that a malformed
`optim_args` string now gets an error that says what is wrong with it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import transformers
from aenum import extend_enum
from packaging.version import Version
from torch import nn
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames, TrainingArguments

from ..optim.backends import CHOICES
from ..optim.eight_bit import S_REFUSAL, PAdam8bit, check_installed
from ..optim.hyperparameters import DEFAULT_LAMBDA_P, DEFAULT_P_NORM, check_hyperparameters
from ..optim.padam import PAdam
from ..optim.target_sparsity import DEFAULT_END, DEFAULT_START, SCOPES, check_plan, check_steerable
from .callbacks import CallbackFromGroups
from .param_groups import get_param_groups

NAME = "padam"
OPTIMIZERS: dict[str, type[PAdam]] = {NAME: PAdam, "padam_8bit": PAdam8bit}
SUPPORTED = "transformers>=5.4,<6"

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError("must be true or false")
    return text.lower() in _TRUE


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


class Option(NamedTuple):
    """One key of `optim_args`."""

    parse: Callable[[str], Any]
    default: Any
    accepted: str


OPTIONS = {
    "p_norm": Option(_number, DEFAULT_P_NORM, "a positive number, the p of the norm; below 2 it makes zeros"),
    "lambda_p": Option(_number, DEFAULT_LAMBDA_P, "a number of at least 0, the strength of the p-norm decay"),
    "decay_embeddings": Option(_boolean, False, "true or false, whether embeddings and output head decay too"),
    "late_decay": Option(_boolean, False, "true or false, whether the decay's factor is of the weight after the step"),
    "s_rate": Option(_number, 1.0, "a number above 0, at most 1, how fast the decay follows a weight; 1 is at once"),
    "bf16_stochastic_round": Option(_boolean, False, "true or false, how weights stored in bf16 are rounded"),
    "dense_modules": Option(str, None, "a regular expression, the names of modules that do not decay"),
    "target_sparsity": Option(
        _number, None, "a share of zeros, above 0 and below 1, to arrive at; in place of lambda_p"
    ),
    "target_start": Option(_number, DEFAULT_START, "the share of the steps after which zeros are made"),
    "target_end": Option(_number, DEFAULT_END, "the share of the steps after which the target is met"),
    "target_scope": Option(_one_of(SCOPES), SCOPES[0], "global or layer, what the target is a share of"),
    "backend": Option(_one_of(CHOICES), "auto", "one of " + ", ".join(CHOICES)),
}
"""The keys of `optim_args`. `PAdamTrainingArguments` has fields of the same names."""


def parse_optim_args(text: str | None) -> dict[str, Any]:
    """Turn an `optim_args` string, key=value pairs joined by commas, into typed options; absent keys stay absent.

    Raises:
        ValueError: On a malformed pair, an unknown or repeated key, or a bad value, with the list of what is accepted.
    """
    if text is not None and not isinstance(text, str):
        raise ValueError(_malformed(text))
    accepted = "; ".join(f"{key} ({option.accepted})" for key, option in OPTIONS.items())
    options: dict[str, Any] = {}
    for pair in (text or "").replace(" ", "").split(",") if text else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(_malformed(text))
        if key not in OPTIONS:
            raise ValueError(f"optim_args has no key {key!r} for padam. Accepted: {accepted}")
        if key in options:
            raise ValueError(f"optim_args={text!r} gives {key} twice. Drop one of them")
        try:
            options[key] = OPTIONS[key].parse(value)
        except ValueError as error:
            raise ValueError(f"optim_args: {key}={value!r} {error}. Accepted: {accepted}") from None
    return options


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
        full = os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT") == "FULL_STATE_DICT"
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and full:
            raise ValueError(
                'optim="padam_8bit" cannot save its packed moments with fsdp_state_dict_type: FULL_STATE_DICT, which '
                'gathers them. Use SHARDED_STATE_DICT (and resume with as many processes), or optim="padam"'
            )
    options: dict[str, Any] = {key: option.default for key, option in OPTIONS.items()}
    typed = {key: getattr(args, key) for key in OPTIONS if getattr(args, key, None) is not None}
    options.update(typed)
    in_text = parse_optim_args(args.optim_args)
    lambda_given = "lambda_p" in typed or "lambda_p" in in_text
    for key, value in in_text.items():
        if key in typed and typed[key] not in (value, OPTIONS[key].default):
            raise ValueError(f"{key} is given twice: {typed[key]!r}, and {value!r} in optim_args. Drop one of them")
        options[key] = value
    options.update(
        optimizer_class=optimizer_class,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        rounding_seed=args.seed if options["bf16_stochastic_round"] else 0,
        target_modules=args.optim_target_modules,
    )
    check_hyperparameters(options)
    if options["target_sparsity"] is None:
        for key in ("target_start", "target_end", "target_scope"):
            if options[key] != OPTIONS[key].default:
                raise ValueError(
                    f"{key}={options[key]!r} has no effect without target_sparsity: give that, or drop {key}"
                )
    else:
        check_plan(options["target_sparsity"], options["target_start"], options["target_end"])
        if options["target_scope"] not in SCOPES:
            raise ValueError(f"target_scope={options['target_scope']!r} is not one of {', '.join(SCOPES)}")
        check_steerable(options | {"p_norm_schedule": getattr(args, "p_norm_schedule", "constant")})
        if lambda_given:
            raise ValueError(
                f"target_sparsity={options['target_sparsity']!r} and lambda_p={options['lambda_p']!r} exclude each "
                "other: the first finds the second. Drop one of them"
            )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or args.deepspeed:
            raise ValueError(
                "target_sparsity does not work under DeepSpeed, which hands the optimizer pieces of weights joined "
                "together: use FSDP2 (recipes/accelerate/fsdp2.yaml), or give lambda_p"
            )
    if optimizer_class is PAdam8bit and options["s_rate"] < 1:
        raise ValueError(S_REFUSAL.format(options["s_rate"]))
    return options


def build_optimizer(
    model: nn.Module,
    *,
    optimizer_class: type[PAdam] = PAdam,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    bf16_stochastic_round: bool = False,
    rounding_seed: int = 0,
    backend: str = "auto",
    target_sparsity: float | None = None,
    target_start: float = DEFAULT_START,
    target_end: float = DEFAULT_END,
    target_scope: str = SCOPES[0],
    **group_options: Any,
) -> PAdam:
    """Build PAdam over a model's trainable parameters, decaying those that `param_groups` chooses.

    Args:
        model: The model to train.
        optimizer_class: `PAdam` or a subclass.
        lr: See `PAdam`.
        betas: See `PAdam`.
        eps: See `PAdam`.
        bf16_stochastic_round: See `PAdam`.
        rounding_seed: See `PAdam`.
        backend: See `PAdam`.
        target_sparsity: If given, kept in the decayed groups for the callback that steers them, with what follows.
        target_start: See `TargetSparsity`.
        target_end: See `TargetSparsity`.
        target_scope: "layer" makes a group of each decayed tensor.
        group_options: See `get_param_groups`.

    Raises:
        ValueError: As `PAdam` and `get_param_groups` do.
    """
    groups = get_param_groups(model, **group_options)
    if target_sparsity is not None:
        plan = dict(target_sparsity=target_sparsity, target_start=target_start, target_end=target_end)
        decayed = groups[0] | plan | {"target_scope": target_scope}
        parts = [[pair] for pair in decayed["params"]] if target_scope == "layer" else [decayed["params"]]
        groups[:1] = [decayed | {"params": part} for part in parts]
    options: dict[str, Any] = dict(bf16_stochastic_round=bf16_stochastic_round, rounding_seed=rounding_seed)
    return optimizer_class(groups, lr=lr, betas=betas, eps=eps, backend=backend, **options)


class _Factory:
    """Called by the Trainer as ``_Factory()(model, **options)``, for it is not an Optimizer class."""

    def __call__(self, model: nn.Module, *, p_norm_schedule: str = "constant", **options: Any) -> PAdam:
        if p_norm_schedule != "constant":
            raise ValueError(
                f"p_norm_schedule={p_norm_schedule!r} would have no effect: this Trainer does not move p. Use "
                'PAdamTrainer; or leave p_norm_schedule at "constant" and add PNormScheduleCallback to the callbacks'
            )
        return build_optimizer(model, **options)


def _handler(context: Any) -> tuple[type[_Factory], dict[str, Any]]:
    schedule = {"p_norm_schedule": getattr(context.args, "p_norm_schedule", "constant")}
    return _Factory, optimizer_options(context.args) | schedule


def _malformed(optim_args: str | None) -> str:
    return (
        f"optim_args={optim_args!r} is malformed: it must be a string of key=value pairs joined by commas, "
        'for example "p_norm=0.8,lambda_p=0.5"'
    )


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
    trainer._parse_optim_args = _explain_malformed(trainer._parse_optim_args)  # type: ignore[assignment]


def add_callback_to_every_trainer(callback: type[TrainerCallback]) -> None:
    """Give every Trainer that is made from now on a callback, once."""
    from transformers import trainer

    if callback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(callback)  # type: ignore[arg-type]


def _explain_malformed(parse: Callable[[str | None], dict[str, str]]) -> Callable[[str | None], dict[str, str]]:
    """Wrap Transformers' parser of `optim_args`, which fails on a missing "=" with an unpacking error."""
    if inspect.unwrap(parse) is not parse:  # wrapped already
        return parse

    @functools.wraps(parse)
    def explained(optim_args: str | None) -> dict[str, str]:
        try:
            return parse(optim_args)
        except (ValueError, AttributeError) as error:
            raise ValueError(_malformed(optim_args)) from error

    return explained
