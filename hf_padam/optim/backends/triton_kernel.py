"""The one transcription of `update.py`: the same steps, with the same numbers, for one block of one tensor.

A launch covers many tensors. A table holds the addresses of their data, and each program looks up which tensor, and
which part of it, is its own. Every element is read once and written once; the arithmetic is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..random_bits import MULTIPLIERS
from ..update import FLUSH_THRESHOLD, LARGEST, Form

NONE, HOLD, HARD, MINUS_ONE, ZERO, HALF, ONE, THREE_HALVES, TWO, BELOW_TWO, ABOVE_TWO = (
    tl.constexpr(i) for i in range(len(Form))
)
FORM_NUMBER = {form: i for i, form in enumerate(Form)}
_FLUSH = tl.constexpr(FLUSH_THRESHOLD)
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_MANTISSA = tl.constexpr(0x007FFFFF)
_ONE = tl.constexpr(0x3F800000)
_UPPER_HALF = tl.constexpr(0xFFFF0000)
_MULTIPLIER1, _MULTIPLIER2, _MULTIPLIER3 = (tl.constexpr(m) for m in MULTIPLIERS)


@triton.jit
def power(x, y, y_upper, y_lower, at_zero):
    """Return ``x ** y`` for ``x >= 0``, as `fast_power` does: ``2^whole * 2^(rest + y * log2(m))``.

    A plain ``exp2(y * log2(x))`` loses the digits that the size of the exponent takes, a hundredfold error at 1e-30.
    """
    bits = x.to(tl.int32, bitcast=True)
    e = ((bits >> 23) - 127).to(tl.float32)
    m = ((bits & _MANTISSA) | _ONE).to(tl.float32, bitcast=True)
    product = y_upper * e
    whole = tl.floor(product + 0.5)
    exact = tl.minimum(tl.maximum(whole, -126.0), 127.0)  # neither 0 nor inf, which rest's power may turn into NaN
    rest = (product - whole) + (y_lower * e + y * tl.log2(m)) + (whole - exact)
    scale = ((exact.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < _SMALLEST_NORMAL, at_zero, scale * tl.exp2(rest))


@triton.jit
def inverse_factor(
    weight,
    root,
    young,
    shrink,
    decay,
    size_scale,
    y,
    y_upper,
    y_lower,
    at_zero,
    FORM: tl.constexpr,
    FISHER: tl.constexpr,
):
    """Return ``1 / r(x)``, see `update.inverse_factor`."""
    magnitude = tl.abs(weight)
    if FORM == NONE:
        result = tl.zeros_like(weight) + shrink
    elif FORM == HOLD:
        result = tl.where(magnitude == 0, float("inf"), tl.zeros_like(weight) + shrink)
    else:
        if FISHER:  # no zero may meet an infinity
            x = (magnitude * tl.minimum(root, _LARGEST)) * size_scale
        else:
            x = magnitude * size_scale
        if FORM == HARD:
            decayed = tl.where(x < 1, float("inf"), tl.zeros_like(x))
        elif FORM == MINUS_ONE:
            inverse = 1 / x
            decayed = (decay * inverse) * (inverse * inverse)
        elif FORM == ZERO:
            inverse = 1 / x
            decayed = (decay * inverse) * inverse
        elif FORM == HALF:
            decayed = decay / (x * tl.sqrt(x))
        elif FORM == ONE:
            decayed = decay / x
        elif FORM == THREE_HALVES:
            decayed = decay / tl.sqrt(x)
        elif FORM == TWO:
            decayed = tl.zeros_like(weight) + decay
        else:
            decayed = decay * power(x, y, y_upper, y_lower, at_zero)
        if FISHER:  # zeros stay zero all the same
            decayed = tl.where(young & (magnitude > 0), 0.0, decayed)
        result = shrink + decayed
    return result


@triton.jit
def random_bits(position, tensor_key, step_key):
    """Return 32 random bits for each element, see `random_bits.random_bits`."""
    tensor_key, step_key = tensor_key.to(tl.uint32, bitcast=True), step_key.to(tl.uint32, bitcast=True)
    x = position.to(tl.uint32) ^ tensor_key
    x = (x ^ (x >> 16)) * _MULTIPLIER1
    x = ((x ^ (x >> 15)) + (step_key ^ tensor_key)) * _MULTIPLIER2
    x = (x ^ (x >> 16)) * _MULTIPLIER3
    return x ^ (x >> 16)


@triton.jit
def round_stochastically(x, bits):
    """Round fp32 to a bf16 neighbour, see `update.round_stochastically`."""
    rounded = ((x.to(tl.uint32, bitcast=True) + bits) & _UPPER_HALF).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit(do_not_specialize=["step_key", "tensors"])
def step_kernel(
    pointers,  # int64 (4 or 5, tensors): addresses of the parameters, gradients, first and second moments, and s
    lengths,  # int64 (tensors,)
    block_tensors,  # int32 (blocks,): which tensor a block belongs to
    block_starts,  # int64 (blocks,): its first element there
    tensor_keys,  # int32 (tensors,)
    step_key,  # int32
    tensors,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    inverse_root_correction2,
    eps,
    shrink,
    decay,
    y,
    size_scale,
    young_scale,
    y_upper,
    y_lower,
    at_zero,
    s_rate,  # None, which makes it a constant, if there is no s
    FORM: tl.constexpr,
    LATE: tl.constexpr,
    FISHER: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT1: tl.constexpr,
    MOMENT2: tl.constexpr,
    ROUND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block."""
    block = tl.program_id(0)
    tensor = tl.load(block_tensors + block)
    start = tl.load(block_starts + block)
    length = tl.load(lengths + tensor)
    if ROUND:
        tensor_key = tl.load(tensor_keys + tensor)
    row = pointers + tensor
    param = tl.load(row).to(tl.pointer_type(PARAM))
    grad = tl.load(row + tensors).to(tl.pointer_type(GRAD))
    exp_avg = tl.load(row + 2 * tensors).to(tl.pointer_type(MOMENT1))
    exp_avg_sq = tl.load(row + 3 * tensors).to(tl.pointer_type(MOMENT2))
    if ALIGNED:  # lets the compiler move 16 bytes at a time
        param = tl.multiple_of(param, 16)
        grad = tl.multiple_of(grad, 16)
        exp_avg = tl.multiple_of(exp_avg, 16)
        exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
        length = tl.multiple_of(length, 16)
    at = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    inside = at < length
    weight = tl.load(param + at, mask=inside, other=1.0).to(tl.float32)
    gradient = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if s_rate is not None:
        auxiliary = tl.load(row + 4 * tensors).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            auxiliary = tl.multiple_of(auxiliary, 16)
    # 1. Adam's moments. (The other common form, m + (1 - beta1) * (g - m), overflows for huge gradients.)
    first = beta1 * tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32) + one_minus_beta1 * gradient
    before = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32)
    second = beta2 * before + one_minus_beta2 * gradient * gradient
    young = tl.maximum(first * first, 0.25 * gradient * gradient) * young_scale >= before
    # (Into the storage dtype already, see 5: what is stored takes no registers in what follows.)
    tl.store(exp_avg + at, first.to(MOMENT1), mask=inside)
    if ROUND:
        bits = random_bits(at, tensor_key, step_key)
    if ROUND and MOMENT2 == tl.bfloat16:
        tl.store(exp_avg_sq + at, round_stochastically(second, bits >> 16).to(MOMENT2), mask=inside)
    else:
        tl.store(exp_avg_sq + at, second.to(MOMENT2), mask=inside)
    # 2. Adam's step, bias corrections folded into the scalars.
    root = tl.sqrt(second)
    stepped = weight - step_size * (first / (root * inverse_root_correction2 + eps))
    # 3. pWD: shrink by the factor of the weight before the step; or after it; or of what follows the weight.
    if s_rate is not None:
        s = tl.load(auxiliary + at, mask=inside, other=0.0)
        s = (1 - s_rate) * s + s_rate * power(tl.abs(weight), y, y_upper, y_lower, at_zero)
        tl.store(auxiliary + at, s, mask=inside)
        if FORM == NONE:
            new = stepped / shrink
        else:
            new = stepped / (shrink + decay * s)
    else:
        if LATE:
            measured = stepped
        else:
            measured = weight
        new = stepped / inverse_factor(
            measured, root, young, shrink, decay, size_scale, y, y_upper, y_lower, at_zero, FORM, FISHER
        )
    # 4. What is as good as dead is zero, on every device alike.
    if FORM != NONE and FORM != TWO and FORM != ABOVE_TWO:
        new = tl.where(tl.abs(new) < _FLUSH, 0.0, new)
    # 5. Back into the storage dtype.
    if ROUND and PARAM == tl.bfloat16:
        new = round_stochastically(new, bits & 0xFFFF)
    tl.store(param + at, new.to(PARAM), mask=inside)
