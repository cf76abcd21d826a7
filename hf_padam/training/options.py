"""PAdam's options, defined once: the typed fields of training arguments, the keys of `optim_args`, and their help."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from ..optim.backends import CHOICES
from ..optim.hyperparameters import DEFAULT_LAMBDA_P, DEFAULT_P_NORM, is_number, plain
from ..optim.patterns import pattern_share
from ..optim.schedules import DEFAULT_SHARE, SHAPES
from ..optim.schedules import DEFAULT_START as SCHEDULE_START
from ..optim.target_options import SCOPES, check_steerable, ramp
from ..optim.target_options import check_target as check_share
from ..optim.update import IMPORTANCES
from .distillation import DEFAULT_TEMPERATURE, DEFAULT_WEIGHT, DTYPES

PAPER: dict[str, Any] = {"p_norm": DEFAULT_P_NORM, "importance": "magnitude"}
"""The paper's method, for a lambda_p of one's own, or where importance="magnitude" is given."""

PRUNING: dict[str, Any] = {"p_norm": -math.inf, "importance": "fisher"}
"""What a target comes with where nothing else is asked for; measured, see recipes/README.md."""


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass
class PAdamOptions:
    """The options of PAdam and of `PAdamTrainer`, for dataclasses of arguments to inherit from.

    Training arguments have typed options if their class is derived from this one; a field of the same name in any
    other class is that class's own business. For the arguments of another library's trainer:

        @dataclass
        class Arguments(PAdamOptions, SFTConfig): ...

    A string is read as in `optim_args`, so what a command line or a YAML file holds can be passed as it is.

    Raises:
        ValueError: On a value of the wrong type.
    """

    p_norm: float | None = _option(
        None,
        "p of the norm whose decay is applied, any number. Below 2 it makes zeros; the smaller it is, the less "
        "survivors are shrunk, down to -inf (write --p_norm=-inf), which is gradual pruning. Default: "
        f"{PAPER['p_norm']}, the paper's; {PRUNING['p_norm']} with target_sparsity, unless importance is magnitude.",
    )
    lambda_p: float | None = _option(
        None,
        "Strength of the p-norm decay. More makes more zeros; 0 turns it off. Adds the decay to any other optim too. "
        f"Default: {DEFAULT_LAMBDA_P} with padam and padam_8bit, no decay with others.",
    )
    importance: str | None = _option(
        None,
        "By what the decay measures a weight: magnitude, the paper's method, or fisher, magnitude times the root of "
        f"Adam's second moment. Default: {PAPER['importance']}; {PRUNING['importance']} with target_sparsity.",
        choices=list(IMPORTANCES),
    )
    p_norm_schedule: str = _option(
        "constant", "How p moves from p_norm_start to p_norm. PAdamTrainer moves it.", choices=list(SHAPES)
    )
    p_norm_start: float = _option(SCHEDULE_START, "p of the first step, under a schedule; at 2 zeros may grow.")
    p_norm_schedule_share: float = _option(DEFAULT_SHARE, "Share of the training steps over which p moves.")
    late_decay: bool = _option(False, "Take the decay's factor from the weight after the step. Makes few exact zeros.")
    s_rate: float = _option(1.0, "How fast the p-norm decay follows a weight, up to 1, which is at once.")
    decay_embeddings: bool = _option(False, "Decay embeddings and the output head too, which are left out otherwise.")
    dense_modules: None | str | list[str] = _option(
        None, "Leave these modules out of the decay: a regular expression, or a JSON list."
    )
    target_sparsity: None | str | float | dict[str, float] = _option(
        None,
        "Share of the decayed weights that is to be zero in the end, in (0, 1). Finds lambda_p in its place. Or a "
        'mapping from modules to shares, {"mlp": 0.8, "attn": 0.5}: from parts of names or regular expressions, and '
        '"*" for all other modules, which stay dense otherwise.',
    )
    target_pattern: str | None = _option(
        None, "Zeros in a pattern N:M, in place of target_sparsity: of M weights along the inputs, N stay. E.g. 2:4."
    )
    target_start: float | None = _option(
        None,
        "Share of the steps after which target_sparsity makes zeros. Default: 0.2, or 0.05 for targets up to 0.4.",
    )
    target_end: float | None = _option(
        None,
        "Share of the steps after which it has made all; what survives recovers in the rest. Default: 0.75, or 0.2 "
        "for targets up to 0.4.",
    )
    target_scope: str = _option(
        SCOPES[0],
        "What target_sparsity is a share of: all decayed weights together, or each tensor by itself.",
        choices=list(SCOPES),
    )
    bf16_stochastic_round: bool = _option(
        False, "For models whose weights are bf16: round them up or down at random, exact in the mean."
    )
    nonfinite_gradients: str = _option(
        "stop",
        "At a step whose gradients are not finite: stop, or skip its update (as fp16 and DeepSpeed do).",
        choices=["stop", "skip"],
    )
    distill_from: str | None = _option(
        None,
        "Distil from this teacher: a Hub id, a directory, or start, for the model as training begins. PAdamTrainer "
        "and the recipes do it.",
    )
    distill_weight: float = _option(
        DEFAULT_WEIGHT, "Share of the teacher's part in the loss, above 0, at most 1; the rest is cross-entropy."
    )
    distill_temperature: float = _option(
        DEFAULT_TEMPERATURE, "Teacher and student are compared at this temperature; above 1 small probabilities count."
    )
    distill_dtype: str = _option(
        "auto",
        "dtype of the teacher's weights; auto is that of its files, or of the model at the start.",
        choices=list(DTYPES),
    )
    backend: str = _option(
        "auto",
        "How the update runs: eager (plain PyTorch, anywhere), compiled (CPU: one fused C++ pass; needs a C++ "
        "compiler), triton (GPU: one kernel launch), or auto, the fastest that works there.",
        choices=list(CHOICES),
    )

    def __post_init__(self) -> None:
        """Read the strings, and check the types, once the class beside this one has done the same."""
        getattr(super(), "__post_init__", lambda: None)()
        for name in FIELDS:
            setattr(self, name, read(name, getattr(self, name)))


FIELDS = {option.name: option for option in fields(PAdamOptions)}
DISTILLATION = ("distill_from", "distill_weight", "distill_temperature", "distill_dtype")
SCHEDULE = ("p_norm_schedule", "p_norm_start", "p_norm_schedule_share")
_OTHERS = (*SCHEDULE, *DISTILLATION, "nonfinite_gradients")
OPTIONS = {name: option for name, option in FIELDS.items() if name not in _OTHERS}
"""Those that any Trainer can act on: the keys of `optim_args`."""

_PATTERN: Any = "N:M"


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    float: ("a number", is_number),
    str: ("a regular expression", lambda value: isinstance(value, str)),
    list[str]: ("a list of names", lambda value: isinstance(value, list) and all(isinstance(e, str) for e in value)),
    dict[str, float]: (
        "a mapping from modules to numbers",
        lambda value: isinstance(value, dict) and all(isinstance(k, str) and is_number(value[k]) for k in value),
    ),
    _PATTERN: (
        "a pattern such as 2:4 (in quotes in a YAML file)",
        lambda value: isinstance(value, str) and bool(re.fullmatch(r"\d+:\d+", value)),
    ),
}
_HINTS = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(PAdamOptions).items()}
_HINTS["optim_target_modules"] = _HINTS["dense_modules"]
_HINTS["target_sparsity"] = (float, dict[str, float], type(None))  # a string in the annotation is for argparse
_HINTS["target_pattern"] = (_PATTERN, type(None))
_BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_LIST = re.compile(r"""\[\s*["'\]]|\[[^\]]*$""")
"""How a list begins; a regular expression may begin with a set of characters."""


def options_of(args: Any) -> PAdamOptions:
    """Return the typed options of training arguments: themselves if their class says that it has them, else none."""
    return args if isinstance(args, PAdamOptions) else PAdamOptions()


def read(name: str, value: Any) -> Any:
    """Return an option's value, of its type. A string is parsed, unless the option is one.

    Args:
        name: Of an option, or `optim_target_modules`.
        value: What was given for it.

    Raises:
        ValueError: If it does not have the option's type.
    """
    types, text = _HINTS[name], value
    if isinstance(value, str):
        value = value.strip()
        mapping = dict[str, float] in types and value[:1] == "{"
        if mapping or list[str] in types and _LIST.match(value):
            try:
                value = json.loads(value, object_pairs_hook=_unique)
            except ValueError as error:
                kind = "mapping" if mapping else "list"
                raise ValueError(f"{name}={text!r} is not a {kind} in JSON: {error}") from error
        elif bool in types:
            value = _BOOLEANS.get(value.lower(), value)
        elif float in types:
            with contextlib.suppress(ValueError):
                value = float(value)
    choices = _choices(name)
    absent = value is None and type(None) in types
    fits = value in choices if choices else any(_KINDS[t][1](value) for t in types if t in _KINDS)
    if not (absent or fits):
        raise ValueError(f"{name}={text!r} must be {accepted(name)}")
    if isinstance(value, dict):
        return {key: plain(share) for key, share in value.items()}
    if is_number(value):
        return float(plain(value))  # not NumPy's, which JSON does not know; nor an int, to which a search would cast
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a mapping from what a JSON object holds."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return mapping


def _choices(name: str) -> list[str]:
    return FIELDS[name].metadata.get("choices", []) if name in FIELDS else []


def accepted(name: str) -> str:
    """Say what an option takes."""
    if choices := _choices(name):
        return f"one of {', '.join(choices)}"
    return " or ".join(_KINDS[kind][0] for kind in _HINTS[name] if kind in _KINDS)


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the norm and the importance that go with them, where these were not given."""
    pruning = options["target_pattern"] is not None or (has_target(options) and options["importance"] != "magnitude")
    defaults = PRUNING if pruning else PAPER
    return {**options, **{key: value for key, value in defaults.items() if options[key] is None}}


def has_target(options: Mapping[str, Any]) -> bool:
    """Whether options ask for a share or a pattern of zeros."""
    return options["target_sparsity"] is not None or options["target_pattern"] is not None


def check_under_deepspeed(options: Mapping[str, Any]) -> None:
    """Check that DeepSpeed's optimizer, which sees pieces of weights joined together, can do what is asked for.

    Raises:
        ValueError: If there is a target.
    """
    if has_target(options):
        raise ValueError(
            "target_sparsity does not work under DeepSpeed, which hands the optimizer pieces of weights joined "
            "together: use FSDP2 (recipes/accelerate/fsdp2.yaml), or give lambda_p"
        )


def check_deepspeed(config: Mapping[str, Any], name: str) -> None:
    """Check that DeepSpeed takes the optimizer that has a p-norm decay.

    Args:
        config: DeepSpeed's configuration.
        name: The optimizer's.

    Raises:
        ValueError: If it makes one of its own, which has none.
    """
    if "optimizer" in config:
        key = "an optimizer section"
    else:
        offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
        if offload.get("device", "none") == "none" or not config.get("zero_force_ds_cpu_optimizer", True):
            return
        key = "offload_optimizer, for which accelerate replaces the optimizer"
    raise ValueError(
        f"DeepSpeed takes an optimizer of its own, without a p-norm decay, in place of {name}: its configuration has "
        f"{key}. Remove that (or set zero_force_ds_cpu_optimizer to false, for offload_optimizer), or use FSDP2"
    )


def check_target(options: Mapping[str, Any]) -> None:
    """Check that a target sparsity, if there is one, goes with the other options, and that these have an effect.

    Raises:
        ValueError: If not.
    """
    target, pattern = options["target_sparsity"], options["target_pattern"]
    if not has_target(options):
        if options["p_norm"] == -math.inf:
            raise ValueError(
                "p_norm=-inf needs a target_sparsity, which chooses the size below which weights are pruned: give "
                "that, or a finite p_norm"
            )
        for key in ("target_start", "target_end", "target_scope"):
            if options[key] != OPTIONS[key].default:
                raise ValueError(
                    f"{key}={options[key]!r} has no effect without target_sparsity or target_pattern: give one, or "
                    f"drop {key}"
                )
        return
    if pattern is not None:
        if target is not None:
            raise ValueError(
                f"target_pattern={pattern!r} and target_sparsity={target!r} exclude each other: the pattern says the "
                "share. Drop one of them"
            )
        if options["p_norm"] != -math.inf:
            raise ValueError(
                f"p_norm={options['p_norm']!r} has no effect on target_pattern={pattern!r}, under which weights are "
                "pruned by block, p_norm=-inf: drop p_norm"
            )
    shares = [pattern_share(pattern)] if pattern else target.values() if isinstance(target, dict) else [target]
    for share in shares:
        check_share(share)
        ramp(share, options["target_start"], options["target_end"])
    check_steerable(options)
    if not shares:
        raise ValueError("target_sparsity={} names no module: give shares by modules, or drop it")
    if options["lambda_p"] is not None:
        name = "target_pattern" if pattern else "target_sparsity"
        raise ValueError(
            f"{name}={pattern or target!r} and lambda_p={options['lambda_p']!r} exclude each other: the first finds "
            "the second. Drop one of them"
        )
