"""Which weights decay."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_padam import PAdam, decayed_parameters, get_param_groups

LLAMA_LINEAR = {
    f"model.layers.{i}.{name}.weight"
    for i in range(2)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip


def test_linear_weights_decay_and_nothing_else():
    assert set(decayed_parameters(tiny_llama())) == LLAMA_LINEAR
    assert set(decayed_parameters(tiny_llama(tie_word_embeddings=False))) == LLAMA_LINEAR
    expected = {
        f"transformer.h.{i}.{name}.weight"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert set(decayed_parameters(tiny_gpt2())) == expected


def test_groups_hold_every_trainable_parameter_once():
    model = tiny_gpt2()
    decayed, others = get_param_groups(model, p_norm=0.7, lambda_p=0.3, weight_decay=0.1)
    assert (decayed["p_norm"], decayed["lambda_p"], decayed["weight_decay"]) == (0.7, 0.3, 0.1)
    assert (others["lambda_p"], others["weight_decay"]) == (0.0, 0.0)
    ids = [id(p) for group in (decayed, others) for _, p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_decay_embeddings_includes_tied_ones_once():
    tied = decayed_parameters(tiny_llama(), decay_embeddings=True)
    assert set(tied) == LLAMA_LINEAR | {"model.embed_tokens.weight"}
    untied = decayed_parameters(tiny_llama(tie_word_embeddings=False), decay_embeddings=True)
    assert set(untied) == LLAMA_LINEAR | {"model.embed_tokens.weight", "lm_head.weight"}


def test_a_weight_tied_to_an_embedding_by_hand_is_an_embedding():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Embedding(7, 5)
            self.middle = nn.Linear(5, 5)
            self.decoder = nn.Linear(5, 7, bias=False)
            self.decoder.weight = self.encoder.weight

    assert set(decayed_parameters(Model())) == {"middle.weight"}


def test_a_shared_weight_goes_by_the_names_of_all_its_modules():
    assert "model.embed_tokens.weight" not in decayed_parameters(
        tiny_llama(), decay_embeddings=True, dense_modules=["lm_head"]
    )
    model, shared = tiny_llama(), "model.layers.0.mlp.up_proj.weight"
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert shared not in decayed_parameters(model, dense_modules=["layers.1"])
    assert shared in decayed_parameters(model, target_modules=["layers.1"])
    assert shared in decayed_parameters(model, target_modules=r".*layers\.1\..*")
    assert shared in decayed_parameters(model, target_sparsity={"layers.1": 0.5})
    model.model.layers[1] = model.model.layers[0]  # and so with a shared module
    with pytest.raises(ValueError, match="no weight is left to decay"):
        get_param_groups(model, dense_modules=["layers.1"])


def test_frozen_weights_are_in_no_group():
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    groups = get_param_groups(model)
    names = {name for group in groups for name, _ in group["params"]}
    assert not any(name.startswith("model.layers.0.") for name in names)
    assert {name for name, _ in groups[0]["params"]} == {n for n in LLAMA_LINEAR if ".1." in n}


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("all-linear", LLAMA_LINEAR),
        (["mlp"], {n for n in LLAMA_LINEAR if "mlp" in n}),
        ([r".*\.q_proj", "v_proj"], {n for n in LLAMA_LINEAR if "q_proj" in n or "v_proj" in n}),
        (r"model\.layers\.1\..*", {n for n in LLAMA_LINEAR if ".1." in n}),
    ],
    ids=["all-linear", "part", "regex and part", "regex"],
)
def test_target_modules_narrow_the_choice(target_modules, expected):
    assert set(decayed_parameters(tiny_llama(), target_modules=target_modules)) == expected


def test_all_linear_covers_gpt2s_conv1d_and_not_the_tied_head():
    chosen = decayed_parameters(tiny_gpt2(), target_modules="all-linear")
    assert len(chosen) == 8 and not any("wte" in name or "lm_head" in name for name in chosen)


@pytest.mark.parametrize("target_modules", [["mlp", "q_porj"], "no_such_module", ["("]], ids=str)
def test_a_target_that_matches_nothing_is_an_error_that_shows_names(target_modules):
    with pytest.raises(ValueError, match="optim_target_modules=.*(q_proj|regular expression)"):
        decayed_parameters(tiny_llama(), target_modules=target_modules)


def test_nothing_left_to_decay_is_an_error():
    model = tiny_llama()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        get_param_groups(model)
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="no weight is left to decay.*decay_embeddings"):
        get_param_groups(model)
    with pytest.raises(ValueError, match="optim_target_modules='all-linear' matches only"):
        get_param_groups(model, target_modules="all-linear")


def lora() -> nn.Module:
    return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def test_peft_adapters_are_left_out_by_default():
    assert decayed_parameters(lora()) == {}
    with pytest.raises(ValueError, match="PEFT adapters are left out"):
        get_param_groups(lora())
    trained = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    trained.base_model.model.model.layers[0].mlp.requires_grad_(True)
    chosen = decayed_parameters(trained)
    assert len(chosen) == 3 and all("layers.0.mlp" in name for name in chosen)


def test_adapters_named_explicitly_decay_but_a_zero_b_matrix_is_refused():
    groups = get_param_groups(lora(), target_modules=["lora_A"])
    assert len(groups[0]["params"]) == 4
    optimizer = PAdam(groups, lr=1e-3)
    assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match=r"lora_B\.default\.weight.*all zeros.*lambda_p=0"):
        PAdam(get_param_groups(lora(), target_modules=["lora_A", "lora_B"]), lr=1e-3)


def test_zeros_of_a_sparse_checkpoint_survive_further_training(tmp_path):
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    for param in decayed_parameters(model).values():
        param.data[torch.rand(param.shape, generator=generator) < 0.5] = 0
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    zeros = {name: p == 0 for name, p in decayed_parameters(model).items()}
    optimizer = PAdam(get_param_groups(model, p_norm=0.8, lambda_p=0.01), lr=1e-3)
    ids = torch.randint(2, 90, (4, 32), generator=generator)
    for _ in range(20):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, param in decayed_parameters(model).items():
        assert (param[zeros[name]] == 0).all()
        assert (param[~zeros[name]] != 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_sparsity": 0.5, "target_scope": "Layer"}, "target_scope='Layer' must be one of global, layer"),
        ({"target_pattern": (2, 4)}, r"target_pattern=\(2, 4\) must be a pattern such as 2:4"),
        ({"target_pattern": "2:4", "target_sparsity": 0.7}, "'2:4' and target_sparsity=0.7 exclude each other"),
    ],
    ids=str,
)
def test_a_target_that_cannot_be_meant_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        get_param_groups(tiny_llama(), **options)
