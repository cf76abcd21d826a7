"""What `from_pretrained` makes of a compressed directory that is not whole, and that all others still load."""

import json
import shutil

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from hf_padam import compress
from hf_padam.compression.packing import CompressionError

NORM = "model.layers.0.input_layernorm.weight"


def tiny_mixtral():
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return MixtralForCausalLM(MixtralConfig(vocab_size=50, num_key_value_heads=1, num_local_experts=4, **sizes))


def tiny_t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


@pytest.fixture
def compressed(tmp_path):
    """Compress a model whose tensors on disk are changed first, by names."""

    def make(model, change=lambda tensors: tensors):
        model.save_pretrained(tmp_path / "dense")
        file = tmp_path / "dense" / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        return compress(tmp_path / "dense", tmp_path / "compressed").directory

    return make


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def with_more(tensors):
    return tensors | {"model.layers.0.mlp.extra.weight": torch.ones(3)}


def renamed(tensors):
    return {f"other.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (tiny_llama, without(NORM), f"it lacks {NORM} .1 in all."),
        (tiny_llama, with_more, "it has, and the model has not, model.layers.0.mlp.extra.weight .1 in all."),
        (tiny_llama, renamed, "it lacks lm_head.weight, .*; it has, and the model has not, other.model.embed_tokens"),
        (tiny_gpt2, without("transformer.h.0.attn.c_attn.bias"), "it lacks transformer.h.0.attn.c_attn.bias"),
        (tiny_mixtral, without(NORM), f"it lacks {NORM}"),
        (tiny_mixtral, with_more, "it has, and the model has not, model.layers.0.mlp.extra"),
    ],
)
def test_missing_and_unexpected_tensors_are_an_error_that_names_them(model, change, message, compressed):
    directory = compressed(model(), change)
    with pytest.raises(CompressionError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 3}, "it lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "it has, and the model has not, model.layers.1"),
        ({"tie_word_embeddings": False}, "it lacks lm_head.weight"),
    ],
)
def test_a_config_of_another_model_is_an_error(options, message, compressed):
    directory = compressed(tiny_llama())
    with pytest.raises(CompressionError, match=message):
        AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.mark.parametrize("other", [AutoModel, AutoModelForSequenceClassification])
def test_another_class_loads_the_whole_and_refuses_what_is_not(other, compressed, tmp_path):
    model = tiny_llama()
    directory = compressed(model)
    loaded = other.from_pretrained(directory).base_model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.model.state_dict().items())
    shutil.rmtree(directory)
    compressed(model, without(NORM))
    with pytest.raises(CompressionError, match=f"not hold the weights of a LlamaForCausalLM.*{NORM}"):
        other.from_pretrained(directory)


def test_a_body_gets_a_new_head(compressed):
    directory = compressed(tiny_llama().model)
    body = AutoModel.from_pretrained(directory).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert all(torch.equal(tensor, body[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.mark.parametrize("kept", ["both", "the other"])
def test_tied_weights_may_have_either_name_or_both(kept, compressed):
    def change(tensors):
        copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        return (tensors if kept == "both" else without("model.embed_tokens.weight")(tensors)) | copy

    model = tiny_llama()
    loaded = AutoModelForCausalLM.from_pretrained(compressed(model, change))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_class_may_say_what_it_does_without(compressed, monkeypatch):
    directory = compressed(tiny_llama(), lambda tensors: with_more(without(NORM)(tensors)))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_missing", [r"layers\.0\.input_layernorm"])
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"mlp\.extra"])
    assert AutoModelForCausalLM.from_pretrained(directory).model.layers[0].input_layernorm.weight.sum() == 32
    AutoModel.from_pretrained(directory)


def test_a_mapping_of_names_is_followed(compressed):
    model = tiny_llama(tie_word_embeddings=False)
    loaded = AutoModelForCausalLM.from_pretrained(compressed(model, renamed), key_mapping={"^other.": ""})
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_renaming_that_leads_out_of_the_model_is_not_followed(compressed, tmp_path):
    """As from DeepSeek V4's `norm` of the attention, which its last norm is called, too."""
    model = tiny_llama()
    loaded = AutoModelForCausalLM.from_pretrained(compressed(model), key_mapping={r"\.norm\.": ".kv_norm."})
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    loaded.save_pretrained(tmp_path / "again")
    assert "model.norm.weight" in load_file(tmp_path / "again" / "model.safetensors")


def test_sizes_that_differ_may_be_asked_for(compressed):
    directory = compressed(tiny_llama())
    options = dict(intermediate_size=48, ignore_mismatched_sizes=True)
    assert AutoModelForCausalLM.from_pretrained(directory, **options).model.layers[0].mlp.up_proj.out_features == 48


@pytest.mark.parametrize("tied", [True, False])
def test_weights_may_go_to_the_disk(tied, compressed, tmp_path):
    directory = compressed(tiny_llama(tie_word_embeddings=tied))
    places = {"model.embed_tokens": "disk", "model.layers": "disk", "lm_head": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    AutoModelForCausalLM.from_pretrained(directory, device_map=places, offload_folder=str(tmp_path / "offload"))


def test_a_part_of_a_model_loads_alone(compressed):
    model = tiny_t5()
    directory = compressed(model)
    loaded = T5EncoderModel.from_pretrained(directory).state_dict()
    assert all(torch.equal(tensor, loaded[f"encoder.{n}"]) for n, tensor in model.encoder.state_dict().items())


def test_a_class_that_is_not_known_here_loads_what_it_finds(compressed):
    class Own(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Linear(2, 2)
            self.post_init()

    directory = compressed(Own(tiny_llama().config))
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["Own"]
    Own.from_pretrained(directory)
    AutoModelForCausalLM.from_pretrained(directory)
