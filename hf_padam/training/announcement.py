"""Say once, as training begins, which weights decay."""

from __future__ import annotations

import logging
import sys
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from .decay_report import decaying_names, describe_decay
from .optim_args import parse_optim_args
from .options import OPTIONS, options_of, read
from .other_optimizers import asks_for_decay
from .param_groups import decayed_parameters
from .registration import OPTIMIZERS, optimizer_options

logger = logging.getLogger(__name__)


def decay_targets(args: TrainingArguments) -> dict[str, Any]:
    """Return what training arguments tell `decayed_parameters` of the weights that are to decay."""
    if OptimizerNames(args.optim).value in OPTIMIZERS:
        options = optimizer_options(args)
    else:
        options = vars(options_of(args)) | {"target_sparsity": None}
    targets = {key: options[key] for key in ("decay_embeddings", "dense_modules", "target_sparsity")}
    return targets | {"target_modules": read("optim_target_modules", args.optim_target_modules)}


def decayed_names(model: nn.Module, optimizer: Any, args: TrainingArguments) -> list[str]:
    """Return the names of the weights that the optimizer in use decays, or that the arguments say would decay.

    The optimizer has the first word, for a Trainer may be given one. The second counts where no p-norm decay is in
    use, as in a run that another is compared with, and where the optimizer's groups say nothing (DeepSpeed's).
    """
    names = decaying_names(model, optimizer)
    return list(decayed_parameters(model, **decay_targets(args))) if names is None else names


def warn_of_unused_options(args: TrainingArguments) -> None:
    """Warn of the options of padam that say nothing to an optimizer that a Trainer was given."""
    if OptimizerNames(args.optim).value not in OPTIMIZERS:
        return
    typed = options_of(args)
    given = {key for key in OPTIONS if getattr(typed, key) != OPTIONS[key].default}
    given |= parse_optim_args(args.optim_args).keys()
    if given:
        logger.warning(
            "%s: no effect on the optimizer that this Trainer was given. Let the Trainer make it "
            '(optim="padam", neither optimizers nor optimizer_cls_and_kwargs), or build it with '
            "hf_padam.PAdam(hf_padam.get_param_groups(model, ...)) and drop these options.",
            ", ".join(sorted(given)),
        )


class DecayAnnouncement(TrainerCallback):
    """Prints the decayed weights by kind of layer, on the main process, unless its log level is above warnings.

    `PAdamTrainer` has it, and every Trainer of a script that `hf-padam run` runs. Where nothing decays it is silent.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print them; a logger's information would not be seen."""
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if not state.is_world_process_zero or args.get_process_log_level() > logging.WARNING:
            return
        names = decaying_names(model, optimizer)
        if names is None and (OptimizerNames(args.optim).value in OPTIMIZERS or asks_for_decay(args)):
            groups = getattr(optimizer, "param_groups", [])
            if any(group.get("lambda_p", 0) > 0 for group in groups):  # DeepSpeed's, of other tensors
                names = decayed_names(model, optimizer, args)
        if names:
            tqdm.write(describe_decay(model, names), file=sys.stderr)
