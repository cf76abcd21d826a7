"""ms-swift: an external plug-in that adds ``--optimizer padam``.

    swift sft --external_plugins SITE_PACKAGES/hf_padam/integrations/ms_swift.py \
        --optimizer padam --optim_args target_sparsity=0.5 ...

A file of one's own with the line ``import hf_padam.integrations.ms_swift`` serves as well. ms-swift parses its
command line before it imports plug-ins, too early for ``--optim padam``; `--optimizer` has precedence over `--optim`.
"""

from __future__ import annotations

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map
from transformers.training_args import OptimizerNames

# Absolute, for ms-swift runs this file by its path, as no part of the package.
from hf_padam.training.registration import OPTIMIZERS, optimizer_options, register


class PAdamCallback(OptimizerCallback):
    """Makes the Trainer that it belongs to create its optimizer as with ``optim="padam"``.

    Args:
        args: ms-swift's training arguments.
        trainer: Its trainer.

    Raises:
        ValueError: If an option of PAdam is not acceptable.
    """

    name = "padam"

    def __init__(self, args: Any, trainer: Any) -> None:
        register()  # again: ms-swift replaces the callbacks that every Trainer has, maybe after this file was imported
        args.optim = OptimizerNames(self.name)
        optimizer_options(args)
        super().__init__(args, trainer)


for name in OPTIMIZERS:
    optimizers_map[name] = type(PAdamCallback.__name__, (PAdamCallback,), {"name": name})
