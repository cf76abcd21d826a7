"""Load a compressed model through Transformers' plug-in for quantizers; what comes out is an ordinary dense model.

The packed tensors keep their names, so they pass through whatever renaming and conversion Transformers has for a
model; unpacking comes first of all conversions. Nothing of the plug-in stays with the model: it trains, saves and
resumes like one that was loaded from a standard checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..resuming.weight_names import UnknownNamesError, names_in_memory
from .decayed_on_disk import skeleton
from .model_directory import QUANT_METHOD, TEXT_CONFIG, ModelDirectory, check_version, unpack
from .packing import FORMAT_VERSION, REMEDY, CompressionError

_HOW_TO_FIT = (
    "Load them with the config and the version of Transformers that they were saved with; or load the original with "
    "Transformers, make it whole, save it with save_pretrained, and compress that"
)


@register_quantization_config(QUANT_METHOD)
class CompressedConfig(QuantizationConfigMixin):
    """What the config.json of a compressed model says under `quantization_config`.

    Args:
        format_version: The version of the format.
        quant_method: Always "hf_padam".
        unknown: Anything else is an error.

    Raises:
        CompressionError: If the version is not known here, or there is something else.
    """

    def __init__(self, format_version: Any = None, quant_method: str = QUANT_METHOD, **unknown: Any) -> None:
        check_version(format_version, "the model")
        if unknown:
            raise CompressionError(
                f"the model's quantization_config has {', '.join(unknown)}, which version {FORMAT_VERSION} of "
                f"hf_padam's format has not: its config.json is damaged. {REMEDY}"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # Transformers' enum has no custom names
        self.format_version = format_version
        self.dequantize = True  # Transformers then drops every trace of quantization from the loaded model

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {"quant_method": self.quant_method, "format_version": self.format_version}


class Unpack(ConversionOps):
    """Turn the packed tensors of one or more names into dense ones.

    Args:
        on_unpacked: Called with the stored name of each, and Transformers' own set of what is missing yet.
    """

    def __init__(self, on_unpacked: Callable[[str, set[str]], None]) -> None:
        self.on_unpacked = on_unpacked
        self.dtype: torch.dtype | None = None  # that asked for; see `CompressedQuantizer.get_new_dtype`

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `ConversionOps.convert`: unpack every tensor, in the dtype asked for, on the device it was on."""
        target = _target(kwargs.get("model"), kwargs.get("full_layer_name", ""))
        dtype = target.dtype if self.dtype is None and target is not None else self.dtype  # Transformers before 5.23

        def unpacked(packed: Tensor) -> Tensor:
            info, dense = unpack(packed.cpu().numpy().data, "a packed tensor")
            self.on_unpacked(info.name, kwargs["missing_keys"])
            return dense.to(device=packed.device, dtype=dtype)

        return {
            name: [unpacked(packed) for packed in (tensors if isinstance(tensors, list) else [tensors])]
            for name, tensors in input_dict.items()
        }


def _target(model: PreTrainedModel | None, name: str) -> Tensor | None:
    """Return the parameter or buffer that a name stands for, on the meta device or not; None if it is not one."""
    path, _, leaf = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(path), leaf, None) if model is not None else None
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


class _UnpackOnly(Unpack):
    """Unpack what nothing else converts: its pattern matches every name, so it names what it returns itself."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `Unpack.convert`."""
        [tensors] = super().convert(input_dict, *args, **kwargs).values()
        return {kwargs["full_layer_name"]: tensors}


def _renamed(name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


class _Keep(WeightRenaming):
    """Give a tensor the name back that a renaming, meant for another, has taken from it.

    Transformers does so by leaving out all conversions of such a tensor: the unpacking, too.
    """


def _check_whole(stored: ModelDirectory) -> None:
    """Check that a directory has all weights of the class that its config names, where that is known.

    Raises:
        CompressionError: Names what it lacks.
    """
    try:
        named = skeleton(stored)
    except Exception:  # a class or code of its own
        return
    if getattr(named, "_keys_to_ignore_on_load_missing", None):  # which may be missing, and is then made anew
        return
    try:
        names_in_memory(named, {tensor.info.name: stored.info(tensor).shape for tensor in stored.stored})
    except UnknownNamesError as error:
        message = f"{stored.path} does not hold the weights of a {type(named).__name__}, as its config says: {error}"
        raise CompressionError(f"{message}. {_HOW_TO_FIT}") from None


@register_quantizer(QUANT_METHOD)
class CompressedQuantizer(HfQuantizer):
    """Check the files of a compressed model, and unpack them while Transformers loads it."""

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._directories: set[Path] = set()
        self._stored: set[str] = set()  # names of tensors, of which so many are
        self._unpacked: set[str] = set()
        self._missing: set[str] | None = None  # Transformers' own, which shrinks while it loads
        self._classes: list[str] = []  # those whose weights they are

        def note(name: str, missing: set[str]) -> None:
            self._unpacked.add(name)
            self._missing = missing

        self._note = note  # no method: conversions are copied deeply, and would copy what a method is bound to
        if not self.pre_quantized:
            raise CompressionError(
                "a model is not compressed by loading it: use hf_padam.save_compressed, or `hf-padam compress`"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check every byte before the first is used, whatever way the files have come."""
        if getattr(model.config, "distributed_config", None) is not None:
            raise CompressionError(
                "a compressed model cannot be loaded in shards (distributed_config, tp_plan): make the standard "
                "checkpoint with `hf-padam decompress` and load that"
            )
        self._directories = {Path(file).parent for file in kwargs.get("checkpoint_files") or ()}
        for directory in self._directories:
            with ModelDirectory(directory) as stored:
                stored.check()
                self._stored |= {tensor.info.name for tensor in stored.stored}
                self._classes += stored.config.get("architectures") or ()

    def get_weight_conversions(self) -> list[Any]:
        """Unpack whatever no conversion of the model matches."""
        rest = WeightConverter(r"^(.+)$", r"\1", operations=[_UnpackOnly(self._note)])
        if hasattr(rest, "force_cpu"):  # packed tensors need not visit another device, and would fill it
            rest.force_cpu = True
        return [rest]

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel | None = None) -> list:
        """Unpack before every conversion of the model, too, and whatever has the name that it has in the model."""
        renamings = deepcopy([c for c in weight_conversions if isinstance(c, WeightRenaming)])  # they note their use
        state = model.state_dict() if model is not None else {}
        renamed = {name: _renamed(name, renamings) for name in sorted(state)}  # on which some depend
        kept = [_Keep(rf"^{re.escape(other)}$", name) for name, other in renamed.items() if other not in state]
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter):
                conversion.operations.insert(0, Unpack(self._note))
        return weight_conversions + kept + self.get_weight_conversions()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Leave packed bytes alone, and tell the unpacking which dtype was asked for."""
        for operation in getattr(converter, "operations", ()):
            if isinstance(operation, Unpack):
                operation.dtype = dtype
        return None

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Check that all was loaded, and forget the unpacking: saving reverts the model's own conversions only."""
        self._check_names(model)
        own: Any = []
        for conversion in list(getattr(model, "_weight_conversions", None) or ()):
            operations = getattr(conversion, "operations", [])
            unpacking = [operation for operation in operations if isinstance(operation, Unpack)]
            if not isinstance(conversion, _Keep) and (not unpacking or len(operations) > len(unpacking)):
                for operation in unpacking:
                    operations.remove(operation)
                own.append(conversion)
        model._weight_conversions = own
        text: Any = getattr(model.config, TEXT_CONFIG, None)  # at the top, Transformers forgets it
        if hasattr(text, "quantization_config"):
            del text.quantization_config
        return model

    def _check_names(self, model: PreTrainedModel) -> None:
        """Check that nothing is missing or left over.

        A model of another class than the one that was compressed may lack a head, or have a new one: Transformers
        reports what it has made of that, and the directory is checked to be whole.

        Raises:
            CompressionError: Names what is.
        """
        if type(model).__name__ not in self._classes:
            for directory in self._directories:
                with ModelDirectory(directory) as stored:
                    _check_whole(stored)
            return
        state = model.state_dict(keep_vars=True)
        missing = state.keys() if self._missing is None else self._missing
        loaded = {id(tensor) for name, tensor in state.items() if name not in missing}  # under any of its tied names
        differing: Any = SimpleNamespace(
            missing_keys={name for name in missing if id(state.get(name)) not in loaded},
            unexpected_keys=self._stored - self._unpacked,
        )
        model._adjust_missing_and_unexpected_keys(differing)  # takes out what the class says may differ
        found = {"lacks": differing.missing_keys, "has, and the model has not,": differing.unexpected_keys}
        lines = [
            f"it {what} {', '.join(sorted(names)[:5])} ({len(names)} in all)" for what, names in found.items() if names
        ]
        if lines:
            raise CompressionError(
                f"the compressed weights are not those of a {type(model).__name__} of this config: "
                f"{'; '.join(lines)}. {_HOW_TO_FIT}"
            )

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the model can be saved: as the dense one that it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True
