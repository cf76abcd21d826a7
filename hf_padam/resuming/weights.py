"""Load a checkpoint's weights into the model that saved them: all of them, through the model's own conversions.

What a model saves has other names, and other shapes, than what it holds: a mixture of experts saves every expert apart
and keeps them stacked, a vision-language model saves its language model under a name of old. `from_pretrained` knows
the way back; a Trainer that resumes does not, and leaves such weights as they are.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from .checkpoints import CheckpointError

ADAPTER_FILES = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
_SHOWN = 5  # names in an error


def weight_files(checkpoint: str | Path) -> list[Path]:
    """Return the files of a checkpoint that hold a whole model's weights; none of adapters or FSDP's shards."""
    checkpoint = Path(checkpoint)
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (checkpoint / single).is_file():
            return [checkpoint / single]
        if (checkpoint / index).is_file():
            shards = json.loads((checkpoint / index).read_text(encoding="utf-8"))["weight_map"].values()
            return [checkpoint / shard for shard in sorted(set(shards))]
    return []


def load_weights(model: nn.Module, checkpoint: str | Path) -> None:
    """Load the weights of a checkpoint into a model, in place: parameters stay the objects that they are.

    Args:
        model: The model, of Transformers or not.
        checkpoint: A directory of which `weight_files` knows the weights.

    Raises:
        CheckpointError: If a tensor of the model is not in the checkpoint, one of the checkpoint is not in the model,
            or shapes differ. The model is as it was then.
    """
    saved: dict[str, Any] = {}
    for file in weight_files(checkpoint):
        saved |= load_state_dict(str(file))
    values, unexpected, misfits = (_converted if isinstance(model, PreTrainedModel) else _as_named)(model, saved)
    state = model.state_dict(keep_vars=True)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    missing = {name for name in state.keys() - ignored if id(state[name]) not in values}  # what is tied is saved once
    check_keys(checkpoint, missing - {misfit.split()[0] for misfit in misfits}, unexpected, misfits)
    with torch.no_grad():
        for _, _, tensor in _tensors(model):
            if id(tensor) in values:
                tensor.copy_(values[id(tensor)])


def check_keys(
    checkpoint: str | Path, missing: set[str], unexpected: set[str], misfits: list[str] | None = None
) -> None:
    """Check that a checkpoint and a model hold the same tensors.

    Raises:
        CheckpointError: If they do not; names the first of those that differ.
    """
    found = {"lacks": sorted(missing), "has, and the model has not,": sorted(unexpected), "has": misfits or []}
    lines = [
        f"it {what} {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' * (len(names) > _SHOWN)}"
        for what, names in found.items()
        if names
    ]
    if lines:
        raise CheckpointError(
            f"{checkpoint} is of another model: {'; '.join(lines)}. Give the model that the run began with, or start "
            "a new run in another directory"
        )


_IN_NO_FILE = re.compile(r"\bprompt_encoder\.[^.]+\.(?!embedding\.)")
"""Names of the weights of p-tuning's encoder and of prefix tuning's projection, beside their embeddings."""


def check_adapters(model: Any, checkpoint: str | Path) -> None:
    """Check, before PEFT loads adapters, that the checkpoint holds their tensors and no others: PEFT would not say.

    Args:
        model: A `peft.PeftModel`.
        checkpoint: The directory that it was saved in: the adapter named "default" itself, others below it.

    Raises:
        CheckpointError: If it does not; or if PEFT saves of the adapter what it computes, not the weights that do.
    """
    from peft import get_peft_model_state_dict

    own = [name for name, param in model.named_parameters() if param.requires_grad and _IN_NO_FILE.search(name)]
    if own:
        raise CheckpointError(
            f"{checkpoint} cannot be gone on from: of the network that makes the prompt ({own[0]}), PEFT saves what "
            "it gives out only. Start anew, or train a kind of adapter without one (PromptTuningConfig, LoraConfig)"
        )
    for adapter in model.peft_config:
        directory = Path(checkpoint) if adapter == "default" else Path(checkpoint) / adapter
        files = [directory / name for name in ADAPTER_FILES if (directory / name).is_file()]
        if not files:
            raise CheckpointError(f"{checkpoint} does not hold the adapter {adapter!r} that the model has")
        held, saved = get_peft_model_state_dict(model, adapter_name=adapter), load_state_dict(str(files[0]))
        both = sorted(held.keys() & saved.keys())
        misfits = [_misfit(n, saved[n].shape, held[n].shape) for n in both if saved[n].shape != held[n].shape]
        check_keys(checkpoint, held.keys() - saved.keys(), saved.keys() - held.keys(), misfits)


def _tensors(model: nn.Module) -> Iterator[tuple[dict[str, Tensor], str, Tensor]]:
    """Yield every parameter and buffer, as often as it is tied, with where it hangs."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield table, name, tensor  # type: ignore[misc]  # of a table without None's


def _converted(model: Any, saved: dict[str, Any]) -> tuple[dict[int, Tensor], set[str], list[str]]:
    """Convert what was saved as `from_pretrained` does, which hangs new tensors into the model; take them out again.

    Returns:
        The values of the model's tensors, by their ids; names that are none of the model's; tensors that do not fit.
    """
    held = list(_tensors(model))
    used = getattr(model, "_weight_conversions", None)  # those by which the model was loaded, and is saved
    conversions: Any = get_model_conversion_mapping(model) if used is None else used
    config = LoadStateDictConfig(weight_mapping=conversions)
    load = convert_and_load_state_dict_in_model
    more = {"tp_plan": None} if "tp_plan" in inspect.signature(load).parameters else {}  # Transformers 5.4
    try:
        info, _ = load(model=model, state_dict=saved, load_config=config, **more)
        values = {id(tensor): table[name] for table, name, tensor in held if table[name] is not tensor}
    finally:
        for table, name, tensor in held:
            table[name] = tensor
        model._weight_conversions = used
    misfits = [_misfit(name, there, here) for name, there, here in info.mismatched_keys]
    misfits += [f"{name}, which cannot be converted ({what})" for name, what in info.conversion_errors.items()]
    return values, set(info.unexpected_keys), sorted(misfits)


def _as_named(model: nn.Module, saved: dict[str, Any]) -> tuple[dict[int, Tensor], set[str], list[str]]:
    """Do the same where names and shapes are those that the model holds: it is not of Transformers."""
    state = model.state_dict(keep_vars=True)
    fits = {name for name in saved.keys() & state.keys() if saved[name].shape == state[name].shape}
    misfits = [_misfit(n, saved[n].shape, state[n].shape) for n in sorted(saved.keys() & state.keys() - fits)]
    return {id(state[name]): saved[name] for name in fits}, saved.keys() - state.keys(), misfits


def _misfit(name: str, there: Sequence[int], here: Sequence[int]) -> str:
    return f"{name} of shape {list(there)} for {list(here)}"
