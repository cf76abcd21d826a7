"""The recipes for TRL and for PEFT on a tiny model: chats to a share of zeros, and adapters that keep a base's."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys

import pytest
import torch
from conftest import REPOSITORY, character_tokenizer, tiny_llama
from support.report import RESULT_KEYS
from test_bad_inputs import complain as complain  # a fixture
from transformers import AutoModelForCausalLM, Trainer

from hf_padam import decayed_parameters

SFT, LORA = (str(REPOSITORY / "recipes" / name) for name in ("finetune_trl_sft.py", "finetune_lora.py"))
TEMPLATE = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
TURNS = [(f"What is {i}?", f"It is {i}, and {i} dogs.") for i in range(200)]


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    """A saved model whose tokenizer has a chat template."""
    directory = tmp_path_factory.mktemp("chat")
    tiny_llama().save_pretrained(directory)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Run a recipe in this process; return its results, the model that it saved, and what it printed."""

    def run(script, **options):
        options = {
            "max_steps": 20, "per_device_train_batch_size": 4, "logging_steps": 5, "learning_rate": 3e-3, "seed": 3,
            "max_eval_samples": 8, "report_to": "none", "use_cpu": True, "output_dir": tmp_path / "out",
        } | options  # fmt: skip
        monkeypatch.setattr(sys, "argv", [script, *(f"--{key}={value}" for key, value in options.items())])
        runpy.run_path(script, run_name="__main__")
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert set(RESULT_KEYS) <= set(results) and (tmp_path / "out" / "report.md").is_file()
        return results, AutoModelForCausalLM.from_pretrained(tmp_path / "out"), capfd.readouterr().out

    return run


def conversations(kind, path):
    """Write the turns as a dataset of a kind, and return its file."""
    turns = [({"role": "user", "content": a}, {"role": "assistant", "content": b}) for a, b in TURNS]
    rows = {
        "messages": [{"messages": [a, b]} for a, b in turns],
        "prompt and completion": [{"prompt": [a], "completion": [b]} for a, b in turns],
    }
    file = path / ("chats.txt" if kind == "text" else "chats.jsonl")
    if kind == "text":
        file.write_text("\n\n".join(passage for turn in TURNS for passage in turn))
    else:
        file.write_text("\n".join(json.dumps(row) for row in rows[kind]))
    return file


@pytest.mark.parametrize("kind", ["messages", "prompt and completion", "text"])
def test_trls_trainer_reaches_the_target_on_any_conversations(run, tmp_path, chat_dir, kind):
    """The perplexity is that of the answers, of whole conversations where the data do not say what is an answer."""
    file = conversations(kind, tmp_path)
    options = {"gradient_checkpointing": False, "max_length": 64, "per_device_eval_batch_size": 3}
    results, model, printed = run(SFT, model_name_or_path=chat_dir, train_file=file, **options)
    decayed = decayed_parameters(model)
    zeros, size = (sum(count(p) for p in decayed.values()) for count in (lambda p: int((p == 0).sum()), torch.numel))
    assert results["sparsity"] == zeros / size == pytest.approx(0.5, abs=1e-3)
    assert results["test_perplexity"] < results["test_perplexity_before"] and "50.0" in printed
    assert results["train_steps"] == 20 and results["train_tokens_per_second"] > 0

    passages = [passage for turn in TURNS for passage in turn]
    pairs = list(zip(passages, passages[1:], strict=False)) if kind == "text" else TURNS
    share = len(pairs) * 5 // 100  # the test's are the last
    nll, tokens = 0.0, 0
    for prompt, answer in pairs[-share:][:8]:
        start = f"u:{prompt}\na:"
        ids = character_tokenizer()(f"{start}{answer}\n", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].double().log_softmax(-1)
        first = 1 if kind == "messages" else len(start)
        nll -= sum(scores[i - 1, ids[0, i]].item() for i in range(first, ids.shape[1]))
        tokens += ids.shape[1] - first
    assert results["test_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "the tokenizer has no chat template: take a chat model, or give --chat_template_path"),
        ({"optim_args": "target=0.5"}, "optim_args has no key 'target' for padam"),
        ({"streaming": True}, "unknown option --streaming"),
    ],
)
def test_what_trls_trainer_cannot_use_is_said(complain, changes, message):
    assert message in complain(script=SFT, block_size=None, **changes)


USER, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Who?"}, "messages is 'Who[?]', which must be a list of messages"),
        ({"messages": None}, "messages is None"),
        ({"messages": []}, r"messages is \[\]"),
        (
            {"messages": [USER, {"role": "assistant"}]},
            "a message is {.*role.*assistant.*}, which must have a role and",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "a message is"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "(a message is|could not be read)"),
        ({"messages": [{"from": "user", "value": "Who?"}]}, "(a message is|could not be read)"),
        ({"prompt": 1, "completion": 2}, "prompt is 1, which must be a list of messages .or both prompt and"),
        ({"prompt": "Who?", "completion": None}, "prompt is 'Who[?]'|completion is None"),
        ({"prompt": "Who?", "completion": [ANSWER]}, "prompt is 'Who[?]'"),
    ],
    ids=str,
)
def test_rows_that_are_no_conversations_are_named(complain, chat_dir, tmp_path, row, message):
    data = tmp_path / "rows.jsonl"
    data.write_text(f"{json.dumps(row)}\n" * 40)
    options = {"model_name_or_path": chat_dir, "train_file": data, "block_size": None}
    said = complain(script=SFT, **options)
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 1}, "--max_length 1 is too small"),
        ({"max_length": 0}, "--max_length 0 is too small"),
        ({"max_length": 3}, "--max_length 3 leaves nothing of the answers in the train conversations"),
        ({"chat_template_path": "no_such.jinja"}, "error: TRL cannot prepare the conversations: OSError"),
    ],
    ids=str,
)
def test_what_leaves_nothing_to_train_on_is_said(complain, chat_dir, tmp_path, change, message):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": [USER], "completion": [ANSWER]}) + "\n")
    data.write_text(data.read_text() * 40)
    options = {"model_name_or_path": chat_dir, "train_file": data, "block_size": None}
    assert message in complain(script=SFT, **options | change)


def test_a_text_of_one_passage_has_no_answers(complain, chat_dir, tmp_path):
    text = tmp_path / "one.txt"
    text.write_text("Hello.\n")
    message = complain(script=SFT, block_size=None, model_name_or_path=chat_dir, train_file=text)
    assert "the train text has 1 passages: a prompt and an answer take two" in message


@pytest.fixture(scope="module")
def sparse_dir(tmp_path_factory):
    """A saved model of which half of the decayed weights are zeros."""
    directory = tmp_path_factory.mktemp("sparse")
    model = tiny_llama()
    with torch.no_grad():
        for param in decayed_parameters(model).values():
            param *= torch.rand(param.shape) < 0.5
    model.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("keep", [True, False])
def test_adapters_keep_the_zeros_of_their_base_or_say_how_many_are_lost(run, sparse_dir, text_file, keep):
    options = {"block_size": 32, "keep_zeros": keep, "lora_r": 4}
    results, model, printed = run(LORA, model_name_or_path=sparse_dir, train_file=text_file, **options)
    base = AutoModelForCausalLM.from_pretrained(sparse_dir)
    zeros = {name: param == 0 for name, param in base.named_parameters()}
    number = sum(int(mask.sum()) for mask in zeros.values())
    lost = sum(int(param[zeros[name]].count_nonzero()) for name, param in model.named_parameters())
    filled = results["zeros_filled_by_merging"]
    assert results["zeros_of_base"] == number > filled > 0.9 * number / 2
    assert f"Merging filled {filled:,} of the base's {number:,} zeros" in printed
    adapted, merged = results["test_perplexity_adapted"], results["test_perplexity_merged"]
    assert adapted == pytest.approx(merged, rel=1e-4) and merged < results["test_perplexity_before"]
    decayed = set(decayed_parameters(base))
    trained = [name for name, param in model.named_parameters() if not torch.equal(param, base.get_parameter(name))]
    assert set(trained) == decayed  # and biases are frozen
    if keep:
        assert lost == 0 and results["sparsity"] == pytest.approx(0.5, abs=0.02)
        assert f"are zero again: perplexity {merged:.4f} -> {results['test_perplexity']:.4f}" in printed
        assert results["test_perplexity"] != merged
    else:
        assert lost == filled and results["sparsity"] < 0.01 and results["test_perplexity"] == merged
        assert f"are lost: perplexity {merged:.4f}" in printed


def test_adapters_may_decay_and_the_base_keeps_its_record(run, sparse_dir, text_file, tmp_path, monkeypatch):
    """And what a run has left is uploaded once, when all of it is there."""
    uploads = []

    class Hub:
        def __init__(self, token=None):
            pass

        def upload_folder(self, folder_path, ignore_patterns, **options):
            uploads.append((sorted(path.name for path in folder_path.iterdir()), ignore_patterns, options["repo_id"]))

    monkeypatch.setattr("support.models.HfApi", Hub)
    created = {"hub_model_id": "me/out", "push_in_progress": None}
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, *args, **kwargs: vars(self).update(created))
    base = AutoModelForCausalLM.from_pretrained(sparse_dir)
    base.config.padam_decays = {"dense_modules": ["q_proj"]}
    base.save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    options = {"optim": "padam", "optim_target_modules": '["lora_A"]', "lambda_p": 0.3, "block_size": 32, "lora_r": 4}
    options["push_to_hub"] = True
    results, model, _ = run(LORA, model_name_or_path=tmp_path / "base", train_file=text_file, **options)
    assert model.config.padam_decays == {"dense_modules": ["q_proj"]}
    expected = decayed_parameters(base, dense_modules=["q_proj"])
    assert results["decayed_parameters"] == sum(param.numel() for param in expected.values())
    [(names, ignored, repository)] = uploads
    assert {"model.safetensors", "results.json", "report.md", "training.png", "README.md"} <= set(names)
    assert ignored == ["checkpoint-*", ".*", "_*"] and repository == "me/out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "padam"}, "PEFT adapters are left out"),
        ({"lora_target_modules": "no_proj"}, "no_proj"),
        ({"lora_r": 0}, "r` should be a positive integer"),
    ],
)
def test_adapters_that_cannot_train_are_an_error(complain, changes, message):
    assert message in complain(script=LORA, **changes)
