"""Refuse gradients that are not finite: Adam's moments, and with them every later weight, would never recover."""

from __future__ import annotations

import math
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType


def leaves_out_steps(accelerator: Accelerator) -> bool:
    """Whether steps with gradients that are not finite are left out anyway: by loss scaling (fp16) or DeepSpeed."""
    return accelerator.scaler is not None or accelerator.distributed_type == DistributedType.DEEPSPEED


def check_gradient_norm(norm: Any, step: int, accelerator: Accelerator) -> None:
    """Raise if the norm of all gradients, the same on every process, is infinite or NaN.

    Nothing is raised, or read from the device, where `leaves_out_steps` is true.

    Args:
        norm: What `accelerator.clip_grad_norm_` returned.
        step: Number of the step, for the message.
        accelerator: Knows whether losses are scaled.

    Raises:
        FloatingPointError: Before the step is taken, so that the weights are as they were.
    """
    if not leaves_out_steps(accelerator) and norm is not None and not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient norm of step {step} is {float(norm)}; the step is not taken. Lower the learning rate, "
            "train in bf16 or fp32, or look for bad rows in the data; then resume from the newest checkpoint"
        )


class UnreadNorms:
    """The gradient norms of steps after which nothing is to wait for the device: summed up there, and read later.

    A sum of norms is finite if all of them are.
    """

    def __init__(self) -> None:
        self._sum: Any = None
        self._first = self._last = 0

    def add(self, norm: Any, step: int) -> None:
        """Add the norm of a step that is about to be taken."""
        if self._sum is None or step <= self._last:  # of another training, which ended early
            self._sum, self._first = norm, step
        else:
            self._sum = self._sum + norm
        self._last = step

    def check(self) -> None:
        """Read what has been added, and forget it.

        Raises:
            FloatingPointError: If a norm was infinite or NaN; the weights then hold the update of that step.
        """
        total, self._sum = self._sum, None
        if total is not None and not math.isfinite(total):
            raise FloatingPointError(
                f"the gradient norm of a step from {self._first} to {self._last} was not finite, and its update is in "
                "the weights. Lower the learning rate, train in bf16 or fp32, or look for bad rows in the data; then "
                "resume from the newest checkpoint, which is from before. Such a step is not taken where every norm "
                'is read: with logging_nan_inf_filter, or nonfinite_gradients="skip"'
            )
