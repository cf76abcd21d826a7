"""pWD on any optimizer: the decay of arXiv 2404.10824 around the step of SGD, AdamW, Adafactor, Lion, Muon, ...

The paper derives pWD for adaptive optimizers at large: Adam's direction is exchangeable. What an optimizer makes of a
weight is shrunk by the factor of the weight before the step. The mathematics is in `update.py`; this file hangs it on
the hooks that every `torch.optim.Optimizer` has.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sparsity import local_tensor
from .exemptions import CHOSEN, exempt, warn_of_vectors
from .hyperparameters import (
    DEFAULT_LAMBDA_P,
    DEFAULT_P_NORM,
    can_step,
    check_hyperparameters,
    check_not_all_zeros,
    named,
    plain,
)
from .importance import SCALE, SCALE_STATE, count_anew, count_step, needs_scale, update_scale
from .padam import PAdam, unwrap
from .plan import gradients
from .schedules import check_moved
from .update import FLUSH_THRESHOLD, YOUNG_STEPS, Form, Scalars, inverse_factor, prepare

_NOT_OURS: dict[str, Any] = {"betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
"""What `prepare` takes besides, and the decay does not depend on: these are the business of the optimizer."""

_attached: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def add_pnorm_decay(
    optimizer: Optimizer,
    *,
    p_norm: float = DEFAULT_P_NORM,
    lambda_p: float = DEFAULT_LAMBDA_P,
    importance: str = "magnitude",
    params: Mapping[str, Tensor] | Iterable[Tensor | tuple[str, Tensor]] | None = None,
) -> None:
    """Make every later ``optimizer.step()`` end with pWD, for any torch optimizer whose groups have an `lr`.

    With ``w_t'`` what the optimizer makes of ``w_{t-1}``, its own L2 decay included:

        w_t = w_t' / (1 + lr * lambda_p * |w_{t-1}|^(p_norm - 2))

    and magnitudes below 2^-100 become zero if p_norm < 2, as with `PAdam`. `p_norm` and `lambda_p` become keys of the
    optimizer's parameter groups: settable per group, changed by schedules, part of `state_dict`. The arithmetic is
    fp32 (fp64 for fp64 weights), from the result as the optimizer has stored it: bf16 weights are rounded twice.

    A parameter without a gradient is left alone, and so is a step that loss scaling skips. During a step, the weights
    that decay are held twice; nothing is kept between steps.

    Attach it once the optimizer is built, before schedules are and before a state is loaded, unless nothing changes in
    the number of groups. torch copies and pickles optimizers without their hooks: attach it to the copy too. An
    optimizer that keeps a second copy of its weights and writes them over the first undoes the decay.

    Args:
        optimizer: Any but `PAdam`; if accelerate has wrapped it, the one inside.
        p_norm: See `PAdam`.
        lambda_p: See `PAdam`.
        importance: See `PAdam`; "fisher" is for optimizers that keep `exp_avg_sq`, AdamW and its relatives.
        params: The parameters that decay; with their names, such as ``decayed_parameters(model)``, errors name them.
            Without it all do, biases, norms and embeddings too, but for groups with ``weight_decay=0`` beside one that
            has some. Groups that hold others too are divided in two; others get ``lambda_p=0``.

    Raises:
        TypeError: If `optimizer` is no torch optimizer.
        ValueError: If the optimizer has pWD already, or no learning rate (Adafactor's ``relative_step=True``); if a
            number is out of range, a parameter not one of the optimizer's, not floating-point or all zeros; if
            "fisher" is asked of an optimizer without second moments; if a schedule has been built over a group to be
            divided.
        RuntimeError: From ``step``, if the gradient of what decays is sparse, or a group has a p that nothing moves to
            where it is to end; or while a CUDA graph is being captured.
    """
    inner, p_norm, lambda_p = unwrap(optimizer), plain(p_norm), plain(lambda_p)
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"a p-norm decay cannot be added to {type(inner).__name__}, which is no torch.optim.Optimizer: add it to "
            "the torch optimizer that it steps, before DeepSpeed or accelerate prepare that"
        )
    kind = type(inner).__name__
    if isinstance(inner, PAdam):
        raise ValueError(f"{kind} has a p-norm decay of its own: set p_norm and lambda_p of its parameter groups")
    if inner in _attached:
        raise ValueError(f"this {kind} has a p-norm decay already: set p_norm and lambda_p of its parameter groups")
    names: dict[int, str] | None = None
    if params is not None:
        items = params.items() if isinstance(params, Mapping) else params
        pairs = [item if isinstance(item, tuple) else ("", item) for item in items]
        if not pairs:
            raise ValueError("params is empty, so nothing would decay: name parameters, or leave params out for all")
        names = {id(param): name for name, param in pairs}
        own = {id(param) for group in inner.param_groups for param in group["params"]}
        foreign = [name or f"one of shape {tuple(param.shape)}" for name, param in pairs if id(param) not in own]
        if foreign:
            raise ValueError(
                f"{len(foreign)} of the {len(pairs)} parameters in params ({foreign[0]}, ...) are not in this {kind}: "
                "give it the parameters to decay too, and add the decay before they are wrapped or sharded"
            )
    if importance == "fisher" and _keeps_second_moments(inner) is False:
        raise ValueError(_NO_SECOND_MOMENTS.format(kind))
    spared = exempt(inner.param_groups, 0.0) if params is None else [False] * len(inner.param_groups)
    divided = [
        part
        for group, spare in zip(inner.param_groups, spared, strict=True)
        for part in _divide(group, names, p_norm, 0.0 if spare else lambda_p, importance)
    ]
    for group in divided:
        _check_group(group, kind, names or {})
    warn_of_vectors(divided)
    setattr(inner, CHOSEN, set() if params is None else set(range(len(divided))))
    inner.param_groups[:] = divided
    _PNormDecay(inner, p_norm, lambda_p if params is None else 0.0, importance)
    _attached.add(inner)


def has_pnorm_decay(optimizer: Any) -> bool:
    """Whether `add_pnorm_decay` has been called for an optimizer, or for the one that accelerate has wrapped."""
    inner = unwrap(optimizer)
    return isinstance(inner, Optimizer) and inner in _attached


class _PNormDecay:
    """The hooks of one optimizer, and what they keep during a step."""

    def __init__(self, optimizer: Optimizer, p_norm: float, lambda_p: float, importance: str) -> None:
        self._defaults = {"p_norm": p_norm, "lambda_p": lambda_p, "importance": importance}  # of groups added later
        self._groups = len(optimizer.param_groups)
        self._kept: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        self._before_loading: list[dict[str, Any]] = []
        self._taken: dict[int, tuple[Any, int]] = {}  # steps of the parameters under "fisher", and what said so
        self._skips, self._counted = False, False
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_load_state_dict_pre_hook(self._remember)
        optimizer.register_load_state_dict_post_hook(self._complete)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # What an earlier step has left that ended in an error is forgotten. If the step calls the hooked one of its
        # parent class, the decay is part of that.
        self._kept, self._counted = [], False
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a step with a p-norm decay cannot be captured in a CUDA graph: do without capturable")
        self._adopt_new_groups(optimizer)
        for group in optimizer.param_groups:
            check_moved(optimizer, group)
        found_inf = getattr(optimizer, "found_inf", None)  # GradScaler leaves it to fused optimizers to skip the step
        self._skips = found_inf is not None and bool(found_inf)
        if self._skips:
            return
        count_anew(optimizer, (param.grad for group in optimizer.param_groups for param in group["params"]))
        states = [(p, optimizer.state.get(p)) for g in optimizer.param_groups if needs_scale(g) for p in g["params"]]
        update_scale(optimizer, max([self._steps(param, state) for param, state in states if state], default=0))
        closure = _closure(args, kwargs)
        for group in optimizer.param_groups:
            decays = decay_scalars(group, YOUNG_STEPS + 1).form is not Form.NONE
            for param in group["params"]:
                # A closure computes the gradients later.
                if decays and (_has_gradient(param) or closure and param.requires_grad):
                    self._kept.append((param, local_tensor(param).clone(), group))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = _closure(args, kwargs)
        counts, self._counted = not (self._skips or self._counted), True
        if counts:
            count_step(optimizer)
        for group in optimizer.param_groups if counts else ():
            for param in group["params"] if group["importance"] == "fisher" else ():
                if param.grad is not None and "step" in optimizer.state[param]:
                    self._steps(param, optimizer.state[param], more=1)
        while self._kept:
            param, before, group = self._kept.pop()
            if not closure or _has_gradient(param):
                state = optimizer.state[param]
                _decay_(param, before, group, state, self._steps(param, state) if "step" in state else 0)

    def _steps(self, param: Tensor, state: Mapping[str, Any], more: int = 0) -> int:
        """Return how many steps a parameter has taken, of which so many are new to this.

        A fused optimizer counts them on the device, for which the host would wait: it is asked for the first only.
        """
        seen, number = self._taken.get(id(param), (None, 0))
        known = seen is state["step"] and isinstance(seen, Tensor)
        number = number + more if known else int(state["step"])
        self._taken[id(param)] = state["step"], number
        return number

    def _adopt_new_groups(self, optimizer: Optimizer) -> None:
        """Complete and check the groups that were added since the last step."""
        for number, group in enumerate(optimizer.param_groups[self._groups :], self._groups):
            if exempt(optimizer.param_groups[: number + 1], 0.0)[-1]:
                group["lambda_p"] = 0.0
            for name, value in self._defaults.items():
                group.setdefault(name, value)
            _check_group(group, type(optimizer).__name__, {})
        self._groups = max(self._groups, len(optimizer.param_groups))  # DeepSpeed shows one group at a time

    def _remember(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._adopt_new_groups(optimizer)
        self._before_loading = [{name: group[name] for name in self._defaults} for group in optimizer.param_groups]

    def _complete(self, optimizer: Optimizer) -> None:
        """Give groups that were saved without a p-norm decay the values that they had here."""
        for group, values in zip(optimizer.param_groups, self._before_loading, strict=True):
            for name, value in values.items():
                group.setdefault(name, value)


def _decay_(param: Tensor, before: Tensor, group: dict[str, Any], state: Mapping[str, Any], step: int) -> None:
    """Shrink a parameter by the factor of what it was before its step of this number, in place."""
    weight = local_tensor(param)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if group["importance"] == "fisher":
        if not _has_second_moments(param, state):
            raise ValueError(_NO_SECOND_MOMENTS.format("this optimizer"))
        second = local_tensor(state["exp_avg_sq"]).to(dtype)
        scalars = decay_scalars(group, step)
        # As in `update_`, but for the second moment of before the step, which nothing has kept.
        latest = [0.25 * grad.to(dtype).square() for grad in gradients([param]) if grad is not None]
        latest += [local_tensor(state["exp_avg"]).to(dtype).square()] if "exp_avg" in state else []
        young = second == 0
        for squared in latest:
            young |= squared * scalars.young >= second
        inverse = inverse_factor(before.to(dtype), scalars, root=second.sqrt(), young=young)
    else:
        scalars = decay_scalars(group)
        inverse = inverse_factor(before.to(dtype), scalars)
    new = weight.to(dtype) / inverse
    if scalars.form.makes_zeros:
        new = torch.where(new.abs() < FLUSH_THRESHOLD, 0.0, new)
    weight.copy_(new)


def decay_scalars(values: Mapping[str, Any], step: int = 1) -> Scalars:
    """Check `lr`, `p_norm`, `lambda_p` and `importance`, of a parameter group for example, and prepare a step's decay.

    Args:
        values: These, and under "fisher" the group's `betas` and the scale of the importance.
        step: Its number, on which the decay under "fisher" depends.

    Raises:
        ValueError: As `check_hyperparameters` does.
    """
    options: dict[str, Any] = {name: values[name] for name in ("lr", "p_norm", "lambda_p")} | _NOT_OURS
    options["importance"] = values.get("importance", "magnitude")
    check_hyperparameters(options)
    if options["importance"] == "fisher":
        beta2 = values["betas"][1] if "betas" in values else 0.0
        options |= {"betas": (0.0, beta2), SCALE: values.get(SCALE, 1.0)}
    return prepare(step, **options)


def check_finite(p_norm: float) -> None:
    """Check the p of a decay that nothing steers.

    Raises:
        ValueError: If it is -inf: all that is smaller than 1 would be pruned.
    """
    if p_norm == -math.inf:
        raise ValueError("p_norm=-inf needs a target_sparsity, to which PAdam alone is steered: give a finite p_norm")


_NO_SECOND_MOMENTS = (
    'importance="fisher" needs second moments, and {} keeps none (exp_avg_sq, of every weight, and step, of every '
    'tensor): take AdamW or one of its relatives, optim="padam", or importance="magnitude"'
)


def _has_second_moments(param: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether there is one for every weight, that tells small from none.

    Not so where gradients are projected, their squares factored, or these packed in 8 bits or 4 (but by `PAdam8bit`).
    """
    whole = state.keys() >= {"exp_avg_sq", "step"} and state["exp_avg_sq"].shape == param.shape
    return whole and not hasattr(local_tensor(state["exp_avg_sq"]), "codes")


def _keeps_second_moments(optimizer: Optimizer) -> bool | None:
    """Whether an optimizer's state has second moments: seen there, or on a small twin; None if neither can be had."""
    if type(optimizer).__module__.startswith("torchao."):  # small tensors, as of the twin below, are not packed
        return False
    states = [(param, state) for param, state in optimizer.state.items() if state and isinstance(param, Tensor)]
    if not states:
        known = inspect.signature(type(optimizer).__init__).parameters
        param = torch.nn.Parameter(torch.ones(4, 4))
        param.grad = torch.ones(4, 4)
        try:
            twin = type(optimizer)([param], **{k: v for k, v in optimizer.defaults.items() if k in known})
            twin.step()
        except Exception:  # other libraries' constructors and devices: the first step will tell
            return None
        states = [(param, twin.state[param])]
    return _has_second_moments(*states[0])


def _divide(
    group: dict[str, Any], names: dict[int, str] | None, p_norm: float, lambda_p: float, importance: str
) -> list[dict[str, Any]]:
    """Return a group as one or two, of which the first decays if any does. State is kept by parameter, so it stays."""
    decays = [names is None or id(param) in names for param in group["params"]]
    kinds = [kind for kind in (True, False) if kind in decays] or [names is None]
    if len(kinds) == 2 and "initial_lr" in group:
        raise ValueError(
            "params divides a parameter group, which a learning-rate schedule counts already: add the decay before "
            "the schedule is built, or build the optimizer with the parameters that decay in groups of their own"
        )
    parts = []
    for kind in kinds:
        part = group | {"p_norm": p_norm, "lambda_p": lambda_p if kind else 0.0, "importance": importance}
        part |= SCALE_STATE if importance == "fisher" else {}
        for key in ("params", "param_names"):  # aligned lists
            if key in group:
                part[key] = [item for item, decay in zip(group[key], decays, strict=True) if decay is kind]
        parts.append(part)
    return parts


def _check_group(group: dict[str, Any], kind: str, names: dict[int, str]) -> None:
    """Check a group's hyperparameters, and the tensors that decay."""
    if group.get("lr") is None:
        raise ValueError(
            f"the parameter groups of this {kind} have no learning rate (lr), which the strength of the decay goes "
            "with: give it one (Transformers' Adafactor: relative_step=False, lr=...)"
        )
    decay_scalars(group)
    if group["lambda_p"] == 0:
        return
    check_finite(group["p_norm"])
    decays: list[tuple[str, Tensor]] = []
    for own_name, param in named(group):
        name = names.get(id(param)) or own_name
        if not can_step(param.dtype):
            raise ValueError(
                f"parameter {name} has dtype {param.dtype}; a p-norm decay is for real floating-point tensors of 16 "
                "bits or more only: leave it out of params"
            )
        if group["p_norm"] < 2 and param.requires_grad:
            decays.append((name, param))
    cure = "Leave it out of the decay, for example with params=hf_padam.decayed_parameters(model).items()"
    check_not_all_zeros(decays, cure)


def _has_gradient(param: Tensor) -> bool:
    if param.grad is not None and param.grad.layout is not torch.strided:
        raise RuntimeError(
            f"a p-norm decay needs dense gradients; one of shape {tuple(param.shape)} is {param.grad.layout}. Set "
            "sparse=False on the embedding, or leave its weight out of params"
        )
    return param.grad is not None


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the closure that ``step`` was called with; `args` begins with the optimizer."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)
