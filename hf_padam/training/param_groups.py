"""Which weights decay: the matrices of linear maps and of experts, without embeddings, output head and PEFT adapters.

This is the convention of the pruning literature for language models. Weights are told apart by the modules that own
them, by role and by identity (see `linear_maps.py`); a tied weight is one weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import check_target_module_exists

from ..optim.hyperparameters import DEFAULT_LAMBDA_P
from ..optim.patterns import INPUT_DIM, PATTERN, pattern_share
from ..optim.schedules import FINAL
from ..optim.target_options import check_target
from .linear_maps import adapter_weights, embedding_weights, linear_matrices, tables
from .options import read, with_defaults


def decayed_parameters(
    model: nn.Module,
    *,
    decay_embeddings: bool = False,
    target_modules: str | list[str] | None = None,
    dense_modules: str | list[str] | None = None,
    target_sparsity: float | Mapping[str, float] | None = None,
) -> dict[str, nn.Parameter]:
    """Return the trainable weights that the p-norm decay acts on, by name, each tensor once. There may be none.

    They are the matrices of linear maps and nothing else (`linear_matrices` says which these are): no biases, norms,
    convolutions, positions, routers, states of state-space layers, attention sinks, nor anything of one dimension.
    Embeddings and the output head, and what is tied to them, are left out too, unless `decay_embeddings`.

    Single weights, rows or columns that start at zero stay zero and are no error; a matrix that is zero as a whole is
    one, which `PAdam` raises.

    Args:
        model: Any module; a Transformers model for its embeddings to be recognised by role rather than by class.
        decay_embeddings: Include embeddings (`nn.Embedding`, of positions too) and the output head.
        target_modules: Narrow the choice to modules of these names: "all-linear" (all with matrices of linear maps or
            of experts), a regular expression that matches whole module names, or a list of parts of names and regular
            expressions; the meaning that `TrainingArguments.optim_target_modules` has elsewhere. PEFT adapters are
            included only if named here.
        dense_modules: Leave modules of these names out; said in the same way.
        target_sparsity: If a mapping from names of modules (what a list can hold) to shares, leave out modules of
            other names, unless there is an entry "*" for them. A weight belongs to the first entry that matches it;
            the weights are in the order of the entries.

    Raises:
        ValueError: If an entry of `target_modules`, `dense_modules` or `target_sparsity` matches nothing (one of
            `target_sparsity`: no weight that decays), or is no regular expression; if FSDP1 has merged parameters, so
            that a weight cannot be told from a bias.
    """
    if any(name.rpartition(".")[2] == "_flat_param" for name, _ in model.named_parameters()):
        raise ValueError(
            "FSDP1 has merged weights and biases into flat parameters, so they cannot decay apart: set "
            "fsdp_use_orig_params: true (use_orig_params=True), or use FSDP2, fsdp_version: 2"
        )
    targets = _named(model, target_modules, "optim_target_modules")
    dense = _named(model, dense_modules, "dense_modules") if dense_modules is not None else set()
    chosen = linear_matrices(model)
    embeddings, adapters = list(embedding_weights(model)), list(adapter_weights(model))
    chosen -= {id(param) for param in (*embeddings, *adapters)}
    if decay_embeddings:
        chosen |= tables(model, embeddings)
    if target_modules is not None and target_modules not in _ALL_LINEAR:
        chosen |= tables(model, adapters)
    chosen &= targets - dense
    decayed = {
        name: param
        for name, param in model.named_parameters()
        if param.requires_grad and id(param) in chosen and param.is_floating_point()
    }
    if decayed and isinstance(target_sparsity, Mapping):
        entries = _by_entry(model, decayed, target_sparsity)
        return {name: decayed[name] for names in entries.values() for name in names}
    return decayed


CHOICES = ("decay_embeddings", "target_modules", "dense_modules", "target_sparsity")
"""The arguments of `decayed_parameters`."""

_CHOICE = "padam_decays"
"""The key of a model's config under which it is kept, if it is not the default, what decays."""


def remember_choice(
    model: nn.Module,
    *,
    target_sparsity: float | Mapping[str, float] | None = None,
    **choice: bool | str | list[str] | None,
) -> None:
    """Keep in a Transformers model's config what of `decayed_parameters`' arguments is not the default.

    `save_pretrained` writes it, so that reports of the files are about the weights that decayed.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return
    kept: dict[str, Any] = {name: value for name, value in choice.items() if value}
    if isinstance(target_sparsity, Mapping):
        kept["target_sparsity"] = dict(target_sparsity)
    if kept:
        setattr(config, _CHOICE, kept)
    elif hasattr(config, _CHOICE):
        delattr(config, _CHOICE)


def remembered_choice(config: Any) -> dict[str, Any]:
    """Return the arguments of `decayed_parameters` that a config keeps; none if it keeps none.

    Raises:
        ValueError: If what it keeps is none of ours.
    """
    kept = getattr(config, _CHOICE, {})
    if not isinstance(kept, dict) or not set(kept) <= set(CHOICES):
        raise ValueError(f"the config's {_CHOICE} is {kept!r}, which no version known here has written")
    return kept


def get_param_groups(
    model: nn.Module,
    *,
    p_norm: float | None = None,
    lambda_p: float = DEFAULT_LAMBDA_P,
    weight_decay: float = 0.0,
    p_norm_start: float | None = None,
    target_sparsity: float | Mapping[str, float] | None = None,
    target_pattern: str | None = None,
    target_scope: str = "global",
    importance: str | None = None,
    late_decay: bool = False,
    s_rate: float = 1.0,
    decay_embeddings: bool = False,
    target_modules: str | list[str] | None = None,
    dense_modules: str | list[str] | None = None,
) -> list[dict[str, Any]]:
    """Return two groups of named parameters for `PAdam`: the decayed weights, and every other trainable parameter.

    A target can make several groups of the decayed weights; those of the others is the last.

    Args:
        model: The model to train.
        p_norm: See `PAdam`. By default 0.8, the paper's; with a target -inf, unless `importance` is "magnitude".
        lambda_p: See `PAdam`; 0 in the second group.
        weight_decay: See `PAdam`; 0 in the second group.
        target_sparsity: A share of zeros for `TargetSparsity` to steer to, kept in the decayed groups; or a mapping
            from modules to shares (see `decayed_parameters`), which makes a group of each entry.
        target_pattern: In its place an N:M pattern, such as "2:4": N of M weights stay, along the inputs.
        target_scope: "layer" makes a group of each decayed tensor, which is to have the share by itself.
        p_norm_start: Where p starts if a schedule is to move it to `p_norm` (see `PNormScheduler`).
        importance: See `PAdam`. By default "magnitude", the paper's; with a target "fisher".
        late_decay: See `PAdam`.
        s_rate: See `PAdam`.
        decay_embeddings: See `decayed_parameters`.
        target_modules: See `decayed_parameters`.
        dense_modules: See `decayed_parameters`.

    Raises:
        ValueError: As `decayed_parameters` does, and if nothing is left to decay, or a target is no share of zeros.
    """
    target_scope, target_pattern = read("target_scope", target_scope), read("target_pattern", target_pattern)
    for share in target_sparsity.values() if isinstance(target_sparsity, Mapping) else [target_sparsity]:
        if share is not None:
            check_target(share)
    if target_sparsity is not None and target_pattern is not None:
        raise ValueError(
            f"target_pattern={target_pattern!r} and target_sparsity={target_sparsity!r} exclude each other: the "
            "pattern says the share. Drop one of them"
        )
    decayed = decayed_parameters(
        model,
        decay_embeddings=decay_embeddings,
        target_modules=target_modules,
        dense_modules=dense_modules,
        target_sparsity=target_sparsity,
    )
    if not decayed:
        raise ValueError(_nothing_left(model, target_modules, dense_modules))
    others = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name not in decayed]
    given: dict[str, Any] = {"target_sparsity": target_sparsity, "target_pattern": target_pattern}
    given = with_defaults(given | {"p_norm": p_norm, "importance": importance})
    p_norm, importance = given["p_norm"], given["importance"]
    groups: list[dict[str, Any]] = [
        {"params": list(decayed.items()), "p_norm": p_norm, "lambda_p": lambda_p, "weight_decay": weight_decay}
    ]
    if p_norm_start is not None:
        groups[0] |= {"p_norm": p_norm_start, FINAL: p_norm}
    if importance != "magnitude":
        groups[0]["importance"] = importance
    if late_decay:
        groups[0]["late_decay"] = late_decay
    if s_rate != 1:
        groups[0]["s_rate"] = s_rate
    if target_sparsity is not None or target_pattern is not None:
        groups = _steered_groups(model, groups[0], target_sparsity, target_pattern, target_scope)
    if others:
        groups.append({"params": others, "p_norm": p_norm, "lambda_p": 0.0, "weight_decay": 0.0})
    return groups


def _by_entry(
    model: nn.Module, params: Mapping[str, nn.Parameter], entries: Mapping[str, float]
) -> dict[str, list[str]]:
    """Return the names of parameters by the entry of a mapping that they belong to; those of none are left out."""
    targets = {key: _named(model, [key], "target_sparsity") for key in entries if key != "*"}
    taken: dict[str, list[str]] = {key: [] for key in entries}
    for name, param in params.items():
        key = next((key for key, target in targets.items() if id(param) in target), "*")
        if key in taken:
            taken[key].append(name)
    for key, mine in taken.items():
        if not mine:
            raise ValueError(
                f"target_sparsity: the entry {key!r} has no weight, of those that decay and that an entry before it "
                "has not taken. Drop it, or put it before the entries that are less narrow"
            )
    return taken


def _steered_groups(
    model: nn.Module,
    decayed: dict[str, Any],
    target: float | Mapping[str, float] | None,
    pattern: str | None,
    scope: str,
) -> list[dict[str, Any]]:
    """Split the group of the decayed weights into those that `TargetSparsity` steers, and say to what."""
    params = dict(decayed["params"])
    pools = _by_entry(model, params, target) if isinstance(target, Mapping) else {"all": list(params)}
    groups = []
    for entry, names in pools.items():
        share = pattern_share(pattern) if pattern else target[entry] if isinstance(target, Mapping) else target
        parts: dict[tuple, list[str]] = {}
        for name in names:
            pool = name if scope == "layer" else entry
            parts.setdefault((pool, input_dim(model, name) if pattern else None), []).append(name)
        for (pool, dim), part in parts.items():
            group = decayed | {"params": [(name, params[name]) for name in part], "target_sparsity": share}
            group |= {"target_scope": scope, "target_pool": pool}
            groups.append(group | ({PATTERN: pattern, INPUT_DIM: dim} if pattern else {}))
    return groups


def input_dim(model: nn.Module, name: str) -> int:
    """Return which dimension of the matrix of a linear map, or of a stack of such, runs along its inputs."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Conv1D):
        return -2
    transposed = getattr(module, "is_transposed", None)  # of Transformers' stacks of experts
    if isinstance(transposed, bool) and getattr(module, attribute).ndim == 3:
        return -2 if transposed else -1
    if isinstance(module, nn.Linear | nn.Embedding):
        return -1
    raise ValueError(
        f"target_pattern does not go with {name}: which of its dimensions are inputs is not known of a "
        f"{type(module).__name__}. Leave it out of the decay (dense_modules)"
    )


_ALL_LINEAR = ("all-linear", "all_linear")


def _named(model: nn.Module, target_modules: str | list[str] | None, option: str) -> set[int]:
    """Return the identities of the weights of the modules that an option names.

    A module, or a weight, that is in several places goes by the names of all of them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: set[str] = set()
    if target_modules is None:
        owners = set(modules)
    elif target_modules in _ALL_LINEAR:
        linear = linear_matrices(model)
        owners = {name for name, module in modules.items() if linear & set(map(id, _own(module)))}
    else:
        for entry in [target_modules] if isinstance(target_modules, str) else target_modules:
            try:
                # A lone string is matched whole, entries of a list may also be part of a name.
                matcher = entry if isinstance(target_modules, str) else [entry]
                matched = {name for name in modules if check_target_module_exists(matcher, name)}
            except re.error as error:
                raise ValueError(f"{option}={entry!r} is not a regular expression: {error}") from None
            if not matched:
                raise ValueError(
                    f"{option}={entry!r} matches no module of the model; its modules are named like "
                    f"{', '.join(_examples(modules))}. A list takes parts of names, a string one regular "
                    'expression for whole names (or "all-linear").'
                )
            owners |= matched
    return {id(param) for name in owners for param in _own(modules[name])}


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _examples(modules: dict[str, nn.Module]) -> list[str]:
    """A few names of modules that own parameters, one per last component."""
    last = {name.rpartition(".")[2]: name for name, module in modules.items() if _own(module)}
    return list(last.values())[:8]


def _nothing_left(
    model: nn.Module, target_modules: str | list[str] | None, dense_modules: str | list[str] | None
) -> str:
    """Explain why no weight is left to decay, and what to do."""
    trainable = [name for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        return "the model has no trainable parameter: every requires_grad is False"
    message = f"no weight is left to decay among the {len(trainable)} trainable parameters ({trainable[0]}, ...): "
    if dense_modules is not None:
        return message + f"dense_modules={dense_modules!r} leaves out all others. Name fewer"
    if target_modules is not None:
        return message + (
            f"optim_target_modules={target_modules!r} matches only frozen weights, biases, norms, embeddings, "
            "adapters and the like. Name modules with trainable weight matrices, or set decay_embeddings=true"
        )
    if any(True for _ in adapter_weights(model)):
        return message + (
            "PEFT adapters are left out, and the base model is frozen. A sparse base model needs full fine-tuning; to "
            'make the adapters sparse, name them in optim_target_modules (target_modules here), e.g. ["lora_A"]'
        )
    return message + (
        "they are biases, norms, embeddings, the head or others that are no matrices of linear maps. Unfreeze such "
        "matrices, or set decay_embeddings=true"
    )
