"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): prune a layer, and let the other weights make up for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .importance_scores import by_output

BLOCK_SIZE = 128
"""Columns that a mask is chosen for at a time (the paper's B_s), and whose updates are gathered (its B)."""

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""


@torch.no_grad()
def prune_by_sparsegpt(
    module: nn.Module, weight: Tensor, gram: Tensor, share: float, block_size: int = BLOCK_SIZE
) -> None:
    """Zero a share of a linear layer's weights and change the rest so that its outputs change least.

    Columns are visited one after another. A pruned weight's error, w_j over the j-th diagonal element of the inverse
    Hessian of the columns from j on, is subtracted from the columns that follow, times that inverse's row (eq. 3 and
    algorithm 1). At the beginning of each block the mask of its columns is chosen: the smallest
    ``w_j^2 / [H^-1]_jj`` of all rows together.

    Args:
        module: The layer.
        weight: Its weight, which is changed.
        gram: (inputs, inputs), X X^T over calibration tokens: the Hessian of the squared error but for a factor.
        share: Of zeros, 0 to 1.
        block_size: Columns in a block.

    Raises:
        ValueError: If `gram` is not finite.
    """
    matrix = by_output(module, weight)
    w = matrix.float().clone()
    factor = _inverse_factor(gram.float())
    outputs, inputs = w.shape
    for first in range(0, inputs, block_size):
        last = min(first + block_size, inputs)
        scores = (w[:, first:last] / factor.diagonal()[first:last]).square()
        count = round(share * outputs * last) - round(share * outputs * first)
        pruned = torch.zeros(scores.numel(), dtype=torch.bool, device=w.device)
        pruned[scores.flatten().topk(count, largest=False).indices] = True
        pruned = pruned.view_as(scores)
        errors = torch.zeros_like(scores)
        for column in range(first, last):
            error = torch.where(pruned[:, column - first], w[:, column], 0.0) / factor[column, column]
            w[:, column:last] -= torch.outer(error, factor[column, column:last])
            errors[:, column - first] = error
        w[:, first:last].masked_fill_(pruned, 0.0)  # exactly
        w[:, last:] -= errors @ factor[first:last, last:]
    matrix.copy_(w)


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper triangular U with U^T U = H^-1 for the damped Hessian H; more damping where it needs more.

    Row j of U, divided by its first element, is that of the inverse of H without its first j rows and columns. With
    the order of rows and columns reversed, H = R R^T for an upper triangular R, and U = R^-1: no inverse is factored.
    """
    if not gram.isfinite().all():
        raise ValueError("a layer's inputs are not finite, so SparseGPT cannot prune it")
    eye = torch.eye(len(gram), device=gram.device)
    mean = float(gram.diagonal().mean()) or 1.0
    damping = DAMPING
    while True:
        lower, failed = torch.linalg.cholesky_ex((gram + damping * mean * eye).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
        damping *= 10
