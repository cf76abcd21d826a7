"""The PAdam step as the paper writes it: NumPy, float64, element by element. Imports nothing from the package."""

from __future__ import annotations

import math

import numpy as np


def power(w: float, p: float) -> float:
    """|w|^(p-2), infinite for w = 0 and p < 2."""
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
                 late_decay=False, s_rate=1.0):  # fmt: skip
        """Start from weights `w`."""
        self.w = np.asarray(w, dtype=np.float64).reshape(-1).copy()
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)
        self.t, self.lr, self.betas, self.eps = 0, lr, betas, eps
        self.p, self.lambda_p, self.lambda_2 = p_norm, lambda_p, weight_decay
        self.late, self.s_rate, self.s = late_decay, s_rate, [power(x, p_norm) for x in self.w]

    def step(self, grad) -> np.ndarray:
        """Take one step and return the new weights."""
        self.t += 1
        b1, b2 = self.betas
        for i, g in enumerate(np.asarray(grad, dtype=np.float64).reshape(-1)):
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
            u = (self.m[i] / (1 - b1**self.t)) / (math.sqrt(self.v[i] / (1 - b2**self.t)) + self.eps)
            stepped = self.w[i] - self.lr * u
            here = power(stepped if self.late else self.w[i], self.p)
            self.s[i] = here if self.s_rate == 1 else (1 - self.s_rate) * self.s[i] + self.s_rate * here
            new = stepped * factor_of(self.s[i], self.lr, self.lambda_p, self.lambda_2)
            if self.p < 2 and self.lr * self.lambda_p > 0 and abs(new) < 2.0**-100:
                new = 0.0
            self.w[i] = new
        return self.w
