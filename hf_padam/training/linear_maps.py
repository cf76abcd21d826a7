"""Which parameters are matrices of linear maps: what a module is and what it is for decides.

Names of parameters are no guide (lists of them miss `norm_f`, `A_log`, `sinks`, `conv1d`), and neither is the number
of dimensions: sharding flattens, and filters, positions and state spaces have two or three as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""The matrices that `nn.MultiheadAttention` holds itself."""
_NUMBER_OF_EXPERTS = re.compile(r"(\w+_)?(n|num)_(\w+_)?experts")
_GATE = re.compile(r"(\w*(moe|expert)\w*_)?(gate|gating|wg)")
_NORM = re.compile(r"rms_?norm(gated)?$", re.IGNORECASE)  # how its class name ends; others hold whole layers, too
_NOT_A_MATRIX = re.compile(r"bias|scale", re.IGNORECASE)  # of an expert; the scales are those of quantised matrices


def linear_matrices(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that are matrices of linear maps, frozen ones included.

    They are the weights of

    * `nn.Linear` and what derives from it; modules that are no `nn.Linear` but have `in_features`, `out_features` and
      a weight of these sizes; GPT-2's `Conv1D`; the projections of `nn.MultiheadAttention`;
    * stacks of expert matrices: parameters of three dimensions, or of two with the rows of all experts (DBRX), in
      modules that are called experts or MoE, or for as many experts as they, or what holds them, say they have.

    But not routers: what is called a router, and beside experts what is called a gate (of shared experts, too), or
    else is linear with an output per expert. Nor linear maps that make the gain of an RMS norm. Parameters that
    other modules hold are none, as far as can be known: convolutions, positions and class tokens, states of
    state-space and recurrent layers, sinks, coefficients.

    Embeddings are not among them unless their module is linear, output heads and PEFT's `lora_A` are.
    """
    shapes = WholeShapes(model)
    return {
        id(param)
        for module, experts, counts in _modules(model)
        for name, param in module.named_parameters(recurse=False)
        if _is_matrix(module, name, shapes.of(param), experts, counts)
    }


def embedding_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of embeddings and of the output head; tied ones more than once."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters(recurse=False)
        for role in ("get_input_embeddings", "get_output_embeddings"):
            try:
                embedding = getattr(module, role)()
            except Exception:  # not a Transformers model, or one without that role, or code of its own
                continue
            if isinstance(embedding, nn.Module):
                yield from embedding.parameters()
        if hasattr(module, "get_output_embeddings"):  # which keeps silent where the input is no text (CTC, Bark)
            for name, child in module.named_children():
                if name.endswith("lm_head") and _is_linear(child):
                    yield from child.parameters(recurse=False)


def adapter_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights that PEFT added: under a tuner layer's `adapter_layer_names`, and encoders of prompts."""
    for module in model.modules():
        for name in (*getattr(module, "adapter_layer_names", ()), "prompt_encoder"):
            held = getattr(module, name, None)
            if isinstance(held, nn.Module) and (name != "prompt_encoder" or hasattr(module, "peft_config")):
                yield from held.parameters()


def tables(model: nn.Module, weights: Iterable[Tensor]) -> set[int]:
    """Return the ids of those among some weights, of embeddings or adapters, that have two dimensions."""
    shapes = WholeShapes(model)
    return {id(param) for param in weights if len(shapes.of(param)) == 2}


class WholeShapes:
    """The shapes of a model's parameters over all shards, whatever has sharded them."""

    def __init__(self, model: nn.Module) -> None:
        self._flattened: dict[int, tuple[int, ...]] = {}
        for module in model.modules():
            flat: Any = getattr(module, "_flat_param", None)  # FSDP1's
            for param, shape in zip(getattr(flat, "_params", None) or (), getattr(flat, "_shapes", ()), strict=False):
                self._flattened[id(param)] = tuple(shape)

    def of(self, param: Tensor) -> tuple[int, ...]:
        """Return one; a DTensor's is that of the whole, ZeRO-3 leaves it in an attribute."""
        return self._flattened.get(id(param)) or tuple(getattr(param, "ds_shape", param.shape))


def _modules(model: nn.Module) -> Iterator[tuple[nn.Module, bool, set[int]]]:
    """Yield every module but routers and norms, whether it is called experts, and how many experts it may hold."""

    def below(
        module: nn.Module, name: str, parent: nn.Module | None, experts: bool
    ) -> Iterator[tuple[nn.Module, bool, set[int]]]:
        if parent is not None and (_routes(name, module, parent) or _NORM.search(type(module).__name__)):
            return
        experts = experts or parent is not None and _holds_experts(name, module)
        counts = _counts(module) | (_counts(parent) if parent is not None else set())
        yield module, experts or _is_mixture(name, module), counts
        for child_name, child in module.named_children():
            yield from below(child, child_name, module, experts)

    yield from below(model, "", None, False)


def _holds_experts(name: str, module: nn.Module) -> bool:
    return "expert" in name.lower() or "expert" in type(module).__name__.lower()


def _is_mixture(name: str, module: nn.Module) -> bool:
    return "moe" in name.lower() or "moe" in type(module).__name__.lower()


def _counts(module: nn.Module) -> set[int]:
    """How many experts a module says it has, the routed, the local, ..."""
    return {
        value
        for name, value in vars(module).items()
        if type(value) is int and value > 1 and _NUMBER_OF_EXPERTS.fullmatch(name)
    }


def _routes(name: str, module: nn.Module, parent: nn.Module) -> bool:
    if _is_router(name, module):
        return True
    siblings = [(n, m) for n, m in parent.named_children() if m is not module]
    experts = [m for n, m in siblings if _holds_experts(n, m) and not _GATE.fullmatch(n)]
    if experts and _GATE.fullmatch(name):
        return True
    if not _is_linear(module) or any(_is_router(n, m) or _GATE.fullmatch(n) for n, m in siblings):
        return False
    counts = _counts(parent)
    if _is_mixture("", parent):
        counts |= {stack.shape[0] for stack in parent.parameters(recurse=False) if stack.dim() == 3}
    for held in experts:
        counts |= {len(held)} if isinstance(held, nn.ModuleList) else _counts(held)
    return getattr(module, "out_features", 0) in counts


def _is_router(name: str, module: nn.Module) -> bool:
    return "router" in name.lower() or type(module).__name__.lower().endswith("router")


def _is_linear(module: nn.Module) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return isinstance(module, nn.Linear | Conv1D) or all(isinstance(size, int) for size in sizes)


def _is_matrix(module: nn.Module, name: str, shape: tuple[int, ...], experts: bool, counts: set[int]) -> bool:
    if isinstance(module, nn.Linear | Conv1D):
        return name == "weight"
    if isinstance(module, nn.MultiheadAttention):
        return name in _PROJECTIONS
    if _is_linear(module):
        sizes = (module.out_features, module.in_features)
        return name == "weight" and shape in (sizes, sizes[::-1])
    if isinstance(module, nn.modules.conv._ConvNd | nn.Embedding) or _NOT_A_MATRIX.search(name):
        return False
    if len(shape) == 3:
        return (experts or shape[0] in counts) and min(shape) > 1
    return experts and len(shape) == 2 and any(shape[0] > n and shape[0] % n == 0 for n in counts) and shape[1] > 1
