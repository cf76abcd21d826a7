"""Parameter groups that were made for any optimizer, and so do not say which of them a p-norm decay is to spare."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .hyperparameters import is_number, named

logger = logging.getLogger(__name__)


def exempt(groups: list[dict[str, Any]], weight_decay: float) -> list[bool]:
    """Say of each group whether its maker exempts it from decay: a `weight_decay` of 0 beside a group that has some.

    Scripts and the Trainer put biases and norms into such a group. One that gives a `lambda_p` speaks for itself.

    Args:
        groups: Of one optimizer.
        weight_decay: What counts where a group does not give it.
    """
    given = [group.get("weight_decay", weight_decay) for group in groups]
    numbers = [value if isinstance(value, Tensor) or is_number(value) else 0 for value in given]  # checked elsewhere
    some = any(number > 0 for number in numbers)
    return [some and value == 0 and "lambda_p" not in group for group, value in zip(groups, given, strict=True)]


def with_exemptions(params: Iterable[Any], weight_decay: float) -> Iterable[Any]:
    """Return what an optimizer is given, with ``lambda_p=0`` in groups that are `exempt`."""
    if isinstance(params, Tensor):
        return params  # torch says what is wrong with it
    groups = list(params)
    if not groups or not all(isinstance(group, dict) for group in groups):
        return groups
    spared = exempt(groups, weight_decay)
    return [group | {"lambda_p": 0.0} if spare else group for group, spare in zip(groups, spared, strict=True)]


CHOSEN = "_chosen_to_decay"
"""Of an optimizer: the indices of the groups in which nothing decays that was not chosen for it."""


def warn_of_vectors(groups: Iterable[dict[str, Any]]) -> None:
    """Warn if biases, norms and the like, which have one dimension, decay along with matrices."""
    decaying = [
        (name, param)
        for group in groups
        if group["lambda_p"] > 0 and group["p_norm"] < 2
        for name, param in named(group)
    ]
    vectors = [name for name, param in decaying if param.dim() == 1 and not _is_shard(param)]
    if vectors and len(vectors) < len(decaying):
        logger.warning(
            "A p-norm decay with p < 2 acts on %d tensors of one dimension, as biases and norms are: %s. Many of "
            "their weights will become zero. To leave them out, put them in a parameter group with lambda_p=0, as "
            "hf_padam.get_param_groups(model) does, which also leaves out embeddings.",
            len(vectors),
            ", ".join(vectors[:5]) + (", ..." if len(vectors) > 5 else ""),
        )


def _is_shard(param: Tensor) -> bool:
    """Whether FSDP1 or ZeRO-3 have flattened it, so that its dimensions tell nothing."""
    return hasattr(param, "_fsdp_flattened") or hasattr(param, "ds_tensor")
