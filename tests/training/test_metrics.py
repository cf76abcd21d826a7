"""Perplexity and sparsity against hand computations."""

from __future__ import annotations

import json
import math
import tempfile

import evaluate
import pytest
import torch
from conftest import tiny_llama

from hf_padam import Perplexity, WeightSparsity, decayed_parameters
from hf_padam.sparsity import count_model_zeros, count_zeros, summarize
from hf_padam.training.metrics import sequence_nll


def test_perplexity_equals_a_hand_computation_on_ragged_sequences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 6), generator=generator)
    labels[0, 4:] = -100
    labels[1, :3] = -100
    labels[2, 1:] = -100  # only its first token is left, which nothing predicts
    nll, tokens = 0.0, 0
    for row in range(3):
        for i in range(5):
            if labels[row, i + 1] != -100:
                log_probabilities = logits[row, i].double().log_softmax(0)
                nll -= log_probabilities[labels[row, i + 1]].item()
                tokens += 1
    assert tokens == 3 + 3 + 0
    sums, counts = sequence_nll(logits, labels)
    assert counts.tolist() == [3, 3, 0]
    result = Perplexity().compute(predictions=sums.tolist(), references=counts.tolist())
    assert result["tokens"] == tokens
    assert result["loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)


def test_perplexity_does_not_depend_on_the_batches():
    metric = Perplexity()
    for nll, tokens in ((3.0, 2), (10.0, 1), (0.5, 7)):
        metric.add_batch(predictions=[nll], references=[tokens])
    assert metric.compute()["perplexity"] == pytest.approx(math.exp(13.5 / 10))


def test_labels_need_no_shift_where_position_i_predicts_label_i():
    logits = torch.randn(1, 4, 5)
    labels = torch.tensor([[1, 2, 3, 4]])
    nll, tokens = sequence_nll(logits, labels, shift=False)
    assert tokens.item() == 4
    assert nll.item() == pytest.approx(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item())


def test_no_predicted_token_is_an_error_and_overflow_is_infinite():
    with pytest.raises(ValueError, match="no token was predicted"):
        Perplexity().compute(predictions=[0.0], references=[0])
    assert Perplexity().compute(predictions=[1e6], references=[1])["perplexity"] == math.inf
    assert math.isnan(Perplexity().compute(predictions=[math.nan], references=[1])["perplexity"])


def test_sparsity_equals_a_hand_count_with_tied_and_frozen_weights():
    model = tiny_llama(attention_bias=False)  # embeddings and head are tied; biases would start at zero
    model.model.layers[0].mlp.requires_grad_(False)
    frozen = model.model.layers[0].mlp.up_proj.weight
    decayed = model.model.layers[1].self_attn.q_proj.weight
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        frozen[:10] = 0
        decayed[:, :7] = 0
        decayed[0, 7] = -0.0
        embedding[3] = 0
    zeros_decayed = 32 * 7 + 1
    zeros_total = zeros_decayed + 10 * 32 + 32
    names = decayed_parameters(model)
    elements = sum(p.numel() for p in names.values())
    total = sum(p.numel() for p in model.parameters())
    assert frozen.numel() * 3 + elements == 18432  # the frozen layer's three matrices are not among the decayed
    result = WeightSparsity().compute(model=model, decayed=names)
    assert result == {
        "sparsity": zeros_decayed / elements,
        "sparsity_total": zeros_total / total,
        "decayed_parameters": elements,
        "total_parameters": total,
    }
    rows = [
        {"name": "a", "elements": 4, "zeros": 1, "decayed": True},
        {"name": "b", "elements": 4, "zeros": 0, "decayed": False},
    ]
    assert WeightSparsity().compute(data=rows)["sparsity_total"] == 1 / 8


def test_near_zeros_are_counted_apart_from_zeros():
    (count,) = count_zeros({"w": torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e-3])}, near_zero=1e-8)
    assert (count.zeros, count.near_zeros, count.elements) == (2, 2, 5)
    (count,) = count_zeros({"w": torch.ones(2)})
    assert count.near_zeros is None
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        (count,) = count_zeros({"w": torch.tensor([0.0, 0.0, 0.5]).to(dtype)}, near_zero=1e-8)
        assert (count.zeros, count.near_zeros) == (2, 0), dtype


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.bool],
    ids=str,
)
def test_zeros_are_counted_in_every_dtype(dtype):
    values = torch.tensor([0.0, -0.0, 1.0, 0.0, math.nan, -0.25 if dtype.is_floating_point else 3.0])
    values = values if dtype.is_floating_point else values.nan_to_num(nan=1.0)
    (count,) = count_zeros({"w": values.to(dtype).reshape(3, 2).T})
    assert (count.zeros, count.elements) == (3, 6)


def test_subnormal_numbers_are_not_zeros():
    (count,) = count_zeros({"w": torch.tensor([2.0**-149, -(2.0**-149), 0.0])})
    assert count.zeros == 1


def test_empty_models_have_no_zeros():
    assert summarize([])["sparsity"] is None
    assert count_model_zeros(torch.nn.Identity()) == []


def test_results_can_be_saved_with_evaluate(tmp_path):
    evaluate.save(tmp_path / "results.json", **WeightSparsity().compute(model=tiny_llama()))
    assert json.loads((tmp_path / "results.json").read_text())["sparsity"] == 0.0


def quantised(weight):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = torch.nn.Linear(*weight.shape, bias=False)
    quantize_(linear, Int8WeightOnlyConfig())
    return linear.weight


UNREADABLE = {
    "quantised": quantised,
    "meta": lambda weight: weight.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "nested": lambda weight: torch.nested.nested_tensor(list(weight)),
    "unsigned": lambda weight: weight.to(torch.uint16),
    "uninitialised": lambda weight: torch.nn.LazyLinear(4).weight,
}


@pytest.mark.parametrize("near_zero", [None, 1e-8])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_zeros_that_cannot_be_looked_at_are_not_known_and_others_are(kind, near_zero):
    tensors = {"there": UNREADABLE[kind](torch.ones(32, 32)), "plain": torch.tensor([0.0, 1.0])}
    counts = count_zeros(tensors, decayed=["plain"], near_zero=near_zero)
    assert [count.known for count in counts] == [False, True]
    assert (counts[1].zeros, counts[1].elements) == (1, 2)
    summary = summarize(counts)
    assert (summary["sparsity"], summary["sparsity_total"], summary["total_parameters"]) == (0.5, None, None)


def test_metrics_make_no_directories(tmp_path, monkeypatch):
    """In a directory that all users share, those of one would be in another's way."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Perplexity().compute(predictions=[1.0], references=[1])["loss"] == 1.0
    row = {"name": "w", "elements": 4, "zeros": 1, "decayed": True}
    assert WeightSparsity().compute(data=[row])["sparsity"] == 0.25
    assert not list(tmp_path.iterdir())


def test_a_model_that_adapters_were_merged_into_is_counted_like_any_other():
    """Its config may say that they decayed, which are no more."""
    model = tiny_llama()
    expected = WeightSparsity().compute(model=model)
    model.config.padam_decays = {"target_modules": ["lora_A"]}
    assert WeightSparsity().compute(model=model) == expected
