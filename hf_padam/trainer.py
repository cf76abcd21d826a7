"""A Trainer that reports token-exact perplexity and weight sparsity, and its arguments with PAdam's options typed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames

from .backends import CHOICES
from .gradients import check_gradient_norm
from .metrics import Perplexity, WeightSparsity, sequence_nll
from .other_optimizers import asks_for_decay, attach_decay, check_decay_options, check_deepspeed
from .param_groups import decayed_parameters
from .registration import NAME, OPTIMIZERS, OPTIONS, optimizer_options
from .resumable import ResumableTrainer
from .schedules import DEFAULT_SHARE, DEFAULT_START, SHAPES, PNormScheduleCallback, check_schedule, scheduled_p_norm
from .settings import check_added_decay, check_decayed
from .target_sparsity import SCOPES

logger = logging.getLogger(__name__)

_ADDED_DECAY = "added_decay"
"""Among the settings that a checkpoint keeps: whether a p-norm decay was added to an optimizer other than PAdam."""

_DECAYED = "decayed_weights"
"""Another of them: which weights the p-norm decay acts on, if there is one."""


@dataclass
class PAdamTrainingArguments(TrainingArguments):
    """TrainingArguments with "padam" as the default optimizer and its options as typed fields.

    The fields are the keys that a plain `TrainingArguments` takes in `optim_args`. With another `optim`, giving
    `lambda_p` makes `PAdamTrainer` add the same decay to that optimizer (see `add_pnorm_decay`).

    Raises:
        ValueError: On an option out of range, or one that the optimizer does not have, before anything is loaded.
    """

    optim: OptimizerNames | str = field(
        default=NAME, metadata={"help": "The optimizer: padam, padam_8bit, or any other name that Transformers knows."}
    )
    optim_args: str | None = field(
        default=None,
        metadata={
            "help": "Options of the optimizer as key=value pairs; padam's are also options of their own, below."
        },
    )
    optim_target_modules: None | str | list[str] = field(
        default=None,
        metadata={"help": "Narrow the decay to these modules: all-linear, a regular expression, or a JSON list."},
    )
    p_norm: float = field(
        default=OPTIONS["p_norm"].default,
        metadata={
            "help": "p of the norm whose decay is applied. Below 2 it makes zeros, below 1 the sparsest models."
        },
    )
    lambda_p: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the p-norm decay. More makes more zeros; 0 turns it off. Adds the decay to any other "
            f"optim too. Default: {OPTIONS['lambda_p'].default} with padam and padam_8bit, no decay with others."
        },
    )
    p_norm_schedule: str = field(
        default="constant",
        metadata={
            "help": "How p moves from p_norm_start to p_norm. PAdamTrainer moves it.",
            "choices": list(SHAPES),
        },
    )
    p_norm_start: float = field(
        default=DEFAULT_START, metadata={"help": "p of the first step, under a schedule; at 2 zeros may grow."}
    )
    p_norm_schedule_share: float = field(
        default=DEFAULT_SHARE, metadata={"help": "Share of the training steps over which p moves."}
    )
    late_decay: bool = field(
        default=OPTIONS["late_decay"].default,
        metadata={"help": "Take the decay's factor from the weight after the step. Makes few exact zeros."},
    )
    s_rate: float = field(
        default=OPTIONS["s_rate"].default,
        metadata={"help": "How fast the p-norm decay follows a weight, above 0, at most 1, which is at once."},
    )
    decay_embeddings: bool = field(
        default=OPTIONS["decay_embeddings"].default,
        metadata={"help": "Decay embeddings and the output head too, which are left out otherwise."},
    )
    dense_modules: None | str | list[str] = field(
        default=None,
        metadata={"help": "Leave these modules out of the decay: a regular expression, or a JSON list."},
    )
    target_sparsity: float | None = field(
        default=None,
        metadata={"help": "Share of the decayed weights that is to be zero in the end. Finds lambda_p in its place."},
    )
    target_start: float = field(
        default=OPTIONS["target_start"].default,
        metadata={"help": "Share of the steps after which target_sparsity begins to make zeros."},
    )
    target_end: float = field(
        default=OPTIONS["target_end"].default,
        metadata={"help": "Share of the steps after which it has made all; what survives recovers in the rest."},
    )
    target_scope: str = field(
        default=OPTIONS["target_scope"].default,
        metadata={
            "help": "What target_sparsity is a share of: all decayed weights together, or each tensor by itself.",
            "choices": list(SCOPES),
        },
    )
    bf16_stochastic_round: bool = field(
        default=OPTIONS["bf16_stochastic_round"].default,
        metadata={"help": "For models whose weights are bf16: round them up or down at random, exact in the mean."},
    )
    nonfinite_gradients: str = field(
        default="stop",
        metadata={
            "help": "At a step whose gradients are not finite: stop, or skip its update (as fp16 and DeepSpeed do).",
            "choices": ["stop", "skip"],
        },
    )
    backend: str = field(
        default=OPTIONS["backend"].default,
        metadata={"help": "How the update runs. auto picks the fastest available.", "choices": list(CHOICES)},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # The Trainer would take the largest perplexity for the best one.
        best = self.metric_for_best_model
        if best is not None and best.endswith("perplexity"):
            self.greater_is_better = False
        for name in ("optim_target_modules", "dense_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("["):  # a list, from a command line
                try:
                    setattr(self, name, json.loads(value))
                except ValueError as error:
                    raise ValueError(f"{name}={value!r} is not a list in JSON: {error}") from error
        if self.nonfinite_gradients not in ("stop", "skip"):
            raise ValueError(f"nonfinite_gradients={self.nonfinite_gradients!r} is not allowed: it is stop or skip")
        check_schedule(self.p_norm_start, self.p_norm_schedule_share, self.p_norm_schedule)
        if OptimizerNames(self.optim).value in OPTIMIZERS:
            optimizer_options(self)
        else:
            check_decay_options(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments for logs and reports, with the options of padam that are in force."""
        values = super().to_dict()
        if OptimizerNames(self.optim).value in OPTIMIZERS:
            options = optimizer_options(self)
            values.update({key: options[key] for key in OPTIONS})
        return values


class PAdamTrainer(ResumableTrainer):
    """A Trainer whose evaluations report perplexity and sparsity, and whose training logs report sparsity.

    * ``eval_perplexity`` is exp(summed NLL / predicted tokens), exact across batches of unequal length, ``-100``
      labels and processes. (``exp(eval_loss)`` is not: `eval_loss` is the Trainer's mean of batch means.)
    * ``eval_sparsity`` is the share of exact zeros among the weights that the p-norm decay acts on;
      ``eval_sparsity_total`` that among all parameters, frozen ones included and each tied weight counted once.

    Both sparsities are also in the training logs, so they reach whatever `report_to` names; so is `p_norm` while
    `p_norm_schedule` moves it. Works with any optimizer.

    Runs go on exactly after a kill (see `ResumableTrainer`), and a gradient that is not finite is never applied.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._nll: list[Tensor] = []
        self._tokens: list[Tensor] = []
        if asks_for_decay(self.args) and self.is_deepspeed_enabled:
            check_deepspeed(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        if not any(isinstance(callback, PNormScheduleCallback) for callback in self.callback_handler.callbacks):
            start = getattr(self.args, "p_norm_start", DEFAULT_START)
            share = getattr(self.args, "p_norm_schedule_share", DEFAULT_SHARE)
            shape = getattr(self.args, "p_norm_schedule", "constant")
            self.add_callback(PNormScheduleCallback(start, share, shape))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; add a p-norm decay if the arguments ask for one and it is not PAdam."""
        optimizer = super().create_optimizer(model)
        if asks_for_decay(self.args):
            model = self.model if model is None else model
            assert model is not None
            attach_decay(optimizer, model, self.args, self._decay_targets())
        return optimizer

    def _settings(self) -> dict[str, Any]:
        settings = super()._settings() | {_ADDED_DECAY: asks_for_decay(self.args)}
        if asks_for_decay(self.args) or OptimizerNames(self.args.optim).value in OPTIMIZERS:
            names = self.decayed_names()
            digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
            settings[_DECAYED] = f"{len(names)} weights (hash of their names: {digest[:8]})"
        return settings

    def _check_settings(self, checkpoint: str, saved: dict[str, Any]) -> None:
        super()._check_settings(checkpoint, saved)
        if _ADDED_DECAY in saved:
            check_added_decay(checkpoint, saved[_ADDED_DECAY], asks_for_decay(self.args))
        if _DECAYED in saved:
            check_decayed(checkpoint, saved[_DECAYED], self._settings()[_DECAYED])

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        """Return what the optimizer is built with: under a schedule, groups that begin at its start."""
        factory, options = ResumableTrainer.get_optimizer_cls_and_kwargs(args, model)
        if options.pop("p_norm_schedule", "constant") != "constant":
            options["p_norm_start"] = getattr(args, "p_norm_start", DEFAULT_START)
        return factory, options

    def decayed_names(self) -> list[str]:
        """Return the names of the weights that the p-norm decay acts on, or would with `optim="padam"`."""
        assert self.model is not None  # the Trainer has one from its constructor on
        return list(decayed_parameters(self.model, **self._decay_targets()))

    def _decay_targets(self) -> dict[str, Any]:
        if OptimizerNames(self.args.optim).value in OPTIMIZERS:
            options = optimizer_options(self.args)
        else:
            options = {key: getattr(self.args, key, OPTIONS[key].default) for key in OPTIONS}
        targets = {key: options[key] for key in ("decay_embeddings", "dense_modules")}
        return targets | {"target_modules": self.args.optim_target_modules}

    def sparsity(self) -> dict[str, float]:
        """Return the shares of exact zeros: `sparsity` of the decayed weights, `sparsity_total` of the model."""
        summary = WeightSparsity().compute(model=self.model, decayed=self.decayed_names())
        return {key: summary[key] for key in ("sparsity", "sparsity_total")}

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradients' norm, over all processes; act as `nonfinite_gradients` says if it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # a sharded model's
        step = self.state.global_step + 1
        try:
            check_gradient_norm(norm, step, self.accelerator)
        except FloatingPointError:
            if getattr(self.args, "nonfinite_gradients", "stop") == "stop":
                raise
            logger.warning("The gradient norm of step %d is %s: its update is skipped.", step, float(norm))
            model.zero_grad()  # without gradients the optimizer leaves weights and moments as they are
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add sparsity to every log of training progress."""
        if "loss" in logs:
            logs |= self.sparsity()
            p_norm = scheduled_p_norm(self.optimizer)
            if p_norm is not None:
                logs["p_norm"] = p_norm
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate one batch, and keep its summed NLL and token count for the perplexity."""
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        scores = _token_scores(logits, labels)
        if scores is not None and labels is not None:
            shift = "shift_labels" not in inputs  # else the collator has shifted them
            shift = shift and _predicts_the_next_token(self.accelerator.unwrap_model(model))
            nll, tokens = self.accelerator.gather_for_metrics(sequence_nll(scores, labels, shift=shift))
            self._nll.append(nll)
            self._tokens.append(tokens)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the evaluation and add perplexity and sparsity to its metrics."""
        self._nll, self._tokens = [], []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = self.sparsity()
        if self._nll:
            nll, tokens = torch.cat(self._nll).tolist(), torch.cat(self._tokens).tolist()
            predicts = any(tokens)  # else every label is masked
            result = Perplexity().compute(predictions=nll, references=tokens) if predicts else {"perplexity": math.nan}
            metrics["perplexity"] = result["perplexity"]
        prefixed = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        return output._replace(metrics={**(output.metrics or {}), **prefixed})


def _token_scores(logits: Any, labels: Any) -> Tensor | None:
    """Return the output that scores every labelled token: (batch, length, vocabulary) for labels (batch, length)."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    for output in logits if isinstance(logits, tuple | list) else (logits,):
        if isinstance(output, Tensor) and output.ndim == 3 and output.shape[:2] == labels.shape:
            return output
    return None


def _predicts_the_next_token(model: nn.Module) -> bool:
    """Whether position i of a language model predicts label i + 1, rather than label i."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return not any(type(m).__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values() for m in model.modules())
