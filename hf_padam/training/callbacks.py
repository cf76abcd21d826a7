"""The callbacks that move p and steer to a target sparsity in any Trainer, once the number of steps is known."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim import PAdam, TargetSparsity, steering_of, unwrap
from ..optim.any_optimizer import has_pnorm_decay
from ..optim.backends import select
from ..optim.hyperparameters import innermost
from ..optim.schedules import DEFAULT_SHARE, FINAL, MOVES, check_schedule, set_p_norm
from ..optim.schedules import DEFAULT_START as DEFAULT_SCHEDULE_START
from ..optim.target_options import check_target, ramp
from ..sparsity import local_shard
from .decay_report import warn_of_strangers
from .lost_updates import warn_of_lost_updates
from .options import check_deepspeed, options_of

logger = logging.getLogger(__name__)


class TargetSparsityCallback(TrainerCallback):
    """Steer a Trainer's PAdam to a share of zeros; see `TargetSparsity`.

    Not needed where the training arguments ask for it (``target_sparsity``, also in `optim_args`). What
    `TargetSparsity.state` returns is added to the training logs. A model from before the target is met is never the
    best one, whatever `metric_for_best_model` says of it, and does not stop a run early.

    Args:
        target: Share of exact zeros among the decayed weights, in (0, 1).
        start: See `TargetSparsity`.
        end: See `TargetSparsity`.
        per_group: See `TargetSparsity`.

    Raises:
        ValueError: If the target or the ramp is out of range; as training begins, if the optimizer is no `PAdam`.
    """

    def __init__(
        self, target: float, start: float | None = None, end: float | None = None, per_group: bool = False
    ) -> None:
        check_target(target)
        ramp(target, start, end)
        self._plan: dict[str, Any] = {"target": target, "start": start, "end": end, "per_group": per_group}
        self._steering: TargetSparsity | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, now that the number of steps is known."""
        if self._plan["target"] is not None:  # else the groups had theirs from the beginning
            cure = 'target_sparsity in optim_args ("target_sparsity=0.5"), in place of this callback'
            _check_loaded(kwargs["optimizer"], state, "target_step", cure)
        self._steering = TargetSparsity(kwargs["optimizer"], total_steps=state.max_steps, **self._plan)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the best model so far while weights are still to die."""
        if self._steering is not None and not self._steering.met:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet the target if the ramp was to end with the training, and loss scaling has skipped steps of it."""
        if self._steering is None:
            return
        if state.global_step >= state.max_steps:
            self._steering.finish()
        over = control.should_training_stop or state.global_step >= state.max_steps  # else it is to be resumed
        if over and not self._steering.met:
            share = self._steering.state().get("sparsity")
            logger.warning(
                "Training ended before target_sparsity=%s was met: %s.",
                self._steering.target,
                "all of the decayed weights are frozen"
                if share is None
                else f"{100 * share:.2f} % of the decayed weights are zero",
            )


CHECK_LATER = "_check_zero_start_later"
"""Set on a PAdam that was built without the check of tensors that start as zeros, for a checkpoint may follow."""


class CallbackFromGroups(TargetSparsityCallback):
    """The callback as every Trainer has it: it acts if the optimizer's groups hold a `target_sparsity`.

    It also writes the logs of every steered optimizer, for it comes before the callbacks that report them; and warns
    of updates that the rounding of bf16 weights would lose, and of parameters that decay and are not meant to.
    """

    def __init__(self) -> None:
        self._steering = None
        self._looked = False
        self.distils = False  # the Trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach if the groups say so; refuse what could not be refused before.

        Tensors that start as zeros, now that a checkpoint has been loaded; and an optimizer of DeepSpeed's own.
        """
        optimizer, inner = unwrap(kwargs.get("optimizer")), innermost(kwargs.get("optimizer"))
        plugin, name = getattr(args, "deepspeed_plugin", None), str(getattr(args.optim, "value", args.optim))
        if plugin is not None and name.startswith("padam") and not isinstance(inner, PAdam):
            check_deepspeed(plugin.deepspeed_config, name)
        if not name.startswith("padam") and (options_of(args).lambda_p or 0) > 0 and not has_pnorm_decay(inner):
            raise ValueError(
                f"lambda_p={options_of(args).lambda_p!r} has no effect on optim={name!r} in this Trainer: take "
                'PAdamTrainer, which adds the decay, or optim="padam"'
            )
        if options_of(args).distill_from is not None and not self.distils:
            raise ValueError(
                f"distill_from={options_of(args).distill_from!r} would have no effect: this Trainer does not distil. "
                "Use PAdamTrainer, or leave distill_from out"
            )
        if isinstance(inner, PAdam) and args.world_size > 1:
            if "model" in kwargs:
                _check_replicas(kwargs["model"])
            _agree(inner)
        self._looked = False
        if getattr(optimizer, CHECK_LATER, False):
            optimizer.check_zero_start()
        groups = getattr(optimizer, "param_groups", [])
        if state.is_world_process_zero:
            warn_of_lost_updates(groups)
            if "model" in kwargs:
                warn_of_strangers(kwargs["model"], optimizer)
        steerable = groups if isinstance(optimizer, PAdam) else []  # the keys of others are theirs
        plans = [group for group in steerable if group.get("target_sparsity") is not None]
        earlier, self._steering = self._steering, None
        attached = steering_of(optimizer)
        if plans and (attached is None or attached is earlier):  # else the script has attached its own
            self._plan = {
                "target": None,  # the groups' own
                "start": plans[0].get("target_start"),
                "end": plans[0].get("target_end"),
            }
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say once if a run goes on that was steered, and nothing steers it now; all callbacks have begun by then."""
        super().on_step_begin(args, state, control, **kwargs)
        if self._looked:
            return
        self._looked, optimizer = True, unwrap(kwargs.get("optimizer"))
        groups = optimizer.param_groups if isinstance(optimizer, PAdam) and steering_of(optimizer) is None else []
        if state.is_world_process_zero and any(g.get("target_step") and not g.get("target_met") for g in groups):
            logger.warning(
                "The checkpoint is of a run on its way to a target, to which nothing steers this one: zeros stay, and "
                "no more are made. Add the callback that the run had (TargetSparsityCallback), or start a new run."
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the training logs, for what logs them after this and for the history."""
        steering = steering_of(kwargs.get("optimizer"))
        if steering is not None and "loss" in kwargs["logs"]:
            additions = steering.state()
            kwargs["logs"].update(additions)
            state.log_history[-1].update(additions)


def _check_loaded(optimizer: Any, state: TrainerState, key: str, cure: str) -> None:
    """Refuse to go on from a checkpoint of which a key of the groups was not loaded, for they did not have it before.

    Torch loads what is sharded, by fully_shard for example, into the keys that are there.
    """
    groups = [group for group in unwrap(optimizer).param_groups if group.get("lambda_p", 0) > 0 and key not in group]
    sharded = any(local_shard(param)[1] is not None for group in groups for param in group["params"])
    if state.global_step and sharded:
        raise RuntimeError(
            f"{key!r} is not in the sharded optimizer's groups, into which torch loads only what they have: if the "
            f"checkpoint's run had it, it is lost, and the run cannot go on exactly. Take {cure}; or save "
            "whole states (fsdp_state_dict_type: FULL_STATE_DICT)"
        )


def _check_replicas(model: nn.Module) -> None:
    """Refuse FSDP1's ways that keep replicas, of which its parameters do not tell."""
    kinds = {getattr(getattr(module, "sharding_strategy", None), "name", "") for module in model.modules()}
    if any("HYBRID" in kind or kind == "NO_SHARD" for kind in kinds):
        raise ValueError(
            f"FSDP1 with {', '.join(sorted(filter(None, kinds)))} keeps replicas that PAdam cannot tell from shards: "
            "use FSDP2, FULL_SHARD, or DDP"
        )


def _agree(optimizer: PAdam) -> None:
    """Have all processes run one backend: replicas whose last bits differ would end with zeros in other places."""
    elements: Counter[torch.device] = Counter()
    for group in optimizer.param_groups:
        for param in group["params"]:
            elements[param.device] += param.numel() * param.requires_grad
    chosen = sorted({select(optimizer.backend, device, number).__name__ for device, number in elements.items()})
    if optimizer.backend == "auto" and any(other != chosen for other in gather_object([chosen])):
        logger.warning("PAdam runs in eager mode, which is slower: not all processes can run %s.", ", ".join(chosen))
        optimizer.backend = "eager"


class PNormScheduleCallback(TrainerCallback):
    """Move p during a `Trainer`'s training; `PAdamTrainer` has it built in, as ``p_norm_schedule="linear"``.

    Groups and errors are as for `PNormScheduler`. The p of a step depends on `state.global_step` and
    `state.max_steps`: accumulated batches share it, and steps that loss scaling leaves out count.

    Args:
        start: p of the first step.
        share: Of the steps, over which p moves.
        shape: "linear", "cosine" or "constant" (see `p_norm_at`).

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self, start: float = DEFAULT_SCHEDULE_START, share: float = DEFAULT_SHARE, shape: str = "linear"
    ) -> None:
        """Check the settings."""
        check_schedule(start, share, shape)
        self._settings = (start, share, shape)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the settings of this training, and that a checkpoint's p has been loaded."""
        schedule = self._schedule(args)
        check_schedule(*schedule)
        if schedule[-1] != "constant":
            cure = "PAdamTrainer and its p_norm_schedule, or build them with get_param_groups(model, p_norm_start=...)"
            _check_loaded(kwargs["optimizer"], state, FINAL, cure)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set p for the step."""
        setattr(innermost(kwargs["optimizer"]), MOVES, True)
        set_p_norm(kwargs["optimizer"].param_groups, state.global_step, state.max_steps, *self._schedule(args))

    def _schedule(self, args: TrainingArguments) -> tuple[float, float, str]:
        return self._settings


class ScheduleFromArguments(PNormScheduleCallback):
    """The callback as `PAdamTrainer` has it: it reads the training arguments at every use.

    For they change after a Trainer's construction: a hyperparameter search sets them before each trial.
    """

    def __init__(self) -> None:
        pass

    def _schedule(self, args: TrainingArguments) -> tuple[float, float, str]:
        options = options_of(args)
        return options.p_norm_start, options.p_norm_schedule_share, options.p_norm_schedule
