"""What a recipe trains on is the text as it stands in the file, in blocks that the model can take."""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import CHARACTERS, character_tokenizer
from support.arguments import DataArguments
from support.characters import TextArguments, load_text
from support.data import load_blocks
from support.errors import UsageError
from support.positions import longest_sequence
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BloomConfig,
    CamembertConfig,
    CodeGenConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    ProphetNetConfig,
    RobertaConfig,
    WhisperConfig,
    XLMRobertaConfig,
    XLNetConfig,
)

SIZES = dict(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=1
)
LAYERS = dict(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
NO_LIMIT = 777

CONFIGS = [
    (RobertaConfig(**SIZES, max_position_embeddings=34, is_decoder=True), 32, True),
    (XLMRobertaConfig(**SIZES, max_position_embeddings=34, is_decoder=True), 32, True),
    (CamembertConfig(**SIZES, max_position_embeddings=34, is_decoder=True), 32, True),
    (RobertaConfig(**SIZES | {"pad_token_id": 0}, max_position_embeddings=34, is_decoder=True), 33, True),
    (BertConfig(**SIZES, max_position_embeddings=32, is_decoder=True), 32, True),
    (GPT2Config(**LAYERS, n_positions=32), 32, True),
    (
        OPTConfig(
            vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=16,
        ), 32, True,
    ),
    (
        BartConfig(
            vocab_size=64, d_model=16, decoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2,
            max_position_embeddings=32,
        ), 32, True,
    ),
    (
        ProphetNetConfig(
            vocab_size=64, hidden_size=16, num_decoder_layers=1, num_decoder_attention_heads=2, decoder_ffn_dim=16,
            max_position_embeddings=32, is_decoder=True, is_encoder_decoder=False,
        ), 30, True,
    ),
    (
        GPTNeoConfig(
            vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]],
            max_position_embeddings=32,
        ), 32, True,
    ),
    (MptConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=2, max_seq_len=32), 32, True),
    (
        WhisperConfig(
            vocab_size=64, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
            max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ), 32, True,
    ),
    (CodeGenConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=4, rotary_dim=4, n_positions=32), 32, True),
    (LlamaConfig(**SIZES, max_position_embeddings=32), 32, False),
    (MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4, max_position_embeddings=32), 32, False),
    (MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1), NO_LIMIT, False),
    (BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2), NO_LIMIT, False),
    (XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16), NO_LIMIT, False),
]  # fmt: skip


@pytest.mark.parametrize(("config", "longest", "strict"), CONFIGS, ids=lambda value: type(value).__name__)
def test_the_longest_sequence_is_what_the_model_takes(config, longest, strict):
    tokenizer = character_tokenizer()
    tokenizer.model_max_length = NO_LIMIT
    model = AutoModelForCausalLM.from_config(config).eval()
    assert longest_sequence(model, tokenizer) == longest
    with torch.no_grad():
        model(input_ids=torch.full((1, longest), 5))
        with pytest.raises((IndexError, RuntimeError)) if strict else contextlib.nullcontext():
            model(input_ids=torch.full((1, longest + 1), 5))


def trained_on(tmp_path, name: str, content: bytes, **options) -> str:
    """The text of the training blocks, of one token each."""
    file = tmp_path / name
    file.write_bytes(content)
    other = tmp_path / f"other{file.suffix}"
    other.write_bytes(b"text,n\nabcd,1\n" if file.suffix == ".csv" else b'{"text": "abcd"}\n')
    args = DataArguments(
        train_file=str(file), validation_file=str(other), test_file=str(other), block_size=2, **options
    )
    splits = load_blocks(args, character_tokenizer(), 64, contextlib.nullcontext(), {})
    vocabulary = {i + 2: c for i, c in enumerate(CHARACTERS)}
    return "".join(vocabulary.get(token, "?") for row in splits["train"] for token in row["input_ids"])


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", MARK + b"abcdef"),
        ("a.md", MARK + b"abcdef"),
        ("a.csv", MARK + b"text,n\nabcdef,1\n"),
        ("a.jsonl", MARK + b'{"text": "abcdef"}\n'),
    ],
)
def test_a_byte_order_mark_is_not_trained_on(tmp_path, name, content, streaming):
    assert trained_on(tmp_path, name, content, streaming=streaming) == "abcdef"


def test_a_byte_order_mark_is_not_a_character_either(tmp_path):
    (tmp_path / "a.txt").write_bytes(MARK + b"abcdefghij" * 2)
    train, validation = load_text(TextArguments(train_file=str(tmp_path / "a.txt")))
    assert train + validation == "abcdefghij" * 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("word", ["NA", "None", "null", "nan", "N/A", "007", "1.50", "True"])
def test_cells_of_a_table_are_texts_whatever_they_look_like(tmp_path, word, streaming):
    found = trained_on(tmp_path, "a.csv", f"text,n\n{word},1\n{word},2\n".encode(), streaming=streaming)
    assert found == word * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_text_is_named_by_its_row(tmp_path, streaming):
    with pytest.raises(UsageError, match=r"column text of train is empty \(null\), in row 2: remove such rows"):
        trained_on(tmp_path, "a.jsonl", b'{"text": "abcd"}\n{"text": null}\n', streaming=streaming)
