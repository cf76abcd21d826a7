"""Tiny training runs, one for each way that people train; and what PAdamTrainer adds."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import OPTIM_ARGS, REPOSITORY, blocks, character_tokenizer, options, tiny_llama
from datasets import Dataset
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_padam import PAdam, PAdamTrainer, PAdamTrainingArguments, decayed_parameters, get_param_groups
from hf_padam.__main__ import main


def check_outcome(model: nn.Module, optimizer: torch.optim.Optimizer | None, embeddings_decay: bool = False) -> None:
    """Every trainable tensor moved; linear weights decayed, norms, biases and tied embeddings did not."""
    linear = {n for n, _ in model.named_parameters() if n.endswith("_proj.weight")}
    expected = linear | ({"model.embed_tokens.weight"} if embeddings_decay else set())
    assert len(linear) == 14
    for (name, param), start in zip(model.named_parameters(), tiny_llama().parameters(), strict=True):
        assert not torch.equal(param, start), f"{name} did not change"
        assert bool((param == 0).any()) == (name in expected), name
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if optimizer is not None:
        decayed, others = optimizer.param_groups
        parameters = dict(model.named_parameters())
        assert {id(p) for p in decayed["params"]} == {id(parameters[name]) for name in expected}
        assert {id(p) for p in others["params"]} == {id(p) for n, p in parameters.items() if n not in expected}
        assert decayed["lambda_p"] > 0 and others["lambda_p"] == others["weight_decay"] == 0


def with_plain_trainer(tmp_path):
    trainer = Trainer(model=tiny_llama(), args=TrainingArguments(**options(tmp_path)), train_dataset=blocks())
    trainer.train()
    return trainer


def with_padam_trainer(tmp_path):
    args = PAdamTrainingArguments(**options(tmp_path, optim_args=None, p_norm=0.5, lambda_p=0.3))
    trainer = PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks(), eval_dataset=blocks(9, 17))
    trainer.train()
    return trainer


def with_command_line(tmp_path):
    line = [f"--{key}={value}" for key, value in options(tmp_path).items()]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=blocks())
    trainer.train()
    return trainer


def with_sft_trainer(tmp_path):
    from trl import SFTConfig, SFTTrainer

    # TRL saves no memory here and its default precision is bf16.
    args = SFTConfig(**options(tmp_path, bf16=False, max_length=32, gradient_checkpointing=False))
    rows = Dataset.from_dict({"text": [f"Line {i}: a fox, {i} dogs." for i in range(40)]})
    tokenizer = character_tokenizer()
    trainer = SFTTrainer(model=tiny_llama(), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "train", [with_plain_trainer, with_padam_trainer, with_command_line, with_sft_trainer], ids=lambda f: f.__name__
)
def test_a_short_run_trains_everything_and_makes_zeros_where_it_should(tmp_path, train):
    trainer = train(tmp_path)
    assert isinstance(trainer.optimizer.optimizer, PAdam)
    check_outcome(trainer.model, trainer.optimizer)


def test_a_loop_without_trainer_does_the_same():
    model = tiny_llama()
    optimizer = PAdam(get_param_groups(model, p_norm=0.5, lambda_p=0.3), lr=3e-3)
    batch = {key: torch.tensor([row[key] for row in blocks(4)]) for key in ("input_ids", "labels")}
    for _ in range(20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    check_outcome(model, optimizer)


def test_embeddings_decay_when_asked(tmp_path):
    args = TrainingArguments(**options(tmp_path, optim_args=OPTIM_ARGS + ",decay_embeddings=true"))
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=blocks())
    trainer.train()
    check_outcome(trainer.model, trainer.optimizer, embeddings_decay=True)


def test_trls_own_script_runs_unmodified(tmp_path, model_dir, capsys):
    """`hf-padam run -m trl.scripts.sft`, on a local model and local data, to a target, as `hf-padam` counts it."""
    data = tmp_path / "data"
    data.mkdir()
    Dataset.from_dict({"text": [f"Line {i}: a fox, {i} dogs." for i in range(40)]}).to_json(data / "train.jsonl")
    flags = options(tmp_path / "out", optim_args="target_sparsity=0.5", max_length=32, bf16=False)
    line = [f"--{key}={value}" for key, value in flags.items()]
    command = [sys.executable, "-m", "hf_padam", "run", "-m", "trl.scripts.sft"]
    command += [f"--model_name_or_path={model_dir}", f"--dataset_name={data}", *line]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    from transformers import AutoModelForCausalLM

    check_outcome(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), None)
    main(["sparsity", str(tmp_path / "out"), "--json", "-"])
    counted = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in counted["tensors"] if row["decayed"]} == set(decayed_parameters(tiny_llama()))
    assert counted["sparsity"] == pytest.approx(0.5, abs=5e-4)


def test_lora_runs_end_in_the_error_that_explains(tmp_path):
    from peft import LoraConfig, get_peft_model

    def run(**more):
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
        Trainer(model=model, args=TrainingArguments(**options(tmp_path, **more)), train_dataset=blocks()).train()

    with pytest.raises(ValueError, match="PEFT adapters are left out"):
        run()
    with pytest.raises(ValueError, match="lora_B.*all zeros"):
        run(optim_target_modules=["lora_"])
    run(optim_target_modules=["lora_A"])


def ragged(batch_sizes=(3, 2, 4)):
    """Batches of unequal lengths with masked labels, and their summed NLL and token count under a model."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, _ in enumerate(range(sum(batch_sizes))):
        length = 5 + 3 * (i % 4)
        ids = torch.randint(2, 90, (length,), generator=generator).tolist()
        labels = [token if j > i % 3 else -100 for j, token in enumerate(ids)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def pad(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [1] * (longest - len(row["input_ids"])) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        ),
        "labels": torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]),
    }


@pytest.mark.parametrize("eval_batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_perplexity_is_exact_on_ragged_batches(tmp_path, eval_batch_size, label_smoothing):
    rows, model = ragged(), tiny_llama()
    nll, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for i, label in enumerate(row["labels"][1:]):
            if label != -100:
                nll -= scores[i, label].item()
                tokens += 1
    args = PAdamTrainingArguments(
        **options(tmp_path, per_device_eval_batch_size=eval_batch_size, label_smoothing_factor=label_smoothing)
    )
    trainer = PAdamTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=pad)
    metrics = trainer.evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert metrics["eval_sparsity"] == 0.0 < metrics["eval_sparsity_total"]  # biases start at zero
    assert trainer.predict(rows).metrics["test_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)


def test_evaluations_and_logs_carry_perplexity_and_sparsity(tmp_path):
    trainer = with_padam_trainer(tmp_path)
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in logs] == [5, 10, 15, 20]
    sparsities = [row["sparsity"] for row in logs]
    assert sparsities == sorted(sparsities) and sparsities[-1] > 0.01
    assert all(0 <= row["sparsity_total"] < row["sparsity"] for row in logs if row["sparsity"])
    metrics = trainer.evaluate()
    assert metrics["eval_sparsity"] == pytest.approx(sparsities[-1])
    assert metrics["eval_perplexity"] > 1
    by_name = trainer.evaluate({"a": blocks(3), "b": blocks(4)})
    assert "eval_a_perplexity" in by_name and "eval_b_sparsity" in by_name


def test_metrics_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = PAdamTrainingArguments(**options(tmp_path, report_to="tensorboard", optim_args=None))
    PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks()).train()
    files = list(tmp_path.rglob("events.out.tfevents*"))
    scalars = [tag for file in files for tag in EventAccumulator(str(file)).Reload().Tags()["scalars"]]
    assert "train/sparsity" in scalars and "train/sparsity_total" in scalars


def test_the_smallest_perplexity_is_the_best(tmp_path):
    args = PAdamTrainingArguments(**options(tmp_path, metric_for_best_model="perplexity"))
    assert args.greater_is_better is False
    plain = TrainingArguments(**options(tmp_path, metric_for_best_model="eval_perplexity"))
    assert PAdamTrainer(model=tiny_llama(), args=plain).args.greater_is_better is False


def test_a_run_without_a_decay_keeps_the_record_of_what_decayed(tmp_path):
    model = tiny_llama()
    for optim, more, kept in (
        ("padam", {"decay_embeddings": True}, {"decay_embeddings": True}),
        ("adamw_torch", {}, {"decay_embeddings": True}),
        ("padam", {}, None),
    ):
        args = PAdamTrainingArguments(**options(tmp_path, optim=optim, optim_args=None, **more))
        PAdamTrainer(model=model, args=args, train_dataset=blocks()).create_optimizer()
        assert getattr(model.config, "padam_decays", None) == kept


def test_accumulated_and_whole_batches_train_alike(tmp_path):
    """1 x 8 sequences and 8 x 1, through the Trainer: the same weights up to rounding."""
    models = []
    for batch, accumulation in ((8, 1), (1, 8)):
        more = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 5}
        args = TrainingArguments(**options(tmp_path, **more))
        trainer = Trainer(model=tiny_llama(), args=args, train_dataset=blocks())
        trainer.train()
        models.append(trainer.model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # Adam turns rounding of tiny gradients into differences of a few lr; all but a few weights agree closely.
        assert ((a - b).abs() < 1e-4).float().mean() > 0.99


def test_counting_is_a_small_part_of_a_step():
    """Counting reads the weights once; a training step reads them dozens of times."""
    import time

    from hf_padam import WeightSparsity

    model = tiny_llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    ids = torch.randint(2, 90, (8, 256))
    optimizer = PAdam(get_param_groups(model), lr=1e-4, backend="eager")
    names = decayed_parameters(model)

    def seconds(function, repeats):
        """The processor's time, of one thread: other tests run at the same time."""
        times = []
        for _ in range(repeats):
            start = time.thread_time()
            function()
            times.append(time.thread_time() - start)
        return min(times)

    def train():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counting, training = (
            seconds(lambda: WeightSparsity().compute(model=model, decayed=names), 5),
            seconds(train, 3),
        )
    finally:
        torch.set_num_threads(threads)
    assert counting < 0.01 * training


def test_masked_language_models_predict_the_token_at_its_own_place(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model, rows = BertForMaskedLM(config).eval(), blocks(5, 16)
    trainer = PAdamTrainer(model=model, args=PAdamTrainingArguments(**options(tmp_path)), eval_dataset=rows)
    with torch.no_grad():
        loss = model(**{key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}).loss
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-5)


def test_models_that_score_no_tokens_are_evaluated_without_perplexity(tmp_path):
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(tiny_llama().config)
    model.config.pad_token_id = 1
    rows = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(blocks(6))]
    metrics = PAdamTrainer(model=model, args=PAdamTrainingArguments(**options(tmp_path)), eval_dataset=rows).evaluate()
    assert "eval_perplexity" not in metrics and metrics["eval_sparsity"] == 0.0


def test_an_evaluation_without_a_predicted_token_does_not_end_a_run(tmp_path):
    rows = [{"input_ids": row["input_ids"], "labels": [-100] * 32} for row in blocks(4)]
    trainer = PAdamTrainer(model=tiny_llama(), args=PAdamTrainingArguments(**options(tmp_path)), eval_dataset=rows)
    assert math.isnan(trainer.evaluate()["eval_perplexity"])


class Record(TrainerCallback):
    """What the steps were taken with, and what they made."""

    def __init__(self):
        self.p_norms, self.lambdas = [], []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.p_norms.append(optimizer.param_groups[0].get("p_norm"))
        self.lambdas.append(optimizer.param_groups[0].get("lambda_p"))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.weights = [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize(
    ("searched", "more"),
    [
        ({"p_norm_schedule": "linear"}, {}),
        ({"p_norm_schedule": "cosine", "p_norm_start": 1.6, "p_norm_schedule_share": 0.8}, {}),
        ({"p_norm_start": 1.5}, {"p_norm_schedule": "linear"}),
        ({"p_norm_schedule": "constant"}, {"p_norm_schedule": "linear"}),
        ({"target_sparsity": 0.4, "target_start": 0.25, "target_end": 0.75}, {}),
        ({"target_sparsity": 0.4, "target_scope": "layer"}, {}),
        ({"lambda_p": 0.2, "p_norm": 0.6}, {"optim": "adamw_torch"}),
        ({"lambda_p": 0.2, "p_norm_schedule": "linear"}, {"optim": "adamw_torch"}),
    ],
    ids=str,
)
def test_what_a_hyperparameter_search_sets_acts_as_if_it_had_been_given(tmp_path, searched, more):
    def trainer(record, **given):
        args = PAdamTrainingArguments(**options(tmp_path, optim_args=None, max_steps=8) | more | given)
        rows = blocks(16, 8)
        return PAdamTrainer(
            model_init=lambda: tiny_llama(), args=args, train_dataset=rows, eval_dataset=rows[:2], callbacks=[record]
        )

    given, found = Record(), Record()
    trainer(given, **searched).train()
    space = {key: [value] for key, value in searched.items()}
    trainer(found).hyperparameter_search(
        hp_space=lambda trial: {key: trial.suggest_categorical(key, values) for key, values in space.items()},
        n_trials=1,
        backend="optuna",
    )
    assert found.p_norms == given.p_norms and found.lambdas == given.lambdas
    assert all(torch.equal(a, b) for a, b in zip(found.weights, given.weights, strict=True))


def test_a_search_with_whole_numbers_as_defaults_does_not_round_what_it_tries(tmp_path):
    args = PAdamTrainingArguments(**options(tmp_path, optim_args=None), lambda_p=1, p_norm=0)
    trainer = PAdamTrainer(model_init=lambda: tiny_llama(), args=args, train_dataset=blocks(), eval_dataset=blocks(2))
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {key: trial.suggest_categorical(key, [0.4]) for key in ("lambda_p", "p_norm")},
        n_trials=1,
        backend="optuna",
    )
    assert (trainer.args.lambda_p, trainer.args.p_norm) == (0.4, 0.4)
    evaluated = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert best.objective == evaluated[-1]["eval_loss"]  # by default, as without perplexity and sparsity


def test_a_searched_seed_is_that_of_the_data_too(tmp_path):
    args = PAdamTrainingArguments(**options(tmp_path), data_seed=1)
    trainer = PAdamTrainer(model_init=lambda: tiny_llama(), args=args, train_dataset=blocks(), eval_dataset=blocks(2))
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"data_seed": trial.suggest_categorical("data_seed", [7])},
        n_trials=1,
        backend="optuna",
    )
    assert trainer._place.seed == 7


def test_a_bad_schedule_from_a_search_is_refused_before_the_first_step(tmp_path):
    args = PAdamTrainingArguments(**options(tmp_path, optim_args=None))
    trainer = PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks())
    trainer.args.p_norm_schedule_share = 2.0
    with pytest.raises(ValueError, match="p_norm_schedule_share=2.0 is not allowed"):
        trainer.train()
    assert trainer.state.global_step == 0


class HostReads(TorchDispatchMode):
    """Counts the reads of tensors by the host, each of which waits for a GPU, if they are on one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_reads_no_more_from_the_device_than_transformers_own(tmp_path):
    def reads(trainer_class, args_class, steps):
        given = options(tmp_path, optim="sgd", optim_args=None, max_steps=steps, logging_strategy="no")
        args = args_class(**given, logging_nan_inf_filter=False)
        trainer = trainer_class(model=tiny_llama(), args=args, train_dataset=blocks(8, 8))
        with HostReads() as counted:
            trainer.train()
        return counted.count

    own = reads(Trainer, TrainingArguments, 8) - reads(Trainer, TrainingArguments, 3)
    assert reads(PAdamTrainer, PAdamTrainingArguments, 8) - reads(PAdamTrainer, PAdamTrainingArguments, 3) == own


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("when", ["log", "save", "end"])
def test_without_waiting_gradients_that_are_not_finite_are_found_before_anything_is_told_of_them(
    tmp_path, value, when, monkeypatch
):
    more = {"save": {"save_strategy": "steps", "save_steps": 4}, "log": {"logging_steps": 4}}.get(when, {})
    given = options(tmp_path, max_steps=7, logging_steps=100, logging_nan_inf_filter=False)
    trainer = PAdamTrainer(model=tiny_llama(), args=PAdamTrainingArguments(**given | more), train_dataset=blocks())
    clip = trainer._clip_grad_norm

    def spoiled(model):
        if trainer.state.global_step == 2:
            next(model.parameters()).grad[0, 0] = value
        return clip(model)

    monkeypatch.setattr(trainer, "_clip_grad_norm", spoiled)
    with pytest.raises(FloatingPointError, match=f"of a step from 1 to {7 if when == 'end' else 4} was not finite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*")) and not trainer.state.log_history


@pytest.mark.parametrize(
    ("warns", "dtype", "more"),
    [
        (True, torch.bfloat16, {"learning_rate": 2e-5}),
        (True, torch.bfloat16, {"learning_rate": 2e-5, "warmup_steps": 10}),
        (False, torch.bfloat16, {"learning_rate": 2e-5, "optim_args": OPTIM_ARGS + ",bf16_stochastic_round=true"}),
        (False, torch.bfloat16, {"learning_rate": 1e-2}),
        (False, torch.float32, {"learning_rate": 2e-5}),
        (False, torch.bfloat16, {"learning_rate": 2e-5, "optim": "adamw_torch", "optim_args": None}),
    ],
    ids=str,
)
@pytest.mark.parametrize("trainer_class", [Trainer, PAdamTrainer])
def test_updates_that_bf16_weights_would_lose_are_warned_of_once(tmp_path, caplog, trainer_class, warns, dtype, more):
    args = TrainingArguments(**options(tmp_path, max_steps=2, **more))
    trainer_class(model=tiny_llama().to(dtype), args=args, train_dataset=blocks(8, 8)).train()
    assert caplog.text.count("bf16_stochastic_round=true") == warns
