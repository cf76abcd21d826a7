"""Refuse gradients that are not finite: Adam's moments, and with them every later weight, would never recover."""

from __future__ import annotations

import math
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType


def check_gradient_norm(norm: Any, step: int, accelerator: Accelerator) -> None:
    """Raise if the norm of all gradients, the same on every process, is infinite or NaN.

    Loss scaling (fp16) and DeepSpeed leave such steps out by themselves; nothing is raised under these.

    Args:
        norm: What `accelerator.clip_grad_norm_` returned.
        step: Number of the step, for the message.
        accelerator: Knows whether losses are scaled.

    Raises:
        FloatingPointError: Before the step is taken, so that the weights are as they were.
    """
    handled = accelerator.scaler is not None or accelerator.distributed_type == DistributedType.DEEPSPEED
    if not handled and norm is not None and not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient norm of step {step} is {float(norm)}; the step is not taken. Lower the learning rate, "
            "train in bf16 or fp32, or look for bad rows in the data; then resume from the newest checkpoint"
        )
