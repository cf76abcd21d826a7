"""Perplexity is reported where it is known, whatever the model predicts, and costs next to nothing."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from conftest import blocks, tiny_gpt2, tiny_llama
from processes import job
from test_trainer import options
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    CLIPConfig,
    CLIPModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_padam import PAdamTrainer, PAdamTrainingArguments, sequence_nll
from hf_padam.training import metrics
from hf_padam.training.perplexity import PerplexityMeter

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)


def rows(labels=97):
    """Of unequal numbers of predicted tokens, so that a mean of means is not the mean."""
    result = []
    for i, row in enumerate(blocks(9, 16)):
        target = [token % labels for token in row["labels"]]
        result.append({"input_ids": row["input_ids"], "labels": [-100] * (i % 5 * 3) + target[i % 5 * 3 :]})
    return result


def evaluate(model, tmp_path, data, trainer_class=PAdamTrainer, **more):
    args = PAdamTrainingArguments(**options(tmp_path, optim_args=None, per_device_eval_batch_size=2) | more)
    return trainer_class(model=model, args=args, eval_dataset=data)


def own_perplexity(model, data, **inputs):
    """exp of the token-weighted mean of the model's own losses, one sequence at a time."""
    nll, tokens = 0.0, 0
    model.eval()
    for row in data:
        batch = {key: torch.tensor([value]) for key, value in row.items()}
        with torch.no_grad():
            loss = model(**batch, **inputs).loss
        # What the loss is the mean of: losses of other lengths of the same labels tell.
        predicted = (batch["labels"][:, 1:] if shifts(model) else batch["labels"]).ne(-100).sum().item()
        nll, tokens = nll + loss.double().item() * predicted, tokens + predicted
    return math.exp(nll / tokens)


def shifts(model):
    return type(model).__name__.endswith("CausalLM") or type(model).__name__ == "GPT2LMHeadModel"


def renamed(model):
    """A class that no list of Transformers has, as in research code."""
    model.__class__ = type("Mine" + type(model).__name__, (type(model),), {})
    return model


MODELS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)),
    "roberta decoder": lambda: RobertaForCausalLM(RobertaConfig(vocab_size=97, is_decoder=True, **SMALL)),
    "masked": lambda: BertForMaskedLM(BertConfig(vocab_size=97, **SMALL)),
    "masked, of an unknown class": lambda: renamed(BertForMaskedLM(BertConfig(vocab_size=97, **SMALL))),
    "causal, of an unknown class": lambda: renamed(tiny_llama()),
    "tagger": lambda: BertForTokenClassification(BertConfig(vocab_size=97, num_labels=5, **SMALL)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, decoder_start_token_id=0)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "smoothing"), [(name, 0.0) for name in MODELS] + [(name, 0.1) for name in ("llama", "masked", "tagger")]
)
def test_perplexity_is_exp_of_the_models_own_mean_loss(tmp_path, name, smoothing):
    torch.manual_seed(0)
    model, data = MODELS[name](), rows(5 if name == "tagger" else 97)
    expected = own_perplexity(model, data)
    metrics = evaluate(model, tmp_path, data, label_smoothing_factor=smoothing).evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(expected, rel=2e-6)


def test_a_routers_loss_is_no_part_of_perplexity(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=97, num_key_value_heads=2, output_router_logits=True, **SMALL)
    model, data = MixtralForCausalLM(config), rows()
    expected = own_perplexity(model, data, output_router_logits=False)
    metrics = evaluate(model, tmp_path, data).evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning", "prefix tuning", "lora"])
def test_adapters_have_a_perplexity(tmp_path, kind):
    from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    config = {
        "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
        "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    }[kind]
    model, data = get_peft_model(tiny_llama(), config).eval(), rows()
    nll, tokens = 0.0, 0
    for row in data:
        labels = torch.tensor(row["labels"])
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        virtual = len(scores) - len(labels)
        for i, label in enumerate(labels):
            if label != -100 and i + virtual > 0:
                nll, tokens = nll - scores[i + virtual - 1, label].item(), tokens + 1
    metrics = evaluate(model, tmp_path, data, optim="adamw_torch").evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=2e-6)


def test_labels_that_a_collator_has_shifted_are_not_shifted_again(tmp_path):
    model, data = tiny_llama(), rows()
    expected = own_perplexity(model, data)

    def collate(batch):
        ids, labels = (torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels"))
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return {"input_ids": ids, "labels": labels, "shift_labels": labels}

    args = PAdamTrainingArguments(**options(tmp_path, optim_args=None, per_device_eval_batch_size=2))
    trainer = PAdamTrainer(model=model, args=args, eval_dataset=data, data_collator=collate)
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(expected, rel=2e-6)


class Weighted(type(tiny_llama())):
    """A loss of its own: the first half of the vocabulary counts twice."""

    def loss_function(self, logits, labels, vocab_size, **kwargs):
        weights = torch.ones(vocab_size)
        weights[: vocab_size // 2] = 2
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weights)


class Penalized(type(tiny_llama())):
    """A loss with a term that the outputs do not name."""

    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids, labels=labels, **kwargs)
        output.loss = None if output.loss is None else output.loss + 0.01 * output.logits.logsumexp(-1).mean()
        return output


@pytest.mark.parametrize("kind", [Weighted, Penalized])
def test_no_perplexity_where_the_models_loss_is_another_and_it_is_said_once(tmp_path, caplog, kind):
    trainer = evaluate(kind(tiny_llama().config), tmp_path, rows())
    for _ in range(2):
        metrics = trainer.evaluate()
        assert "eval_loss" in metrics and "eval_perplexity" not in metrics
    assert caplog.text.count("No eval_perplexity is reported: the model's own loss of the first batch") == 1


class MeanOfRows(type(tiny_llama())):
    """The mean over rows of each row's mean, which is that over tokens where all have as many."""

    def loss_function(self, logits, labels, vocab_size, **kwargs):
        nll, counts = sequence_nll(logits, labels)
        return (nll / counts).float().mean()


def test_even_batches_do_not_say_what_the_loss_of_ragged_ones_is(tmp_path):
    model = MeanOfRows(tiny_llama().config)
    model.loss_type = "ForCausalLM"  # which a class that is named like that has
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in blocks(2, 16)] + rows()
    assert evaluate(model, tmp_path, data).evaluate()["eval_perplexity"] == pytest.approx(
        own_perplexity_of(model, data)
    )


def own_perplexity_of(model, data):
    """exp of the mean NLL of all tokens, from the logits."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    for row in data:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        sums += torch.cat(sequence_nll(logits, torch.tensor([row["labels"]])))
    return math.exp(sums[0] / sums[1])


def answers():
    model = BertForQuestionAnswering(BertConfig(vocab_size=97, **SMALL))
    return model, [{"input_ids": row["input_ids"], "start_positions": 1, "end_positions": 3} for row in blocks(4, 16)]


def pictures_and_texts():
    shape = SMALL | dict(max_position_embeddings=16, eos_token_id=1)
    model = CLIPModel(CLIPConfig(text_config=shape, vision_config=SMALL | dict(image_size=8, patch_size=4)))
    return model, [{"input_ids": row["input_ids"], "pixel_values": [[[0.5] * 8] * 8] * 3} for row in blocks(4, 16)]


@pytest.mark.parametrize("kind", [answers, pictures_and_texts])
def test_no_perplexity_where_nothing_is_called_labels(tmp_path, caplog, kind):
    model, data = kind()
    metrics = evaluate(model, tmp_path, data).evaluate()
    assert "eval_perplexity" not in metrics and "eval_sparsity" in metrics
    assert caplog.text.count("No eval_perplexity is reported: the evaluation data have no column of labels") == 1


def test_a_loss_of_the_trainers_does_not_hide_the_models_own(tmp_path):
    class Half(PAdamTrainer):
        def compute_loss(self, *args, **kwargs):
            loss, outputs = super().compute_loss(*args, **kwargs | {"return_outputs": True})
            return loss / 2, outputs

    model, data = tiny_llama(), rows()
    expected = own_perplexity(model, data)
    metrics = evaluate(model, tmp_path, data, trainer_class=Half).evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_no_perplexity_where_sequences_are_cut_in_pieces_and_it_is_said_once(tmp_path, monkeypatch, caplog, size):
    trainer = evaluate(tiny_llama(), tmp_path, rows())

    class Parallelism:
        """Of two processes; what Transformers would do about it here is not what is tested."""

        def __getattr__(self, name):
            return {size: 2}.get(name, 1 if name.endswith("_size") else None)

    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", Parallelism())
    for prefix in ("eval", "eval", "test"):
        metrics = trainer.evaluate(metric_key_prefix=prefix)
        assert f"{prefix}_loss" in metrics and f"{prefix}_perplexity" not in metrics
    assert caplog.text.count("context and sequence parallelism") == 1

    meter = PerplexityMeter(trainer.accelerator)  # of a loop of one's own
    meter.add(torch.tensor(1.0), torch.zeros(1, 4, 9), torch.ones(1, 4, dtype=torch.long), own_loss=lambda: None)
    assert meter.result() is None and "cut the sequences in pieces" in meter.reason


def test_a_fused_loss_is_not_made_to_give_logits(tmp_path, caplog):
    class Fused(type(tiny_llama())):
        skipped = []

        def forward(self, input_ids, labels=None, skip_logits=False, **kwargs):
            output = super().forward(input_ids, labels=labels, **kwargs)
            self.skipped.append(skip_logits)
            output.logits = None if skip_logits else output.logits
            return output

    model = Fused(tiny_llama().config)
    trainer = evaluate(model, tmp_path, rows())
    trainer.args.use_liger_kernel = True
    assert "eval_perplexity" not in trainer.evaluate()
    assert model.skipped and all(model.skipped) and "Liger" in caplog.text
    trainer.args.liger_kernel_config = {"fused_linear_cross_entropy": False}  # as that says
    assert "eval_perplexity" in trainer.evaluate()


def test_first_batches_without_a_predicted_token_are_passed_over(tmp_path):
    model = tiny_llama()
    masked = [{"input_ids": row["input_ids"], "labels": [-100] * 16} for row in blocks(4, 16)]
    expected = own_perplexity(model, rows())
    assert evaluate(model, tmp_path, masked + rows()).evaluate()["eval_perplexity"] == pytest.approx(expected)


def test_weights_that_are_not_numbers_have_no_finite_perplexity(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    assert math.isnan(evaluate(model, tmp_path, rows()).evaluate()["eval_perplexity"])


@pytest.mark.parametrize("kind", ["as reported", "by its own loss", "of another kind", "without scores"])
def test_the_default_device_need_not_be_the_models(kind):
    """The meta device stands for another GPU: whatever is created there by mistake has no values."""
    logits, labels = torch.linspace(-1, 1, 60).view(2, 5, 6), torch.arange(10).view(2, 5) % 6
    nll, counts = sequence_nll(logits, labels)
    mean = nll.sum() / counts.sum()
    meter = PerplexityMeter(Accelerator(cpu=True))
    torch.set_default_device("meta")
    try:
        loss = mean if kind == "as reported" else None
        scores = None if kind == "without scores" else logits
        meter.add(loss, scores, labels, own_loss=lambda: mean if kind == "by its own loss" else None)
        result = meter.result()
    finally:
        torch.set_default_device(None)
    known = kind in ("as reported", "by its own loss")
    assert result == (pytest.approx(mean.exp().item()) if known else None) and bool(meter.reason) is not known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_perplexity_of_weights_in_16_bits(tmp_path, dtype):
    model, data = tiny_llama().to(dtype), rows()
    model.eval()
    nll, tokens = 0.0, 0
    for row in data:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        sums, counts = sequence_nll(logits, torch.tensor([row["labels"]]))
        nll, tokens = nll + sums.item(), tokens + counts.item()
    metrics = evaluate(model, tmp_path, data, per_device_eval_batch_size=1).evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_logits_are_read_once_an_evaluation_where_the_loss_says_the_rest(tmp_path, monkeypatch):
    from hf_padam.training import perplexity

    read = []
    monkeypatch.setattr(perplexity, "token_nll", lambda *args: read.append(1) or metrics.token_nll(*args))
    trainer = evaluate(tiny_llama(), tmp_path, rows())
    for _ in range(2):
        trainer.evaluate()
    assert len(read) == 2  # of ten batches


def test_no_copy_of_all_logits_is_made():
    """Some of the vocabulary's rows at a time, with the same result."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 40, 50_000, dtype=torch.bfloat16), torch.randint(0, 50_000, (2, 40))
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, torch.Tensor) and result.dtype == torch.float32 else 0)
            return result

    with Sizes():
        nll, tokens = sequence_nll(logits, labels)
    assert 0 < max(largest) < logits.numel() / 5
    expected = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), reduction="none"
    )
    assert torch.allclose(nll, expected.view(2, 39).sum(1), rtol=1e-6) and tokens.tolist() == [39, 39]


def test_repeated_rows_at_the_end_of_the_data_do_not_count(tmp_path):
    """However the data come: with a length or as a stream, dispatched or not, in workers, split or ragged."""
    result = job(2, "training/distributed.py", "perplexities", tmp_path)
    assert len(result["found"]) == 9
    for situation, perplexity in result["found"].items():
        assert perplexity == pytest.approx(result["expected"][situation], rel=1e-5), situation
