"""A distilled loss is the formula's, exact however it is batched, and known to training steps alone."""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass

import pytest
import torch
import transformers
from conftest import blocks, tiny_gpt2, tiny_llama
from processes import job
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments, default_data_collator

from hf_padam import PAdamTrainer, PAdamTrainingArguments
from hf_padam.resuming.checkpoints import CheckpointError
from hf_padam.training import distillation
from hf_padam.training.distillation import Distillation
from hf_padam.training.options import PAdamOptions
from hf_padam.training.teacher import Teacher


def other_llama(**overrides):
    """A teacher: of the same shape, with other weights."""
    model = tiny_llama(**overrides)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape) * 0.1)
    return model


def rows_with_gaps(rows: int = 8, length: int = 24) -> list[dict]:
    """Rows of which different numbers of tokens are predicted."""
    data = blocks(rows, length)
    for i, row in enumerate(data):
        row["labels"] = [-100 if j < 2 * i else label for j, label in enumerate(row["labels"])]
    return data


def expected(logits, labels, teacher, weight, temperature):
    """The formula of the docstring, in float64, over the tokens that count."""
    logits, teacher = logits.double()[:, :-1].flatten(end_dim=1), teacher.double()[:, :-1].flatten(end_dim=1)
    labels = labels[:, 1:].flatten()
    count = labels != -100
    logits, teacher, labels = logits[count], teacher[count], labels[count]
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels)
    p = (teacher[:, : logits.shape[1]] / temperature).softmax(dim=1)
    q = (logits / temperature).softmax(dim=1)
    divergence = (p * (p / q[:, : p.shape[1]]).log()).sum(dim=1).mean()  # p is 0 for what the teacher does not know
    return (1 - weight) * cross_entropy + weight * temperature**2 * divergence


@pytest.mark.parametrize("chunk", [1, 300, 2**22], ids=["a token", "three tokens", "all"])
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.3, 2.5), (1.0, 1.0), (1.0, 0.7)])
@pytest.mark.parametrize("rows", [(97, 97), (97, 104), (104, 97)])
def test_loss_and_gradient_are_the_formulas(monkeypatch, chunk, weight, temperature, rows):
    monkeypatch.setattr(distillation, "_CHUNK", chunk)
    monkeypatch.setattr(distillation, "_CHUNKS", 10**6)
    student, teacher = (make(vocab_size=size) for make, size in zip((tiny_llama, other_llama), rows, strict=True))
    batch = default_data_collator(rows_with_gaps(4))
    frozen = Teacher.copied(teacher, None)
    with Distillation(frozen, weight, temperature)(student, batch):
        loss = student(**batch).loss
    loss.backward()
    gradients = [param.grad for param in student.parameters()]
    student.zero_grad()
    logits = student(input_ids=batch["input_ids"]).logits
    reference = expected(logits, batch["labels"], teacher(batch["input_ids"]).logits.detach(), weight, temperature)
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    for gradient, param in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(gradient, param.grad, rtol=1e-4, atol=1e-7)


def test_logits_of_minus_infinity_are_probabilities_of_zero():
    logits, teacher = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    teacher[:, 5:] = -torch.inf
    masked = logits.detach().clone()
    masked[:, 6] = -torch.inf
    for student in (logits.detach(), masked):
        loss, gradient = distillation._distilled(student, torch.tensor([0, 1, 2]), teacher, 0.5, 1.0)
        assert loss.isfinite() and gradient.isfinite().all()


def test_fp16_logits_have_a_gradient_though_most_of_its_elements_are_below_fp16s_smallest_numbers():
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(6, 4000, generator=generator) for _ in range(2))
    labels, every = torch.randint(4000, (6,), generator=generator), torch.arange(6)
    gradients = []
    for dtype in (torch.float32, torch.float16):
        student = logits.detach().to(dtype, copy=True).requires_grad_()
        loss = distillation._DistilledSum.apply(student, labels, every, lambda tokens: other[tokens], 0.5, 2.0)
        (loss * 2.0**15).backward()  # as a GradScaler does
        gradients.append(student.grad.float() / 2.0**15)
    precise, got = gradients
    assert ((got - precise).abs() <= 0.01 * precise.abs() + 1e-9).float().mean() > 0.99


def train(model, directory, teacher=None, data=None, resume=None, processing_class=None, cls=PAdamTrainer, **options):
    options = dict(
        max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True, seed=0,
        disable_tqdm=True, save_strategy="no", logging_steps=1, optim_args="lambda_p=0.1",
    ) | options  # fmt: skip
    given = {"teacher": teacher} if teacher is not None else {}
    init = {"model_init": model} if not isinstance(model, torch.nn.Module) else {"model": model}
    trainer = cls(
        **init,
        args=PAdamTrainingArguments(output_dir=str(directory), **options),
        train_dataset=blocks(32) if data is None else data,
        eval_dataset=blocks(8),
        data_collator=default_data_collator,
        processing_class=processing_class,
        **given,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return [param.detach().clone() for param in trainer.model.parameters()]


def equal(first, second):
    return all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_gradient_accumulation_is_exact(tmp_path):
    data = rows_with_gaps(16)
    trained = [
        weights(
            train(
                tiny_llama(attention_bias=False),
                tmp_path,
                other_llama(attention_bias=False),
                data,
                distill_from="a model",
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
            )
        )
        for size in (8, 1)
    ]
    for one, eight in zip(*trained, strict=True):
        torch.testing.assert_close(one, eight, rtol=1e-4, atol=1e-5)


def test_off_it_changes_no_bit_and_on_it_changes_training_alone(tmp_path, monkeypatch):
    plain = train(tiny_gpt2(), tmp_path)
    on = train(tiny_gpt2(), tmp_path, distill_from="start")  # with dropout in the student, and none in the teacher
    monkeypatch.setattr(PAdamTrainer, "compute_loss", transformers.Trainer.compute_loss)
    without = train(tiny_gpt2(), tmp_path)
    assert equal(weights(plain), weights(without)) and not equal(weights(plain), weights(on))
    monkeypatch.undo()
    metrics = on.evaluate()
    on._distillation = None
    again = on.evaluate()
    assert {k: v for k, v in metrics.items() if "per_second" not in k and "runtime" not in k} == {
        k: v for k, v in again.items() if "per_second" not in k and "runtime" not in k
    }


def test_the_teacher_stays_as_it_is_and_the_student_comes_closer_to_it(tmp_path):
    teacher = other_llama()
    before = [param.clone() for param in teacher.parameters()]
    distances = []
    for weight in (1.0, None):
        options = dict(distill_from="a model", distill_weight=weight) if weight else {}
        trainer = train(tiny_llama(), tmp_path, teacher if weight else None, max_steps=30, **options)
        batch = default_data_collator(blocks(8))["input_ids"]
        with torch.no_grad():
            p, q = (m.eval()(batch).logits.log_softmax(dim=-1) for m in (teacher, trainer.model))
        distances.append((p.exp() * (p - q)).sum(dim=-1).mean().item())
    assert distances[0] < distances[1] / 2
    assert equal(before, teacher.parameters())
    assert not any(param.requires_grad or param.grad is not None for param in teacher.parameters())


@pytest.mark.parametrize("made", ["model", "model_init"])
def test_a_run_that_goes_on_has_the_teacher_that_it_began_with(tmp_path, made):
    def make():
        return tiny_gpt2() if made == "model" else lambda: tiny_gpt2()

    options = dict(distill_from="start", save_strategy="steps", save_steps=2, max_steps=6)
    whole = train(make(), tmp_path / "run", **options)
    resumed = train(make(), tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"), **options)
    assert equal(weights(whole), weights(resumed))
    assert [row["loss"] for row in whole.state.log_history if "loss" in row] == [
        row["loss"] for row in resumed.state.log_history if "loss" in row
    ]
    # In the same Trainer too, whose model has been trained since.
    whole.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert equal(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    "searched",
    [{"distill_from": "other"}, {"distill_from": "start"}, {"distill_from": None}, {"distill_dtype": "bfloat16"},
     {"distill_weight": 1.0}, {"distill_temperature": 3.0}],
    ids=str,
)  # fmt: skip
def test_what_changes_between_trainings_as_in_a_search_acts_as_if_it_had_been_given(tmp_path, searched):
    for name, teacher in {"teacher": other_llama(), "other": tiny_llama()}.items():
        teacher.save_pretrained(tmp_path / name)
    options = {"distill_from": str(tmp_path / "teacher"), "max_steps": 2}
    changes = {key: str(tmp_path / value) if value == "other" else value for key, value in searched.items()}
    trainer = train(lambda: tiny_llama(), tmp_path / "run", **options)
    before = weights(trainer)
    for name, value in changes.items():
        setattr(trainer.args, name, value)
    trainer.train()
    given = train(lambda: tiny_llama(), tmp_path / "run", **options | changes)
    assert equal(weights(trainer), weights(given)) and not equal(weights(trainer), before)


def test_a_checkpoint_of_another_teacher_is_refused(tmp_path):
    options = dict(save_strategy="steps", save_steps=2)
    trained = train(tiny_llama(), tmp_path, distill_from="start", **options).model
    with pytest.raises(CheckpointError, match="the model that the run began with"):
        train(trained, tmp_path, resume=str(tmp_path / "checkpoint-2"), distill_from="start", **options)
    train(tiny_llama(), tmp_path, other_llama(), distill_from="teacher", **options)
    with pytest.raises(CheckpointError, match="'teacher'"):
        train(tiny_llama(), tmp_path, tiny_llama(), resume=str(tmp_path / "checkpoint-2"), distill_from="teacher",
              **options)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (dict(distill_weight=0.3), "no effect without distill_from"),
        (dict(distill_temperature=2.0), "no effect without distill_from"),
        (dict(distill_dtype="bfloat16"), "no effect without distill_from"),
        (dict(distill_from=""), "names no teacher"),
        (dict(distill_from="start", distill_weight=0.0), "above 0"),
        (dict(distill_from="start", distill_weight=1.5), "at most 1"),
        (dict(distill_from="start", distill_temperature=0.0), "above 0"),
        (dict(distill_from="start", distill_temperature=float("nan")), "finite"),
        (dict(distill_from="start", distill_dtype="int8"), "must be one of auto"),
        (dict(distill_from="start", label_smoothing_factor=0.1), "label_smoothing_factor"),
        (dict(distill_from="start", use_liger_kernel=True), "use_liger_kernel"),
    ],
)
def test_what_cannot_be_is_refused_with_the_arguments(tmp_path, options, error):
    with pytest.raises(ValueError, match=error):
        PAdamTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)


def test_what_cannot_be_distilled_is_refused_before_a_step(tmp_path):
    args = PAdamTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, distill_from="start")
    with pytest.raises(ValueError, match="compute_loss_func"):
        PAdamTrainer(tiny_llama(), args, compute_loss_func=lambda *args, **kwargs: None)
    config = dict(vocab_size=97, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
    with pytest.raises(ValueError, match="this model is a T5ForConditionalGeneration"):
        PAdamTrainer(transformers.T5ForConditionalGeneration(transformers.T5Config(**config)), args)
    classifier = transformers.LlamaForSequenceClassification(tiny_llama().config)
    with pytest.raises(ValueError, match="this model is a LlamaForSequenceClassification"):
        PAdamTrainer(classifier, args)
    with pytest.raises(ValueError, match="distill_from='nowhere' could not be loaded"):
        train(tiny_llama(), tmp_path, distill_from="nowhere")
    for name in (None, "start"):
        with pytest.raises(ValueError, match="teacher=... has no effect"):
            train(tiny_llama(), tmp_path, tiny_llama(), distill_from=name)
    with pytest.raises(ValueError, match="a vocabulary of 400 tokens"):
        train(tiny_llama(), tmp_path, tiny_llama(vocab_size=400), distill_from="a model")
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**shape))
    before = [param.clone() for param in bert.parameters()]
    with pytest.raises(ValueError, match="BertForMaskedLM does not make its loss by its loss_function"):
        train(bert, tmp_path, distill_from="start")
    assert equal(before, bert.parameters())


def test_adapters_are_distilled_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = train(model, tmp_path, other_llama(), optim="adamw_torch", optim_args=None, distill_from="a model")
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.abs().sum() > 0


@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens", "q_proj"]}, {"trainable_token_indices": [1, 2]}]
)
def test_adapters_of_embeddings_do_not_hide_the_vocabulary(tmp_path, options):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(**{"target_modules": ["q_proj"]} | options, task_type="CAUSAL_LM"))
    train(model, tmp_path, max_steps=1, optim="adamw_torch", optim_args=None, distill_from="start")


@pytest.mark.parametrize("padded", [0, 20])
def test_positions_that_the_teacher_does_not_have_are_refused(tmp_path, padded):
    from peft import PromptTuningConfig, get_peft_model

    rows = blocks(4, 24)
    for row in rows:  # padded ones are within the teacher's logits, at other tokens
        row["labels"] = row["labels"][: 24 - padded] + [-100] * padded
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=r"labels of shape \(4, 24\), the model makes its loss of \(4, 27\)"):
        train(model, tmp_path, data=rows, optim="adamw_torch", optim_args=None, distill_from="start")
    assert equal(before, model.parameters())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_in_mixed_precision_the_loss_is_nearly_the_same(tmp_path, dtype):
    options = dict(distill_from="a model", distill_dtype=dtype, max_steps=2)
    losses = [
        train(tiny_llama(), tmp_path, other_llama(), bf16=bf16, **options).state.log_history[1]["loss"]
        for bf16 in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_a_compiled_model_is_compiled_once():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    student, counter = tiny_llama(), CompileCounter()
    compiled = torch.compile(student, backend=counter)
    distillation = Distillation(Teacher.copied(other_llama(), None))
    losses, graphs = [], []
    for step in range(3):
        batch = default_data_collator(rows_with_gaps(4)[step:] + rows_with_gaps(4)[:step])
        losses.append([])
        for model in (compiled, student):
            with distillation(student, batch):
                losses[-1].append(model(**batch).loss.item())
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1] > 0
    for one, other in losses:
        assert one == pytest.approx(other, rel=1e-5)


class Allocated(TorchDispatchMode):
    """Sums the storages that operators return while they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(storage := tensor.untyped_storage()) not in self._known:
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key, size)
        return result

    def _free(self, key, size):
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_holds_one_chunk_more_and_no_second_copy_of_the_logits(monkeypatch, dtype):
    vocabulary, length = 20_000, 256
    monkeypatch.setattr(distillation, "_CHUNK", vocabulary)
    student = tiny_llama(vocab_size=vocabulary, max_position_embeddings=length).to(dtype)
    teacher = Teacher.copied(student, None)
    ids = torch.randint(vocabulary, (2, length))
    batch = {"input_ids": ids, "labels": ids}
    peaks = []
    for context in (contextlib.nullcontext(), Distillation(teacher)(student, batch)):
        student.zero_grad(set_to_none=True)
        with Allocated() as allocated, context:
            student(**batch).loss.backward()
        peaks.append(allocated.peak)
    chunk = 2 * length // distillation._CHUNKS * vocabulary * 4
    assert peaks[1] < peaks[0] + chunk


def test_two_processes_distil_like_one(tmp_path):
    one = job(1, "training/distributed.py", "distil", tmp_path / "one", 4)
    two = job(2, "training/distributed.py", "distil", tmp_path / "two", 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["teacher"] == one["teacher"]
    assert two["moved"] == pytest.approx(one["moved"], rel=1e-3, abs=1e-5)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_a_sharded_student_learns_from_a_whole_teacher_like_an_unsharded_one():
    assert job(2, "training/distributed.py", "distil_sharded")["difference"] < 1e-5


@dataclass
class Mixed(PAdamOptions, TrainingArguments):
    """As another library's arguments are given the options."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill_weight": 0.3}, "distill_weight=0.3 has no effect without distill_from"),
        ({"distill_from": "start", "label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 does not go with"),
    ],
    ids=str,
)
def test_options_that_another_class_inherits_are_checked_too(tmp_path, options, message):
    args = Mixed(output_dir=str(tmp_path), report_to="none", use_cpu=True, optim="padam", **options)
    with pytest.raises(ValueError, match=message):
        PAdamTrainer(model=tiny_llama(), args=args, train_dataset=blocks())


@pytest.mark.parametrize("cls", [PAdamTrainingArguments, Mixed])
@pytest.mark.parametrize("given", [False, True])
def test_a_trainer_that_does_not_distil_says_so_whatever_its_optimizer(tmp_path, cls, given):
    args = cls(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=1, distill_from="start")
    model = tiny_llama()
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None) if given else (None, None)
    trainer = transformers.Trainer(model=model, args=args, train_dataset=blocks(), optimizers=optimizers)
    with pytest.raises(ValueError, match="distill_from='start' would have no effect: this Trainer does not distil"):
        trainer.train()


def test_logits_of_some_positions_only_are_refused():
    student, batch = tiny_llama(), default_data_collator(rows_with_gaps(4))
    distillation = Distillation(Teacher.copied(other_llama(), None))
    with pytest.raises(ValueError, match="leave logits_to_keep out of the batch"), distillation(student, batch):
        student(**batch, logits_to_keep=3)


def test_a_trainer_that_makes_its_loss_in_its_own_way_says_that_it_does_not_distil(tmp_path):
    class Own(PAdamTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    class Scaled(PAdamTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    model = tiny_llama()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match="compute_loss of Own does not call PAdamTrainer's"):
        train(model, tmp_path, distill_from="start", cls=Own)
    assert equal(before, model.parameters())
    train(model, tmp_path, distill_from="start", cls=Scaled)
