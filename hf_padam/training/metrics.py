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
from .param_groups import decayed_parameters


def sequence_nll(logits: Tensor, labels: Tensor, *, shift: bool = True) -> tuple[Tensor, Tensor]:
    """Return each sequence's negative log-likelihood and its number of predicted tokens: the inputs of `Perplexity`.

    Args:
        logits: (batch, length, vocabulary).
        labels: (batch, length); -100 marks tokens that are not predicted.
        shift: Whether position i predicts label i + 1, as in causal models, rather than label i.

    Returns:
        NLL in nats, in fp64 where the device has it, and counts, int64; both of shape (batch,).
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=-100, reduction="none")
    precise = torch.float32 if losses.device.type == "mps" else torch.float64
    return losses.sum(dim=1, dtype=precise), labels.ne(-100).sum(dim=1)


# evaluate makes a cache directory even for modules that work in memory; the default one may not be writable.
_IN_MEMORY = {"keep_in_memory": True, "cache_dir": tempfile.gettempdir()}


class Perplexity(evaluate.Metric):
    """exp(NLL / tokens), over all predicted tokens of all sequences, however they were batched.

    ``predictions`` are the sequences' summed NLLs in nats, ``references`` their numbers of predicted tokens; both come
    from `sequence_nll`. ``compute`` returns ``perplexity``, ``loss`` (mean NLL per token, in nats) and ``tokens``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_IN_MEMORY | kwargs)

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


class WeightSparsity(evaluate.Measurement):
    """Share of weights that are exactly zero, over the decayed weights and over all of them.

    ``compute(model=model, decayed=names)`` counts a model's; ``compute(data=rows)`` reduces rows of counts, each with
    ``elements``, ``zeros`` and ``decayed``. Both return ``sparsity`` (decayed weights), ``sparsity_total`` (all),
    ``decayed_parameters`` and ``total_parameters``. A share is None where nothing decays, or where weights are packed
    (4-bit quantisation) and cannot be counted.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_IN_MEMORY | kwargs)

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
            decayed: Names of its decayed weights; what `hf_padam.decayed_parameters` returns for it by default.
            kwargs: ``data``, in place of a model.
        """
        if model is not None:
            return summarize(count_model_zeros(model, decayed_parameters(model) if decayed is None else decayed))
        return super().compute(**kwargs)

    def _compute(self, data: list[dict[str, Any]]) -> dict[str, float | int | None]:
        return summarize(TensorCount(**row, near_zeros=None) for row in data)
