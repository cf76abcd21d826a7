"""PAdam, the optimizer of *Decoupled Weight Decay for Any p Norm* (arXiv 2404.10824), as a `torch.optim.Optimizer`.

This file validates, owns the state and hands tensors to a backend; the arithmetic is in `update.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..sparsity import local_tensor
from . import backends
from .exemptions import CHOSEN, exempt, warn_of_vectors, with_exemptions
from .hyperparameters import (
    DEFAULT_LAMBDA_P,
    DEFAULT_P_NORM,
    HYPERPARAMETERS,
    VARIANTS,
    can_step,
    check_hyperparameters,
    check_not_all_zeros,
    named,
    plain,
    plain_group,
)
from .importance import REFERENCE, SCALE, SCALE_STATE, check_steered, count_anew, count_step, needs_scale, update_scale
from .plan import MOMENTS, Bucket, Plan, Tensors, check_dense, gradients, united
from .random_bits import Rounding, random_key
from .schedules import check_moved
from .target_options import STATE
from .update import Scalars, initial_s, prepare

logger = logging.getLogger(__name__)
_LATER_OPTIONS = ("bf16_stochastic_round", "rounding_seed", *VARIANTS)
"""Options that groups saved by earlier versions lack."""


class PAdam(Optimizer):
    """Adam with pWD, decoupled weight decay for any p norm (arXiv 2404.10824); not the "Padam" of arXiv 1806.06763.

    (That one is *partially adaptive* Adam, by Chen & Gu.) With ``u_t`` the Adam direction:

        w_t = (w_{t-1} - lr * u_t) / (1 + lr * weight_decay + lr * lambda_p * |w_{t-1}|^(p_norm - 2))

    For ``p_norm < 2`` small weights become exact zeros, and zeros are absorbing: a weight that is exactly zero stays
    zero. So a sparse model stays sparse with no mask, and a tensor that *starts* at zero can never train, which is
    refused. With ``importance="fisher"``, which is not the paper's, the size of a weight is ``|w| * sqrt(v) / mu`` in
    place of ``|w|``: what the loss would lose with it, not how large it is (see `hf_padam.optim.update`).

    The code that the paper's authors released multiplies its lambda by p: ``lambda_p`` here is ``p`` times theirs.

    Args:
        params: Parameters, named parameters, or groups of either. Every hyperparameter can be set per group. A group
            with ``weight_decay=0`` beside one that has some is exempt from decay: it gets ``lambda_p=0``, unless it
            gives one.
        lr: Learning rate, at least 0.
        betas: Decay rates of the two moment estimates, each in [0, 1).
        eps: Added to the root of the second moment; positive.
        p_norm: The norm's p, any number; 2 is AdamW's decay. Below 2 it makes zeros. The smaller it is, the faster
            small weights die and the less is taken off large ones, down to ``-inf``: what is below a size is pruned,
            all else left alone. (The size is 1 for any `lambda_p`: this is for `TargetSparsity`, which chooses it.)
        lambda_p: Strength of the p-norm decay, at least 0.
        weight_decay: Strength of the L2 decay (the paper's lambda_2), at least 0. As in AdamW, up to order lr^2.
        importance: By what the decay measures a weight: "magnitude", the paper's method, or "fisher". Under that the
            first 10 steps of a parameter do not decay, nor does a weight that has had no gradient, or its first few.
        late_decay: Take the factor from the weight after Adam's step, ``w_{t-1} - lr * u_t``, in place of
            ``w_{t-1}``. A weight that is exactly zero then leaves zero as soon as it has a gradient, so models end
            sparse only where gradients are zero, and tensors may start at zero.
        s_rate: 1, or in [2^-24, 1 - 2^-24]. Below 1 the power ``|w_{t-1}|^(p_norm - 2)`` gives way to ``s``, which
            follows it as an exponential moving average: ``s_t = (1 - s_rate) * s_{t-1} + s_rate * |w_{t-1}|^(p - 2)``,
            from ``s_0 = |w_0|^(p - 2)``. (In the paper `s` is an auxiliary variable that is at its optimum at all
            times, ``s_rate=1``.) Zero absorbs as ever. Not together with `late_decay`, "fisher" or a negative p.
        bf16_stochastic_round: Round bf16 weights and second moments up or down at random, so that the mean is exact.
            For models whose weights are bf16 (not for autocast): rounding to the nearest loses every change below
            1/256 of a weight. Other dtypes are not affected.
        rounding_seed: Of that randomness, which is a function of the seed, the step, the parameter's place in the
            optimizer, its shard and the element: nothing else needs saving. Give all processes the same.
        check_zero_start: Refuse decayed tensors that are all zeros now. If a state is to be loaded, call the method of
            this name afterwards instead: what a state says was trained may have died as a whole.
        backend: "auto", "eager", "compiled" (CPU) or "triton" (GPU); see `hf_padam.optim.backends`.

    State, created at the first step: ``step`` (a scalar), ``exp_avg`` and ``exp_avg_sq`` (like the parameter, in its
    dtype; in fp32 for fp16 parameters, whose squared gradients fp16 cannot hold). Loading keeps the saved dtype.
    Where ``s_rate < 1`` and ``lambda_p > 0``, also ``s``, in fp32 (fp64 for fp64 parameters); it is dropped where
    either ends, and starts anew.

    Raises:
        ValueError: If a hyperparameter is out of range, a decayed tensor is all zeros, or a parameter is not of real
            floating-point numbers of 16 bits or more; from ``step``, if a gradient or a state has another shape than
            its parameter, or is on another device.
        RuntimeError: If the backend cannot run where the tensors are; from ``step``, if a gradient is sparse.
    """

    _plan: Plan | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        p_norm: float = DEFAULT_P_NORM,
        lambda_p: float = DEFAULT_LAMBDA_P,
        weight_decay: float = 0.0,
        *,
        importance: str = "magnitude",
        late_decay: bool = False,
        s_rate: float = 1.0,
        bf16_stochastic_round: bool = False,
        rounding_seed: int = 0,
        backend: str = "auto",
        check_zero_start: bool = True,
    ) -> None:
        """Validate everything and register the parameters; see the class for the arguments."""
        if backend not in backends.CHOICES:
            raise ValueError(f"backend={backend!r} is not one of {', '.join(backends.CHOICES)}")
        self.backend = backend
        defaults: dict[str, Any] = dict(
            lr=lr, betas=betas, eps=eps, p_norm=p_norm, lambda_p=lambda_p, weight_decay=weight_decay
        )
        defaults |= dict(importance=importance, late_decay=late_decay, s_rate=s_rate)
        defaults |= dict(bf16_stochastic_round=bf16_stochastic_round, rounding_seed=rounding_seed)
        check_hyperparameters(defaults)
        defaults = {name: plain(value) for name, value in defaults.items()}
        groups = with_exemptions(params, weight_decay)
        super().__init__(groups, defaults)
        # Torch's defaults are in copies of the groups.
        said = {i for i, group in enumerate(groups) if isinstance(group, dict) and "lambda_p" in group}
        for group in self.param_groups:
            kept: dict[str, Any] = STATE if group.get("target_sparsity") is not None and group["lambda_p"] > 0 else {}
            kept = kept | (SCALE_STATE if group["importance"] == "fisher" else {})
            group.update({name: value for name, value in kept.items() if name not in group})
        setattr(self, CHOSEN, {i for i in said if "param_names" in self.param_groups[i]})
        self._built = True
        warn_of_vectors(self.param_groups)
        if check_zero_start:
            self.check_zero_start()
        rounded = [p for group in self.param_groups if group["bf16_stochastic_round"] for p in group["params"]]
        if rounded and not any(p.dtype == torch.bfloat16 for p in rounded):
            logger.warning("bf16_stochastic_round has no effect: none of the parameters is bf16 (autocast may be).")

    def __getstate__(self) -> dict[str, Any]:
        """Keep the backend when copied or pickled; torch keeps only state, groups and defaults."""
        return {**super().__getstate__(), "backend": self.backend, "_built": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state; groups that were saved before an option existed get its default."""
        super().__setstate__(state)
        self._plan = None
        for group in self.param_groups:
            for name in _LATER_OPTIONS:
                group.setdefault(name, self.defaults[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its hyperparameters and tensors; one may be exempt as in the constructor.

        Raises:
            ValueError: As the constructor does.
            RuntimeError: If the backend cannot run where the tensors are.
        """
        if isinstance(param_group, dict):
            param_group = plain_group(param_group)
        built = getattr(self, "_built", False)
        if built and exempt([*self.param_groups, param_group], self.defaults["weight_decay"])[-1]:
            param_group = param_group | {"lambda_p": 0.0}
        super().add_param_group(param_group)
        self._keep_here(self.param_groups[-1:])
        try:
            self._check_group(self.param_groups[-1])
            if built:
                self.check_zero_start(self.param_groups[-1:])
        except (ValueError, RuntimeError):
            del self.param_groups[-1]
            raise

    @staticmethod
    def _keep_here(groups: list[dict[str, Any]]) -> None:
        """Keep learning rates that are tensors on the host, which reads them at every step."""
        for group in groups:
            group |= {"lr": group["lr"].cpu()} if isinstance(group["lr"], Tensor) else {}

    def _check_group(self, group: dict[str, Any]) -> None:
        check_hyperparameters(group)
        self.keeps_s(group)
        for name, param in named(group):
            if not can_step(param.dtype):
                raise ValueError(
                    f"parameter {name} has dtype {param.dtype}; PAdam updates real floating-point tensors of 16 bits "
                    "or more only: view complex parameters as real ones with torch.view_as_real, leave others out"
                )
            backends.check(self.backend, param.device)

    def check_zero_start(self, groups: list[dict[str, Any]] | None = None) -> None:
        """Refuse tensors that are all zeros and would have to stay so; not those that have a state, from training.

        Args:
            groups: Of this optimizer; all by default.

        Raises:
            ValueError: Naming the first.
        """
        groups = self.param_groups if groups is None else groups
        decaying = [g for g in groups if g["lambda_p"] > 0 and g["p_norm"] < 2 and not g["late_decay"]]
        check_not_all_zeros(
            [
                (name, param)
                for group in decaying
                for name, param in named(group)
                if param.requires_grad and not self.state.get(param)
            ],
            "Put it in a parameter group with lambda_p=0, as hf_padam.get_param_groups(model) does for biases and "
            "norms",
        )

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: If a gradient is sparse, or a group has a target to which nothing steers it, or a p that
                nothing moves to where it is to end; or while a CUDA graph is being captured.
        """
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("PAdam's step cannot be captured in a CUDA graph: capture forward and backward only")
        try:
            return self._step(closure)
        except BaseException:  # what steers it is not told of a step that fails
            for group in self.param_groups:
                group |= {REFERENCE: 0.0} if REFERENCE in group else {}
            raise

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_hyperparameters(group)
        tensors, plan = self._prepare()
        for number in {bucket.group for bucket in plan.buckets}:
            check_steered(self.param_groups[number])
            check_moved(self, self.param_groups[number])
        update_scale(self, max([b.taken for b in plan.buckets if needs_scale(self.param_groups[b.group])], default=0))
        selected = {device: backends.select(self.backend, device, count) for device, count in plan.elements.items()}
        finished = 0
        try:
            for (scalars, device, _, step_key), same in groupby(plan.buckets, self._how):
                buckets = list(same)
                bucket = united(buckets, tensors)
                rounding = None if step_key is None else Rounding(step_key, bucket.keys)
                self._run(selected[device], bucket.lists(tensors), scalars, rounding, bucket.kept)
                finished += len(buckets)
            count_step(self)
        finally:
            plan.count(finished)
        return loss

    def _how(self, bucket: Bucket) -> tuple[Scalars, torch.device, tuple, int | None]:
        """Return what is done to a bucket, and where: one launch does it to all that follow one another and agree."""
        group, number = self.param_groups[bucket.group], bucket.taken + 1
        options = {name: group[name] for name in HYPERPARAMETERS + VARIANTS} | {"lr": float(group["lr"])}
        options |= {name: group[name] for name in (REFERENCE, SCALE) if name in group}
        step_key = random_key(group["rounding_seed"], number) if bucket.rounds else None
        return prepare(number, **options), bucket.device, (bucket.dtypes, bucket.follows), step_key

    def _prepare(self) -> tuple[Tensors, Plan]:
        """Return what the step is about and its plan; make a new one, and state that is missing, if it has changed."""
        params = [param for group in self.param_groups for param in group["params"]]
        grads = gradients(params)
        tensors = None if self._plan is None else self._plan.tensors(self, params, grads)
        if self._plan is None or tensors is None:
            check_dense(grads)
            count_anew(self, grads)
            for param, grad in zip(params, grads, strict=True):
                if grad is not None and not self.state[param]:
                    # Both first: where there is no memory for one, a step that is tried again begins anew.
                    moments = {name: self._new_moment(param, name) for name in MOMENTS}
                    step = torch.zeros((), dtype=torch.float32, device="cpu")
                    self.state[param].update(step=step, **moments)
            self._plan = Plan(self, grads)
            tensors = self._plan.tensors(self, params, grads)
            assert tensors is not None
        return tensors, self._plan

    def _run(
        self,
        backend: ModuleType,
        tensors: tuple[list[Tensor], ...],
        scalars: Scalars,
        rounding: Rounding | None,
        kept: dict[Any, Any],
    ) -> None:
        """Step one bucket; a fifth list of tensors, if there is one, is that of `s`."""
        backend.step(*tensors[:4], scalars, rounding, *tensors[4:], kept=kept)

    def keeps_s(self, group: dict[str, Any]) -> bool:
        """Whether a group's parameters have an auxiliary variable of their own."""
        return group["s_rate"] < 1 and group["lambda_p"] > 0

    def _new_moment(self, param: Tensor, name: str) -> Tensor:
        """Create the state `name` of a parameter."""
        dtype = torch.float32 if param.dtype == torch.float16 else param.dtype
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def new_s(self, param: Tensor, p_norm: float) -> Tensor:
        """Create the auxiliary variable of a parameter, sharded as it is."""
        dtype = torch.promote_types(param.dtype, torch.float32)
        s = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        local_tensor(s).copy_(initial_s(local_tensor(param), p_norm))
        return s

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups; what schedules have set to NumPy's numbers, in Python's."""
        state = super().state_dict()
        return state | {"param_groups": [plain_group(group) for group in state["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, in the dtype they were saved in; torch would cast state to the parameter's dtype.

        The state may be Adam's or AdamW's: what their groups do not say remains as it is here.

        Raises:
            ValueError: If the state is of other groups, or of the same named parameters in another order: torch goes
                by place, and would give it to other parameters. Or if it lacks what this optimizer goes on from.
        """
        seen: dict[str, Any] = {}
        before = [dict(group) for group in self.param_groups]

        def remember(_: Optimizer, incoming: dict[str, Any]) -> None:
            seen.update(incoming)  # registered last, so it sees what every other hook has made of the dict
            saved, own = (
                [name for group in groups for name in group.get("param_names", ())]
                for groups in (incoming["param_groups"], self.param_groups)
            )
            if saved != own and sorted(saved) == sorted(own):
                raise ValueError(
                    "loaded state dict has the parameters of a parameter group in another order or group, from "
                    f"{next(a for a, b in zip(saved, own, strict=True) if a != b)} on. If it is of hf_padam before "
                    "0.2, that version chose other weights to decay: finish the run with it"
                )
            if any(group.get("maximize") for group in incoming["param_groups"]):
                raise ValueError("the loaded state is of an optimizer with maximize=True, and PAdam minimizes")
            for state in incoming["state"].values():
                missing = [name for name in ("step", *MOMENTS) if state and name not in state]
                if missing:
                    raise ValueError(
                        f"the loaded state has no {missing[0]}, but {', '.join(state)}: it is of another optimizer. "
                        "PAdam goes on from its own states, and from those of Adam and AdamW"
                    )

        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._keep_here(self.param_groups)
        for group, own, saved in zip(self.param_groups, before, seen["param_groups"], strict=True):
            if "p_norm" not in saved:  # another optimizer's
                group |= {name: value for name, value in own.items() if name not in saved}
        params = [p for group in self.param_groups for p in group["params"]]
        saved_ids = [i for group in seen["param_groups"] for i in group["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            state = self.state.get(param, {})
            state.pop("max_exp_avg_sq", None)  # AMSGrad's, which nothing would use
            for name, value in seen["state"].get(saved_id, {}).items():
                if name in (*MOMENTS, "s"):
                    if value.dtype != state[name].dtype:
                        state[name] = value.to(device=param.device, copy=True)
                    if name in MOMENTS:
                        state[name] = self._adopt(param, name, state[name])
                elif name == "step":  # on a GPU, reading it would wait for the GPU
                    state[name] = torch.as_tensor(value).float().cpu().clone()

    def _adopt(self, param: Tensor, name: str, value: Tensor) -> Tensor:
        """Return a loaded moment as this optimizer stores it."""
        if hasattr(local_tensor(value), "codes"):
            raise ValueError('the loaded state has 8-bit moments: continue with PAdam8bit (optim="padam_8bit")')
        return value


def unwrap(optimizer: Any) -> Any:
    """Return the optimizer that accelerate, known by an attribute of its own, has wrapped; any other as it is."""
    while hasattr(optimizer, "accelerator_state"):
        optimizer = optimizer.optimizer
    return optimizer
