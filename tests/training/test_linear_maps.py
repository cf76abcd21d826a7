"""Which parameters are matrices of linear maps: families of models, built on the meta device from their configs."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from conftest import tiny_gpt2, tiny_llama
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from hf_padam import decayed_parameters, get_param_groups
from hf_padam.training.decay_report import describe_decay

TEXT = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
HEADS = TEXT | dict(head_dim=8)
MOE = HEADS | dict(moe_intermediate_size=16, num_experts_per_tok=2)
VISION = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
)
SPEECH = dict(
    vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64,
    encoder_attention_heads=4, decoder_attention_heads=4,
)  # fmt: skip
CLIP_TEXT = {key: value for key, value in VISION.items() if "size" not in key or "hidden" in key}
ROPE = dict(rope_type="default", rope_theta=1e4)

ATTENTION = "q_proj k_proj v_proj o_proj"
LLAMA = f"{ATTENTION} gate_proj up_proj down_proj"
EXPERTS = f"{ATTENTION} gate_up_proj down_proj"
TOWER = "q_proj k_proj v_proj out_proj fc1 fc2"

FAMILIES = {
    "LlamaForCausalLM": (HEADS, LLAMA, ""),
    "Qwen3ForCausalLM": (HEADS, LLAMA, ""),
    "Gemma3ForCausalLM": (HEADS, LLAMA, ""),
    "DiffLlamaForCausalLM": (HEADS, LLAMA, "lambda_q1 lambda_k2"),
    "GPT2LMHeadModel": (dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4), "c_attn c_proj c_fc", "wpe"),
    "GPTNeoXForCausalLM": (
        {key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
        "query_key_value dense dense_h_to_4h dense_4h_to_h",
        "",
    ),
    "MixtralForCausalLM": (HEADS | dict(num_local_experts=4), EXPERTS, "mlp.gate"),
    "Qwen2MoeForCausalLM": (
        MOE | dict(num_experts=4, shared_expert_intermediate_size=16),
        f"{EXPERTS} gate_proj up_proj",
        "mlp.gate mlp.shared_expert_gate",
    ),
    "Qwen3MoeForCausalLM": (MOE | dict(num_experts=4), EXPERTS, "mlp.gate"),
    "DeepseekV3ForCausalLM": (
        MOE
        | dict(n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16)
        | dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj gate_up_proj",
        "mlp.gate kv_a_layernorm",
    ),
    "OlmoeForCausalLM": (TEXT | dict(num_experts=4, num_experts_per_tok=2), EXPERTS, "mlp.gate"),
    "GptOssForCausalLM": (
        HEADS | dict(num_local_experts=4),
        EXPERTS,
        "sinks gate_up_proj_bias down_proj_bias mlp.router",
    ),
    "Llama4ForCausalLM": (
        HEADS | dict(num_local_experts=4, intermediate_size_mlp=64),
        f"{LLAMA} gate_up_proj",
        "feed_forward.router",
    ),
    "GraniteMoeForCausalLM": (HEADS | dict(num_local_experts=4, num_experts_per_tok=2), EXPERTS, "router"),
    "JetMoeForCausalLM": (
        dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=2)
        | dict(kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
        "kv_proj input_linear output_linear",
        "router.layer",
    ),
    "PhimoeForCausalLM": (HEADS | dict(num_local_experts=4), EXPERTS, "mlp.router"),
    "DbrxForCausalLM": (
        dict(d_model=32, n_heads=4, n_layers=2, vocab_size=97, attn_config=dict(kv_n_heads=2, rope_theta=1e4))
        | dict(ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2)),
        "Wqkv out_proj w1 v1 w2",
        "router.layer norm_1",
    ),
    "MambaForCausalLM": (
        dict(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2),
        "in_proj x_proj dt_proj out_proj",
        "A_log D conv1d norm_f",
    ),
    "Mamba2ForCausalLM": (
        dict(vocab_size=97, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=4, head_dim=16, n_groups=1),
        "in_proj out_proj",
        "A_log D dt_bias conv1d",
    ),
    "RwkvForCausalLM": (
        dict(vocab_size=97, hidden_size=32, num_hidden_layers=2),
        "key value receptance output",
        "time_decay time_mix_key time_mix_receptance",
    ),
    "RecurrentGemmaForCausalLM": (
        HEADS | dict(lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]),
        f"{LLAMA} linear_x linear_y linear_out",
        "input_gate_weight recurrent_gate_bias recurrent_param conv_1d",
    ),
    "Qwen3NextForCausalLM": (
        MOE
        | dict(num_experts=4, shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"])
        | dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8),
        f"{EXPERTS} gate_proj up_proj in_proj_qkvz in_proj_ba out_proj",
        "conv1d A_log dt_bias mlp.gate shared_expert_gate",
    ),
    "JambaForCausalLM": (
        TEXT
        | dict(num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
        | dict(mamba_d_state=4),
        f"{EXPERTS} gate_proj up_proj in_proj x_proj dt_proj out_proj",
        "A_log D conv1d feed_forward.router",
    ),
    "BambaForCausalLM": (
        TEXT | dict(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8),
        f"{LLAMA} in_proj out_proj",
        "A_log D conv1d dt_bias",
    ),
    "FalconH1ForCausalLM": (
        HEADS | dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64, mamba_d_state=8),
        f"{LLAMA} in_proj out_proj",
        "A_log D conv1d dt_bias",
    ),
    "T5ForConditionalGeneration": (
        dict(vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        "q k v o wi wo",
        "relative_attention_bias layer_norm",
    ),
    "BartForConditionalGeneration": (SPEECH, TOWER, "embed_positions"),
    "BertForMaskedLM": (
        {key: value for key, value in TEXT.items() if key != "num_key_value_heads"},
        "query key value dense",
        "position_embeddings token_type_embeddings predictions.bias",
    ),
    "ViTForImageClassification": (
        VISION,
        f"{ATTENTION} fc1 fc2 classifier",
        "cls_token position_embeddings projection",
    ),
    "CLIPModel": (
        dict(text_config=CLIP_TEXT | dict(vocab_size=97), vision_config=VISION),
        f"{TOWER} text_projection visual_projection",
        "class_embedding position_embedding patch_embedding logit_scale",
    ),
    "SiglipVisionModel": (VISION, f"{TOWER} in_proj_weight", "probe patch_embedding position_embedding"),
    "LlavaForConditionalGeneration": (
        dict(text_config=dict(model_type="llama", **HEADS), image_token_index=95)
        | dict(vision_config=dict(model_type="clip_vision_model", **VISION)),
        f"{LLAMA} {TOWER} linear_1 linear_2",
        "class_embedding patch_embedding position_embedding pre_layrnorm",
    ),
    "Qwen2VLForConditionalGeneration": (
        dict(text_config=TEXT | dict(rope_parameters=ROPE | dict(mrope_section=[1, 1, 2])))
        | dict(vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, patch_size=4)),
        f"{LLAMA} qkv proj fc1 fc2 mlp",
        "patch_embed.proj norm1 ln_q",
    ),
    "WhisperForConditionalGeneration": (
        SPEECH | dict(num_mel_bins=8, pad_token_id=0, bos_token_id=0, eos_token_id=0),
        TOWER,
        "conv1 conv2 embed_positions",
    ),
}  # fmt: skip
"""By model class: a tiny config, the modules or parameters all of whose matrices decay, and some that never do."""


def on_meta(name: str, options: dict) -> nn.Module:
    cls = getattr(transformers, name)
    config = (cls.config_class or cls._model_mapping)(**options)
    with torch.device("meta"):
        return cls(config)


def parts(name: str) -> str:
    """A parameter's name without the numbers of layers and ".weight"."""
    return re.sub(r"\.\d+(?=\.|$)", "", name).removesuffix(".weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_decays_by_family(family):
    options, decay, never = FAMILIES[family]
    model = on_meta(family, options)
    decayed = decayed_parameters(model)
    assert {parts(name).rpartition(".")[2] for name in decayed} == set(decay.split())
    others = {parts(name) for name, _ in model.named_parameters() if name not in decayed}
    for name in never.split():
        assert any(f".{other}".endswith(f".{name}") for other in others), name
        if name != "patch_embed.proj":
            assert not any(f".{parts(other)}".endswith(f".{name}") for other in decayed), name
    roles = [role for role in ("input", "output") if family != "CLIPModel"]
    embeddings = [module for role in roles if (module := getattr(model, f"get_{role}_embeddings")())]
    assert not {id(p) for module in embeddings for p in module.parameters()} & {id(p) for p in decayed.values()}
    assert set(decayed) == set(decayed_parameters(model, target_modules="all-linear"))
    assert set(decayed) <= set(decayed_parameters(model, decay_embeddings=True))


@pytest.mark.parametrize(
    "name, config",
    [
        ("Wav2Vec2ForCTC", transformers.Wav2Vec2Config(num_hidden_layers=1)),
        ("HubertForCTC", transformers.HubertConfig(num_hidden_layers=1)),
        ("BarkSemanticModel", transformers.BarkSemanticConfig(num_layers=1)),
        ("ClvpForCausalLM", transformers.ClvpDecoderConfig(num_hidden_layers=1)),
    ],
)
def test_an_output_head_that_the_model_does_not_own_up_to_is_one(name, config):
    from transformers.models.bark import modeling_bark

    cls = getattr(transformers, name, None) or getattr(modeling_bark, name)
    with torch.device("meta"):
        model = cls(config)
    assert model.get_output_embeddings() is None
    assert "lm_head.weight" not in decayed_parameters(model)
    assert "lm_head.weight" in decayed_parameters(model, decay_embeddings=True)


def causal_models():
    logging.set_verbosity_error()
    for config_class in CONFIG_MAPPING.values():
        if config_class not in AutoModelForCausalLM._model_mapping:
            continue
        for layers in (2, None):
            try:
                config = config_class()
                for name in ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"):
                    if layers and isinstance(getattr(config, name, None), int):
                        setattr(config, name, layers)
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(config)
            except Exception:  # defaults that make no model, or not with two layers
                continue
            yield config_class.model_type, model
            break


def test_no_vector_norm_convolution_or_position_decays_in_any_causal_model():
    models = 0
    for model_type, model in causal_models():
        models += 1
        modules = dict(model.named_modules())
        for name, param in decayed_parameters(model).items():
            owner, _, own = name.rpartition(".")
            path = name.partition(".")[2]  # the name of the model may be that of a norm
            assert param.dim() > 1, (model_type, name)
            assert not re.search(r"norm|bias|A_log|sink$|conv\d?d|router|time_|\.embed_(positions|tokens)", path), name
            assert (
                isinstance(modules[owner], nn.Linear)
                or param.dim() == 3
                or own == "in_proj_weight"
                or (type(modules[owner]).__name__ == "Conv1D")
            ), (model_type, name)
    assert models > 150


class Mixture(nn.Module):
    """Experts under names of their own, as in code that comes with a model."""

    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.up = nn.Parameter(torch.randn(4, 8, 16))
        self.down = nn.Parameter(torch.randn(4, 16, 8))
        self.up_bias = nn.Parameter(torch.randn(4, 16))
        self.offset = nn.Parameter(torch.randn(4, 1, 16))
        self.choice = nn.Linear(8, 4)
        self.dense = nn.Linear(8, 8)


class ExpertList(nn.Module):
    """Experts one by one, as Mixtral had them."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(8, 8), "gate": nn.Linear(8, 8)})] * 3)
        self.shared_expert = nn.Linear(8, 8)
        self.shared_expert_gate = nn.Linear(8, 1)


class Other(nn.Module):
    """What has two or three dimensions and is no matrix; and linear maps that are no `nn.Linear`."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 16, 8))
        self.state = nn.Parameter(torch.randn(4, 8, 8))
        self.low_rank = nn.Parameter(torch.randn(8, 2))
        self.conv = nn.Conv1d(8, 8, 3)
        self.group_norm = nn.GroupNorm(2, 8)
        self.recurrent = nn.GRU(8, 8)
        self.foreign = nn.Module()
        self.foreign.in_features, self.foreign.out_features = 8, 4
        self.foreign.weight = nn.Parameter(torch.randn(4, 8))
        self.foreign.norm = nn.Parameter(torch.randn(8, 8))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Mixture, {"up", "down", "dense.weight"}),
        (ExpertList, {"experts.0.w1.weight", "experts.0.gate.weight", "shared_expert.weight"}),
        (Other, {"foreign.weight"}),
    ],
)
def test_modules_are_told_by_their_role(module, expected):
    assert set(decayed_parameters(module())) == expected


def test_a_quantised_weight_and_a_weight_norm_do_not_decay():
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    assert set(decayed_parameters(model)) == {"2.weight"}


def test_shapes_of_shards_do_not_matter():
    """ZeRO-3 leaves empty placeholders with the whole shape in an attribute."""
    model = on_meta("GptOssForCausalLM", FAMILIES["GptOssForCausalLM"][0])
    expected = set(decayed_parameters(model))
    for param in model.parameters():
        param.ds_shape = param.shape
        param.data = torch.empty(0, device="meta")
    assert set(decayed_parameters(model)) == expected


@pytest.mark.parametrize("way", ["fully_shard", "fsdp1"])
def test_what_decays_and_its_description_are_those_of_the_whole_model_under_fsdp(way):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def build():
        name = "GptOssForCausalLM"  # whose biases of experts have two dimensions
        cls = getattr(transformers, name)
        return cls(cls.config_class(**FAMILIES[name][0]))

    whole = build()
    expected = decayed_parameters(whole)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = build()
        layers = model.model.layers
        for i, layer in enumerate(layers):
            if way == "fsdp1":
                layers[i] = FullyShardedDataParallel(layer, use_orig_params=True, device_id=torch.device("cpu"))
            else:
                fully_shard(layer)
        decayed = decayed_parameters(model)
        assert {name.replace("_fsdp_wrapped_module.", "") for name in decayed} == set(expected)
        assert describe_decay(model, decayed) == describe_decay(whole, expected)
    finally:
        dist.destroy_process_group()


def test_the_decayed_set_is_described_by_kind_of_layer():
    model = tiny_llama()
    text = describe_decay(model, decayed_parameters(model))
    lines = text.splitlines()
    assert lines[0].startswith("The p-norm decay acts on 14 of 28 tensors, 18,432 of 21,920 weights:")
    assert "  q_proj 2 × 32×32" in lines and "  k_proj 2 × 16×32" in lines and len(lines) == 8
    assert "  c_fc 2 × 32×128" in describe_decay(tiny_gpt2(), decayed_parameters(tiny_gpt2())).splitlines()


def test_rows_and_columns_may_start_at_zero_and_whole_matrices_may_not():
    from hf_padam import PAdam

    model = tiny_llama()
    layer = model.model.layers[0].mlp
    layer.up_proj.weight.data[0] = 0
    layer.up_proj.weight.data[:, 1] = 0
    PAdam(get_param_groups(model))
    layer.up_proj.weight.data.zero_()
    with pytest.raises(ValueError, match="up_proj.*is all zeros"):
        PAdam(get_param_groups(model))
