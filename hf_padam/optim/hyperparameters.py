"""PAdam's hyperparameters: their defaults, the ranges they must be in, and the tensors that may not decay."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sparsity import count_zeros
from .update import IMPORTANCES

DEFAULT_P_NORM = 0.8
DEFAULT_LAMBDA_P = 0.1
HYPERPARAMETERS = ("lr", "betas", "eps", "p_norm", "lambda_p", "weight_decay")
VARIANTS = ("importance", "late_decay", "s_rate")
"""Options of the update besides, which groups saved by earlier versions lack."""


class UnfitWeightsError(ValueError):
    """The zeros that a model's weights begin with do not go with what is asked for."""


def check_not_all_zeros(params: Sequence[tuple[str, Tensor]], cure: str) -> None:
    """Refuse tensors that start as zeros, at which a p-norm decay with p < 2 would hold them.

    A row, a column or an expert of zeros is no tensor of zeros.

    Args:
        params: The parameters that decay, with their names, before training. FSDP1's shards and meta tensors are not
            judged.
        cure: What the message advises, but for a non-zero start.

    Raises:
        UnfitWeightsError: If every element of a tensor, over all shards, is zero.
    """
    judged = [(name, p) for name, p in params if not p.is_meta and not hasattr(p, "_fsdp_flattened")]
    counts = count_zeros({str(i): param for i, (_, param) in enumerate(judged)})
    dead = [judged[int(count.name)] for count in counts if 0 < count.elements == count.zeros]
    if not dead:
        return
    name, param = dead[0]
    raise UnfitWeightsError(
        f"parameter {name}, of shape {tuple(param.shape)}, is all zeros. Under a p-norm decay with p < 2 zero is "
        "absorbing, so it would never train (biases, LoRA's B matrices and zero-initialised heads start like this). "
        f"{cure}, or give it a non-zero start. (One that training made zero: freeze it, requires_grad_(False).)"
    )


def named(group: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the parameters of a group with their names, or numbers: DeepSpeed leaves the names of what it joins."""
    names, params = group.get("param_names") or [], group["params"]
    if len(names) != len(params):
        names = [f"number {i} of its group" for i in range(len(params))]
    return list(zip(names, params, strict=True))


def can_step(dtype: torch.dtype) -> bool:
    """Whether a step can change tensors of this dtype: real floating-point ones, but for those of 8 bits or fewer."""
    return dtype.is_floating_point and dtype.itemsize > 1


def is_number(value: Any) -> bool:
    """Whether a value is a real number, NumPy's scalars included; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, NumPy's included; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Return a real number of another kind, NumPy's for one, as Python's; a pair of them too; all else as it is.

    What is saved with NumPy's in it, ``torch.load`` refuses to read; and fp32 ones compute in fp32.
    """
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value)) if type(value) in (tuple, list) else value
    if type(value) in (int, float) or not is_number(value):
        return value
    return int(value) if is_integer(value) else float(value)


def plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group with `plain` numbers."""
    return {name: value if name in ("params", "param_names") else plain(value) for name, value in group.items()}


def _as_float(value: Any) -> float:
    """Return a number as a float, NaN if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.nan


def check_hyperparameters(values: dict[str, Any]) -> None:
    """Check that each hyperparameter is a number in its range.

    Args:
        values: Any mapping that holds all of `HYPERPARAMETERS`, a parameter group for example.

    Raises:
        ValueError: Naming the first that is not, its value and what is allowed.
    """
    betas = values["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} is not allowed: it must be a pair of numbers in [0, 1)")
    for name, value, low, high, what in (
        ("lr", values["lr"], 0.0, math.inf, "a finite number of at least 0"),
        ("betas[0]", betas[0], 0.0, 1.0, "a number in [0, 1)"),
        ("betas[1]", betas[1], 0.0, 1.0, "a number in [0, 1)"),
        ("eps", values["eps"], 2.0**-126, math.inf, "a positive number, representable in fp32 (at least 2^-126)"),
        ("p_norm", values["p_norm"], -math.inf, math.inf, "a finite number, or -inf; below 2 it makes zeros"),
        ("lambda_p", values["lambda_p"], 0.0, math.inf, "a finite number of at least 0"),
        ("weight_decay", values["weight_decay"], 0.0, math.inf, "a finite number of at least 0"),
    ):
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not is_number(value) or not low <= _as_float(value) < high:
            raise ValueError(f"{name}={value!r} is not allowed: it must be {what}")
    kinds: tuple[tuple[str, type, str], ...] = (
        ("bf16_stochastic_round", bool, "True or False"),
        ("rounding_seed", numbers.Integral, "an integer"),
        ("late_decay", bool, "True or False"),
        ("s_rate", numbers.Real, "1, the paper's method, or a number from 2**-24 to 1 - 2**-24"),
    )
    for name, kind, what in kinds:
        value = values.get(name, 1)
        if name in values and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise ValueError(f"{name}={values[name]!r} is not allowed: it must be {what}")
        if name == "s_rate" and value != 1 and not 2**-24 <= value <= 1 - 2**-24:  # else fp32 has 0 * inf
            raise ValueError(f"{name}={values[name]!r} is not allowed: it must be {what}")
    if values.get("importance", "magnitude") not in IMPORTANCES:
        raise ValueError(
            f"importance={values['importance']!r} is not allowed: it must be one of {', '.join(IMPORTANCES)}"
        )
    smallest = min(values["p_norm"], values.get("final_p_norm", values["p_norm"]))  # of a schedule
    if values.get("s_rate", 1) < 1 and (values.get("importance") == "fisher" or smallest < 0):
        other = 'importance="fisher"' if values.get("importance") == "fisher" else f"p_norm={smallest}"
        raise ValueError(
            f"s_rate={values['s_rate']} and {other} exclude each other: s follows |w|^(p-2), for p of at least 0. "
            "Leave s_rate at 1"
        )
    if values.get("late_decay") and values["s_rate"] < 1:
        raise ValueError(
            f"late_decay=True and s_rate={values['s_rate']} exclude each other: s follows the weight before the step. "
            "Set one of them only"
        )


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that takes the steps, whatever accelerate and DeepSpeed have wrapped around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
