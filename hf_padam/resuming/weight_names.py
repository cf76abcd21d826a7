"""The names of weights on disk and in memory, which differ: the model's own conversions lead from one to the other.

A checkpoint may have an expert's matrices apart where the model has them stacked, a vision-language model's parts
under names of old, a model's body without its prefix. Names are compared through what Transformers has to load them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class UnknownNamesError(ValueError):
    """Names or shapes on disk cannot be brought together with those in memory."""


def names_in_memory(model: nn.Module, saved: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, ...]]:
    """Return where each tensor of a checkpoint goes in a model.

    Args:
        model: The model that would load it; it may be on the meta device.
        saved: The names and shapes of a checkpoint's tensors.

    Returns:
        For each name on disk the names of the parameters that hold its weights, as `named_parameters` has them: one,
        several if they are taken apart, none for a buffer, for what the model does not take, and for a second copy of
        a tied weight.

    Raises:
        UnknownNamesError: If parameters of the model, tied ones aside, are not in the checkpoint, or of another size
            there.
    """
    own = {id(param): name for name, param in model.named_parameters()}
    state = model.state_dict(keep_vars=True)
    found: dict[str, tuple[str, ...]] = {}
    first: dict[tuple[str, ...], str] = {}  # under which of its tied names a parameter came first
    held: defaultdict[tuple[str, ...], int] = defaultdict(int)
    for name, keys in _state_names(model, sorted(saved), state).items():
        params = tuple(dict.fromkeys(own[id(state[key])] for key in keys if id(state[key]) in own))
        is_copy = bool(params) and first.setdefault(params, keys[0]) != keys[0]
        found[name] = () if is_copy else params
        held[found[name]] += math.prod(saved[name])
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # sinusoidal positions, for example
    _check({name: p.numel() for name, p in model.named_parameters() if name not in unsaved or (name,) in held}, held)
    return found


def _state_names(model: nn.Module, names: list[str], state: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return which names of the model's state the tensors of a checkpoint are loaded into, as Transformers does it."""
    if not isinstance(model, PreTrainedModel):
        return {name: (name,) if name in state else () for name in names}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = {}
    for name in names:  # in order, on which some renamings depend
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state and name in state:
            key, pattern = name, None
        keys = [key]
        if pattern is not None:
            target, *others = by_pattern[pattern].target_patterns
            keys += [key.replace(target, other) for other in others]
        found[name] = tuple(key for key in keys if key in state)
    return found


def _check(sizes: Mapping[str, int], held: Mapping[tuple[str, ...], int]) -> None:
    covered = {param for params in held for param in params}
    missing = [name for name in sizes if name not in covered]
    if missing:
        raise UnknownNamesError(
            f"{len(missing)} of the model's parameters are not in it: {', '.join(missing[:3])}, ..."
        )
    for params, size in held.items():
        expected = sum(sizes[param] for param in params)
        if params and size != expected:
            raise UnknownNamesError(f"it has {size:,} weights for {' and '.join(params)}, which has {expected:,}")
