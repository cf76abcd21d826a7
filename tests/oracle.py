"""The PAdam step as the paper writes it: NumPy, float64, element by element. Imports nothing from the package."""

from __future__ import annotations

import math

import numpy as np


def power(w: float, p: float) -> float:
    """|w|^(p-2), infinite for w = 0 and p < 2; where p is -inf, infinite below 1 and 0 from there."""
    if p == -math.inf:
        return math.inf if abs(w) < 1 else 0.0
    try:
        return abs(float(w)) ** (p - 2)
    except (OverflowError, ZeroDivisionError):
        return math.inf


def factor_of(s: float, lr: float, lambda_p: float, lambda_2: float) -> float:
    """1 / (1 + lr*lambda_2 + lr*lambda_p*s), with no p-norm term where lr*lambda_p = 0."""
    if lr * lambda_p == 0:
        return 1 / (1 + lr * lambda_2)
    return 1 / (1 + lr * lambda_2 + lr * lambda_p * s)


def factor(w: float, lr: float, p: float, lambda_p: float, lambda_2: float) -> float:
    """r(w), the factor with s = |w|^(p-2)."""
    return factor_of(power(w, p), lr, lambda_p, lambda_2)


class Oracle:
    """PAdam on one list of numbers, remembering its own moments; lr and p may be set between steps."""

    def __init__(self, w, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, p_norm=0.8, lambda_p=0.1, weight_decay=0.0,
                 late_decay=False, s_rate=1.0, importance="magnitude", mu=1.0):  # fmt: skip
        """Start from weights `w`; under "fisher" sizes are in units of `mu`, and none decays in the first 10 steps."""
        self.fisher, self.mu = importance == "fisher", mu
        self.w = np.asarray(w, dtype=np.float64).reshape(-1).copy()
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)
        self.t, self.lr, self.betas, self.eps = 0, lr, betas, eps
        self.p, self.lambda_p, self.lambda_2 = p_norm, lambda_p, weight_decay
        self.late, self.s_rate, self.s = late_decay, s_rate, [power(x, p_norm) for x in self.w]

    def size_power(self, w: float, i: int, before: float, g: float) -> float:
        """x^(p-2); under "fisher" 0 for a weight that is not zero and has no evidence yet."""
        if not self.fisher:
            return power(w, self.p)
        b1, b2 = self.betas
        young = self.t <= 10 or max(self.m[i] ** 2, (g / 2) ** 2) >= 2 * before / (1 - b2**self.t)
        if young:
            return math.inf if w == 0 and self.p < 2 else 0.0
        return power(abs(w) * math.sqrt(self.v[i] / (1 - b2**self.t)) / self.mu, self.p)

    def step(self, grad) -> np.ndarray:
        """Take one step and return the new weights."""
        self.t += 1
        b1, b2 = self.betas
        for i, g in enumerate(np.asarray(grad, dtype=np.float64).reshape(-1)):
            self.m[i], before = b1 * self.m[i] + (1 - b1) * g, self.v[i]
            self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
            u = (self.m[i] / (1 - b1**self.t)) / (math.sqrt(self.v[i] / (1 - b2**self.t)) + self.eps)
            stepped = self.w[i] - self.lr * u
            here = self.size_power(stepped if self.late else self.w[i], i, before, g)
            self.s[i] = here if self.s_rate == 1 else (1 - self.s_rate) * self.s[i] + self.s_rate * here
            new = stepped * factor_of(self.s[i], self.lr, self.lambda_p, self.lambda_2)
            if self.p < 2 and self.lr * self.lambda_p > 0 and abs(new) < 2.0**-100:
                new = 0.0
            self.w[i] = new
        return self.w
