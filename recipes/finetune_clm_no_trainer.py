r"""Fine-tune a causal language model with PAdam in a plain accelerate loop, for people who write their own.

    python recipes/finetune_clm_no_trainer.py recipes/configs/quickstart.yaml
    accelerate launch recipes/finetune_clm_no_trainer.py recipes/configs/quickstart.yaml

Same model, data, options, results and pictures as finetune_clm.py; the training options are those of
`LoopArguments`, PAdam's among them.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, set_seed
from support import report
from support.arguments import DataArguments, ModelArguments, check_output_dir, check_resume, parse_arguments
from support.data import load_blocks
from support.errors import UsageError, reports_usage_errors
from support.loop import PROGRESS_FILE, LoopArguments, Progress, make_distillation
from support.models import load_model_and_tokenizer, load_teacher, save_model
from support.pictures import Magnitudes
from support.positions import longest_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator, get_scheduler

from hf_padam import PAdam, PNormScheduler, TargetSparsity, WeightSparsity, decayed_parameters, get_param_groups
from hf_padam.optim.hyperparameters import DEFAULT_LAMBDA_P
from hf_padam.resuming.checkpoints import claimed
from hf_padam.resuming.interruption import EXIT_STATUS, StopSignal
from hf_padam.training.gradients import check_gradient_norm
from hf_padam.training.lost_updates import warn_of_lost_updates
from hf_padam.training.options import check_deepspeed, check_under_deepspeed, has_target, with_defaults
from hf_padam.training.param_groups import remember_choice
from hf_padam.training.perplexity import PerplexityMeter, own_loss
from hf_padam.training.uneven_ends import rows_that_count


def parse(argv: list[str]) -> tuple[Any, ...]:
    """Parse a command line into arguments of the model, the data, and the training."""
    return parse_arguments((__doc__ or "").split("\n")[0], ModelArguments, DataArguments, LoopArguments, argv=argv)


@reports_usage_errors
def main() -> None:
    """Run the recipe."""
    model_args, data_args, args = parse(sys.argv[1:])
    output_dir = check_output_dir(args.output_dir)
    if data_args.streaming and args.max_steps <= 0:
        raise UsageError("--streaming has no end that is known in advance: give --max_steps")
    resume = check_resume(args.resume_from_checkpoint, PROGRESS_FILE)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=output_dir,
            step_scheduler_with_optimizer=False,
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True
            ),  # an order that a resumed run repeats
        )
    except ValueError as error:
        raise UsageError(f"--report_to {args.report_to}: {error}") from error
    set_seed(args.seed)
    model, tokenizer = load_model_and_tokenizer(model_args, accelerator.main_process_first())
    fetching = accelerator.main_process_first()
    teacher = load_teacher(args.distill_from, args.distill_dtype, model_args, (model, tokenizer), fetching)
    distillation = make_distillation(args, model, tokenizer, teacher, accelerator)
    max_length = longest_sequence(model, tokenizer)
    hub_options = {"token": model_args.token, "cache_dir": model_args.cache_dir}
    splits = load_blocks(data_args, tokenizer, max_length, accelerator.main_process_first(), hub_options)

    # 1. Two parameter groups; that is all there is to PAdam in a loop of one's own.
    try:
        decay = with_defaults(vars(args))
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            check_under_deepspeed(decay)
            check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, "padam")
        which = {key: getattr(args, key) for key in ("decay_embeddings", "dense_modules", "target_sparsity")}
        groups = get_param_groups(
            model,
            p_norm=decay["p_norm"],
            importance=decay["importance"],
            lambda_p=DEFAULT_LAMBDA_P if args.lambda_p is None else args.lambda_p,
            weight_decay=args.weight_decay,
            p_norm_start=None if args.p_norm_schedule == "constant" else args.p_norm_start,
            late_decay=args.late_decay,
            s_rate=args.s_rate,
            **which,
            target_pattern=args.target_pattern,
            target_scope=args.target_scope,
        )
        decayed = list(decayed_parameters(model, **which))
        remember_choice(model, **which)
        rounding = {"bf16_stochastic_round": True, "rounding_seed": args.seed} if args.bf16_stochastic_round else {}
        optimizer = PAdam(groups, lr=args.learning_rate, backend=args.backend, **rounding)
        warn_of_lost_updates(optimizer.param_groups)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error

    loaders: dict[str, Any] = {
        split: DataLoader(
            dataset,
            batch_size=args.per_device_train_batch_size if split == "train" else args.per_device_eval_batch_size,
            shuffle=split == "train" and not data_args.streaming,
            collate_fn=default_data_collator,
            generator=torch.Generator(),  # so that starting to read does not draw from the one that dropout uses
        )
        for split, dataset in splits.items()
    }
    model, optimizer, *prepared = accelerator.prepare(model, optimizer, *loaders.values())
    loaders = dict(zip(loaders, prepared, strict=True))
    # As with the Trainer, the batches that are left over at the end of an epoch make a step of their own.
    accumulated = args.gradient_accumulation_steps
    batches_per_epoch = math.inf if data_args.streaming else len(loaders["train"])
    if args.max_steps > 0:
        total_steps = args.max_steps
    else:
        total_steps = math.ceil(args.num_train_epochs * math.ceil(batches_per_epoch / accumulated))
    try:
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, total_steps)
        scheduler = accelerator.prepare(scheduler)
    except ValueError as error:
        raise UsageError(f"--lr_scheduler_type: {error}") from error
    p_schedule = (args.p_norm_start, args.p_norm_schedule_share, args.p_norm_schedule)
    p_scheduler = PNormScheduler(optimizer, total_steps, *p_schedule)
    steering = None
    if has_target(vars(args)):
        try:  # the groups say to what
            steering = TargetSparsity(optimizer, None, total_steps, start=args.target_start, end=args.target_end)
        except ValueError as error:
            raise UsageError(f"--target_sparsity: {error}") from error
    if args.report_to != "none":
        accelerator.init_trackers("padam")

    quiet = args.disable_tqdm or not accelerator.is_main_process

    # 2. Evaluation: summed NLL and token counts of all processes make an exact perplexity.
    @torch.no_grad()
    def perplexity(split: str) -> float:
        model.eval()
        meter = PerplexityMeter(accelerator)
        for batch in tqdm(loaders[split], desc=f"Evaluating {split}", disable=quiet):
            output, labels = model(**batch), batch["labels"]
            if meter.follows_loss(labels):
                meter.add_mean(output.loss, labels)
            else:
                rows = rows_that_count(batch, labels, accelerator)
                again = functools.partial(own_loss, model, batch, plain)
                meter.add(output.loss, output.logits, labels, own_loss=again, rows=rows)
        model.train()
        value = meter.result()
        if value is None:
            raise UsageError(f"this recipe reports perplexities, but {meter.reason}")
        return value

    plain = accelerator.unwrap_model(model)
    before = Magnitudes.of(plain, decayed)

    # 3. Where an interrupted run goes on. The model that training starts from is evaluated once.
    rows = None if data_args.streaming else len(splits["train"])
    progress = Progress(accelerator, args, distillation, rows)
    progress.resume(resume, output_dir, optimizer)
    if progress.test_before is None:
        progress.test_before = perplexity("test")

    # 4. Training.
    model.train()
    bar = tqdm(total=total_steps, initial=progress.step, desc="Training", disable=quiet)
    with claimed(output_dir):
        with StopSignal() as stop:
            while progress.step < total_steps:
                loaders["train"].set_epoch(progress.epoch)
                for batch in accelerator.skip_first_batches(loaders["train"], progress.batches):
                    start = time.perf_counter()
                    with accelerator.accumulate(model):
                        with distillation(plain, batch) if distillation else nullcontext():
                            loss = model(**batch).loss
                        left = batches_per_epoch - progress.batches // accumulated * accumulated
                        accelerator.backward(loss * accumulated / min(accumulated, left))  # which divides by all
                        progress.losses.append(loss.detach())
                        if accelerator.sync_gradients:
                            norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                            try:
                                check_gradient_norm(norm, progress.step + 1, accelerator)
                            except FloatingPointError:
                                if args.nonfinite_gradients == "stop":
                                    raise
                                optimizer.zero_grad()  # so that the step changes nothing
                            p_scheduler.step(progress.step)  # whose p depends on the steps so far, resumed or not
                            optimizer.step()
                            scheduler.step()
                            optimizer.zero_grad()
                    if torch.accelerator.is_available():
                        torch.accelerator.synchronize()
                    progress.seconds += time.perf_counter() - start
                    progress.tokens += batch["input_ids"].numel() * accelerator.num_processes
                    progress.batches += 1
                    if not accelerator.sync_gradients:
                        continue
                    progress.step += 1
                    bar.update()
                    last = progress.step == total_steps
                    if steering and last:
                        steering.finish()  # loss scaling may have left out steps of the ramp
                    if progress.step % args.logging_steps == 0 or last:
                        mean_loss = accelerator.gather(torch.stack(progress.losses)).mean().item()
                        sparsity = WeightSparsity().compute(model=plain, decayed=decayed)["sparsity"]
                        row = {"loss": mean_loss, "sparsity": sparsity} | (steering.state() if steering else {})
                        if args.p_norm_schedule != "constant":
                            row["p_norm"] = p_scheduler.get_last_p_norm()[0]
                        progress.history.append({"step": progress.step, **row})
                        bar.set_postfix(loss=f"{mean_loss:.3f}", sparsity=f"{sparsity:.2%}")
                        accelerator.log(row, step=progress.step)
                        progress.losses.clear()
                    stopping = stop.agreed(last)
                    if stopping or args.saves_at(progress.step, last):
                        progress.save(output_dir, args.save_total_limit)
                    if stopping:
                        accelerator.end_training()
                        sys.exit(EXIT_STATUS)
                    if last:
                        break
                progress.epoch, progress.batches = progress.epoch + 1, 0
        bar.close()

        # 5. What comes out: model and tokenizer first, the results last.
        def save(directory: str) -> None:
            state = accelerator.get_state_dict(model)
            if accelerator.is_main_process:
                plain.save_pretrained(directory, state_dict=state)
                tokenizer.save_pretrained(directory)

        save_model(output_dir, save, accelerator.is_main_process)
        validation, test = perplexity("validation"), perplexity("test")
        report.conclude(
            output_dir,
            plain,
            decayed,
            title=f"{model_args.model_name_or_path} fine-tuned with padam in a plain accelerate loop",
            model_source=str(model_args.model_name_or_path),
            before=before,
            history=progress.history,
            arguments=(model_args, data_args, args),
            is_main_process=accelerator.is_main_process,
            validation_perplexity=validation,
            test_perplexity=test,
            test_perplexity_before=progress.test_before,
            **report.target(optimizer),
            train_steps=progress.step,
            train_tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
            seed=args.seed,
        )
        accelerator.end_training()


if __name__ == "__main__":
    main()
