"""PAdam with both moments stored in 8 bits: about 2 bytes of state a parameter instead of 8 (in fp32).

The storage is torchao's, block-wise quantization with a dynamic map (arXiv 2110.02861); the update is the same one, in
fp32, by the same backends, a slice of each tensor at a time.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..sparsity import local_tensor
from .padam import PAdam
from .random_bits import Rounding, random_key
from .update import Scalars

BLOCK = 256
"""Elements that share a scale."""

SMALLEST = 4096
"""Smaller tensors, and those that are not whole blocks, keep full moments: there is little to save."""

_SLICE = 2**22
"""Elements that are unpacked at a time: the extra memory of a step is some tens of bytes for each."""


S_REFUSAL = (
    "s_rate={} is not allowed with 8-bit moments, which save the memory that it takes: leave s_rate at 1, or use "
    'PAdam (optim="padam")'
)


def check_installed() -> Any:
    """Return torchao's class of packed tensors.

    Raises:
        ImportError: If torchao is not installed, or does not work here.
    """
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ImportError(
            f"8-bit moments need torchao, which cannot be imported here ({error}): "
            'pip install "hf-padam[8bit]", or use PAdam (optim="padam")'
        ) from error
    return OptimState8bit


class PAdam8bit(PAdam):
    """PAdam with its moments in 8 bits; arguments and errors are those of `PAdam`.

    Moments of tensors (or shards) with at least `SMALLEST` elements, a multiple of `BLOCK`, are stored as torchao's
    `OptimState8bit`; others as `PAdam` stores them. Each step unpacks them, computes in fp32 and packs them again.

    Raises:
        ImportError: If torchao is not installed.
        ValueError: Also for ``s_rate < 1``, which would add 4 bytes a parameter to these 2.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check that torchao is there; see `PAdam` for the arguments."""
        self._storage = check_installed()
        super().__init__(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Keep what `PAdam` keeps, and the storage."""
        return {**super().__getstate__(), "_storage": self._storage}

    def keeps_s(self, group: dict[str, Any]) -> bool:
        """Refuse the auxiliary variable."""
        if group["s_rate"] < 1:
            raise ValueError(S_REFUSAL.format(group["s_rate"]))
        return False

    def _new_moment(self, param: Tensor, name: str) -> Tensor:
        local = local_tensor(param)
        if local.numel() < SMALLEST or local.numel() % BLOCK:
            return super()._new_moment(param, name)
        moment = self._storage.zeros(local.shape, name == "exp_avg", BLOCK, local.device, dtype=local.dtype)
        if isinstance(param, DTensor):
            layout: dict[str, Any] = dict(shape=param.shape, stride=param.stride(), run_check=False)
            return DTensor.from_local(moment, param.device_mesh, param.placements, **layout)
        return moment

    def _run(
        self,
        backend: ModuleType,
        tensors: tuple[list[Tensor], ...],
        scalars: Scalars,
        rounding: Rounding | None,
        kept: dict[Any, Any],
    ) -> None:
        full: tuple[list[Any], ...] = ([], [], [], [], [])
        keys = rounding.tensor_keys if rounding else [0] * len(tensors[0])
        for i, (*own, key) in enumerate(zip(*tensors, keys, strict=True)):
            if isinstance(own[2], self._storage):
                one = rounding and rounding._replace(tensor_keys=[key])
                self._step_packed(backend, own, scalars, one, kept.setdefault(i, {}))
            else:
                for values, value in zip(full, (*own, key), strict=True):
                    values.append(value)
        if full[0]:
            rest = rounding and rounding._replace(tensor_keys=full[4])
            super()._run(backend, full[:4], scalars, rest, kept.setdefault("full", {}))

    def _step_packed(
        self,
        backend: ModuleType,
        tensors: list[Any],
        scalars: Scalars,
        rounding: Rounding | None,
        kept: dict[Any, Any],
    ) -> None:
        """Step one tensor whose moments are packed, a slice at a time."""
        weights, grads = (t.reshape(-1) for t in tensors[:2])
        for start in range(0, weights.numel(), _SLICE):
            part = slice(start, start + _SLICE)
            packed = [self._slice(moment, part) for moment in tensors[2:]]
            moments = [moment.dequantize() for moment in packed]
            own = rounding and rounding._replace(tensor_keys=[random_key(*rounding.tensor_keys, start)])
            lists = [weights[part]], [grads[part]], [moments[0]], [moments[1]]
            backend.step(*lists, scalars, own, kept=kept.setdefault(start, {"moving": True}))
            for moment, new in zip(packed, moments, strict=True):
                _pack(moment, new)
        if weights.data_ptr() != tensors[0].data_ptr():  # it was a copy
            tensors[0].copy_(weights.view_as(tensors[0]))

    def _slice(self, moment: Any, part: slice) -> Any:
        """View whole blocks of a packed moment."""
        blocks = slice(part.start // BLOCK, part.stop // BLOCK)
        return self._storage(moment.codes.view(-1)[part], moment.scale[blocks], moment.qmap, moment.signed)

    def _adopt(self, param: Tensor, name: str, value: Tensor) -> Tensor:
        """Keep a loaded moment, packed if this optimizer packs it and it is not: PAdam's states can be continued."""
        fresh = self._new_moment(param, name)
        if isinstance(local_tensor(value), self._storage) or not isinstance(local_tensor(fresh), self._storage):
            return value
        _pack(local_tensor(fresh), local_tensor(value).to(param.device, torch.float32))
        return fresh


def _pack(moment: Any, values: Tensor) -> None:
    """Store values in a packed moment; of a second moment none that is positive as zero: "no gradient so far"."""
    moment.copy_(values)
    if not moment.signed:
        moment.codes.add_((moment.codes == 0) & (values.view_as(moment.codes) > 0))
