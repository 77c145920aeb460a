"""Kronecker factors from rows: second moments of inputs and output gradients, and their running averages.

A = (1/(N T)) sum_{n,t} a a^T and G = sum_{n,t,vectors} g g^T, so that G (x) A approximates the block of the exact
curvature (Martens & Grosse 2015, arXiv 1503.05671, section 3; with T > 1 the product equals that of arXiv
1602.01407, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor


def input_moment(a: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum of a a^T and the number of rows summed.

    Args:
        a: rows [K, N, T, d_in].
        mask: [N * T], 1 for rows that count, 0 for those that the loss ignores.

    Returns:
        [K, d_in, d_in] and a 0-dimensional count.
    """
    rows = a.flatten(1, 2)
    if mask is None:
        return rows.mT @ rows, torch.full((), float(rows.shape[1]), device=a.device, dtype=a.dtype)
    mask = mask.to(a.dtype)
    return rows.mT @ (rows * mask[:, None]), mask.sum()


def gradient_moment(g: Tensor) -> Tensor:
    """Sum of g g^T over vectors, examples and positions: [K, M, N, T, d_out] -> [K, d_out, d_out]."""
    rows = g.flatten(1, 3)
    return rows.mT @ rows


def squared_gradients(a: Tensor, g: Tensor, memory: int = 2**24) -> Tensor:
    """Second moments of per-example gradients, sum over n and vectors of (sum_t g a^T)^2, elementwise.

    This is the scale of E-KFAC when rows are given in the eigenbasis (George et al. 2018, arXiv 1806.03884, equation
    10).

    Args:
        a: rows [K, N, T, d_in].
        g: rows [K, M, N, T, d_out].
        memory: largest number of numbers that a chunk of per-example gradients may hold.

    Returns:
        [K, d_out, d_in].
    """
    if a.shape[2] == 1:
        return g[:, :, :, 0].square().sum(1).mT @ a[:, :, 0].square()
    total = a.new_zeros(a.shape[0], g.shape[-1], a.shape[-1])
    chunk = max(1, memory // (a.shape[0] * g.shape[-1] * a.shape[-1]))
    for vector in g.unbind(1):
        for first in range(0, a.shape[1], chunk):
            part = slice(first, first + chunk)
            total += (vector[:, part].mT @ a[:, part]).square().sum(1)
    return total


def update_average(average: Tensor, new: Tensor, count: Tensor, decay: float, finite: Tensor) -> None:
    """average <- e average + (1 - e) new with e = min(1 - 1/count, decay), in place; count includes `new`.

    The first values are a plain mean, so that no zero start has to be corrected for (arXiv 1503.05671, section 5).
    Where `finite` is False the average stays as it was.
    """
    keep = (1 - 1 / count.clamp_min(1)).clamp_max(decay)
    average.copy_(torch.where(finite, torch.lerp(new, average, keep.to(average.dtype)), average))
