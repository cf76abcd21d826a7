"""The zeros of a model before something is merged into it."""

from __future__ import annotations

import torch
from torch import nn


class BaseZeros:
    """Where a model's weights are exactly zero; a byte a weight.

    Args:
        model: The model, with the names of its weights as they will be again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._masks = {name: param.detach() == 0 for name, param in model.named_parameters()}
        self.number = sum(int(mask.count_nonzero()) for mask in self._masks.values())

    @torch.no_grad()
    def filled(self, model: nn.Module) -> int:
        """Count the weights that were zero and are not any more."""
        pairs = ((param, self._masks[name].to(param.device)) for name, param in model.named_parameters())
        return sum(int(param[mask].count_nonzero()) for param, mask in pairs)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Set to zero what was zero."""
        for name, param in model.named_parameters():
            param.masked_fill_(self._masks[name].to(param.device), 0.0)
