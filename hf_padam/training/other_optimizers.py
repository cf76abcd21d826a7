"""What training arguments say about a p-norm decay on an optimizer that is not PAdam."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..optim import add_pnorm_decay
from ..optim.any_optimizer import check_finite, decay_scalars, has_pnorm_decay
from ..optim.schedules import FINAL
from .options import OPTIONS, PAPER, options_of
from .param_groups import get_param_groups
from .registration import OPTIMIZERS

_SHARED = ("p_norm", "lambda_p", "importance", "decay_embeddings", "dense_modules")
"""Options of padam that have a meaning for the decay beside another optimizer; the rest do not."""


def asks_for_decay(args: TrainingArguments) -> bool:
    """Whether `lambda_p` is given, and `optim` is not PAdam, which decays by itself."""
    return options_of(args).lambda_p is not None and OptimizerNames(args.optim).value not in OPTIMIZERS


def decay_of(args: Any) -> dict[str, Any]:
    """Return `p_norm`, `lambda_p` and `importance` of the decay beside another optimizer."""
    given = {key: getattr(args, key) for key in ("p_norm", "lambda_p", "importance")}
    return {**given, **{key: value for key, value in PAPER.items() if given[key] is None}}


def check_decay_options(args: Any) -> None:
    """Check the options of the p-norm decay beside an optimizer that is not PAdam.

    Args:
        args: A `PAdamTrainingArguments`.

    Raises:
        ValueError: If they are out of range, would have no effect, or do not go with the optimizer.
    """
    name = OptimizerNames(args.optim).value
    for key in (key for key in OPTIONS if key not in _SHARED):
        if getattr(args, key) != OPTIONS[key].default:
            raise ValueError(
                f"{key}={getattr(args, key)!r} is an option of padam and has no effect on optim={name!r}: take "
                f'optim="padam", or drop {key}'
            )
    for key in OPTIONS:
        if re.search(rf"\b{key}\s*=", args.optim_args or ""):
            raise ValueError(
                f"optim_args={args.optim_args!r}: {key} is an option of padam, not of {name}. To add a p-norm decay "
                f"to {name}, give lambda_p and p_norm as options of their own (--lambda_p, --p_norm)"
            )
    if args.lambda_p is None:
        for key, plain in (PAPER | {"p_norm_schedule": "constant"}).items():
            if getattr(args, key) not in (None, plain):
                raise ValueError(
                    f"{key}={getattr(args, key)!r} has no effect on optim={name!r} without lambda_p, the strength of "
                    f"the decay: give lambda_p too, or drop {key}"
                )
        return
    decay_scalars(decay_of(args) | {"lr": args.learning_rate})
    check_finite(decay_of(args)["p_norm"])
    why = None
    if name in ("lomo", "adalomo") or name.endswith("_layerwise"):
        why = "it updates each layer during the backward pass, not in a step that a decay could follow"
    elif name.startswith("schedule_free"):
        why = "the weights that it saves are averages over the steps, in which zeros would not stay zeros"
    if why:
        raise ValueError(f"lambda_p={args.lambda_p!r} does not go with optim={name!r}: {why}. Choose another optim")


def attach_decay(optimizer: Optimizer, model: nn.Module, args: Any, targets: dict[str, Any]) -> None:
    """Add the p-norm decay that the arguments ask for, unless the optimizer has one.

    Args:
        optimizer: The Trainer's.
        model: Its model.
        args: A `PAdamTrainingArguments`, for which `asks_for_decay`.
        targets: `decay_embeddings` and `target_modules` of `get_param_groups`.

    Raises:
        ValueError: As `add_pnorm_decay` and `get_param_groups` do.
    """
    if not has_pnorm_decay(optimizer):
        decayed = get_param_groups(model, **targets)[0]["params"]
        moves, decay = args.p_norm_schedule != "constant", decay_of(args)
        final = decay["p_norm"]
        if moves:
            decay["p_norm"] = args.p_norm_start
        add_pnorm_decay(optimizer, **decay, params=decayed)
        for group in optimizer.param_groups:
            if moves and group["lambda_p"] > 0:
                group[FINAL] = final
