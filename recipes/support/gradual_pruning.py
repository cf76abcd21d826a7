"""Callbacks that make zeros during training by methods to compare with: pruning, and an exact L1 proximal step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from hf_padam import PAdamTrainer

from .calibration import observed, prune_calibrated
from .errors import UsageError
from .importance_scores import Linear, prune_by_fisher, prune_by_magnitude, prune_by_wanda

_PRUNINGS = 50
"""How many times weights are pruned along the ramp if no interval is given: as often as PAdam prunes at p = -inf."""

_NORM_DECAY = 0.99
"""Of gradual Wanda's running norms: they look back on about a hundred steps."""


class GradualPruning(TrainerCallback):
    """Zero weights, more and more of them (Zhu & Gupta, arXiv 1710.01878).

    The share of zeros is ``target * (1 - (1 - x)^3)``, where x goes from 0 to 1 between two shares of the steps. The
    weights themselves are the mask: what is exactly zero stays zero. So a checkpoint holds all there is to resume.

    Args:
        params: Any shapes.
        target: Share of zeros in the end.
        start: Share of the steps at which x is 0.
        end: Share of the steps at which x is 1.
        interval: Steps between two prunings; None for some 50 prunings in all.
    """

    def __init__(
        self, params: list[nn.Parameter], target: float, start: float, end: float, interval: int | None
    ) -> None:
        self.params, self.target, self.start, self.end, self.interval = params, target, start, end, interval

    def prune(self, share: float, optimizer: Any) -> None:
        """Zero weights until this share of all is zero, those that are already among them."""
        raise NotImplementedError

    def _share(self, step: int, max_steps: int) -> float | None:
        """Return the share of zeros to prune to after a step, None if it is not time to."""
        first, last = math.ceil(self.start * max_steps), max(1, round(self.end * max_steps))
        interval = self.interval or max(1, math.ceil((last - first) / _PRUNINGS))
        if step != last and not (first <= step < last and (step - first) % interval == 0):
            return None
        x = (step - first) / (last - first) if last > first else 1.0
        return self.target * (1 - (1 - min(1.0, x)) ** 3)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to go on from a checkpoint of a run that did not prune, after a step that should have.

        One with fewer zeros than planned is gone on from: where the number of steps has changed, the next pruning
        makes up for it.
        """
        shares = [self._share(step, state.max_steps) or 0.0 for step in range(1, state.global_step + 1)]
        zeros = sum(int((param == 0).sum()) for param in self.params) if any(shares) else 0
        if zeros < max(shares, default=0.0) / 10 * sum(param.numel() for param in self.params):
            raise UsageError(
                f"the checkpoint of step {state.global_step} was not pruned, as --prune_to {self.target} has it from "
                f"step {math.ceil(self.start * state.max_steps)} on: go on from an earlier one, or start afresh"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember what is zero."""
        self._zeros = [param == 0 for param in self.params]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put zeros back, and prune if it is time to."""
        for param, zeros in zip(self.params, self._zeros, strict=True):
            param.masked_fill_(zeros, 0.0)
        share = self._share(state.global_step + 1, state.max_steps)
        if share is not None:
            self.prune(share, kwargs["optimizer"])


class MagnitudePruning(GradualPruning):
    """Prune the smallest weights of all tensors together."""

    def prune(self, share: float, optimizer: Any) -> None:
        """Prune."""
        prune_by_magnitude(self.params, share)


class FisherPruning(GradualPruning):
    """Prune the weights of the least ``|weight| * sqrt(v)`` of all tensors together, v being Adam's second moment."""

    def prune(self, share: float, optimizer: Any) -> None:
        """Prune."""
        prune_by_fisher(self.params, optimizer, share)


class WandaPruning(GradualPruning):
    """Prune each output's weights of the least ``|weight| * input norm``, the norms being running ones of training.

    The norms are kept beside Adam's moments in the optimizer's state, so that a checkpoint has them.

    Args:
        params: As for `GradualPruning`, and the rest of its arguments.
        target: Share of zeros in the end.
        start: Share of the steps at which x is 0.
        end: Share of the steps at which x is 1.
        interval: Steps between two prunings; None for some 50 prunings in all.
        linear: Linear modules and their weights, which are `params`, by name.
        accelerator: Sums over processes.
    """

    STATE = "input_squares"

    def __init__(
        self,
        params: list[nn.Parameter],
        target: float,
        start: float,
        end: float,
        interval: int | None,
        linear: Mapping[str, Linear],
        accelerator: Accelerator,
    ) -> None:
        super().__init__(params, target, start, end, interval)
        self.linear, self._accelerator = linear, accelerator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch the inputs."""
        super().on_train_begin(args, state, control, **kwargs)
        self._watch = contextlib.ExitStack()
        self._seen = self._watch.enter_context(observed(self.linear))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the step before, and what an evaluation has shown since."""
        for squares in self._seen.values():
            squares.zero_()

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the running norms, then go on as for any gradual pruning."""
        for name, squares in self._accelerator.reduce(self._seen, "sum").items():
            kept = kwargs["optimizer"].state[self.linear[name][1]]
            if kept:  # else Adam has skipped the step, and would take what is put here for its moments
                kept[self.STATE] = torch.lerp(squares, kept.get(self.STATE, squares), _NORM_DECAY)
        super().on_optimizer_step(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch no longer."""
        self._watch.close()

    def prune(self, share: float, optimizer: Any) -> None:
        """Prune."""
        norms = {
            name: optimizer.state[weight].get(self.STATE, torch.zeros_like(self._seen[name])).sqrt()
            for name, (_, weight) in self.linear.items()
        }
        prune_by_wanda(self.linear, norms, share)


class CalibratedPruning(GradualPruning):
    """Prune all at once by Wanda or SparseGPT, calibrated on training data.

    Args:
        params: The weights of linear layers.
        target: Share of zeros.
        when: Share of the steps after which they are made.
        trainer: Of the model.
        method: "wanda" or "sparsegpt".
        samples: Training sequences to calibrate on.
    """

    def __init__(
        self, params: list[nn.Parameter], target: float, when: float, trainer: PAdamTrainer, method: str, samples: int
    ) -> None:
        super().__init__(params, target, when, when, 1)
        self.trainer, self.method, self.samples = trainer, method, samples

    def prune(self, share: float, optimizer: Any) -> None:
        """Prune."""
        prune_calibrated(self.trainer, self.method, share, self.samples)


class SoftThreshold(TrainerCallback):
    """After each step, move weights towards zero by the learning rate times a strength, and stop at zero.

    It is the exact proximal step of an L1 penalty, decoupled from Adam's preconditioning as weight decay is.
    """

    def __init__(self, params: list[nn.Parameter], strength: float) -> None:
        self.params, self.strength = params, strength

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Threshold."""
        threshold = kwargs["optimizer"].param_groups[0]["lr"] * self.strength
        for param in self.params:
            param.copy_(nn.functional.softshrink(param, threshold))
