"""A Trainer that reports token-exact perplexity and weight sparsity."""

from __future__ import annotations

import hashlib
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import OptimizerNames

from ..optim.schedules import DEFAULT_SHARE, DEFAULT_START, scheduled_p_norm
from ..resuming.resumable import ResumableTrainer
from ..resuming.settings import check_added_decay, check_decayed
from .announcement import DecayAnnouncement, decay_targets, decayed_names
from .callbacks import PNormScheduleCallback
from .gradients import check_gradient_norm
from .metrics import Perplexity, WeightSparsity, sequence_nll
from .other_optimizers import asks_for_decay, attach_decay, check_deepspeed
from .registration import OPTIMIZERS

logger = logging.getLogger(__name__)

_ADDED_DECAY = "added_decay"
"""Among the settings that a checkpoint keeps: whether a p-norm decay was added to an optimizer other than PAdam."""

_DECAYED = "decayed_weights"
"""Another of them: which weights the p-norm decay acts on, if there is one."""


class PAdamTrainer(ResumableTrainer):
    """A Trainer whose evaluations report perplexity and sparsity, and whose training logs report sparsity.

    * ``eval_perplexity`` is exp(summed NLL / predicted tokens), exact across batches of unequal length, ``-100``
      labels and processes. (``exp(eval_loss)`` is not: `eval_loss` is the Trainer's mean of batch means.)
    * ``eval_sparsity`` is the share of exact zeros among the weights that the p-norm decay acts on, and is left out
      where it acts on none; ``eval_sparsity_total`` that among all parameters, frozen ones included and each tied
      weight counted once.

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
        if not any(isinstance(callback, DecayAnnouncement) for callback in self.callback_handler.callbacks):
            self.add_callback(DecayAnnouncement)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; add a p-norm decay if the arguments ask for one and it is not PAdam."""
        optimizer = super().create_optimizer(model)
        if asks_for_decay(self.args):
            model = self.model if model is None else model
            assert model is not None
            attach_decay(optimizer, model, self.args, decay_targets(self.args))
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
        """Return the names of the weights that the optimizer decays, or would with `optim="padam"`."""
        assert self.model is not None  # the Trainer has one from its constructor on
        return decayed_names(self.model, self.optimizer, self.args)

    def sparsity(self) -> dict[str, float]:
        """Return the shares of exact zeros: `sparsity` of the decayed weights, `sparsity_total` of the model.

        What is not known is left out: the first where no weight decays, the second where weights are packed.
        """
        summary = WeightSparsity().compute(model=self.model, decayed=self.decayed_names())
        shares = {key: summary[key] for key in ("sparsity", "sparsity_total")}
        return {key: share for key, share in shares.items() if share is not None}

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
