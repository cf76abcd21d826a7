"""The name "padam" in Transformers: arguments, parsers, the plain Trainer, and errors."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys

import pytest
import transformers
from conftest import blocks, tiny_llama
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_padam
from hf_padam import PAdam, PAdamTrainingArguments, registration
from hf_padam.training.optim_args import parse_optim_args


def arguments(tmp_path, cls=TrainingArguments, **options):
    return cls(output_dir=str(tmp_path), report_to="none", use_cpu=True, **({"optim": "padam"} | options))


def optimizer_for(args, model=None) -> PAdam:
    return Trainer(model=model or tiny_llama(), args=args, train_dataset=blocks()).create_optimizer()


def test_registering_again_changes_nothing():
    before = list(OptimizerNames)
    wrapped = transformers.trainer._parse_optim_args
    registration.register()
    importlib.reload(hf_padam)
    assert list(OptimizerNames) == before
    assert transformers.trainer._parse_optim_args is wrapped
    assert OptimizerNames("padam") is OptimizerNames.PADAM


def test_the_arguments_survive_copies_pickling_and_dicts(tmp_path):
    args = arguments(tmp_path, optim_args="p_norm=0.5")
    for twin in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert twin.optim is OptimizerNames.PADAM and twin.optim_args == "p_norm=0.5"
    assert args.to_dict()["optim"] == "padam"
    assert TrainingArguments(**{k: args.to_dict()[k] for k in ("output_dir", "optim")}).optim == "padam"


@pytest.mark.parametrize(
    "options", [{"target_sparsity": 0.5}, {"target_pattern": "2:4"}, {"lambda_p": 0.2}, {}], ids=str
)
def test_what_is_in_force_is_in_the_dict_and_makes_the_same_arguments(tmp_path, options):
    args = PAdamTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **options)
    values = args.to_dict()
    assert values["lambda_p"] == options.get("lambda_p", None if options else 0.1)
    (again,) = HfArgumentParser(PAdamTrainingArguments).parse_dict(json.loads(args.to_json_string()))
    assert again.to_dict() == values


def test_the_name_is_in_a_command_lines_help_and_choices(tmp_path):
    parser = HfArgumentParser(TrainingArguments)
    assert "padam" in parser.format_help()
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", "padam"])
    assert args.optim == "padam"


def test_arguments_mean_what_they_mean_for_adamw(tmp_path):
    args = arguments(
        tmp_path,
        learning_rate=3e-4,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        weight_decay=0.2,
        optim_args="p_norm=0.6, lambda_p=0.4, s_rate=0.5, backend=eager",
    )
    optimizer = optimizer_for(args)
    decayed, others = optimizer.param_groups
    assert optimizer.backend == "eager"
    for group in (decayed, others):
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)
    assert (decayed["p_norm"], decayed["lambda_p"], decayed["weight_decay"]) == (0.6, 0.4, 0.2)
    assert (decayed["s_rate"], others["s_rate"]) == (0.5, 1.0)
    assert (others["lambda_p"], others["weight_decay"]) == (0.0, 0.0)


def test_typed_fields_and_optim_args_build_the_same_optimizer(tmp_path):
    typed = arguments(tmp_path, PAdamTrainingArguments, p_norm=0.6, lambda_p=0.4, decay_embeddings=True)
    strings = arguments(tmp_path, optim_args="p_norm=0.6,lambda_p=0.4,decay_embeddings=true")
    a, b = (optimizer_for(args).param_groups for args in (typed, strings))
    for x, y in zip(a, b, strict=True):
        assert {k: v for k, v in x.items() if k != "params"} == {k: v for k, v in y.items() if k != "params"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("p_norm=0.5", {"p_norm": 0.5}),
        ("decay_embeddings=False", {"decay_embeddings": False}),
        ("decay_embeddings=true, lambda_p=2", {"decay_embeddings": True, "lambda_p": 2.0}),
        ("late_decay=on,s_rate=0.1", {"late_decay": True, "s_rate": 0.1}),
    ],
)
def test_optim_args_are_typed(text, expected):
    assert parse_optim_args(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p=0.8", r"no key 'p'.*p_norm \("),
        ("p_norm=small", "p_norm='small' must be a number.*Accepted"),
        ("p_norm=", "p_norm='' must be a number"),
        ("p_norm", "malformed.*key=value"),
        ("p_norm=0.8,", "malformed"),
        ("p_norm=0.8,p_norm=0.5", "twice"),
        ("decay_embeddings=maybe", "must be true or false"),
        ("backend=gpu", "backend='gpu' must be one of auto"),
        ("p_norm=inf", "p_norm=inf is not allowed"),
        ("p_norm=-inf", "needs a target_sparsity"),
        ("importance=wanda", "must be one of magnitude, fisher"),
        ("p_norm=nan", "p_norm=nan is not allowed"),
        ("lambda_p=-1", "lambda_p=-1.0 is not allowed"),
        ("lambda_p=inf", "lambda_p=inf is not allowed"),
        ("s_rate=2", "s_rate=2.0 is not allowed"),
        ("s_rate=0.5,late_decay=true", "exclude each other"),
    ],
)
def test_bad_optim_args_are_one_clear_error(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        optimizer_for(arguments(tmp_path, optim_args=text))
    with pytest.raises(ValueError, match=message):  # typed arguments: before anything is loaded
        arguments(tmp_path, PAdamTrainingArguments, optim_args=text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("p_norm", float("inf")),
        ("lambda_p", float("nan")),
        ("learning_rate", -1e-3),
        ("adam_beta1", 1.5),
    ],
)
def test_bad_fields_are_refused_at_once(tmp_path, field, value):
    with pytest.raises(ValueError, match="is not allowed"):
        arguments(tmp_path, PAdamTrainingArguments, **{field: value})


def test_optim_args_that_are_no_string_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a string of key=value pairs"):
        optimizer_for(arguments(tmp_path, optim_args={"p_norm": 0.5}))


def test_an_option_given_twice_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="p_norm is given twice: 0.7, and 0.5 in optim_args"):
        arguments(tmp_path, PAdamTrainingArguments, p_norm=0.7, optim_args="p_norm=0.5")
    args = arguments(tmp_path, PAdamTrainingArguments, optim_args="p_norm=0.5")
    assert optimizer_for(args).param_groups[0]["p_norm"] == 0.5


def test_other_optimizers_are_untouched(tmp_path):
    args = arguments(tmp_path, PAdamTrainingArguments, optim="adamw_torch")
    assert type(optimizer_for(args)).__name__ == "AdamW"
    with pytest.raises(ValueError, match="malformed"):
        optimizer_for(arguments(tmp_path, optim="adamw_torch", optim_args="oops"))


def test_an_unsupported_transformers_is_refused_with_the_versions(monkeypatch):
    for version in ("4.57.1", "5.3.0", "6.0.0"):
        monkeypatch.setattr(transformers, "__version__", version)
        with pytest.raises(ImportError, match=f"transformers {version}.*>=5.4,<6"):
            registration.register()
    monkeypatch.setattr(transformers, "__version__", "5.4.0.dev0")
    registration.register()


def test_a_name_taken_by_someone_else_is_not_overwritten(monkeypatch):
    from transformers import trainer_optimizer

    def foreign(context):
        raise AssertionError

    foreign.__module__ = "someone_else"
    monkeypatch.setitem(trainer_optimizer._OPTIMIZER_HANDLERS, OptimizerNames.PADAM, foreign)
    with pytest.raises(ImportError, match="already has an optimizer named 'padam'"):
        registration.register()


SCRIPT = """
from dataclasses import dataclass
import sys, torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

assert "hf_padam" not in open(__file__).read().split("#")[-1]
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
rows = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(32)]
trainer = Trainer(model=LlamaForCausalLM(config), args=args, train_dataset=rows)
start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
trainer.train()
assert not any(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())
zeros = sum((p == 0).sum().item() for name, p in trainer.model.named_parameters() if "_proj" in name)
assert not any((p == 0).any() for name, p in trainer.model.named_parameters() if "_proj" not in name)
print(type(trainer.optimizer.optimizer).__name__, zeros, __name__, sys.argv[0])
"""
FLAGS = (
    "--optim padam --optim_args p_norm=0.5,lambda_p=1 --max_steps 30 --learning_rate 1e-2 --use_cpu --report_to none"
)


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "hf_padam", "run"],
        pytest.param(  # as tests/recipes/test_launch_files.py does with two processes
            "-m accelerate.commands.accelerate_cli launch --cpu --num_processes 1 -m hf_padam run".split(),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["hf-padam", "accelerate"],
)
def test_hf_padam_run_gives_the_name_to_a_script_that_knows_nothing_of_it(tmp_path, launcher):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, str(script), "--output_dir", str(tmp_path / "out"), *FLAGS.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    name, zeros, main, argv0 = result.stdout.strip().splitlines()[-1].split()
    assert (name, main, argv0) == ("PAdam", "__main__", str(script)) and int(zeros) > 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (["no_such.py"], "'no_such.py' is not a file"),
        *(
            (["-m", name], f"no module named '{name}'")
            for name in ("no_such_module", "no_such.module", "torch.no_such")
        ),
    ],
    ids=str,
)
def test_hf_padam_run_reports_what_is_missing(what, message, capsys):
    from hf_padam.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["run", *what, "--optim", "padam"])
    assert stop.value.code == 2 and message in capsys.readouterr().err
