"""Jobs that test_interruptions.py runs in several processes: a run in which one of them is hit."""

from __future__ import annotations

import os
import signal
import sys
from unittest.mock import patch

from conftest import blocks, tiny_llama
from transformers import TrainerCallback

from hf_padam import PAdamTrainer, PAdamTrainingArguments
from hf_padam.resuming import interruption


class Hit(TrainerCallback):
    """Send a signal to this process in the middle of a step, on one rank."""

    def __init__(self, step: int, rank: int, number: int) -> None:
        self.step, self.rank, self.number = step, rank, number

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), self.number)


def train(output_dir: str, number: str = "", step: str = "8", seconds: str = "0") -> None:
    """Train 18 steps, logged every 5; if a signal is given, the second process gets it in one of the steps.

    Args:
        output_dir: Where everything goes, and what an interrupted run left.
        number: The signal's name; none by default.
        step: Which step it comes in.
        seconds: The time within which processes agree: 0 makes steps long ones, inf short ones.
    """
    args = PAdamTrainingArguments(
        output_dir,
        max_steps=18,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        p_norm=0.5,
        lambda_p=0.3,
        logging_steps=5,
        save_strategy="steps",
        save_steps=6,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PAdamTrainer(model=tiny_llama(attention_dropout=0.1), args=args, train_dataset=blocks())
    if number:
        trainer.add_callback(Hit(int(step) - 1, 1, signal.Signals[number]))
    agreed_after = []

    def reduce(*args, **kwargs):
        agreed_after.append(trainer.state.global_step)
        return interruption_reduce(*args, **kwargs)

    interruption_reduce = interruption.reduce
    try:
        with patch.multiple(interruption, reduce=reduce, SECONDS=float(seconds)):
            trainer.train(resume_from_checkpoint=True)
    finally:
        if trainer.is_world_process_zero():
            print(f"AGREED {agreed_after}", flush=True)  # noqa: T201
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    train(*sys.argv[1:])
