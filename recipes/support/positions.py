"""How long a sequence a model takes, found out by looking at the positions that it looks up."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LENGTH = 3


def longest_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a model takes at a time; where it has no limit, what its tokenizer says of it.

    The configuration is not enough: it may count positions that are never used, as RoBERTa's first two. So a few
    tokens are passed through the model, up to its first layer. Every process must call this.
    """
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "max_target_positions")
    stated = [getattr(config, name, None) for name in names]
    limits = [limit for limit in stated if isinstance(limit, int) and limit > 0]  # XLNet states -1
    if PartialState().is_main_process:  # which has all weights, whatever the others have
        limits += _learned_positions(model)
    (longest,) = broadcast_object_list([min(limits, default=tokenizer.model_max_length)])
    return longest


@torch.no_grad()
def _learned_positions(model: PreTrainedModel) -> list[int]:
    """Return of each table of learned positions how many tokens it is enough for."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    tokens = torch.full((1, _LENGTH), 1 if padding == 0 else 0, device=model.device)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    layers = max(lists, key=len, default=None)
    handle = layers[0].register_forward_pre_hook(_stop) if layers is not None else None
    try:
        with _Lookups() as lookups:
            model(input_ids=tokens, use_cache=False)
    except Exception:  # the end of the pass; or the model wants something else, and what it has looked up is all
        pass
    finally:
        if handle is not None:
            handle.remove()
    return lookups.capacities


class _Lookups(TorchDispatchMode):
    """Watches for tables that are looked up at successive places, one for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.capacities: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.embedding.default:
            table, places = args[:2]
            first = int(places.flatten()[0])
            successive = torch.arange(first, first + _LENGTH, device=places.device)
            if places.shape[-1] == _LENGTH and bool((places == successive).all()):
                self.capacities.append(table.shape[0] - first)
        return function(*args, **(kwargs or {}))


class _Stop(Exception):
    """Raised to end a pass."""


def _stop(module: nn.Module, args: Any) -> None:
    raise _Stop
