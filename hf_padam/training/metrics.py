"""Perplexity and weight sparsity as `evaluate` modules; they need no Hub."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor, nn

from ..sparsity import TensorCount, count_model_zeros, summarize
from .param_groups import decayed_parameters, remembered_choice

IGNORED = -100
"""The label of what is not predicted."""

_CHUNK = {"cpu": 2**18, "cuda": 2**24}
"""Logits that are taken in fp32 at a time: what stays in a CPU's cache; enough for a GPU to be busy."""


def sequence_nll(logits: Tensor, labels: Tensor, *, shift: bool = True) -> tuple[Tensor, Tensor]:
    """Return each sequence's negative log-likelihood and its number of predicted tokens: the inputs of `Perplexity`.

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length), in the vocabulary, which is not checked; -100 marks tokens that are not predicted.
        shift: Whether position i predicts label i + 1, as in causal models, rather than label i.

    Returns:
        NLL in nats, in fp64 where the device has it, and counts, int64; both of shape (batch,).
    """
    targets = following(labels) if shift else labels
    losses = token_nll(logits, targets)
    return losses.sum(dim=1, dtype=widest_float(losses.device)), targets.ne(IGNORED).sum(dim=1)


def following(labels: Tensor) -> Tensor:
    """Return what each position of a causal model predicts: the label after it, and nothing at the end."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of what every position predicts, 0 where that is -100.

    Some rows of the vocabulary at a time: those of all in fp32 would be the largest tensor of an evaluation, and a
    cross entropy over any dimension but the last is slow and, on CPUs, sums naively.

    Args:
        logits: (batch, length, vocabulary).
        targets: (batch, length), what position i itself predicts; or (batch, length, n), n such alternatives.

    Returns:
        Nats in fp32, of the shape of `targets`.
    """
    scores, wanted = logits.flatten(end_dim=1), targets.to(logits.device).reshape(logits.shape[:2].numel(), -1)
    counts, wanted = wanted.ne(IGNORED), wanted.clamp(0, logits.shape[-1] - 1)
    rows = max(1, _CHUNK.get(logits.device.type, _CHUNK["cuda"]) // logits.shape[-1])
    losses = []
    for chunk, index in zip(scores.split(rows), wanted.split(rows), strict=True):
        chunk = chunk.float()
        losses.append(chunk.logsumexp(dim=-1, keepdim=True) - chunk.gather(-1, index))
    return torch.cat(losses).where(counts, 0.0).view(targets.shape)


def widest_float(device: torch.device) -> torch.dtype:
    """Return fp64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class _InMemory:
    """Of modules that keep nothing on the disk: evaluate would make directories that another user cannot enter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"keep_in_memory": True, "cache_dir": tempfile.gettempdir()} | kwargs)

    def _build_data_dir(self) -> str:
        return tempfile.gettempdir()


class Perplexity(_InMemory, evaluate.Metric):
    """exp(NLL / tokens), over all predicted tokens of all sequences, however they were batched.

    ``predictions`` are the sequences' summed NLLs in nats, ``references`` their numbers of predicted tokens; both come
    from `sequence_nll`. ``compute`` returns ``perplexity`` (inf above a loss of 700), ``loss`` (mean NLL per token, in
    nats) and ``tokens``.

    Raises:
        ValueError: From ``compute``, if no token was predicted.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Token-exact perplexity from summed negative log-likelihoods.",
            citation="",
            inputs_description=self.__doc__ or "",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float | int]:
        tokens = sum(references)
        if tokens == 0:
            raise ValueError(
                "perplexity is undefined: no token was predicted (every label is -100, or no sequence has two tokens)"
            )
        loss = math.fsum(predictions) / tokens
        return {"perplexity": math.inf if loss > 700 else math.exp(loss), "loss": loss, "tokens": tokens}


class WeightSparsity(_InMemory, evaluate.Measurement):
    """Share of weights that are exactly zero, over the decayed weights and over all of them.

    ``compute(model=model, decayed=names)`` counts a model's; ``compute(data=rows)`` reduces rows of counts, each with
    ``elements``, ``zeros`` and ``decayed``. Both return ``sparsity`` (decayed weights), ``sparsity_total`` (all),
    ``decayed_parameters`` and ``total_parameters``. A share is None where nothing decays, or where weights are packed
    (4-bit quantisation) and cannot be counted.
    """

    def _info(self) -> evaluate.MeasurementInfo:
        row = {
            "name": datasets.Value("string"),
            "elements": datasets.Value("int64"),
            "zeros": datasets.Value("int64"),
            "decayed": datasets.Value("bool"),
        }
        return evaluate.MeasurementInfo(
            description="Share of weights that are exactly zero.",
            citation="",
            inputs_description=self.__doc__ or "",
            features=datasets.Features({"data": row}),
        )

    def compute(
        self, *, model: nn.Module | None = None, decayed: Collection[str] | None = None, **kwargs: Any
    ) -> dict[str, float | int | None]:
        """Count a model's zeros, or reduce counts given as `data`.

        Args:
            model: Counted whole: frozen parameters included, tied ones once.
            decayed: Names of its decayed weights; by default those that its config says decayed, or would.
            kwargs: ``data``, in place of a model.

        Returns:
            Shares, in [0, 1] or None, and counts of weights; see the class.
        """
        if model is not None:
            choice = remembered_choice(getattr(model, "config", None))
            if decayed is None:
                try:
                    decayed = decayed_parameters(model, **choice)
                except ValueError:  # adapters decayed, and are merged since
                    decayed = decayed_parameters(model)
            return summarize(count_model_zeros(model, decayed))
        return super().compute(**kwargs)

    def _compute(self, data: list[dict[str, Any]]) -> dict[str, float | int | None]:
        return summarize(TensorCount(**row, near_zeros=None) for row in data)
