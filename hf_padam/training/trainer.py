"""A Trainer that reports token-exact perplexity and weight sparsity."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, default_compute_objective
from transformers.training_args import OptimizerNames

from ..optim.schedules import scheduled_p_norm
from ..resuming.settings import check_added_decay, check_decayed
from ..sparsity import bare_name
from .announcement import DecayAnnouncement, decay_targets, decayed_names, warn_of_unused_options
from .callbacks import PNormScheduleCallback, ScheduleFromArguments
from .distilling_trainer import DistillingTrainer
from .gradients import UnreadNorms, check_gradient_norm, leaves_out_steps
from .metrics import WeightSparsity, following
from .options import SCHEDULE, check_deepspeed, options_of
from .other_optimizers import asks_for_decay, attach_decay
from .param_groups import remember_choice
from .perplexity import PerplexityMeter, own_loss
from .registration import OPTIMIZERS
from .uneven_ends import marking_repeated_rows, rows_that_count

logger = logging.getLogger(__name__)

_FUSED = "fused_linear_cross_entropy"
"""The key of Liger's configuration for a loss that is made without logits; the default."""

_ADDED_DECAY = "added_decay"
"""Among the settings that a checkpoint keeps: whether a p-norm decay was added to an optimizer other than PAdam."""

_DECAYED = "decayed_weights"
"""Another of them: which weights the p-norm decay acts on, if there is one."""


class PAdamTrainer(DistillingTrainer):
    """A Trainer whose evaluations report perplexity and sparsity, and whose training logs report sparsity.

    * ``eval_perplexity`` is exp(summed NLL / predicted tokens), exact across batches of unequal length, ``-100``
      labels and processes. (``exp(eval_loss)`` is not: `eval_loss` is the Trainer's mean of batch means.)
    * ``eval_sparsity`` is the share of exact zeros among the weights that the p-norm decay acts on (or, with another
      optimizer, would act on), and is left out where there are none; ``eval_sparsity_total`` that among all
      parameters, frozen ones included and each tied weight counted once.

    Both sparsities are also in the training logs, so they reach whatever `report_to` names; so is `p_norm` while
    `p_norm_schedule` moves it. Works with any optimizer.

    Runs go on exactly after a kill (see `ResumableTrainer`), and a gradient that is not finite is never applied. (With
    ``logging_nan_inf_filter=False``, which is for steps that never wait for the device, it is not logged or saved.)
    With `distill_from`, the loss is in part the divergence from a teacher (see `DistillingTrainer`).

    Args:
        args: As for `transformers.Trainer`.
        kwargs: As for `transformers.Trainer`; `teacher`, see `DistillingTrainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (self.args.metric_for_best_model or "").endswith("perplexity"):
            self.args.greater_is_better = False  # Transformers takes the largest for the best
        self._meter: PerplexityMeter | None = None  # during an evaluation
        self._said: set[str] = set()
        self._not_ours: set[str] = set()  # metrics with names of ours, which compute_metrics has returned
        self._unread_norms = UnreadNorms()
        self._optimizer_given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if not any(isinstance(callback, PNormScheduleCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(ScheduleFromArguments())
        if not any(isinstance(callback, DecayAnnouncement) for callback in self.callback_handler.callbacks):
            self.add_callback(DecayAnnouncement)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer; add a p-norm decay if the arguments ask for one and it is not PAdam."""
        if asks_for_decay(self.args) and self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            check_deepspeed(config, OptimizerNames(self.args.optim).value)
        if self._optimizer_given and self.is_world_process_zero():
            warn_of_unused_options(self.args)
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        assert model is not None
        targets = decay_targets(self.args)
        if not self._optimizer_given and (self._decays or any(targets.values())):  # else the model's record stays
            remember_choice(model, **targets)
        if asks_for_decay(self.args):
            attach_decay(optimizer, model, self.args, targets)
        return optimizer

    @property
    def _decays(self) -> bool:
        """Whether the arguments ask for a p-norm decay."""
        return asks_for_decay(self.args) or OptimizerNames(self.args.optim).value in OPTIMIZERS

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, float]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Search; see `transformers.Trainer.hyperparameter_search`. By default nothing that this class reports counts.

        The objective is the evaluation loss then, or the sum of what `compute_metrics` returns.
        """
        return super().hyperparameter_search(hp_space, compute_objective or self._objective, *args, **kwargs)

    def _settings(self) -> dict[str, Any]:
        settings = super()._settings() | {_ADDED_DECAY: asks_for_decay(self.args)}
        settings |= {name: getattr(options_of(self.args), name) for name in SCHEDULE}
        if self._decays:
            assert self.model is not None
            chosen = set(self.decayed_names())
            names = [name for name, _ in self.model.named_parameters() if name in chosen]  # whatever the groups' order
            names = [bare_name(name) for name in names]
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
        factory, options = DistillingTrainer.get_optimizer_cls_and_kwargs(args, model)
        options.pop("distill_from", None)  # which a Trainer that does not distil is told
        if options.pop("p_norm_schedule", "constant") != "constant":
            options["p_norm_start"] = options_of(args).p_norm_start
        return factory, options

    def decayed_names(self) -> list[str]:
        """Return the names of the weights that the optimizer decays, or would with `optim="padam"`."""
        assert self.model is not None  # the Trainer has one from its constructor on
        return decayed_names(self.model, self.optimizer, self.args)

    def sparsity(self) -> dict[str, float]:
        """Return the shares of exact zeros: `sparsity` of the decayed weights, `sparsity_total` of the model.

        What is not known is left out: the first where no weight decays, the second where weights are packed.
        """
        try:
            decayed = self.decayed_names()
        except ValueError:  # the targets match no module: these were adapters, which are merged by now
            if self.optimizer is None:
                raise
            decayed = []
        summary = WeightSparsity().compute(model=self.model, decayed=decayed)
        shares = {key: summary[key] for key in ("sparsity", "sparsity_total")}
        return {key: share for key, share in shares.items() if share is not None}

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradients' norm, over all processes; act as `nonfinite_gradients` says if it is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # a sharded model's
        step = self.state.global_step + 1
        stops = options_of(self.args).nonfinite_gradients == "stop"
        if stops and not self.args.logging_nan_inf_filter:  # the Trainer then reads nothing of a step before its log
            if norm is not None and not leaves_out_steps(self.accelerator):
                self._unread_norms.add(norm, step)
            return norm
        try:
            check_gradient_norm(norm, step, self.accelerator)
        except FloatingPointError:
            if stops:
                raise
            logger.warning("The gradient norm of step %d is %s: its update is skipped.", step, float(norm))
            model.zero_grad()  # without gradients the optimizer leaves weights and moments as they are
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._unread_norms.check()
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add sparsity to every log of training progress."""
        self._unread_norms.check()
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
        """Evaluate one batch, and add it to the perplexity."""
        meter, labels = self._meter, inputs.get("labels")
        rows = rows_that_count(inputs, labels, self.accelerator)
        if meter is not None and rows is None:
            meter.reason = "sequences are joined in one row, and some of the last ones are repeated to fill it up"
        if meter is not None and labels is None:
            meter.reason = "the evaluation data have no column of labels"
        if meter is None or labels is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        shifted = inputs.get("shift_labels")
        labels = self._prepare_input(labels if shifted is None else shifted)
        if self._loss_is_enough(meter, labels, shifted is not None):
            loss, logits, targets = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            assert loss is not None  # there are labels
            meter.add_mean(loss, labels)
            return loss, logits, targets
        fused = self.args.use_liger_kernel and (self.args.liger_kernel_config or {}).get(_FUSED, True)
        without_logits = prediction_loss_only and bool(fused or meter.reason)
        loss, logits, targets = super().prediction_step(model, inputs, without_logits, ignore_keys)
        if without_logits and not meter.reason:
            meter.reason = (
                "Liger's fused loss does without the logits. For a perplexity, give "
                f"liger_kernel_config={{'{_FUSED}': False}}"
            )
        meter.add(
            loss,
            logits,
            labels,
            own_loss=lambda: self._own_loss(model, inputs),
            shifted=shifted is not None,
            rows=rows,
        )
        return (loss, None, None) if prediction_loss_only else (loss, logits, targets)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the evaluation and add perplexity and sparsity to its metrics."""
        self._meter = meter = PerplexityMeter(self.accelerator)
        try:
            with marking_repeated_rows(dataloader):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            perplexity = meter.result()
        finally:
            self._meter = None
        metrics = self.sparsity()
        if perplexity is not None:
            metrics["perplexity"] = perplexity
        elif meter.reason and meter.reason not in self._said and self.is_world_process_zero():
            self._said.add(meter.reason)
            logger.warning("No %s_perplexity is reported: %s.", metric_key_prefix, meter.reason)
        prefixed = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        own = output.metrics or {}
        self._not_ours = prefixed.keys() & own.keys()
        for key in sorted(self._not_ours - self._said) if self.is_world_process_zero() else ():
            self._said.add(key)
            logger.warning("%s is what compute_metrics returns, not what PAdamTrainer reports under this name.", key)
        return output._replace(metrics=prefixed | own)

    def _objective(self, metrics: dict[str, float]) -> float:
        """Return what Transformers' own would be if the evaluation did not report perplexity and sparsity."""
        ours = ("_perplexity", "_sparsity", "_sparsity_total")
        kept = {key: value for key, value in metrics.items() if not key.endswith(ours) or key in self._not_ours}
        return default_compute_objective(kept)

    def _loss_is_enough(self, meter: PerplexityMeter, labels: Tensor, shifted: bool) -> bool:
        """Whether the loss of every batch is known to be the mean NLL of the tokens that the meter counts.

        The Trainer has the model divide by its own count of tokens, which is to be the same.
        """
        if self.args.n_gpu > 1 or self.label_smoother or self.compute_loss_func or not meter.follows_loss(labels):
            return False
        shifts = getattr(self, "_loss_shifts_labels", None)  # not in every version of Transformers
        counted_alike = not self.model_accepts_loss_kwargs or shifted or shifts is (meter.aligned is following)
        return counted_alike and type(self).compute_loss is DistillingTrainer.compute_loss

    def _own_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        with self.compute_loss_context_manager():
            return own_loss(model, self._prepare_inputs(inputs), self.accelerator.unwrap_model(model))
