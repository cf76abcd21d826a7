"""Which tensors of a checkpoint decay: asked of the config's model class, built without weights."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ..resuming.weight_names import UnknownNamesError, names_in_memory
from ..training.param_groups import decayed_parameters, input_dim, remembered_choice
from .model_directory import TEXT_CONFIG, ModelDirectory


@dataclass(frozen=True)
class DecayedOnDisk:
    """What is known of a checkpoint's tensors, by the names that they have there."""

    decayed: set[str] | None  # those that decayed, as the config says, or by default; None where that is not known
    parameters: set[str]  # those that are parameters, each tied one once; all where that is not known
    along_rows: set[str]  # matrices, and stacks of such, whose input is their rows
    source: str  # how this was found, in words

    @classmethod
    def of(cls, model: ModelDirectory) -> DecayedOnDisk:
        """Compare the checkpoint's names with those of its model, through the conversions that Transformers has."""
        shapes = {stored.info.name: model.info(stored).shape for stored in model.stored}
        try:
            named = skeleton(model)
            homes = names_in_memory(named, shapes)
            choice = remembered_choice(named.config)
            names = set(decayed_parameters(named, **choice))
            mixed = [name for name, params in homes.items() if names & set(params) and set(params) - names]
            if mixed:
                raise UnknownNamesError(f"{mixed[0]} holds weights that decay and others that do not")
        except Exception as error:  # an unknown class, code of its own that is not run here, other names
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            return cls(None, set(shapes), set(), f"which weights decay is not known: {reason}")

        def along_rows(name: str, in_memory: str) -> bool:
            with suppress(ValueError):  # it is not known of this kind of module
                here, there = list(named.get_parameter(in_memory).shape), list(shapes[name])
                transposed = here != there and here[-2:] == there[:-3:-1]  # as Transformers' conversion turns it
                return len(here) == len(there) and (input_dim(named, in_memory) == -2) != transposed
            return False

        return cls(
            {name for name, params in homes.items() if names & set(params)},
            {name for name, params in homes.items() if params},
            {name for name, params in homes.items() if any(along_rows(name, param) for param in params)},
            f"decayed: what {'decayed in training' if choice else 'decays by default'} in {type(named).__name__}",
        )


_LISTED = re.compile(r"(?!max_).*(layers?|blocks|depths?|stages|groups|experts)")
"""Numbers in a config of which a model may make as many modules."""

_MANY = 1000
"""So many modules are made in a moment, whether there are tensors for them or not."""


def _check_numbers(config: Any, most: int) -> None:
    """Refuse a config that asks for so many modules that the list of them might fill the memory.

    Raises:
        ValueError: Naming the number.
    """
    for name, value in config.items() if isinstance(config, dict) else ():
        if name == "label2id":  # whose names are anything
            continue
        for part in value if isinstance(value, list) else [value]:
            if _LISTED.fullmatch(str(name)) and isinstance(part, int | float) and part > most:
                raise ValueError(f"config.json says that there are {name}={part}, and there are fewer tensors")
            _check_numbers(part, most)


def skeleton(model: ModelDirectory) -> nn.Module:
    """Build the model that a checkpoint's config names, on the meta device; no code that comes with it is run.

    Raises:
        Exception: Any, if its class is not known here.
    """
    if not model.config:
        raise ValueError("no config.json")
    _check_numbers(model.config, max(len(model.stored), _MANY))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        config: Any = AutoConfig.from_pretrained(model.path, trust_remote_code=False)
        parts: list[Any] = [config, getattr(config, TEXT_CONFIG, None)]
        for part in parts:
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with torch.device("meta"):
            if isinstance(named, type) and issubclass(named, PreTrainedModel):  # and nothing else that it has
                return named(config)
            automatic = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
            return automatic.from_config(config)
    finally:
        logging.set_verbosity(verbosity)
