"""The PAdam update of *Decoupled Weight Decay for Any p Norm* (arXiv 2404.10824): the one place that defines it.

The penalty is ``R(w) = (lambda_p / p) * sum |w_i|^p + (lambda_2 / 2) * sum w_i^2``. With ``u_t`` the Adam direction
and ``lr`` the learning rate, the step is Adam's, shrunk by a factor that depends on the weight *before* the step:

    w_t = (w_{t-1} - lr * u_t) * r(x),  r(x) = 1 / (1 + lr * lambda_2 + lr * lambda_p * x^(p - 2)),  x = c * |w_{t-1}|

For ``p < 2`` the power grows without bound as ``x`` vanishes, so small weights are driven to zero and an exact zero
stays zero (IEEE arithmetic gives ``r(0) = 1 / inf = 0``, no special case needed). Any p will do, negative ones too:
the smaller it is, the less survivors are shrunk, and at ``p = -inf`` what is below a size dies and all else is let be.

What ``c`` is, the importance says:

* "magnitude": 1, the paper's method.
* "fisher": ``sqrt(v_t) / mu``, with ``v_t`` Adam's second moment (bias-corrected), the diagonal of the empirical
  Fisher matrix. ``x^2`` is then the saliency of Optimal Brain Damage (LeCun et al., 1990), what the loss would lose
  with the weight. The scalar ``mu`` makes the mean of ``x^2`` that of ``w^2``: lambda_p keeps its meaning, and the
  scale of the loss has none. No evidence is not unimportance: while a weight's moments are young, it is left alone.

Two variants of where the factor is taken from, at most one of them at a time:

* late decay: ``r`` of ``w_{t-1} - lr * u_t``, that is of the weight after Adam's step. An exact zero then does not
  absorb while its gradient lives: Adam's step moves it first, and the factor of that is not zero.
* s-dynamics: the paper's auxiliary variable ``s`` stands for ``|w|^(p - 2)`` in the penalty, and takes that value at
  once. Here it may follow at a rate of its own, as an exponential moving average, which serves as the definition:

      s_t = (1 - s_rate) * s_{t-1} + s_rate * |w_{t-1}|^(p - 2),    r_t = 1 / (1 + lr * lambda_2 + lr * lambda_p * s_t)

  with ``s_0 = |w_0|^(p - 2)``. The ``s`` of an exact zero is infinite and stays so: zero absorbs.

This module imports torch alone.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FLUSH_THRESHOLD = 2.0**-100
"""Where pWD with p < 2 acted, a new weight smaller than this in magnitude becomes an exact zero. Dying weights would
otherwise linger among the subnormal numbers, which devices round differently and CPUs process slowly."""

_SMALLEST_NORMAL = 2.0**-126
"""A decay ``lr * lambda_p`` below fp32's normal range is taken as zero: it changes no weight, and 0 * inf is NaN."""

LARGEST = 2.0**127
"""Nothing that a size is made of may be infinite in fp32, nor vanish if positive: 0 * inf is NaN."""

IMPORTANCES = ("magnitude", "fisher")
"""By what the p-norm decay measures a weight."""

YOUNG_STEPS = 10
"""Under "fisher" nothing decays in so many first steps: a root of a second moment is then known to 1 / sqrt(2 * 10),
some 22 %, and the few tiny gradients that a weight may begin with no longer stand for all that it will have."""

YOUNG_RATIO = 2.0
"""Under "fisher" a weight is left alone in a step if its squared first moment is so many times its second moment from
before the step, or its squared gradient four times as many. In the long run the mean of gradients is no larger than
their root mean square, and few are three times as large. Both are so while a weight has had no gradient before, or
just a few: in an expert that was not routed to, for a token that was not seen."""


_STEEP = 2.0**100
"""Powers beyond are all the same to fp32, whose products with this one are finite."""


class Form(enum.Enum):
    """Which expression of ``x^(p - 2)`` applies: known before the weights are, so backends may specialise on it."""

    NONE = "lr * lambda_p = 0: no p-norm decay, whatever the weight"
    HOLD = "zeros stay zero, and nothing else decays"
    HARD = "p = -inf: what is smaller than the reference size dies"
    MINUS_ONE = "p = -1"
    ZERO = "p = 0"
    HALF = "p = 1/2"
    ONE = "p = 1"
    THREE_HALVES = "p = 3/2"
    TWO = "p = 2: the power is 1"
    BELOW_TWO = "any other p < 2"
    ABOVE_TWO = "p > 2"

    @property
    def makes_zeros(self) -> bool:
        """Whether pWD acts and zero is absorbing: ``p < 2`` and ``lr * lambda_p > 0``."""
        return self not in (Form.NONE, Form.TWO, Form.ABOVE_TWO)


_FORMS = {
    -1.0: Form.MINUS_ONE, 0.0: Form.ZERO, 0.5: Form.HALF, 1.0: Form.ONE, 1.5: Form.THREE_HALVES, 2.0: Form.TWO,
}  # fmt: skip


class Scalars(NamedTuple):
    """Everything of one step that does not depend on the element. Computed in float64, once per group and step.

    The fields behind `form` are Python floats; a backend may hand `update_` 0-dim tensors in their place.
    """

    form: Form
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float  # lr / (1 - beta1^t)
    inverse_root_correction2: float  # 1 / sqrt(1 - beta2^t)
    eps: float
    shrink: float  # 1 + lr * lambda_2
    decay: float  # lr * lambda_p, or 1 where sizes are relative
    exponent: float  # p - 2
    size_scale: float  # turns |w|, or |w| * sqrt(second moment), into x, or into x relative to a reference size
    young: float  # a weight is young whose first moment, squared and multiplied by this, exceeds its second moment
    late_decay: bool = False  # backends specialise on it, as on `form`
    fisher: bool = False  # likewise
    s_rate: float = 1.0  # below 1, and used, only where `s` is given

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers that every step needs: all but `form`, `late_decay`, `fisher` and `s_rate`."""
        return self[1:-3]


def reference_size(p_norm: float, decay: float) -> float:
    """Return the x at which ``decay * x^(p - 2)`` is 1, for p < 2: one step kills what is well below it.

    Args:
        p_norm: p.
        decay: ``lr * lambda_p``, positive.
    """
    return math.exp(math.log(decay) / (2 - p_norm))


def prepare(
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    p_norm: float,
    lambda_p: float,
    weight_decay: float,
    importance: str = "magnitude",
    importance_scale: float = 1.0,
    reference: float | None = None,
    late_decay: bool = False,
    s_rate: float = 1.0,
) -> Scalars:
    """Compute the scalars of step number `step` (1 for the first).

    Args:
        step: Of the bias corrections.
        lr: See `PAdam`.
        betas: See `PAdam`.
        eps: See `PAdam`.
        p_norm: See `PAdam`.
        lambda_p: See `PAdam`.
        weight_decay: See `PAdam`.
        importance: One of `IMPORTANCES`.
        importance_scale: Under "fisher", mu.
        reference: Takes the place of `lambda_p`, for p < 2: the x at which ``lr * lambda_p * x^(p - 2)`` is 1. At 0
            zeros stay zero and nothing else decays. (For p far below 0 neither lambda_p nor the power is a number.)
        late_decay: See `PAdam`.
        s_rate: See `PAdam`.
    """
    beta1, beta2 = (float(beta) for beta in betas)  # a scalar of NumPy would carry its own precision along
    lr, eps, p_norm, lambda_p, weight_decay, s_rate = map(float, (lr, eps, p_norm, lambda_p, weight_decay, s_rate))
    fisher = importance == "fisher"
    decay, scale = lr * lambda_p, 1.0
    if decay < _SMALLEST_NORMAL and reference is None:
        form, decay = Form.NONE, 0.0
    elif reference == 0 or (fisher and step <= YOUNG_STEPS):
        form, decay = (Form.HOLD if p_norm < 2 else Form.NONE), 0.0
    else:
        if reference is None and p_norm < 0:
            reference = reference_size(p_norm, decay)
        if reference is not None:
            decay, scale = 1.0, 1 / reference
        form = Form.ABOVE_TWO if p_norm > 2 else Form.BELOW_TWO
        if s_rate == 1:  # `s` needs the power itself, which the other forms go without
            form = Form.HARD if p_norm == -math.inf else _FORMS.get(p_norm, form)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    if fisher and form not in (Form.NONE, Form.HOLD):
        scale *= correction2**-0.5 / importance_scale
    return Scalars(
        form=form,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        step_size=lr / correction1,
        inverse_root_correction2=correction2**-0.5,
        eps=eps,
        shrink=1 + lr * weight_decay,
        decay=decay,
        exponent=min(max(p_norm - 2, -_STEEP), _STEEP),
        size_scale=min(max(scale, _SMALLEST_NORMAL), LARGEST),
        young=correction2 / YOUNG_RATIO,
        late_decay=late_decay and form is not Form.NONE,  # else a backend would build a kernel that does the same
        fisher=fisher and form not in (Form.NONE, Form.HOLD),
        s_rate=s_rate,
    )


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to one of the two neighbours in bf16, the nearer one more often, so that the mean is `x`.

    Args:
        x: fp32; zeros, infinities and NaN stay what they are.
        bits: int32 in [0, 2^16), uniformly distributed.

    Returns:
        bf16 numbers, in fp32.
    """
    rounded = ((x.view(torch.int32) + bits) & -0x10000).view(torch.float32)
    return torch.where(x == x, rounded, x)  # NaN: not isnan, which does not vectorise on CPUs


def exact_power(x: Tensor, y: float) -> Tensor:
    """Return ``x ** y``, in fp64: an exponent rounded to fp32 would be felt, its error being magnified by log(x)."""
    if x.device.type == "mps":  # has no fp64
        return torch.pow(x, y)
    return torch.pow(x.double(), y).to(x.dtype)


def inverse_factor(
    weight: Tensor,
    scalars: Scalars,
    power: Callable[[Tensor, float], Tensor] = exact_power,
    s: Tensor | None = None,
    root: Tensor | None = None,
    young: Tensor | None = None,
) -> Tensor:
    """Return ``1 / r(x) = 1 + lr * lambda_2 + lr * lambda_p * x^(p - 2)``, infinite where ``r`` is zero.

    Args:
        weight: The weights before the step (after it, if the decay is late), in the dtype of the arithmetic.
        scalars: From `prepare`.
        power: ``power(x, y) = x ** y`` for ``x >= 0`` and a scalar ``y``, infinite at ``x = 0`` for negative ``y``.
        s: What takes the place of ``|weight|^(p - 2)``, if it does not follow at once: see `follow`.
        root: Under "fisher" the root of the second moments.
        young: Under "fisher", which weights have moments that are no evidence yet, and do not decay.
    """
    shrink, decay = scalars.shrink, scalars.decay
    if scalars.form is Form.NONE:
        return torch.ones_like(weight) * shrink
    if s is not None:
        return shrink + decay * s
    magnitude = weight.abs()
    if scalars.form is Form.HOLD:
        return torch.where(magnitude == 0, math.inf, torch.ones_like(weight) * shrink)
    # In this order, and where squares of gradients have overflown, no zero meets an infinity.
    x = (magnitude if root is None else magnitude * root.clamp(max=LARGEST)) * scalars.size_scale
    match scalars.form:
        case Form.HARD:
            decayed = torch.where(x < 1, math.inf, torch.zeros_like(x))
        case Form.MINUS_ONE:
            inverse = 1 / x
            decayed = (decay * inverse) * (inverse * inverse)
        case Form.ZERO:
            inverse = 1 / x
            decayed = (decay * inverse) * inverse
        case Form.HALF:
            decayed = decay / (x * x.sqrt())
        case Form.ONE:
            decayed = decay / x
        case Form.THREE_HALVES:
            decayed = decay / x.sqrt()
        case Form.TWO:
            decayed = torch.ones_like(weight) * decay
        case _:
            decayed = decay * power(x, scalars.exponent)
    if young is not None:  # zeros stay zero all the same
        decayed = torch.where(young & (magnitude > 0), 0.0, decayed)
    return shrink + decayed


def initial_s(weight: Tensor, p_norm: float) -> Tensor:
    """Return ``s_0 = |weight|^(p - 2)``, in the dtype of the arithmetic: infinite at zero for p < 2."""
    return exact_power(weight.to(torch.promote_types(weight.dtype, torch.float32)).abs(), p_norm - 2)


def follow(s: Tensor, weight: Tensor, scalars: Scalars, power: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Return ``(1 - s_rate) * s + s_rate * |weight|^(p - 2)``; as written, infinities never meet their like."""
    return (1 - scalars.s_rate) * s + scalars.s_rate * power(weight.abs(), scalars.exponent)


def update_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Scalars,
    power: Callable[[Tensor, float], Tensor] = exact_power,
    bits: Tensor | None = None,
    s: Tensor | None = None,
) -> None:
    """Take one PAdam step on one tensor, in place.

    Args:
        param: The weights; read and written. Any shape; any real floating-point dtype.
        grad: Their gradient, same shape; read only.
        exp_avg: First moment, same shape; read and written.
        exp_avg_sq: Second moment, same shape; read and written.
        scalars: From `prepare`.
        power: See `inverse_factor`.
        bits: From `random_bits`, same shape, to round bf16 weights and second moments stochastically. (First moments
            change by more than a rounding error a step; they are always rounded to the nearest.)
        s: The auxiliary variable, same shape, if `scalars.s_rate` is below 1; read and written.

    The arithmetic is fp32 for 16-bit and fp32 tensors, fp64 for fp64 ones.
    """
    dtype = torch.promote_types(param.dtype, torch.float32)
    weight, gradient = param.to(dtype), grad.to(dtype)
    # 1. Adam's moments. (The other common form, m + (1 - beta1) * (g - m), overflows for huge gradients.)
    first = scalars.beta1 * exp_avg.to(dtype) + scalars.one_minus_beta1 * gradient
    before = exp_avg_sq.to(dtype)
    second = scalars.beta2 * before + scalars.one_minus_beta2 * gradient * gradient
    # 2. Adam's step, bias corrections folded into the scalars.
    root = second.sqrt()
    stepped = weight - scalars.step_size * (first / (root * scalars.inverse_root_correction2 + scalars.eps))
    # 3. pWD: shrink by the factor of the weight before the step; or after it; or of what follows the weight.
    if s is not None:
        s.copy_(following := follow(s.to(dtype), weight, scalars, power))
        new = stepped / inverse_factor(weight, scalars, power, following)
    else:
        measured = stepped if scalars.late_decay else weight
        young = None
        if scalars.fisher:
            young = torch.maximum(first * first, 0.25 * gradient * gradient) * scalars.young >= before
        new = stepped / inverse_factor(measured, scalars, power, root=root if scalars.fisher else None, young=young)
    # 4. What is as good as dead is zero, on every device alike.
    if scalars.form.makes_zeros:
        new = torch.where(new.abs() < FLUSH_THRESHOLD, 0.0, new)
    # 5. Back into the storage dtype.
    if bits is not None and param.dtype == torch.bfloat16:
        new = round_stochastically(new, bits & 0xFFFF)
    if bits is not None and exp_avg_sq.dtype == torch.bfloat16:
        second = round_stochastically(second, (bits >> 16) & 0xFFFF)
    param.copy_(new)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
