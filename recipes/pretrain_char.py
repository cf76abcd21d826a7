r"""Train a character-level GPT-2 from scratch with PAdam: the language-model experiment of the paper.

The text is any file, or a dataset; its last tenth validates. Tiny Shakespeare as on the Hub, full size, on a GPU:

    python recipes/pretrain_char.py --dataset_name karpathy/tiny_shakespeare \
        --dataset_revision refs/convert/parquet --output_dir runs/char

The same at the size of a laptop, a few minutes on two CPU cores, from a file (Tiny Shakespeare is
https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt):

    python recipes/pretrain_char.py --preset cpu --train_file input.txt --output_dir runs/char_cpu

A preset is a file in recipes/configs, and every option of TrainingArguments overrides it; --optim adamw_torch is the
dense baseline, --one_shot, --prune_to and --soft_threshold are what people use instead. As in the paper, every tensor
of two or more dimensions decays, embeddings included; the sparsity of the linear layers alone is reported beside it.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import report
from support.arguments import ModelArguments, check_output_dir, check_resume, parse_arguments
from support.characters import Blocks, TextArguments, character_tokenizer, collate_blocks, encode, load_text
from support.errors import UsageError, reports_usage_errors
from support.models import load_teacher, save_trained, upload
from support.pictures import Magnitudes
from support.pruning import PruningArguments, evaluate_one_shot
from support.timing import StepTimer
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_padam import PAdamTrainer, PAdamTrainingArguments, WeightSparsity, decayed_parameters
from hf_padam.resuming.checkpoints import claimed
from hf_padam.training.registration import OPTIMIZERS

PRESETS = {"full": {"p_norm": 0.8, "lambda_p": 0.003}, "cpu": {"p_norm": 0.8, "lambda_p": 0.005}}
"""By name, what PAdam takes where neither its strength nor another optimizer is given; the rest is in configs/."""


@dataclass
class CharacterModelArguments:
    """The model's size."""

    _argument_group_name = "model"

    preset: str = field(
        default="full", metadata={"help": "Where options that are not given come from.", "choices": list(PRESETS)}
    )
    n_layer: int = field(default=6, metadata={"help": "Layers."})
    n_head: int = field(default=6, metadata={"help": "Attention heads."})
    n_embd: int = field(default=384, metadata={"help": "Width."})
    dropout: float = field(default=0.2, metadata={"help": "Of embeddings, attention and residuals."})
    block_size: int = field(default=256, metadata={"help": "Characters that the model reads at a time."})

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)} is too small: it must be at least 1")
        if self.n_embd % self.n_head:
            raise UsageError(f"--n_embd {self.n_embd} must be a multiple of --n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout} must be in [0, 1)")

    def config(self, vocab_size: int) -> GPT2Config:
        """Return nanoGPT's model as a configuration of Transformers (which has biases, where nanoGPT has none)."""
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=self.block_size,
            n_embd=self.n_embd,
            n_layer=self.n_layer,
            n_head=self.n_head,
            activation_function="gelu",
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )


def with_preset(argv: list[str]) -> list[str]:
    """Put the preset's config file first, unless the command line begins with one of its own."""
    words = [word for a in argv for word in (a.split("=", 1) if a.startswith("--") else [a])]
    pairs = zip(words, [*words[1:], ""], strict=True)
    given = {a.removeprefix("--").replace("-", "_"): b for a, b in pairs if a.startswith("--")}
    if argv and not argv[0].startswith("-"):
        if "preset" in given:
            raise UsageError(f"--preset and the config file {argv[0]} exclude each other: presets are config files")
        return argv
    name = given.get("preset", "full")
    if name not in PRESETS:
        raise UsageError(f"--preset {name} is not one of {', '.join(PRESETS)}")
    preset = [str(Path(__file__).parent / "configs" / f"pretrain_char_{name}.yaml")]
    strength = {"lambda_p", "target_sparsity", "target_pattern"} & {
        *given,
        *re.findall(r"\w+", given.get("optim_args", "")),
    }
    if given.get("optim", "padam") in OPTIMIZERS and not strength:
        preset += [f"--{key}={value}" for key, value in PRESETS[name].items()]
    return [*preset, *argv]


def parse(argv: list[str]) -> tuple[Any, ...]:
    """Parse a command line into arguments of the model, the text, the methods to compare with, and the training."""
    kinds = (CharacterModelArguments, TextArguments, PruningArguments, PAdamTrainingArguments)
    return parse_arguments((__doc__ or "").split("\n")[0], *kinds, argv=with_preset(argv))


@reports_usage_errors
def main() -> None:
    """Run the recipe."""
    # 1. Arguments and text, checked before anything is built.
    model_args, text_args, pruning_args, args = parse(sys.argv[1:])
    output_dir = check_output_dir(args.output_dir)
    resume = check_resume(args.resume_from_checkpoint)
    with args.main_process_first(desc="fetching"):
        train_text, held_out_text = load_text(text_args)
    set_seed(args.seed)

    # 2. Model and data. Training blocks start anywhere; validation covers the whole tail, each character once.
    tokenizer = character_tokenizer(train_text + held_out_text)
    block_size = model_args.block_size
    train = Blocks(encode(train_text, tokenizer), block_size, stride=1)
    if len(train) == 0:
        raise UsageError(f"the text that trains has {len(train_text)} characters: fewer than one --block_size")
    model = GPT2LMHeadModel(model_args.config(len(tokenizer)))
    fetching = args.main_process_first(desc="fetching the teacher")
    teacher = load_teacher(args.distill_from, args.distill_dtype, ModelArguments(), (model, tokenizer), fetching)

    # 3. The Trainer.
    timer = StepTimer()
    trainer = PAdamTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=Blocks(encode(held_out_text, tokenizer), block_size, stride=block_size),
        processing_class=tokenizer,
        data_collator=collate_blocks,
        callbacks=[timer],
        teacher=teacher,
    )
    try:
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.create_optimizer()
        decayed = trainer.decayed_names()
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from error
    for callback in pruning_args.callbacks(trainer):
        trainer.add_callback(callback)
    before = Magnitudes.of(model, decayed)
    with claimed(output_dir):
        trainer.train(resume_from_checkpoint=resume)

        # 4. What comes out: the model first, the results last.
        model.config.use_cache = True
        save_trained(trainer, output_dir)
        validation = trainer.evaluate(metric_key_prefix="validation")
        one_shot = evaluate_one_shot(trainer, pruning_args)
        history = trainer.state.log_history
        evaluations = [row for row in history if "eval_perplexity" in row]
        best = min(evaluations, key=lambda row: row["eval_perplexity"], default=None)
        report.conclude(
            output_dir,
            trainer.accelerator.unwrap_model(trainer.model),
            decayed,
            title=f"Character GPT-2 trained with {report.optimizer_name(args)}",
            model_source=f"GPT-2, {model_args.n_layer} layers, {model_args.n_head} heads, {model_args.n_embd} wide",
            before=before,
            history=history,
            arguments=(model_args, text_args, pruning_args, args),
            is_main_process=trainer.is_world_process_zero(),
            validation_perplexity=validation["validation_perplexity"],
            best_validation_loss=math.log(best["eval_perplexity"]) if best else None,
            best_validation_step=best["step"] if best else None,
            linear_sparsity=WeightSparsity().compute(model=model, decayed=list(decayed_parameters(model)))["sparsity"],
            one_shot=one_shot,
            **report.target(trainer.optimizer),
            train_steps=trainer.state.global_step,
            train_tokens_per_second=timer.tokens_per_second(trainer, block_size),
            seed=args.seed,
        )
        upload(trainer, output_dir)


if __name__ == "__main__":
    main()
