"""Tiny models, a character tokenizer and a text: everything the tests need, made on the spot."""

from __future__ import annotations

import gc
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)  # the tests run in several processes


def pytest_collection_finish():
    """Keep what the imports made, a million objects, from being gone through by each of accelerate's gc.collect()."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def handler_of_sigterm():
    """A recipe that a test runs in this process leaves a handler, which the next test's Trainer would leave alone."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


REPOSITORY = Path(__file__).parent.parent
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
TEXT = "".join(
    f"Line {i}: the quick brown fox jumps over {i * i % 97} lazy dogs, and back again.\n" for i in range(400)
)


def tiny_llama(**overrides) -> LlamaForCausalLM:
    """A Llama of some 20,000 weights, biases included; the seed makes every call return the same one."""
    torch.manual_seed(0)
    options = dict(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        attention_bias=True,
    )
    return LlamaForCausalLM(LlamaConfig(**(options | overrides)))


def tiny_gpt2(**overrides) -> GPT2LMHeadModel:
    """A GPT-2 with biases, Conv1D layers and learned positions."""
    torch.manual_seed(0)
    options = dict(vocab_size=len(CHARACTERS) + 2, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    return GPT2LMHeadModel(GPT2Config(**(options | overrides)))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character."""
    vocabulary = {"<unk>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A saved tiny Llama with its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def blocks(rows: int = 32, length: int = 32) -> list[dict[str, list[int]]]:
    """Rows of token ids with labels, for a Trainer."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, len(CHARACTERS), (rows, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": list(row)} for row in ids]


OPTIM_ARGS = "p_norm=0.5,lambda_p=0.3"


def options(tmp_path, **more) -> dict:
    """Training arguments of a short run with PAdam."""
    return {
        "output_dir": str(tmp_path), "optim": "padam", "optim_args": OPTIM_ARGS, "learning_rate": 3e-3,
        "max_steps": 20, "per_device_train_batch_size": 4, "logging_steps": 5, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    } | more  # fmt: skip
