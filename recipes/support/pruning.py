"""What people use instead: magnitude pruning (one-shot, with recovery, gradual), Wanda, and an exact L1 proximal step.

They prune the weights that the p-norm decay would act on, so that sparsities compare.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D
from transformers.training_args import OptimizerNames

from hf_padam import PAdamTrainer
from hf_padam.training.registration import OPTIMIZERS

from .errors import UsageError

_CALIBRATION_BATCHES = 32


@dataclass
class PruningArguments:
    """Methods to compare with; they go with --optim adamw_torch."""

    _argument_group_name = "methods to compare with"

    one_shot: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Also evaluate the trained model with these shares of its weights pruned at once, by magnitude "
            "and by Wanda. What is saved stays unpruned."
        },
    )
    prune_to: float | None = field(
        default=None, metadata={"help": "Prune by magnitude, over all layers at once, to this share while training."}
    )
    prune_start: float = field(default=0.2, metadata={"help": "Share of the steps after which --prune_to begins."})
    prune_end: float = field(
        default=0.75,
        metadata={
            "help": "Share of the steps after which it has arrived (on a cubic curve) and the rest recovers. The same "
            "as --prune_start: all at once."
        },
    )
    prune_interval: int = field(default=20, metadata={"help": "Steps from one pruning to the next on the way."})
    soft_threshold: float = field(
        default=0.0, metadata={"help": "Exact L1: after each step move weights towards zero by lr times this."}
    )

    def __post_init__(self) -> None:
        for name, values in (("one_shot", self.one_shot), ("prune_to", [self.prune_to or 0.0])):
            for value in values:
                if not 0 <= value < 1:
                    raise UsageError(f"--{name} {value} is not a share of the weights: it must be in [0, 1)")
        if not 0 <= self.prune_start <= self.prune_end <= 1:
            raise UsageError(
                f"--prune_start {self.prune_start} and --prune_end {self.prune_end} must be shares of the steps, "
                "0 <= start <= end <= 1"
            )
        if self.prune_interval < 1:
            raise UsageError(f"--prune_interval {self.prune_interval} is too small: it must be at least 1")
        for name in ("prune_start", "prune_end", "prune_interval") if self.prune_to is None else ():
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise UsageError(f"--{name} has no effect without --prune_to: give that too, or drop it")
        if not 0 <= self.soft_threshold < math.inf:
            raise UsageError(f"--soft_threshold {self.soft_threshold} must be a finite number of at least 0")

    def callbacks(self, trainer: PAdamTrainer) -> list[TrainerCallback]:
        """Return what prunes a trainer's model during training as these arguments say.

        Raises:
            UsageError: If PAdam, which makes zeros of its own, would be mixed with another method, or the weights are
                sharded.
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
        model: Any = trainer.model
        params = dict(model.named_parameters())
        tensors = [params[name] for name in trainer.decayed_names()]
        callbacks: list[TrainerCallback] = []
        if self.prune_to:
            callbacks.append(
                MagnitudePruning(tensors, self.prune_to, self.prune_start, self.prune_end, self.prune_interval)
            )
        if self.soft_threshold:
            callbacks.append(SoftThreshold(tensors, self.soft_threshold))
        return callbacks


class MagnitudePruning(TrainerCallback):
    """Zero the smallest weights of all tensors together, more and more of them (Zhu & Gupta, arXiv 1710.01878).

    The share of zeros is ``target * (1 - (1 - x)^3)``, where x goes from 0 to 1 between two shares of the steps. The
    weights themselves are the mask: what is exactly zero stays zero. So a checkpoint holds all there is to resume.

    Args:
        params: Any shapes.
        target: Share of zeros in the end.
        start: Share of the steps at which x is 0.
        end: Share of the steps at which x is 1.
        interval: Steps between two prunings.
    """

    def __init__(self, params: list[nn.Parameter], target: float, start: float, end: float, interval: int) -> None:
        self.params, self.target, self.start, self.end, self.interval = params, target, start, end, interval

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember what is zero."""
        self._masks = [param != 0 for param in self.params]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put zeros back, and prune if it is time to."""
        for param, mask in zip(self.params, self._masks, strict=True):
            param.mul_(mask)
        step = state.global_step + 1
        first, last = math.ceil(self.start * state.max_steps), max(1, round(self.end * state.max_steps))
        if step == last or (first <= step < last and (step - first) % self.interval == 0):
            x = (step - first) / (last - first) if last > first else 1.0
            prune_by_magnitude(self.params, self.target * (1 - (1 - min(1.0, x)) ** 3))


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


@torch.no_grad()
def prune_by_magnitude(params: Iterable[Tensor], share: float) -> None:
    """Zero this share of the elements of all tensors together: the smallest."""
    params = list(params)
    flat = torch.cat([param.detach().abs().flatten() for param in params])
    mask = prune.L1Unstructured(amount=share).compute_mask(flat, torch.ones_like(flat)) if share else flat != 0
    for param, part in zip(params, mask.split([param.numel() for param in params]), strict=True):
        param.mul_(part.view_as(param))


@torch.no_grad()
def prune_by_wanda(weights: Mapping[str, tuple[nn.Module, Tensor]], norms: dict[str, Tensor], share: float) -> None:
    """Zero this share of each output's weights: those of the smallest ``|weight| * input norm`` (arXiv 2306.11695).

    Args:
        weights: Linear modules and their weights, by name.
        norms: (inputs,) for each, the root of the inputs' summed squares over calibration tokens.
        share: Of zeros, 0 to 1.
    """
    for name, (module, weight) in weights.items():
        by_output = weight.T if isinstance(module, Conv1D) else weight  # (outputs, inputs), a view
        scores = by_output.abs() * norms[name]
        count = round(share * scores.shape[1])
        by_output.scatter_(1, scores.topk(count, largest=False).indices, 0.0)


def evaluate_one_shot(trainer: PAdamTrainer, shares: list[float]) -> list[dict[str, Any]]:
    """Prune a trained model in one shot in several ways, evaluate each, and put the weights back.

    Returns:
        Rows of `method`, the share asked for, the sparsities reached, and the validation perplexity and loss.
    """
    if not shares:
        return []
    model = trainer.accelerator.unwrap_model(trainer.model)
    params = {name: param for name, param in model.named_parameters() if name in set(trainer.decayed_names())}
    names = {id(param): name for name, param in params.items()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {
        names[id(module.weight)]: (module, module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in names.keys() - embeddings
    }
    norms = _input_norms(trainer, {name: module for name, (module, _) in linear.items()})
    rows = []
    for method, share in itertools.product(("magnitude", "wanda"), shares):
        with _restored(params.values()):
            if method == "magnitude":
                prune_by_magnitude(params.values(), share)
            else:
                prune_by_wanda(linear, norms, share)
            metrics = trainer.evaluate(metric_key_prefix=f"one_shot_{method}_{share:g}")
        metrics = {key.removeprefix(f"one_shot_{method}_{share:g}_"): value for key, value in metrics.items()}
        rows.append(
            {
                "method": method,
                "share": share,
                "validation_loss": math.log(metrics["perplexity"]),
                "validation_perplexity": metrics["perplexity"],
                "sparsity": metrics["sparsity"],
                "sparsity_total": metrics["sparsity_total"],
            }
        )
    return rows


@torch.no_grad()
def _input_norms(trainer: PAdamTrainer, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Measure the norm of each module's inputs, by feature, over some batches of training data."""
    squares: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            values = inputs[0].detach().float().flatten(end_dim=-2)
            squares[name] = squares.get(name, 0.0) + values.square().sum(dim=0)

        return add

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    model: Any = trainer.model
    model.eval()
    try:
        for batch in itertools.islice(trainer.get_train_dataloader(), _CALIBRATION_BATCHES):
            model(**trainer._prepare_inputs(batch))
    finally:
        for handle in handles:
            handle.remove()
    # Each process has seen batches of its own; all must prune the same weights.
    return {name: trainer.accelerator.reduce(value, "sum").sqrt() for name, value in squares.items()}


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
