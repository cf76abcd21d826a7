"""A checkpoint's weights come back into the model that saved them, all of them, or there is an error."""

from __future__ import annotations

import shutil

import pytest
import torch
import transformers
from conftest import blocks, tiny_gpt2, tiny_llama
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from test_trainer import options
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPModel,
    T5ForConditionalGeneration,
)

from hf_padam import PAdamTrainer, PAdamTrainingArguments
from hf_padam.resuming.checkpoints import MARKER, CheckpointError
from hf_padam.resuming.weights import check_adapters, load_weights

TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, head_dim=8,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16,
              patch_size=8, depth=2, embed_dim=32, num_heads=4)  # fmt: skip
LATENT = dict(kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_group=2,
              topk_group=1, first_k_dense_replace=1, n_shared_experts=1)  # fmt: skip

T5 = dict(vocab_size=64, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)


def causal(model_type, **more):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(TEXT | more)))


def vision_language(model_type, text, vision):
    config = AutoConfig.for_model(model_type)
    config = type(config)(
        text_config={"model_type": text, **TEXT}, vision_config={"model_type": vision, **VISION}, image_token_id=3
    )
    return AutoModelForImageTextToText.from_config(config)


MODELS = {
    "llama, tied": lambda: tiny_llama(),
    "llama, untied": lambda: tiny_llama(tie_word_embeddings=False),
    "gpt2": lambda: tiny_gpt2(),
    "t5": lambda: T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "clip": lambda: CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION)),
    **{name: lambda name=name: causal(name, **EXPERTS) for name in (
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "minimax", "granitemoe", "jamba")},
    **{name: lambda name=name: causal(name, **EXPERTS, **LATENT) for name in ("deepseek_v3", "glm4_moe")},
    "llava": lambda: vision_language("llava", "llama", "clip_vision_model"),
    "paligemma": lambda: vision_language("paligemma", "gemma", "siglip_vision_model"),
}  # fmt: skip


def build(name, seed):
    torch.manual_seed(seed)
    return MODELS[name]()


def differing(left, right):
    return [name for name, tensor in right.state_dict().items() if not torch.equal(left.state_dict()[name], tensor)]


@pytest.mark.parametrize("shard", ["50GB", "20kB"], ids=["whole", "shards"])
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_comes_back_into_the_parameters_that_there_are(name, shard, tmp_path):
    saved = build(name, 0)
    with torch.no_grad():
        for tensor in saved.parameters():
            tensor.uniform_(-1, 1)
    saved.save_pretrained(tmp_path, max_shard_size=shard)
    model = build(name, 1)
    held, trained = dict(model.named_parameters()), {n: p.requires_grad for n, p in model.named_parameters()}
    load_weights(model, tmp_path)
    assert differing(model, saved) == []
    assert all(model.get_parameter(n) is p and p.requires_grad == trained[n] for n, p in held.items())
    again = tmp_path / "again"
    model.save_pretrained(again, max_shard_size=shard)
    assert sorted(f.name for f in again.iterdir()) == sorted(f.name for f in tmp_path.iterdir() if f.is_file())
    for file in again.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def trainer(directory, model, **more):
    decay = {} if isinstance(model, PeftModel) else {"optim": "padam", "p_norm": 0.5, "lambda_p": 0.3}
    args = PAdamTrainingArguments(**options(directory, optim_args=None, optim="adamw_torch") | decay | more)
    return PAdamTrainer(model=model, args=args, train_dataset=blocks(), eval_dataset=blocks(4))


class Plain(nn.Module):
    """A model that Transformers knows nothing of, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = (
            nn.Embedding(128, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 128, bias=False),
        )
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids, labels=None):
        self.seen += 1
        logits = self.head(self.hidden(self.embedding(input_ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def with_lora():
    return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["lm_head"]))


TRAINED = {
    "mixture of experts": lambda: causal("mixtral", **EXPERTS, vocab_size=128),
    "no model of Transformers": Plain,
    "LoRA": with_lora,
    "sharded": tiny_llama,
}


def trained(name):
    torch.manual_seed(0)
    return TRAINED[name]()


@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(name, tmp_path, monkeypatch):
    if name == "sharded":
        save = transformers.PreTrainedModel.save_pretrained
        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained",
                            lambda self, *a, **k: save(self, *a, **k, max_shard_size="20kB"))  # fmt: skip
    settings = dict(max_steps=6, save_strategy="steps", save_steps=3)
    whole = trainer(tmp_path, trained(name), **settings)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = trainer(tmp_path, trained(name), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert differing(resumed.model, whole.model) == []


def test_the_best_model_is_loaded_whole(tmp_path):
    settings = dict(max_steps=6, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    best = trainer(tmp_path, trained("mixture of experts"), load_best_model_at_end=True, greater_is_better=False,
                   metric_for_best_model="sparsity", **settings)  # fmt: skip
    best.train()  # the sparsity rises, so an early checkpoint is the best
    assert best.state.best_global_step < 6
    assert differing(best.model, AutoModelForCausalLM.from_pretrained(best.state.best_model_checkpoint)) == []


def drop(saved):
    saved.popitem()


def add(saved):
    saved["extra.weight"] = torch.zeros(2)


def reshape(saved):
    saved[next(iter(saved))] = torch.zeros(3, 5)


@pytest.mark.parametrize("harm", [drop, add, reshape])
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "sharded"])
def test_tensors_that_are_missing_unexpected_or_misshapen_are_an_error(name, harm, tmp_path):
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    trainer(tmp_path, trained(name), **settings).train()
    (file,) = (tmp_path / "checkpoint-1").glob("*model.safetensors")
    saved = load_file(file)
    harm(saved)
    save_file(saved, file, {"format": "pt"})
    (tmp_path / "checkpoint-1" / MARKER).unlink()  # which would tell that the file has changed
    with pytest.raises(
        CheckpointError, match="is of another model: it (lacks|has).*Give the model that the run began"
    ):
        trainer(tmp_path, trained(name), **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8, prefix_projection=True),
    ],
    ids=["p-tuning", "prefix tuning with a projection"],
)
def test_adapters_whose_own_weights_peft_does_not_save_are_refused(config, tmp_path):
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="prompt_encoder.*PEFT saves what it gives out only"):
        check_adapters(model, tmp_path)
    plain = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    plain.save_pretrained(tmp_path / "plain")
    check_adapters(plain, tmp_path / "plain")
