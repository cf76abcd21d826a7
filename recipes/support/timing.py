"""How long training steps take."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments


class StepTimer(TrainerCallback):
    """Add up the time of training steps, evaluations and logging left out."""

    seconds, epochs, batches = 0.0, 0.0, 0

    def tokens_per_second(self, trainer: Trainer, block_size: int) -> float:
        """Return the tokens that all processes trained on, over the time; 0 if there was no step.

        Where it is known how many sequences an epoch has, incomplete batches count as what they are.
        """
        data: Any = trainer.train_dataset
        sequences: float = self.batches * trainer._train_batch_size  # which may have been found to be smaller
        if hasattr(data, "__len__"):
            sequences = min(sequences, self.epochs * len(data))
        return sequences * block_size / self.seconds if self.seconds else 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *unused: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start, self._epoch = time.perf_counter(), state.epoch or 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *unused: Any, **kwargs: Any) -> None:
        """Stop it, once the device is done."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - self._start
        self.epochs += max(0.0, (state.epoch or 0.0) - self._epoch)  # a resumed run may count anew
        self.batches += args.gradient_accumulation_steps * args.world_size
