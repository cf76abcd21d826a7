"""Which weights an optimizer's p-norm decay acts on, in names and in words."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import nn

from ..optim import unwrap
from ..optim.exemptions import CHOSEN
from ..optim.hyperparameters import is_number
from .linear_maps import WholeShapes, embedding_weights, linear_matrices

logger = logging.getLogger(__name__)


def decaying_names(model: nn.Module, optimizer: Any) -> list[str] | None:
    """Return the names of a model's parameters that an optimizer's p-norm decay acts on, in the model's order.

    Args:
        model: The model.
        optimizer: Any; accelerate may have wrapped it. Its groups say what decays: those with a positive `lambda_p`.

    Returns:
        None where the groups do not say: there is no decay, or they hold other tensors than the model (DeepSpeed's).
    """
    decaying = {id(param) for group in _decaying_groups(optimizer) for param in group["params"]}
    return [name for name, param in model.named_parameters() if id(param) in decaying] or None


def describe_decay(model: nn.Module, decayed: Collection[str]) -> str:
    """Say which weights decay, in one line a kind of layer, such as ``q_proj 30 × 576×576``.

    Args:
        model: The model; sharded parameters are described by the shape of the whole.
        decayed: Names of its parameters that decay.

    Returns:
        A heading with the numbers of tensors and weights, then the kinds in the model's order.
    """
    shapes = WholeShapes(model)
    parameters = {name: shapes.of(param) for name, param in model.named_parameters()}
    weights = {name: math.prod(shape) for name, shape in parameters.items()}
    acts_on = [name for name in parameters if name in decayed]
    kinds = Counter((_kind(name), "×".join(map(str, parameters[name]))) for name in acts_on)
    head = (
        f"The p-norm decay acts on {len(acts_on):,} of {len(parameters):,} tensors, "
        f"{sum(weights[name] for name in acts_on):,} of {sum(weights.values()):,} weights:"
    )
    return "\n".join([head, *(f"  {kind} {count} × {shape}" for (kind, shape), count in kinds.items())])


def warn_of_strangers(model: nn.Module, optimizer: Any) -> None:
    """Warn where parameters decay that are no matrices of linear maps, unless they were chosen for this decay.

    So they are in groups that name them and say how they decay, as those of `get_param_groups` do, and not those that
    scripts and the Trainer make for any optimizer; or where `add_pnorm_decay` is told which they are.
    """
    groups = getattr(unwrap(optimizer), "param_groups", [])
    chosen = getattr(unwrap(optimizer), CHOSEN, None)
    named = {i for i, group in enumerate(groups) if "param_names" in group} if chosen is None else chosen
    meant = [id(group) for i, group in enumerate(groups) if i in named]
    others = [group for group in _decaying_groups(optimizer) if id(group) not in meant]
    decaying = {id(param) for group in others for param in group["params"]}
    if not decaying:
        return
    proper = linear_matrices(model) - {id(param) for param in embedding_weights(model)}
    strangers = [name for name, param in model.named_parameters() if id(param) in decaying - proper]
    if strangers:
        shown = ", ".join(strangers[:8]) + (", ..." if len(strangers) > 8 else "")
        logger.warning(
            "The p-norm decay acts on %d parameters that are no matrices of linear maps, but embeddings, norms or the "
            "like: %s. Many of their weights will become zero. To leave them out, build the optimizer with "
            'hf_padam.get_param_groups(model), or set optim="padam" in the training arguments.',
            len(strangers),
            shown,
        )


def _decaying_groups(optimizer: Any) -> list[dict[str, Any]]:
    groups = getattr(unwrap(optimizer), "param_groups", [])
    # Of a group that is steered to a target sparsity lambda_p is a result.
    ours = [group for group in groups if "p_norm" in group and is_number(group.get("lambda_p"))]
    return [group for group in ours if group["lambda_p"] > 0 or "target_step" in group]


def _kind(name: str) -> str:
    """What remains of a parameter's name without the numbers of layers, and where that is: its last part or two."""
    parts = name.removesuffix(".weight").split(".")
    last = parts[-1]
    return f"{parts[-2]}.{last}" if last.isdigit() and len(parts) > 1 else last
