"""Compare the settings of a checkpoint with those of the run that goes on from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from torch.optim import Optimizer

from ..optim.importance import SCALE_STATE
from ..optim.schedules import FINAL
from ..optim.target_options import STATE
from ..optim.target_sparsity import EARLIER_STATE
from .checkpoints import CheckpointError

logger = logging.getLogger(__name__)


def hyperparameters(optimizer: Optimizer) -> dict[str, list[Any]]:
    """Return the hyperparameters of an optimizer's groups, by name: those that schedules move, as they do not."""
    groups = [{**group, "lr": group.get("initial_lr", group["lr"])} for group in optimizer.param_groups]
    groups = [group | ({"p_norm": group[FINAL]} if FINAL in group else {}) for group in groups]
    names = set(groups[0]) - {"params", "param_names", "initial_lr", FINAL, *STATE, *SCALE_STATE, EARLIER_STATE}
    names -= {"target_pool"}  # which follows from the others, and from the parameters
    if {"target_sparsity", "target_step"} & set(groups[0]):
        names.discard("lambda_p")  # a result
    return {name: [group.get(name) for group in groups] for name in sorted(names)}


def check_world_size(checkpoint: str | Path, saved: int, given: int, distributed_type: DistributedType) -> None:
    """Check that a checkpoint can be loaded by this number of processes: by any, but for DeepSpeed's.

    Raises:
        CheckpointError: If it cannot.
    """
    if distributed_type == DistributedType.DEEPSPEED and saved != given:
        raise CheckpointError(
            f"{checkpoint} was saved by {saved} processes and this run has {given}, but DeepSpeed's partitions fit "
            f"only as many. Run with {saved} processes, or start a new run with its weights as the model"
        )


_GOES_ON = {
    ("padam", "padam_8bit"),
    ("adamw_torch", "adamw_torch_fused"),
    ("adamw_torch_fused", "adamw_torch"),
}
"""Optimizers of which the second goes on from the state of the first."""


def check_optimizer(checkpoint: str | Path, saved: str, given: str) -> None:
    """Check that an optimizer, by its `optim` name, can go on from the state of the one that a checkpoint holds.

    Raises:
        CheckpointError: If it cannot.
    """
    if saved != given and (saved, given) not in _GOES_ON:
        raise CheckpointError(
            f"{checkpoint} holds the state of optim={saved!r}, which {given!r} cannot go on from: give "
            f"optim={saved!r}, or start a new run with its weights as the model"
        )


def check_decayed(checkpoint: str | Path, saved: str, given: str) -> None:
    """Check that the p-norm decay acts on the weights, in words, that it acted on in the run that saved a checkpoint.

    Raises:
        CheckpointError: If it does not: the optimizer's states would go to other weights.
    """
    if saved != given:
        raise CheckpointError(
            f"in {checkpoint} the p-norm decay acts on {saved}, here on {given}: the run that saved it decayed other "
            "weights. Give decay_embeddings, dense_modules, optim_target_modules and the modules of target_sparsity "
            "as they were. If they are, an earlier version of hf_padam saved it, which chose by parameters' names; "
            "this one decays only matrices of linear maps and of experts. Then finish the run with that version, or "
            "start a new one with its weights as the model"
        )


def check_added_decay(checkpoint: str | Path, saved: bool, given: bool) -> None:
    """Check that a p-norm decay is added to the optimizer if, and only if, it was in the run that saved a checkpoint.

    Raises:
        CheckpointError: If it is not: the parameter groups would differ, or the decay would be gone unnoticed.
    """
    if saved != given:
        had, do = ("a", "give lambda_p too") if saved else ("no", "leave lambda_p out")
        raise CheckpointError(
            f"{checkpoint} was saved by a run with {had} p-norm decay added to its optimizer: {do}, or start a new "
            "run with its weights as the model"
        )


def warn_of_other_settings(
    checkpoint: str | Path,
    loaded: Mapping[str, list[Any]],
    asked: Mapping[str, list[Any]],
    saved: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    """Warn, in one message, about every setting in which a checkpoint differs from the run that goes on from it.

    Args:
        checkpoint: Named in the warning.
        loaded: `hyperparameters` after the optimizer's state was loaded; these are in force.
        asked: `hyperparameters` before.
        saved: Settings of the run that saved the checkpoint.
        given: Settings of this run; these are in force.
    """
    lines = []
    none = [None] * max(map(len, [*loaded.values(), *asked.values()]), default=0)
    either = loaded.keys() | asked.keys()
    for name in sorted(name for name in either if name in loaded and name in asked or name.startswith("target_")):
        values = zip(loaded.get(name, none), asked.get(name, none), strict=False)
        pairs = {f"{old} -> {new}" for old, new in values if _differ(old, new)}
        lines += [f"{name}: {pair} (the saved value is used)" for pair in sorted(pairs)]
    for name in sorted(saved.keys() & given.keys()):
        if _differ(saved[name], given[name]):
            lines.append(f"{name}: {saved[name]} -> {given[name]} (the new value is used)")
    if lines:
        logger.warning(
            "%s was saved by a run of other settings (saved -> given now):\n  %s\nWhat follows is not what that run "
            "would have done. To train its weights with new settings, start a new run with them as the model.",
            checkpoint,
            "\n  ".join(lines),
        )


def _differ(old: Any, new: Any) -> bool:
    return list(old) != list(new) if isinstance(old, tuple | list) and isinstance(new, tuple | list) else old != new
