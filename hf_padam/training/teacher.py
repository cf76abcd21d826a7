"""The model that another one is distilled from: frozen, whole on every process, its logits some tokens at a time."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.trainer_utils import unwrap_peft_model

logger = logging.getLogger(__name__)

START = "start"
"""In place of a teacher's name: the model as it is when training begins."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Of a teacher's weights; auto is that of its files, or of the model that is copied."""

_NOT_THE_TEACHERS = ("labels", "shift_labels", "num_items_in_batch")
_PADDING = 32
"""Rows that a vocabulary may be padded by, if that is more than a hundredth of it."""


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its elements itself: it is not quantized, say, nor kept outside of memory."""
    return not tensor.is_meta and not hasattr(type(tensor), "__tensor_flatten__")


def _described(name: str, value: Any) -> Iterator[str]:
    """Yield lines that differ if values of a state dict do: the parts of a tensor that is made of others, the bits."""
    parts: Any = value
    if not isinstance(value, Tensor):
        yield f"{name} {type(value).__name__}"
    elif hasattr(type(value), "__tensor_flatten__"):
        for part in parts.__tensor_flatten__()[0]:
            yield from _described(f"{name}.{part}", getattr(value, part))
    elif value.is_meta:
        yield f"{name} {tuple(value.shape)} {value.dtype}"
    else:
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = value.detach().contiguous().view(integers[value.element_size()])
        yield f"{name} {tuple(value.shape)} {bits.sum(dtype=torch.int64).item()}"


class Teacher:
    """A frozen model, and its tokenizer if that is known.

    Every process holds it whole, under FSDP too: it is not wrapped, so that no forward pass of it waits for others.

    Args:
        model: A language model of Transformers. It is frozen in place.
        tokenizer: Its own, or None.
        name: What errors call it.
        dtype: One of `DTYPES`, to convert its weights to.
        device: Where to put it.
        autocast: Makes the context that its passes run in, for example `Accelerator.autocast`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        name: str,
        dtype: str = "auto",
        device: torch.device | str | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.model: Any = unwrap_peft_model(model)
        self.tokenizer, self.name, self._autocast = tokenizer, name, autocast
        self.model.requires_grad_(False).eval()
        if dtype != "auto":  # not by Module.to, which would round the frequencies of rotary positions
            for param in filter(torch.is_floating_point, self.model.parameters()):
                param.data = param.data.to(getattr(torch, dtype))
        if len(set((getattr(self.model, "hf_device_map", None) or {}).values())) < 2:  # else it stays as it is spread
            type(self.model).to(self.model, device=device)  # accelerate's own, in a copy, would move the original
        for config in (self.model.config, self.model.config.get_text_config()):
            config.use_cache, config.return_dict = False, True
        # With FSDP's RAM-efficient loading, the main process alone has read the weights.
        if PartialState().num_processes > 1:
            broadcast([t for t in (*self.model.parameters(), *self.model.buffers()) if _is_plain(t)])
        if any(t.is_meta for t in self.model.state_dict().values() if isinstance(t, Tensor)):
            logger.warning(
                "Weights of the teacher %s are kept outside of memory: that a run which goes on has the same ones is "
                "not checked.",
                name,
            )

    @classmethod
    def copied(cls, model: nn.Module, tokenizer: Any, **options: Any) -> Teacher:
        """Make a frozen copy of a model as it is now. `options` are the constructor's."""
        return cls(copy.deepcopy(model), tokenizer, name=START, **options)

    @property
    def fingerprint(self) -> str:
        """A hash of the weights: equal bits on any device, equal hash."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            for line in _described(name, value):
                digest.update(f"{line}\n".encode())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def logits_of(self, inputs: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
        """Run the model on a batch, but for its output head.

        The head runs for some tokens at a time, in the model's own forward pass, with what that does beside (scaling,
        soft-capping). Of a model whose forward pass does not call its `base_model` (OPT), the logits are made at once.

        Args:
            inputs: Of the forward pass; labels among them are left out.

        Returns:
            A function of the indices of n tokens, in the batch as one row, that returns their logits, (n, vocabulary).
        """
        inputs = {key: value for key, value in inputs.items() if key not in _NOT_THE_TEACHERS}
        body: nn.Module = self.model.base_model

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            raise _BodyIsDone(output)

        handle = body.register_forward_hook(stop) if body is not self.model else None
        try:
            with self._autocast():
                logits = self.model(**inputs).logits.flatten(end_dim=-2)
            return lambda tokens: logits[tokens.to(logits.device)]
        except _BodyIsDone as done:
            output, hidden = done.output, done.output.last_hidden_state.flatten(end_dim=-2)
        finally:
            if handle is not None:
                handle.remove()

        @torch.no_grad()
        def head(tokens: Tensor) -> Tensor:
            output.last_hidden_state = hidden[tokens.to(hidden.device)][None]
            with mock.patch.object(body, "forward", lambda *args, **kwargs: output), self._autocast():
                # Of the body's input some models read the shape, or its special tokens.
                return self.model(input_ids=tokens.new_zeros(1, len(tokens)).to(hidden.device)).logits[0]

        return head


def load_teacher(name: str, causal: bool, dtype: str) -> tuple[nn.Module, Any]:
    """Load a teacher's model from the Hub or a directory, compressed or not; and its tokenizer, None without one.

    Processes may take turns, for it waits for no other.

    Args:
        name: The Hub id or the directory.
        causal: Whether it is a causal language model, rather than a masked one.
        dtype: One of `DTYPES`.

    Raises:
        ValueError: If it cannot be loaded.
    """
    kind = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    try:
        both: Any = kind.from_pretrained(
            name, dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True
        )
        model, loaded = both
        if loaded["missing_keys"]:  # which Transformers makes at random, with a warning
            raise ValueError(f"a {type(model).__name__} needs weights that it has not ({min(loaded['missing_keys'])})")
    except Exception as error:  # the loaders raise whatever their file format's library raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"distill_from={name!r} could not be loaded: {reason}. Give a Hub id, a directory of a saved model, "
            f"{START!r} for the model as it is when training begins, or PAdamTrainer(teacher=...), a model"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        # Without its files some kinds come with nothing but special tokens.
        return model, tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None
    except Exception:  # a model without one
        return model, None


class _BodyIsDone(Exception):
    """Ends a forward pass at the end of the model's body."""

    def __init__(self, output: Any) -> None:
        self.output = output


def check_vocabularies(name: str, student: tuple[nn.Module, Any], teacher: tuple[nn.Module, Any]) -> None:
    """Check that a teacher's logits are about the tokens that a student's are about.

    Every token of the student's tokenizer must have the same number in the teacher's. Rows of padding at the end of
    either vocabulary do not matter. Where a tokenizer is not known, they may be 32, or a hundredth of the vocabulary.

    Args:
        name: The teacher's, for the error.
        student: Model and tokenizer; for the latter, None and what has no vocabulary are the same.
        teacher: Same.

    Raises:
        ValueError: If they are not.
    """
    what = f"distill_from={name!r}"
    cure = "A teacher must have the tokenizer of the model that is trained: give another, or leave distill_from out"
    models: list[Any] = [unwrap_peft_model(model) for model, _ in (student, teacher)]
    rows = [_rows(model.get_input_embeddings()) for model in models]
    ids, other = (
        tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {} for _, tokenizer in (student, teacher)
    )
    if ids and max(ids.values()) >= rows[1]:
        raise ValueError(
            f"{what} has a vocabulary of {rows[1]} tokens, the tokenizer here one of {max(ids.values()) + 1}. {cure}"
        )
    if ids and other:
        differing = [token for token in ids if other.get(token) != ids[token]]
        if differing:
            token = min(differing, key=lambda token: ids[token])
            raise ValueError(
                f"{what} has another tokenizer: {len(differing)} of {len(ids)} tokens differ; {token!r}, for example, "
                f"is number {ids[token]} here and {other.get(token, 'unknown')} there. {cure}"
            )
    elif abs(rows[0] - rows[1]) > max(_PADDING, min(rows) // 100):
        raise ValueError(f"{what} has a vocabulary of {rows[1]} tokens, the model that is trained {rows[0]}. {cure}")


def _rows(embeddings: nn.Module) -> int:
    """Return how many rows embeddings have; an adapter may have wrapped them."""
    sizes = (getattr(module, "num_embeddings", None) for module in embeddings.modules())
    return next(size for size in sizes if isinstance(size, int))
