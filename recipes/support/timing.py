"""How long training steps take."""

from __future__ import annotations

import time

import torch
from transformers import TrainerCallback, TrainingArguments


class StepTimer(TrainerCallback):
    """Add up the time of training steps, evaluations and logging left out."""

    seconds, steps = 0.0, 0

    def tokens_per_second(self, args: TrainingArguments, block_size: int) -> float:
        """Return the tokens that all processes trained on, over the time; 0 if there was no step."""
        tokens = self.steps * args.train_batch_size * args.gradient_accumulation_steps * block_size
        return tokens * args.world_size / self.seconds if self.seconds else 0.0

    def on_step_begin(self, *args, **kwargs) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        """Stop it, once the device is done."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - self._start
        self.steps += 1
