r"""Fine-tune a causal language model with PAdam in a plain accelerate loop, for people who write their own.

    python recipes/finetune_clm_no_trainer.py recipes/configs/quickstart.yaml
    accelerate launch recipes/finetune_clm_no_trainer.py recipes/configs/quickstart.yaml

Same model, data, options, results and pictures as finetune_clm.py; the training options are those of `LoopArguments`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from support import report
from support.arguments import DataArguments, ModelArguments, check_output_dir, parse_arguments
from support.data import load_blocks
from support.errors import UsageError, reports_usage_errors
from support.models import load_model_and_tokenizer, save_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator, get_scheduler

from hf_padam import PAdam, Perplexity, WeightSparsity, get_param_groups
from hf_padam.metrics import sequence_nll


@dataclass
class LoopArguments:
    """The training options of this loop: names and meanings are those of TrainingArguments."""

    output_dir: str = field(default="trainer_output", metadata={"help": "Where everything is written."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    p_norm: float = field(default=0.8, metadata={"help": "p of the norm whose decay is applied."})
    lambda_p: float = field(default=0.1, metadata={"help": "Strength of the p-norm decay."})
    weight_decay: float = field(default=0.0, metadata={"help": "Strength of the L2 decay."})
    decay_embeddings: bool = field(default=False, metadata={"help": "Decay embeddings and the output head too."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the data, unless max_steps is set."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sequences per process and micro-batch."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Same, for evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches per optimizer step."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Name of a Transformers schedule."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between logs."})
    save_strategy: str = field(default="no", metadata={"help": "This loop saves no checkpoints.", "choices": ["no"]})
    report_to: str = field(default="none", metadata={"help": "A tracker that accelerate knows, e.g. tensorboard."})
    seed: int = field(default=42, metadata={"help": "Seed of data order and dropout."})

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} is too small: it must be at least 1")


@reports_usage_errors
def main() -> None:
    """Run the recipe."""
    model_args, data_args, args = parse_arguments(
        (__doc__ or "").split("\n")[0], ModelArguments, DataArguments, LoopArguments
    )
    output_dir = check_output_dir(args.output_dir)
    if data_args.streaming and args.max_steps <= 0:
        raise UsageError("--streaming has no end that is known in advance: give --max_steps")
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=output_dir,
        )
    except ValueError as error:
        raise UsageError(f"--report_to {args.report_to}: {error}") from error
    set_seed(args.seed)
    model, tokenizer = load_model_and_tokenizer(model_args, accelerator.main_process_first())
    max_length = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    hub_options = {"token": model_args.token, "cache_dir": model_args.cache_dir}
    splits = load_blocks(data_args, tokenizer, max_length, accelerator.main_process_first(), hub_options)

    # 1. Two parameter groups; that is all there is to PAdam in a loop of one's own.
    try:
        groups = get_param_groups(
            model,
            p_norm=args.p_norm,
            lambda_p=args.lambda_p,
            weight_decay=args.weight_decay,
            decay_embeddings=args.decay_embeddings,
        )
        decayed = [name for name, _ in groups[0]["params"]]
        optimizer = PAdam(groups, lr=args.learning_rate)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error

    loaders = {
        split: DataLoader(
            dataset,
            batch_size=args.per_device_train_batch_size if split == "train" else args.per_device_eval_batch_size,
            shuffle=split == "train" and not data_args.streaming,
            collate_fn=default_data_collator,
        )
        for split, dataset in splits.items()
    }
    model, optimizer, *prepared = accelerator.prepare(model, optimizer, *loaders.values())
    loaders = dict(zip(loaders, prepared, strict=True))
    if args.max_steps > 0:
        total_steps = args.max_steps
    else:
        total_steps = math.ceil(args.num_train_epochs * len(loaders["train"]) / args.gradient_accumulation_steps)
    try:
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, total_steps)
    except ValueError as error:
        raise UsageError(f"--lr_scheduler_type: {error}") from error
    if args.report_to != "none":
        accelerator.init_trackers("padam")

    # 2. Evaluation: summed NLL and token counts, gathered over processes, make an exact perplexity.
    @torch.no_grad()
    def perplexity(split: str) -> float:
        model.eval()
        nll, tokens = [], []
        for batch in tqdm(loaders[split], desc=f"Evaluating {split}", disable=not accelerator.is_main_process):
            logits = model(input_ids=batch["input_ids"]).logits
            batch_nll, batch_tokens = accelerator.gather_for_metrics(sequence_nll(logits, batch["labels"]))
            nll += batch_nll.tolist()
            tokens += batch_tokens.tolist()
        model.train()
        return Perplexity().compute(predictions=nll, references=tokens)["perplexity"]

    plain = accelerator.unwrap_model(model)
    before = report.Magnitudes.of(plain, decayed)
    test_before = perplexity("test")

    # 3. Training.
    history: list[dict[str, float]] = []
    step, losses, seconds = 0, [], 0.0
    progress = tqdm(total=total_steps, desc="Training", disable=not accelerator.is_main_process)
    while step < total_steps:
        for batch in loaders["train"]:
            start = time.perf_counter()
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds += time.perf_counter() - start
            if not accelerator.sync_gradients:
                continue
            step += 1
            progress.update()
            if step % args.logging_steps == 0 or step == total_steps:
                mean_loss = accelerator.gather(torch.stack(losses)).mean().item()
                sparsity = WeightSparsity().compute(model=plain, decayed=decayed)["sparsity"]
                history.append({"step": step, "loss": mean_loss, "sparsity": sparsity})
                progress.set_postfix(loss=f"{mean_loss:.3f}", sparsity=f"{sparsity:.2%}")
                accelerator.log({"loss": mean_loss, "sparsity": sparsity}, step=step)
                losses.clear()
            if step == total_steps:
                break
    progress.close()
    validation, test = perplexity("validation"), perplexity("test")

    # 4. What comes out: model and tokenizer first, the results last.
    def save(directory: str) -> None:
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            plain.save_pretrained(directory, state_dict=state)
            tokenizer.save_pretrained(directory)

    save_model(output_dir, save, accelerator.is_main_process)
    block_size = len(next(iter(splits["train"]))["input_ids"])
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    report.conclude(
        output_dir,
        plain,
        decayed,
        title=f"{model_args.model_name_or_path} fine-tuned with padam in a plain accelerate loop",
        before=before,
        history=history,
        arguments=(model_args, data_args, args),
        is_main_process=accelerator.is_main_process,
        validation_perplexity=validation,
        test_perplexity=test,
        test_perplexity_before=test_before,
        train_steps=step,
        train_tokens_per_second=step * batch_size * block_size / seconds,
        seed=args.seed,
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
