"""The model that another is distilled from: its logits, how it is found, and which are refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from conftest import blocks, character_tokenizer, tiny_gpt2, tiny_llama
from test_distillation import equal, other_llama, rows_with_gaps, train, weights
from transformers import AutoConfig, LlamaConfig, default_data_collator

from hf_padam import compress
from hf_padam.training.distillation import Distillation
from hf_padam.training.teacher import Teacher, check_vocabularies, load_teacher

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
ARCHITECTURES = {
    "llama": SHAPE,
    "gemma2": SHAPE | dict(num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0),  # caps logits
    "granite": SHAPE | dict(logits_scaling=3.0),
    "cohere": SHAPE | dict(logit_scale=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "mixtral": SHAPE | dict(num_key_value_heads=2, num_local_experts=4, output_router_logits=True),
    "gpt2": dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
    "opt": dict(vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                word_embed_proj_dim=32, max_position_embeddings=64),  # its forward pass does not call its base model
    "modernbert": SHAPE | dict(pad_token_id=0, eos_token_id=1, bos_token_id=1, cls_token_id=1, sep_token_id=1),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_teachers_logits_are_those_of_its_forward_pass_and_its_models_loss_stays(kind):
    torch.manual_seed(0)
    auto = transformers.AutoModelForMaskedLM if kind == "modernbert" else transformers.AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(kind, **ARCHITECTURES[kind])).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.3)
    batch = default_data_collator(rows_with_gaps(2, 12))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 9:] = 0
    teacher = Teacher.copied(model, None)
    tokens = torch.tensor([1, 5, 20])
    logits = teacher.logits_of(batch)(tokens)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    torch.testing.assert_close(logits, model(**inputs).logits.flatten(end_dim=1)[tokens], rtol=1e-5, atol=1e-5)
    # Taught by itself, the divergence is 0; what a router adds is not weighted.
    output = model(**batch)
    with Distillation(teacher)(model, batch):
        loss = model(**batch).loss
    added = model.router_aux_loss_coef * output.aux_loss if kind == "mixtral" else 0.0
    torch.testing.assert_close(loss, (output.loss - added) / 2 + added)
    torch.testing.assert_close(model(**batch).loss, output.loss, rtol=0, atol=0)  # outside it is the model's own


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_teacher_is_loaded_from_a_directory_in_the_dtype_asked_for(tmp_path, compressed, dtype):
    other_llama().save_pretrained(tmp_path / "teacher")
    character_tokenizer().save_pretrained(tmp_path / "teacher")
    name = tmp_path / "teacher"
    if compressed:
        name = compress(name, tmp_path / "compressed").directory
    tokenizer = character_tokenizer()
    trainer = train(tiny_llama(), tmp_path / "run", processing_class=tokenizer, distill_from=str(name),
                    distill_dtype=dtype)  # fmt: skip
    teacher = trainer._distillation.teacher
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32 if dtype == "auto" else torch.bfloat16}
    given = train(tiny_llama(), tmp_path / "run", other_llama(), distill_from="given", distill_dtype=dtype)
    assert equal(weights(trainer), weights(given))


def renamed(tokenizer, old, new):
    tokens = tokenizer.get_vocab()
    tokens[new] = tokens.pop(old)
    model = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer)(
            type(tokenizer.backend_tokenizer.model)(tokens, unk_token="<unk>")
        )
    )
    return model


@pytest.mark.parametrize(
    ("rows", "tokenizers", "error"),
    [
        ((98, 98), (False, False), None),
        ((98, 104), (False, False), None),
        ((128, 98), (False, False), None),
        ((98, 200), (False, False), "a vocabulary of 200 tokens"),
        ((98, 60), (False, False), "a vocabulary of 60 tokens"),
        ((98, 60), (True, False), "a vocabulary of 60 tokens"),
        ((98, 600), (True, True), None),  # padded, as the tokenizers prove
        ((98, 98), (True, "other"), "'q'.*unknown there"),
    ],
)
def test_another_vocabulary_is_refused_and_padding_is_not(rows, tokenizers, error):
    tokenizer = character_tokenizer() if tokenizers[0] else None
    others = {True: character_tokenizer(), False: None, "other": renamed(character_tokenizer(), "q", "qq")}
    teacher = tiny_llama(vocab_size=rows[1]), others[tokenizers[1]]
    context = pytest.raises(ValueError, match=error) if error else contextlib.nullcontext()
    with context:
        check_vocabularies("teacher", (tiny_llama(vocab_size=rows[0]), tokenizer), teacher)


def test_a_model_that_reads_its_input_after_the_body_can_teach():
    class Reads(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            output = super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)
            assert (input_ids if input_ids is not None else inputs_embeds).shape[1] == output.logits.shape[1]
            return output

    plain = other_llama()
    model = Reads(plain.config)
    model.load_state_dict(plain.state_dict())
    ids = torch.tensor([row["input_ids"] for row in blocks(2)])
    tokens = torch.tensor([1, 5, 7])
    found = Teacher(model, name="t").logits_of({"input_ids": ids})(tokens)
    torch.testing.assert_close(found, plain(ids).logits.flatten(end_dim=1)[tokens].detach())


def test_a_teacher_without_a_head_is_refused(tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    body = other_llama(tie_word_embeddings=False).model
    body.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match="not be loaded: a LlamaForCausalLM needs weights that it has not .lm_head"):
        train(model, tmp_path / "out", distill_from=str(tmp_path / "body"))


def test_a_teacher_of_a_kind_whose_tokenizer_comes_empty_without_files_is_known_by_its_rows(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "teacher")
    _, tokenizer = load_teacher(str(tmp_path / "teacher"), True, "auto")
    assert tokenizer is None


def test_a_teacher_keeps_no_cache_of_the_batch_and_returns_no_tuples():
    teacher = Teacher(tiny_llama(return_dict=False), name="t")
    assert not teacher.model.config.get_text_config().use_cache
    ids = torch.tensor([row["input_ids"] for row in blocks(2)])
    assert teacher.logits_of({"input_ids": ids})(torch.tensor([0])).shape == (1, tiny_llama().vocab_size)


def test_a_model_within_a_model_keeps_no_cache_either():
    model = tiny_llama()
    inner = LlamaConfig(use_cache=True)
    model.config.get_text_config = lambda *args, **kwargs: inner
    assert not Teacher(model, name="t").model.config.use_cache and not inner.use_cache


def test_a_model_that_is_spread_over_devices_stays_there():
    model = tiny_llama()
    model.hf_device_map = {"model": "cpu", "lm_head": "meta"}
    Teacher(model, name="t", device="meta")
    assert not any(param.is_meta for param in model.parameters())
    model.hf_device_map = {"": "cpu"}
    Teacher(model, name="t", device="meta")
    assert all(param.is_meta for param in model.parameters())


class WithState(torch.nn.Module):
    """A part whose state is no tensor."""

    def get_extra_state(self):
        return {"calls": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("kind", ["quantized", "outside of memory", "extra state"])
def test_teachers_that_are_no_plain_tensors_in_memory_have_fingerprints(kind, caplog):
    model = tiny_llama()
    if kind == "quantized":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    elif kind == "extra state":
        model.own = WithState()
    teacher = Teacher(model, name="large")
    if kind == "outside of memory":  # as accelerate's offloading leaves it
        model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.empty(32, 64, device="meta"))
        Teacher(model, name="large")
        assert "Weights of the teacher large are kept outside of memory" in caplog.text
    first = teacher.fingerprint
    assert first == teacher.fingerprint
    model.model.layers[1].input_layernorm.weight.data[0] += 1
    assert first != teacher.fingerprint
