"""What a Trainer says of the weights that decay: the list at the start, the warning, and what its sparsity counts."""

from __future__ import annotations

import pytest
import torch
from conftest import blocks, tiny_llama
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.utils import logging

from hf_padam import (
    PAdam,
    PAdamTrainer,
    PAdamTrainingArguments,
    WeightSparsity,
    add_pnorm_decay,
    decayed_parameters,
    get_param_groups,
)
from hf_padam.resuming.checkpoints import CheckpointError
from hf_padam.resuming.settings import check_decayed


def options(tmp_path, **more) -> dict:
    return {
        "output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
    } | more  # fmt: skip


def padam_trainer(tmp_path, model=None, optimizers=(None, None), **more) -> PAdamTrainer:
    args = PAdamTrainingArguments(**options(tmp_path, **more))
    model = tiny_llama() if model is None else model
    data = {"train_dataset": blocks(), "eval_dataset": blocks(4)}
    return PAdamTrainer(model=model, args=args, optimizers=optimizers, **data)


HEAD = "The p-norm decay acts on 14 of 28 tensors, 18,432 of 21,920 weights:\n  q_proj 2 × 32×32\n"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, True),
        ({"target_sparsity": 0.5}, True),
        ({"optim": "adamw_torch", "lambda_p": 0.1}, True),
        ({"optim": "adamw_torch"}, False),
        ({"lambda_p": 0.0}, False),
        ({"log_level": "error"}, False),
    ],
    ids=str,
)
def test_padam_trainer_lists_once_what_decays(more, says, tmp_path, capsys):
    logging.set_verbosity_warning()  # another test may have changed it
    padam_trainer(tmp_path, **more).train()
    assert capsys.readouterr().err.count(HEAD) == says
    logging.set_verbosity_warning()


def test_the_list_is_of_the_optimizer_in_use(tmp_path, capsys):
    model = tiny_llama()
    optimizer = PAdam(get_param_groups(model, target_modules=["q_proj"]))
    padam_trainer(tmp_path, model, (optimizer, None)).train()
    assert "acts on 2 of 28 tensors, 2,048 of 21,920 weights:\n  q_proj 2 × 32×32\n" in capsys.readouterr().err


def test_hf_padam_run_lists_it_for_a_plain_trainer(tmp_path, capsys, monkeypatch):
    from transformers import trainer

    from hf_padam.__main__ import main

    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", list(trainer.DEFAULT_CALLBACKS))
    script = tmp_path / "script.py"
    script.write_text(
        "from conftest import blocks, tiny_llama\n"
        "from transformers import Trainer, TrainingArguments\n"
        f"args = TrainingArguments(**{options(tmp_path, optim='padam')!r})\n"
        "Trainer(model=tiny_llama(), args=args, train_dataset=blocks()).train()\n"
    )
    monkeypatch.setattr("sys.argv", [])
    main(["run", str(script)])
    assert capsys.readouterr().err.count(HEAD) == 1


def test_a_plain_trainer_given_the_class_spares_norms_and_names_the_embeddings(tmp_path, caplog):
    model = tiny_llama(tie_word_embeddings=False)
    args = TrainingArguments(**options(tmp_path, weight_decay=0.1))
    kwargs = dict(lr=1e-3, lambda_p=0.3)
    trainer = Trainer(model=model, args=args, train_dataset=blocks(), optimizer_cls_and_kwargs=(PAdam, kwargs))
    trainer.train()
    assert [group["lambda_p"] for group in trainer.optimizer.param_groups] == [0.3, 0.0]
    (warning,) = [record.message for record in caplog.records if "no matrices of linear maps" in record.message]
    assert "2 parameters" in warning and "model.embed_tokens.weight, lm_head.weight" in warning


def test_trls_grouping_is_treated_the_same(tmp_path, caplog):
    from conftest import character_tokenizer
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**options(tmp_path, weight_decay=0.1, bf16=False, max_length=32, gradient_checkpointing=False))
    rows = Dataset.from_dict({"text": [f"Line {i}: a fox." for i in range(16)]})
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=rows,
        processing_class=character_tokenizer(),
        optimizer_cls_and_kwargs=(PAdam, dict(lr=1e-3, lambda_p=0.3)),
    )
    trainer.train()
    norms = {id(p) for name, p in trainer.model.named_parameters() if "norm" in name or name.endswith("bias")}
    (spared,) = [group for group in trainer.optimizer.param_groups if group["lambda_p"] == 0]
    assert {id(param) for param in spared["params"]} == norms
    assert "model.embed_tokens.weight" in caplog.text


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_what_the_arguments_ask_for_is_not_warned_of(decay_embeddings, tmp_path, caplog):
    padam_trainer(tmp_path, decay_embeddings=decay_embeddings).train()
    assert "no matrices" not in caplog.text and "one dimension" not in caplog.text


def by_hand(model, **more):
    """Two groups of named parameters, as scripts make them for AdamW."""
    vectors = [(name, param) for name, param in model.named_parameters() if param.dim() == 1]
    rest = [(name, param) for name, param in model.named_parameters() if param.dim() > 1]
    return [{"params": rest, "weight_decay": 0.1} | more, {"params": vectors, "weight_decay": 0.0}]


def with_decay(optimizer, **more):
    add_pnorm_decay(optimizer, lambda_p=0.1, **more)
    return optimizer


@pytest.mark.parametrize(
    ("build", "warns"),
    [
        (lambda model: PAdam(by_hand(model)), True),
        (lambda model: PAdam(by_hand(model, lambda_p=0.1)), False),
        (lambda model: with_decay(torch.optim.AdamW(by_hand(model))), True),
        (lambda model: with_decay(torch.optim.AdamW(by_hand(model)), params=dict(by_hand(model)[0]["params"])), False),
    ],
)
def test_embeddings_that_decay_are_warned_of_unless_they_were_chosen_named_or_not(tmp_path, caplog, build, warns):
    model = tiny_llama()
    padam_trainer(tmp_path, model, (build(model), None)).train()
    assert ("no matrices of linear maps, but embeddings" in caplog.text) is warns


@pytest.mark.parametrize("how", ["optimizer", "class"])
def test_options_that_say_nothing_to_the_optimizer_in_use_are_named(how, tmp_path, caplog):
    model = tiny_llama()
    args = PAdamTrainingArguments(**options(tmp_path, optim_args="late_decay=true", lambda_p=0.3))
    given = {"optimizers": (torch.optim.AdamW(model.parameters()), None)}
    given = given if how == "optimizer" else {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {})}
    PAdamTrainer(model=model, args=args, train_dataset=blocks(), **given).train()
    assert "lambda_p, late_decay: no effect on the optimizer that this Trainer was given" in caplog.text


def test_sparsity_counts_what_the_optimizer_in_use_decays(tmp_path):
    model = tiny_llama()
    groups = get_param_groups(model, target_modules=["layers.0."], lambda_p=0.1)
    names, own = zip(*groups[0]["params"], strict=True)
    own[0].data[0] = 0
    trainer = padam_trainer(tmp_path, model, (PAdam(groups), None))
    zeros, elements = sum(int((p == 0).sum()) for p in own), sum(p.numel() for p in own)
    assert trainer.evaluate()["eval_sparsity"] == zeros / elements
    assert trainer.decayed_names() == list(names)


ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj"]),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_over_a_sparse_base_have_no_sparsity_of_decayed_weights(kind, tmp_path):
    base = tiny_llama()
    for param in decayed_parameters(base).values():
        param.data[0] = 0
    model = get_peft_model(base, ADAPTERS[kind])
    assert decayed_parameters(model) == {}
    trainer = padam_trainer(tmp_path, model, optim="adamw_torch")
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert logged and not any("sparsity" in row for row in logged) and "sparsity_total" in logged[0]
    if kind == "lora":
        metrics = trainer.evaluate()
        assert "eval_sparsity" not in metrics and metrics["eval_sparsity_total"] > 0


def test_packed_weights_are_not_counted_by_the_byte():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    summary = WeightSparsity().compute(model=model)
    assert summary == {"sparsity": 0.0, "sparsity_total": None, "decayed_parameters": 64, "total_parameters": None}


def test_resuming_a_run_that_decayed_other_weights_says_so_and_why_that_may_be():
    with pytest.raises(CheckpointError, match="decayed other weights.*decay_embeddings.*earlier version of hf_padam"):
        check_decayed("checkpoint-10", "20 weights (hash of their names: a)", "14 weights (hash of their names: b)")


def test_names_that_a_wrapper_has_changed_are_the_same_weights(tmp_path):
    """A checkpoint is saved with the model wrapped, by FSDP for example, and resumed before it is."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    trainer = padam_trainer(tmp_path, tiny_llama())
    plain = trainer._settings()["decayed_weights"]
    apply_activation_checkpointing(trainer.model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    assert any("_checkpoint_wrapped_module" in name for name in trainer.decayed_names())
    assert trainer._settings()["decayed_weights"] == plain
    trainer.model = torch.compile(trainer.model)
    assert trainer._settings()["decayed_weights"] == plain


@pytest.mark.parametrize("keys", [{"lambda_p": None}, {"lambda_p": 3.0}, {"target_step": 4}])
def test_keys_of_somebody_elses_optimizer_say_nothing(keys, tmp_path, caplog):
    model = tiny_llama()
    optimizer = torch.optim.SGD([{"params": model.parameters(), **keys}], lr=1e-3)
    trainer = padam_trainer(tmp_path, model, (optimizer, None), optim="sgd")
    trainer.train()
    assert not caplog.text and trainer.evaluate()["eval_sparsity"] == 0


def test_the_measurement_counts_what_the_config_says_decayed():
    model = tiny_llama()
    model.config.padam_decays = {"dense_modules": ["q_proj"]}
    expected = sum(param.numel() for name, param in decayed_parameters(model).items() if "q_proj" not in name)
    assert WeightSparsity().compute(model=model)["decayed_parameters"] == expected


def test_a_model_whose_own_code_answers_otherwise_does_not_end_a_run(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.linear = tiny_llama(), nn.Linear(4, 4)

        def get_input_embeddings(self, input_ids):
            raise AssertionError("this is a method of its own")

        def forward(self, input_ids, labels):
            return self.inner(input_ids=input_ids, labels=labels)

    args = TrainingArguments(**options(tmp_path, optim="padam", optim_args="decay_embeddings=false"))
    Trainer(model=Odd(), args=args, train_dataset=blocks()).train()


class Score:
    """`compute_metrics` with a name that PAdamTrainer has, too."""

    def __call__(self, prediction):
        return {"sparsity": 7.0, "eval_perplexity": 8.0}


def test_a_metric_of_the_users_own_is_not_replaced_and_that_is_said_once(tmp_path, caplog):
    trainer = padam_trainer(tmp_path)
    trainer.compute_metrics = Score()
    found = [trainer.evaluate() for _ in range(2)]
    assert [one["eval_sparsity"] for one in found] == [7.0, 7.0] and found[0]["eval_perplexity"] == 8.0
    assert 0 <= found[0]["eval_sparsity_total"] < 0.1
    assert trainer._objective(found[0]) == pytest.approx(15.0, abs=0.1)  # and a time
    assert sum("eval_sparsity is what compute_metrics returns" in message for message in caplog.messages) == 1


def test_a_train_loss_that_the_user_logs_is_left_as_it_is(tmp_path):
    trainer = padam_trainer(tmp_path)
    trainer.log({"train_loss": 5.0})
    assert trainer.state.log_history[-1]["train_loss"] == 5.0
