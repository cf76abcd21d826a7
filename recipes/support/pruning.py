"""What people use instead: pruning by magnitude, Wanda, Fisher information or SparseGPT, and an exact L1 step.

Gradual, in one shot with recovery, or in one shot at the end. They prune the weights that the p-norm decay would act
on, so that sparsities compare.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from hf_padam import PAdam, PAdam8bit, PAdamTrainer
from hf_padam.training.registration import OPTIMIZERS

from .calibration import linear_weights, prune_calibrated
from .errors import UsageError
from .gradual_pruning import (
    CalibratedPruning,
    FisherPruning,
    GradualPruning,
    MagnitudePruning,
    SoftThreshold,
    WandaPruning,
)
from .importance_scores import prune_by_fisher, prune_by_magnitude

METHODS = ("magnitude", "wanda", "fisher", "sparsegpt")


@dataclass
class PruningArguments:
    """Methods to compare with; they go with --optim adamw_torch or adamw_torch_fused."""

    _argument_group_name = "methods to compare with"

    one_shot: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Also evaluate the trained model with these shares of its weights pruned at once. What is saved "
            "stays unpruned."
        },
    )
    one_shot_by: list[str] = field(
        default_factory=lambda: ["magnitude", "wanda", "fisher"],
        metadata={
            "help": "How, any of magnitude, wanda, fisher and sparsegpt, see --prune_by; the first three by default."
        },
    )
    prune_to: float | None = field(default=None, metadata={"help": "Prune to this share of zeros while training."})
    prune_by: str = field(
        default="magnitude",
        metadata={
            "help": "Which weights go: the smallest |weight| of all layers; wanda: the smallest |weight| * input norm "
            "of each output; fisher: the smallest |weight| * sqrt(Adam's second moment) of all layers; sparsegpt: all "
            "at once only, the others make up for them.",
            "choices": list(METHODS),
        },
    )
    prune_start: float = field(default=0.2, metadata={"help": "Share of the steps after which --prune_to begins."})
    prune_end: float = field(
        default=0.75,
        metadata={
            "help": "Share of the steps after which it has arrived (on a cubic curve) and the rest recovers. The same "
            "as --prune_start: all at once."
        },
    )
    prune_interval: int | None = field(
        default=None,
        metadata={"help": "Steps from one pruning to the next on the way; by default such that there are some 50."},
    )
    calibration_samples: int = field(
        default=128,
        metadata={"help": "Training sequences that wanda and sparsegpt look at to prune at once."},
    )
    soft_threshold: float = field(
        default=0.0, metadata={"help": "Exact L1: after each step move weights towards zero by lr times this."}
    )

    def __post_init__(self) -> None:
        for name, values in (("one_shot", self.one_shot), ("prune_to", [self.prune_to or 0.0])):
            for value in values:
                if not 0 <= value < 1:
                    raise UsageError(f"--{name} {value} is not a share of the weights: it must be in [0, 1)")
        for name, methods in (("one_shot_by", self.one_shot_by), ("prune_by", [self.prune_by])):
            for method in methods or [""]:
                if method not in METHODS:
                    raise UsageError(f"--{name} {method} is not one of {', '.join(METHODS)}")
        if self.prune_to and self.soft_threshold:
            raise UsageError("--prune_to and --soft_threshold are two methods: give one of them")
        if not 0 <= self.prune_start <= self.prune_end <= 1:
            raise UsageError(
                f"--prune_start {self.prune_start} and --prune_end {self.prune_end} must be shares of the steps, "
                "0 <= start <= end <= 1"
            )
        for name in ("prune_interval", "calibration_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} is too small: it must be at least 1")
        for name in ("prune_by", "prune_start", "prune_end", "prune_interval") if self.prune_to is None else ():
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UsageError(f"--{name} has no effect without --prune_to: give that too, or drop it")
        if self.prune_by == "sparsegpt" and not self._at_once:
            raise UsageError(
                "--prune_by sparsegpt prunes all at once: give --prune_start and --prune_end the same share of the "
                "steps, e.g. 0.5"
            )
        if not 0 <= self.soft_threshold < math.inf:
            raise UsageError(f"--soft_threshold {self.soft_threshold} must be a finite number of at least 0")

    @property
    def _at_once(self) -> bool:
        return self.prune_start == self.prune_end

    def callbacks(self, trainer: PAdamTrainer) -> list[TrainerCallback]:
        """Return what prunes a trainer's model during training as these arguments say.

        Raises:
            UsageError: If PAdam, which makes zeros of its own, would be mixed with another method, the weights are
                sharded, or the method asked for cannot prune this model or go with this optimizer.
        """
        optim = OptimizerNames(trainer.args.optim).value
        if optim in OPTIMIZERS and (self.prune_to or self.soft_threshold):
            raise UsageError(
                f"--prune_to and --soft_threshold are methods to compare {optim} with: give --optim adamw_torch"
            )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            if self.prune_to or self.soft_threshold or self.one_shot:
                raise UsageError(
                    "--prune_to, --soft_threshold and --one_shot prune whole weights, but FSDP and DeepSpeed split "
                    "them: run in one process, or under DDP"
                )
        self._check_optimizer(trainer.optimizer, optim)
        model: Any = trainer.model
        params = dict(model.named_parameters())
        tensors = [params[name] for name in trainer.decayed_names()]
        if self.one_shot and {"wanda", "sparsegpt"} & set(self.one_shot_by or ()) and any(t.ndim > 2 for t in tensors):
            raise UsageError(
                "--one_shot_by wanda and sparsegpt prune linear layers, and leave experts' stacks: not these"
            )
        callbacks: list[TrainerCallback] = []
        if self.prune_to:
            callbacks.append(self._pruning(trainer, tensors))
        if self.soft_threshold:
            callbacks.append(SoftThreshold(tensors, self.soft_threshold))
        return callbacks

    def _check_optimizer(self, optimizer: Any, name: str) -> None:
        """Refuse what is read from, or kept in, Adam's state with an optimizer that has none."""
        asked = ""
        if self.one_shot and "fisher" in self.one_shot_by:
            asked = "--one_shot_by fisher"
        if self.prune_to and (self.prune_by == "fisher" or self.prune_by == "wanda" and not self._at_once):
            asked = f"--prune_by {self.prune_by}"
        if asked and (not isinstance(optimizer, torch.optim.Adam | PAdam) or isinstance(optimizer, PAdam8bit)):
            raise UsageError(
                f"{asked} needs the state of AdamW or PAdam, with second moments in full, which {name} does not keep: "
                "give --optim adamw_torch, or another method"
            )

    def _pruning(self, trainer: PAdamTrainer, params: list[nn.Parameter]) -> GradualPruning:
        assert self.prune_to is not None
        plan = (self.prune_to, self.prune_start, self.prune_end, self.prune_interval)
        if self.prune_by == "magnitude":
            return MagnitudePruning(params, *plan)
        if self.prune_by == "fisher":
            return FisherPruning(params, *plan)
        linear = linear_weights(trainer.accelerator.unwrap_model(trainer.model), trainer.decayed_names())
        without = {id(param) for param in params} - {id(weight) for _, weight in linear.values()}
        if without:
            model: Any = trainer.model
            names = [name for name, param in model.named_parameters() if id(param) in without]
            raise UsageError(
                f"--prune_by {self.prune_by} looks at the inputs of linear layers, but {names[0]} and "
                f"{len(names) - 1} other weights that decay are none's: prune by magnitude or fisher"
            )
        if self._at_once:
            return CalibratedPruning(
                params, self.prune_to, self.prune_start, trainer, self.prune_by, self.calibration_samples
            )
        return WandaPruning(params, *plan, linear, trainer.accelerator)


def evaluate_one_shot(trainer: PAdamTrainer, pruning: PruningArguments, test: Any = None) -> list[dict[str, Any]]:
    """Prune a trained model in one shot in several ways, evaluate each, and put the weights back.

    Args:
        trainer: After training.
        pruning: Says how much and how.
        test: A dataset to evaluate on besides the validation data.

    Returns:
        Rows of `method`, the share asked for, the sparsities reached, and the perplexities and losses.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    decayed = set(trainer.decayed_names()) if pruning.one_shot else set()
    params = [param for name, param in model.named_parameters() if name in decayed]
    rows = []
    for method, share in itertools.product(pruning.one_shot_by, pruning.one_shot):
        row: dict[str, Any] = {"method": method, "share": share}
        with _restored(params):
            if method == "magnitude":
                prune_by_magnitude(params, share)
            elif method == "fisher":
                prune_by_fisher(params, trainer.optimizer, share)
            else:
                prune_calibrated(trainer, method, share, pruning.calibration_samples)
            for split, data in {"validation": None, "test": test}.items():
                if split == "validation" or data is not None:
                    prefix = f"one_shot_{method}_{share:g}_{split}"
                    metrics = trainer.evaluate(data, metric_key_prefix=prefix)
                    perplexity = metrics[f"{prefix}_perplexity"]
                    row |= {f"{split}_loss": math.log(perplexity), f"{split}_perplexity": perplexity}
                    row |= {key: metrics[f"{prefix}_{key}"] for key in ("sparsity", "sparsity_total")}
        rows.append(row)
    return rows


@contextlib.contextmanager
def _restored(params: Iterable[Tensor]) -> Iterator[None]:
    params = list(params)
    kept = [param.detach().clone() for param in params]
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in zip(params, kept, strict=True):
                param.copy_(value)
