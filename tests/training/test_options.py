"""PAdam's options: whose they are, how they are read from strings, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

import pytest
import torch
from conftest import blocks, tiny_llama
from transformers import HfArgumentParser, Trainer, TrainingArguments

from hf_padam import PAdamOptions, PAdamTrainer, PAdamTrainingArguments
from hf_padam.optim.any_optimizer import has_pnorm_decay
from hf_padam.resuming.checkpoints import CheckpointError
from hf_padam.training.optim_args import parse_optim_args
from hf_padam.training.options import FIELDS, OPTIONS
from hf_padam.training.registration import optimizer_options


def arguments(cls, directory, **options):
    common = dict(output_dir=str(directory), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    return cls(**common | {"optim": "padam"} | options)


def groups_of(trainer) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in trainer.create_optimizer().param_groups]


OWN = {
    "target_sparsity": 0.9,
    "target_scope": "layer",
    "p_norm": "frobenius",
    "lambda_p": -1.0,
    "backend": "gloo",
    "late_decay": True,
    "s_rate": 16000,
    "decay_embeddings": True,
    "dense_modules": 3,
    "p_norm_schedule": "linear",
    "p_norm_start": "now",
    "nonfinite_gradients": "skip",
}


@pytest.mark.parametrize("trainer", [Trainer, PAdamTrainer])
@pytest.mark.parametrize("name", OWN)
def test_a_field_of_the_users_own_arguments_is_not_taken_for_an_option(tmp_path, name, trainer):
    own = make_dataclass("Own", [(name, Any, field(default=OWN[name]))], bases=(TrainingArguments,))
    ours, plain = (
        trainer(model=tiny_llama(), args=arguments(cls, tmp_path, optim_args="p_norm=0.5"), train_dataset=blocks())
        for cls in (own, TrainingArguments)
    )
    assert groups_of(ours) == groups_of(plain)
    if trainer is PAdamTrainer:
        assert ours.decayed_names() == plain.decayed_names() and ours._settings() == plain._settings()


def test_a_field_of_the_users_own_does_not_add_a_decay_or_skip_a_step(tmp_path):
    own = make_dataclass(
        "Own",
        [("lambda_p", float, field(default=0.5)), ("nonfinite_gradients", str, field(default="skip"))],
        bases=(TrainingArguments,),
    )
    trainer = PAdamTrainer(model=tiny_llama(), args=arguments(own, tmp_path, optim="adamw_torch", max_steps=1))
    assert not has_pnorm_decay(trainer.create_optimizer())
    with pytest.raises(FloatingPointError):
        trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(float("nan")))


def test_a_key_of_a_foreign_optimizers_groups_is_not_taken_for_an_option(tmp_path):
    model = tiny_llama()
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "target_sparsity": 0.9}], lr=0.01)
    args = arguments(TrainingArguments, tmp_path, optim="sgd", max_steps=2)
    Trainer(model=model, args=args, train_dataset=blocks(), optimizers=(optimizer, None)).train()
    assert all((param != 0).any() for param in model.parameters())


@dataclass
class Derived(PAdamOptions, TrainingArguments):
    """Another library's arguments, with PAdam's options."""


def test_arguments_that_inherit_the_options_have_them(tmp_path):
    args = arguments(Derived, tmp_path, p_norm="0.6", lambda_p=0.4, decay_embeddings="false", dense_modules='["lm"]')
    options = optimizer_options(args)
    assert (options["p_norm"], options["lambda_p"], options["decay_embeddings"]) == (0.6, 0.4, False)
    assert options["dense_modules"] == ["lm"]
    assert groups_of(Trainer(model=tiny_llama(), args=arguments(Derived, tmp_path, p_norm=0.6)))[0]["p_norm"] == 0.6


@pytest.mark.parametrize("cls", [PAdamTrainingArguments, Derived])
def test_every_option_is_in_the_help_of_a_command_line_with_its_default(tmp_path, cls):
    text = HfArgumentParser(cls).format_help()
    assert all(f"--{name}" in text for name in FIELDS)
    assert all(option.metadata["help"] for option in FIELDS.values())
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert {name: getattr(args, name) for name in FIELDS} == vars(PAdamOptions())
    assert [option.name for option in fields(PAdamOptions)] == list(FIELDS)


GIVEN = {
    "p_norm": ("0.6", 0.6),
    "lambda_p": ("2", 2.0),
    "late_decay": ("yes", True),
    "s_rate": ("0.5", 0.5),
    "decay_embeddings": ("False", False),
    "dense_modules": ('["q_proj", "k_proj"]', ["q_proj", "k_proj"]),
    "target_sparsity": ("0.7", 0.7),
    "target_start": ("0", 0.0),
    "target_end": ("1e-1", 0.1),
    "target_scope": ("layer", "layer"),
    "bf16_stochastic_round": ("1", True),
    "backend": ("eager", "eager"),
}


def test_every_option_is_a_key_of_optim_args_and_reads_there_as_in_its_field():
    assert GIVEN.keys() <= OPTIONS.keys()
    for name, (text, value) in GIVEN.items():
        assert (
            parse_optim_args(f" {name} = {text} ") == {name: value} == {name: vars(PAdamOptions(**{name: text}))[name]}
        )
    joined = ",".join(f"{name}={text}" for name, (text, _) in GIVEN.items())
    assert parse_optim_args(joined) == {name: value for name, (_, value) in GIVEN.items()}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r".*\.(0|1)\..*", None),
        (r".*\.\d{1,2}\..*", None),
        (r"layers\.\d{1,}\.(mlp|self_attn) x", None),
        ("a b", None),
        ("[qk]_proj", None),
        ("(?=model).*", None),
        ("(?!lm).*,?", None),
        ("a=b", None),
        ('"a,s_rate=b"', "a,s_rate=b"),
        ('["q_proj", "k_proj"]', ["q_proj", "k_proj"]),
        ("[]", []),
    ],
)
def test_a_value_keeps_its_spaces_commas_and_equals_signs(tmp_path, text, value):
    expected = {"p_norm": 0.5, "dense_modules": text if value is None else value, "lambda_p": 0.2}
    string = f"p_norm=0.5, dense_modules={text}, lambda_p=0.2"
    assert parse_optim_args(string) == expected
    # Transformers' own parser, which runs first, lets it pass.
    args = arguments(TrainingArguments, tmp_path, optim_args=string)
    _, options = Trainer.get_optimizer_cls_and_kwargs(args)
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
@pytest.mark.parametrize("text", ["oops", "rank=8,oops", "beta=(0.9,0.95)", "rank=1=2", {"rank": 8}])
def test_what_is_malformed_for_another_optimizer_still_is(tmp_path, optim, text):
    with pytest.raises(ValueError, match="malformed"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(TrainingArguments, tmp_path, optim=optim, optim_args=text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_embeddings": "maybe"}, "decay_embeddings='maybe' must be true or false"),
        ({"decay_embeddings": 1}, "decay_embeddings=1 must be true or false"),
        ({"bf16_stochastic_round": None}, "bf16_stochastic_round=None must be true or false"),
        ({"p_norm": "small"}, "p_norm='small' must be a number"),
        ({"p_norm": True}, "p_norm=True must be a number"),
        ({"s_rate": None}, "s_rate=None must be a number"),
        ({"lambda_p": [0.1]}, r"lambda_p=\[0.1\] must be a number"),
        ({"target_sparsity": "half"}, "target_sparsity='half' must be a number"),
        ({"target_sparsity": 0.5, "target_start": "soon"}, "target_start='soon' must be a number"),
        ({"target_end": "late"}, "target_end='late' must be a number"),
        ({"target_scope": ["layer"]}, "must be one of global, layer"),
        ({"backend": 3}, "backend=3 must be one of auto"),
        ({"p_norm_schedule": True}, "p_norm_schedule=True must be one of constant"),
        ({"nonfinite_gradients": "ignore"}, "nonfinite_gradients='ignore' must be one of stop, skip"),
        ({"dense_modules": 5}, "dense_modules=5 must be a regular expression or a list of names"),
        ({"dense_modules": ["a", 1]}, "must be a regular expression or a list of names"),
        ({"dense_modules": "['a']"}, "is not a list in JSON"),
        ({"optim_target_modules": 5}, "optim_target_modules=5 must be a regular expression or a list of names"),
        ({"optim": "adamw_torch", "optim_args": "target_sparsity=0.5"}, "target_sparsity is an option of padam"),
        ({"optim": "adamw_torch", "target_sparsity": 0.5}, "no effect on optim='adamw_torch': take optim=\"padam\""),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_one_clear_error(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(PAdamTrainingArguments, tmp_path, **options)


@pytest.mark.parametrize("optim_args", [5, ["p_norm=0.5"], {"p_norm": 0.5}, b"p_norm=0.5"])
def test_optim_args_of_another_type_are_refused(tmp_path, optim_args):
    with pytest.raises(ValueError, match="must be a string of key=value pairs"):
        optimizer_options(arguments(TrainingArguments, tmp_path, optim_args=optim_args))


def test_what_is_set_after_construction_is_checked_too(tmp_path):
    args = arguments(PAdamTrainingArguments, tmp_path)
    args.decay_embeddings = "false"
    assert optimizer_options(args)["decay_embeddings"] is False
    args.decay_embeddings = "maybe"
    with pytest.raises(ValueError, match="must be true or false"):
        optimizer_options(args)


@pytest.mark.parametrize(("before", "now"), [("global", "layer"), ("layer", "global")])
def test_another_target_scope_on_resume_is_a_clear_error(tmp_path, before, now):
    def trainer(scope):
        options = dict(target_sparsity=0.5, target_scope=scope, max_steps=4, save_strategy="steps", save_steps=2)
        args = arguments(PAdamTrainingArguments, tmp_path, **options)
        return PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks())

    trainer(before).train()
    with pytest.raises(CheckpointError, match="checkpoint-2 is of other parameter groups.*Give target_scope"):
        trainer(now).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_foreign_key_does_not_keep_a_run_from_going_on(tmp_path):
    def trainer(steps):
        model = tiny_llama()
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "target_sparsity": 0.9}], lr=0.01)
        settings = dict(optim="sgd", max_steps=steps, save_strategy="steps", save_steps=1)
        args = arguments(PAdamTrainingArguments, tmp_path, **settings)
        return PAdamTrainer(model=model, args=args, train_dataset=blocks(), optimizers=(optimizer, None))

    trainer(1).train()
    trainer(2).train(resume_from_checkpoint=True)
