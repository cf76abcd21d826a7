"""Distillation: while a model gets sparse, it also learns to predict what a teacher predicts.

    loss = (1 - w) * CE + w * T^2 * KL(teacher || student at temperature T), the mean over the predicted tokens

The KL divergence is over the full vocabulary. It is made in chunks of tokens, and so is the cross-entropy, whose place
in the model's forward pass it takes: what the model adds to its loss (a router's, for example) stays as it is. A step
holds the student's logits, one gradient of their size, and one chunk of the teacher's; without distillation it holds
the logits and more than one array of their size. TRL's `ChunkedDivergenceFunction` and Liger's fused losses do not
serve: they begin at the hidden states, which a model's forward pass does not hand out, and leave out what models do to
their logits or what -100 labels and padded vocabularies ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.trainer_utils import unwrap_peft_model

from .teacher import DTYPES, START, Teacher

DEFAULT_WEIGHT, DEFAULT_TEMPERATURE = 0.5, 1.0

_CHUNK, _CHUNKS = 2**22, 16
"""A chunk is 16 MiB of fp32 logits, or a sixteenth of all if that is more; some seven arrays of its size are made."""


def check_distillation(weight: float, temperature: float, dtype: str = "auto") -> None:
    """Check the numbers of a distillation.

    Raises:
        ValueError: If one is out of range.
    """
    if not 0 < weight <= 1:
        raise ValueError(f"distill_weight={weight!r} is not a share of the loss, above 0 and at most 1")
    if not 0 < temperature < math.inf:
        raise ValueError(f"distill_temperature={temperature!r} must be a finite number above 0")
    if dtype not in DTYPES:
        raise ValueError(f"distill_dtype={dtype!r} is not one of {', '.join(DTYPES)}")


def check_distillation_options(args: Any) -> None:
    """Check what training arguments say about distillation.

    Args:
        args: With the fields of `PAdamTrainingArguments`, some of which may be missing.

    Raises:
        ValueError: If a value is out of range, would have no effect, or does not go with another.
    """
    check_distillation(args.distill_weight, args.distill_temperature, args.distill_dtype)
    if args.distill_from is None:
        plain = {"distill_weight": DEFAULT_WEIGHT, "distill_temperature": DEFAULT_TEMPERATURE, "distill_dtype": "auto"}
        for name, default in plain.items():
            if getattr(args, name) != default:
                raise ValueError(
                    f"{name}={getattr(args, name)!r} has no effect without distill_from, the teacher: give that too, "
                    f"or drop {name}"
                )
        return
    if not args.distill_from:
        raise ValueError(f"distill_from={args.distill_from!r} names no teacher: give a model, or {START!r}")
    for name, why in (
        ("label_smoothing_factor", "it replaces the cross-entropy that is mixed with the teacher's"),
        ("use_liger_kernel", "its loss never makes the logits that are compared with the teacher's"),
    ):
        if getattr(args, name, None):
            raise ValueError(
                f"{name}={getattr(args, name)!r} does not go with distill_from={args.distill_from!r}: {why}. Drop one "
                "of them"
            )


class Distillation:
    """What makes a training step one of distillation.

        distillation = Distillation(Teacher.copied(model, tokenizer))
        ...
        with distillation(model, batch):
            loss = model(**batch).loss

    Args:
        teacher: Knows the student's tokens; see `check_vocabularies`.
        weight: Share of the teacher's part in the loss, above 0, at most 1.
        temperature: Both distributions are those of the logits divided by it.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self, teacher: Teacher, weight: float = DEFAULT_WEIGHT, temperature: float = DEFAULT_TEMPERATURE
    ) -> None:
        check_distillation(weight, temperature)
        self.teacher, self._weight, self._temperature = teacher, weight, temperature
        self._shift = True
        self._teacher_logits: Callable[[Tensor], Tensor] | None = None  # of the batch, until the loss is made
        self._shape: torch.Size | None = None  # of its labels
        self.used = False  # so far

    @contextmanager
    def __call__(self, student: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Make the loss of one forward pass of `student` the distilled one.

        Args:
            student: The model itself, without what accelerate wraps around it.
            inputs: The batch that it is called with.

        Raises:
            ValueError: If the model makes its loss in another way than by its `loss_function`, called once; or at
                other positions than those of the batch.
        """
        model: Any = unwrap_peft_model(student)
        self._shift, self.used = shifts_labels(model), True
        self._teacher_logits = self.teacher.logits_of(inputs)
        given = inputs.get("labels")
        self._shape = None if given is None else given.shape
        try:
            with mock.patch.object(model, "_loss_function", self._loss, create=True):
                yield
            if self._teacher_logits is not None:
                raise ValueError(
                    f"distillation: {type(model).__name__} does not make its loss by its loss_function, whose place "
                    "the distilled loss takes, or the batch has no labels. Leave distill_from out"
                )
        finally:
            self._teacher_logits = None

    @torch.compiler.disable
    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Stand in for the loss functions of Transformers."""
        teacher_logits, self._teacher_logits = self._teacher_logits, None
        if teacher_logits is None:
            raise ValueError("distillation: the model's forward pass makes more than one loss, which is not supported")
        if shift_labels is not None:
            labels = shift_labels
        if self._shape is not None and self._shape.numel() != labels.numel():
            raise ValueError(
                f"distillation: the batch has labels of shape {tuple(self._shape)}, the model makes its loss of "
                f"{tuple(labels.shape)}: positions that a teacher does not have, such as the virtual tokens of prompt "
                "tuning. Leave distill_from out, or train another kind of adapter"
            )
        if shift_labels is None and self._shift:
            labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"distillation: the model's logits are of shape {tuple(logits.shape)}, its labels of "
                f"{tuple(labels.shape)}: leave logits_to_keep out of the batch, all positions are compared"
            )
        labels = labels.flatten().to(logits.device)
        logits = logits.flatten(end_dim=-2)
        predicted = labels.ne(ignore_index).nonzero().squeeze(1)
        total = _DistilledSum.apply(logits, labels, predicted, teacher_logits, self._weight, self._temperature)
        if num_items_in_batch is None:
            return total / len(predicted)
        return total / (
            num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        )


def shifts_labels(model: nn.Module) -> bool:
    """Whether position i of a model predicts label i + 1, as in causal models, rather than label i.

    Raises:
        ValueError: If the model's loss is not a cross-entropy over tokens.
    """
    plain: Any = unwrap_peft_model(model)
    loss = getattr(plain, "loss_function", None)
    if loss not in (ForCausalLMLoss, ForMaskedLMLoss) or plain.config.is_encoder_decoder:
        raise ValueError(
            "distillation is for causal and masked language models with Transformers' own loss; this model is a "
            f"{type(plain).__name__}. Leave distill_from out"
        )
    return loss is ForCausalLMLoss


class _DistilledSum(torch.autograd.Function):
    """The distilled loss summed over tokens, with a gradient that is made beside it, one chunk of tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        predicted: Tensor,
        teacher_logits: Callable[[Tensor], Tensor],
        weight: float,
        temperature: float,
    ) -> Tensor:
        """Return the sum.

        Args:
            ctx: Keeps the gradient.
            logits: (tokens, vocabulary), the student's.
            labels: (tokens,).
            predicted: (n,), the indices of the tokens that count.
            teacher_logits: Returns (n, vocabulary) for such indices.
            weight: Of the divergence.
            temperature: Of the divergence.
        """
        ctx.gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        # No element is above weight * temperature + 1: in fp16, whose smallest numbers most would be below, as large
        # as fits.
        power = 14 - math.ceil(math.log2(weight * temperature + 1))
        ctx.scale = 2.0**power if logits.dtype == torch.float16 else 1.0
        total = torch.zeros((), device=logits.device)
        for tokens in predicted.split(max(1, _CHUNK // logits.shape[1], len(predicted) // _CHUNKS)):
            teacher = teacher_logits(tokens).to(logits.device)
            loss, gradient = _distilled(logits[tokens], labels[tokens], teacher, weight, temperature)
            total += loss
            if ctx.gradient is not None:
                ctx.gradient[tokens] = (gradient.mul_(ctx.scale) if ctx.scale != 1 else gradient).to(logits.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("the gradient of a distilled loss can be taken only once: retain_graph has no effect")
        return (gradient.mul_(grad_output / ctx.scale), *(None,) * 5)


def _distilled(
    logits: Tensor, labels: Tensor, teacher: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the loss of a chunk of tokens, summed, and its gradient; in fp32.

    Rows that pad the teacher's vocabulary are left out of its distribution; those that pad the student's have the
    probability 0 in it.
    """
    vocabulary = min(logits.shape[1], teacher.shape[1])
    target = (teacher[:, :vocabulary].float() / temperature).log_softmax(dim=1)
    student = logits.float().div_(temperature) if logits.dtype != torch.float32 else logits / temperature
    student = student.log_softmax(dim=1)
    probabilities = target.exp()
    # Where the teacher's probability is 0, its logarithm times 0 is no number.
    target.sub_(student[:, :vocabulary]).masked_fill_(probabilities == 0, 0.0).mul_(probabilities)
    loss = target.sum() * (weight * temperature**2)
    gradient = student.exp()
    gradient[:, :vocabulary] -= probabilities
    gradient *= weight * temperature
    if weight < 1:
        if temperature != 1:
            student = logits.float().log_softmax(dim=1)
        loss -= (1 - weight) * student.gather(1, labels[:, None]).sum()
        student.exp_()
        student.scatter_add_(1, labels[:, None], torch.full_like(student[:, :1], -1.0))
        gradient.add_(student, alpha=1 - weight)
    return loss, gradient
