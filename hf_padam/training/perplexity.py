"""Perplexity of an evaluation, where it can be known: where a model's own loss is the mean NLL of its labels.

No list of classes says whether position i of a model predicts label i + 1, as in causal models, or label i, as in
masked and encoder-decoder models and taggers; or whether its loss is something else altogether. So the first batch of
every evaluation is asked: whichever of the two mean NLLs is the model's loss is what is summed from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .metrics import IGNORED, Perplexity, following, token_nll, widest_float

_TOLERANCE, _HALF_TOLERANCE = 5e-5, 1e-2
"""How far a loss computed in fp32, or in 16 bits, may be from the mean NLL of the same logits: more than it rounds."""


class PerplexityMeter:
    """The perplexity of one evaluation: exact however its tokens are batched, masked and shared by processes.

    Every process calls the methods alike, and all agree on what is found out at the first batch with predicted tokens.

    Args:
        accelerator: Knows the other processes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.reason: str | None = None
        """Why no perplexity is known, once that is clear."""
        parallelism = getattr(accelerator, "parallelism_config", None)
        if any(getattr(parallelism, size, 1) > 1 for size in ("cp_size", "sp_size")):
            self.reason = "context and sequence parallelism cut the sequences in pieces"
        self.aligned: Callable[[Tensor], Tensor] | None = None
        """`following` or `unshifted`: what turns labels into what each position predicts, once it is known."""
        self._follows: set[bool] = set()
        """Whether losses were the mean NLL of the only process's labels, in fp32: of even batches, of ragged ones."""
        self._accelerator = accelerator
        self._sums = torch.zeros(2, dtype=widest_float(accelerator.device), device=accelerator.device)  # NLL, tokens

    def add(
        self,
        loss: Tensor | None,
        outputs: Any,
        labels: Any,
        *,
        own_loss: Callable[[], Tensor | None],
        shifted: bool = False,
        rows: int | None = None,
    ) -> None:
        """Add a batch.

        Args:
            loss: What was reported for it.
            outputs: The model's, of which the first that scores every label is taken: (batch, length, vocabulary). It
                may be longer than the labels by virtual tokens in front.
            labels: (batch, length); -100 marks what is not predicted.
            own_loss: Computes the model's own mean loss, in case `loss` is something else.
            shifted: Whether the labels are shifted already, so that position i is known to predict label i.
            rows: How many sequences count; all by default. The others fill up the batches of an uneven end.
        """
        if self.reason:
            return
        candidates = [self.aligned] if self.aligned else [unshifted] if shifted else [following, unshifted]
        scores = _scores(outputs, labels)
        if scores is None:
            nll, counts = self._sums.new_full((2, 1, len(candidates)), math.nan)
        else:
            padded = nn.functional.pad(labels, (scores.shape[1] - labels.shape[1], 0), value=IGNORED)
            targets = torch.stack([aligned(padded) for aligned in candidates], dim=-1)
            nll, counts = token_nll(scores, targets).sum(1, dtype=self._sums.dtype), targets.ne(IGNORED).sum(1)
        chosen, follows = (0, False) if self.aligned else self._choose(loss, nll, counts, own_loss)
        if self._follows and loss is not None and counts.any():  # a ragged batch after even ones
            follows = bool((loss - nll.sum() / counts.sum()).abs() <= _TOLERANCE * max(1.0, float(loss)))
        if chosen is not None:
            self.aligned = candidates[chosen]
            if follows and scores is not None and scores.shape[1] == labels.shape[1]:
                self._follows.add(is_ragged(self.aligned(labels)))
            for i, values in enumerate((nll, counts)):  # (batch, candidates)
                self._sums[i] += values[:rows, chosen].sum().to(self._sums)

    def follows_loss(self, labels: Tensor) -> bool:
        """Whether the loss of a batch is known to be the mean NLL of its labels.

        It is where a ragged batch's was. One of as many tokens in every row does not tell a mean over tokens from a
        mean over rows, and speaks for its like alone.
        """
        if self.aligned is None:
            return False
        return True in self._follows or (False in self._follows and not is_ragged(self.aligned(labels)))

    def add_mean(self, loss: Tensor, labels: Tensor) -> None:
        """Add a batch whose loss is the mean NLL of its labels, as `follows_loss` says: its logits are not needed."""
        assert self.aligned is not None
        tokens = self.aligned(labels).ne(IGNORED).sum().to(self._sums)
        self._sums += torch.stack([torch.where(tokens > 0, loss.to(self._sums) * tokens, 0.0), tokens])

    def result(self) -> float | None:
        """Return the perplexity over all processes; NaN if no token was predicted, None if there is a `reason`."""
        if self.reason:
            return None
        nll, tokens = self._accelerator.reduce(self._sums, "sum").tolist()
        if not tokens > 0:
            return math.nan
        return Perplexity().compute(predictions=[nll], references=[int(tokens)])["perplexity"]

    def _choose(
        self, loss: Tensor | None, nll: Tensor, counts: Tensor, own_loss: Callable[[], Tensor | None]
    ) -> tuple[int | None, bool]:
        """Return which candidate's mean is the loss, the same everywhere; None if none is, or nothing is predicted.

        And whether that is the loss that was reported for the only process, in fp32.

        Args:
            loss: As in `add`.
            nll: (batch, candidates); NaN where there are no scores.
            counts: (batch, candidates); NaN where there are no scores.
            own_loss: As in `add`.
        """
        sums, tokens = self._gather(nll.sum(0)), self._gather(counts.sum(0))  # (processes, candidates)
        if tokens.isnan().any():
            self.reason = "the model does not score every label of a sequence"
        elif not sums.isfinite().all():
            return 0, False  # whichever it is, the perplexity is not finite either
        if self.reason or not tokens.any():
            return None, False
        total = sums.sum(0) / tokens.sum(0)
        for ask in (lambda: loss, own_loss):
            value = ask()
            value = self._sums.new_tensor(math.nan) if value is None else value.detach().mean()
            losses = self._gather(value[None])  # (processes, 1)
            # Each process's mean; or shares of the mean over all, as the Trainer has it.
            misses = torch.where(tokens > 0, (losses - sums / tokens).abs(), 0.0).amax(0)
            misses = misses.nan_to_num(math.inf).minimum((losses.mean(0) - total).abs().nan_to_num(math.inf))
            misses /= total.clamp(min=1.0)
            chosen = int(misses.argmin())
            half = value.dtype in (torch.bfloat16, torch.float16)
            if misses[chosen] <= (_HALF_TOLERANCE if half else _TOLERANCE):
                return chosen, ask is not own_loss and not half and len(losses) == 1
        means = " or ".join(f"{mean:.5g}" for mean in total.tolist())
        self.reason = (
            f"the model's own loss of the first batch, {losses.mean():.5g}, is not the mean negative log-likelihood "
            f"of its labels, {means}"
        )
        return None, False

    def _gather(self, values: Tensor) -> Tensor:
        """Return every process's values, one row each, on the host."""
        return self._accelerator.gather(values.to(self._sums)[None]).cpu()


def is_ragged(targets: Tensor) -> bool:
    """Whether rows of a batch, of (batch, length), have unequal numbers of predicted tokens."""
    counts = targets.ne(IGNORED).sum(1)
    return bool((counts != counts[0]).any())


def unshifted(labels: Tensor) -> Tensor:
    """Return what each position predicts where the labels are in their places already."""
    return labels


@torch.no_grad()
def own_loss(model: nn.Module, inputs: dict[str, Any], plain: nn.Module) -> Tensor | None:
    """Return a model's mean loss of a batch: not smoothed, not divided by other counts, and without MoE routers'.

    Args:
        model: The model, as it is wrapped for its processes.
        inputs: With the labels.
        plain: The same, unwrapped.
    """
    config: Any = getattr(plain, "config", None)
    if isinstance(config, PreTrainedConfig) and getattr(config.get_text_config(), "output_router_logits", False):
        inputs = {**inputs, "output_router_logits": False}
    try:
        outputs = model(**inputs)
    except TypeError:  # it does not take labels, or wants what a `compute_loss` of the user's adds
        return None
    return outputs.get("loss") if isinstance(outputs, dict) else outputs[0]


def _scores(outputs: Any, labels: Any) -> Tensor | None:
    """Return the first output with scores for every label: (batch, length or longer, vocabulary)."""
    if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
        return None
    for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
        if isinstance(output, Tensor) and output.ndim == 3 and output.is_floating_point():
            if output.shape[0] == labels.shape[0] and output.shape[1] >= labels.shape[1]:
                return output
    return None
