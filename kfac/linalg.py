"""Damped inverses and eigenbases of Kronecker factors; no host synchronisation where a Cholesky factor serves."""

from __future__ import annotations

import torch
from torch import Tensor


def balance(a: Tensor, g: Tensor) -> Tensor:
    """pi = sqrt((tr A / d_A) / (tr G / d_G)), the split of the damping between the factors; 1 where a trace vanishes.

    Martens & Grosse 2015, arXiv 1503.05671, section 6.3. Shapes [K, d, d]; returns [K].
    """
    mean_a = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean_g = g.diagonal(dim1=-2, dim2=-1).mean(-1)
    ratio = mean_a / mean_g
    return torch.where((mean_a > 0) & (mean_g > 0) & ratio.isfinite(), ratio, 1.0).sqrt()


def damped_inverse(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(matrix + damping I)^-1 by Cholesky, and whether it succeeded.

    Args:
        matrix: symmetric [K, d, d]; only its lower triangle is read.
        damping: [K].

    Returns:
        the inverse [K, d, d] and a 0-dimensional bool; where it is False the inverse is not to be used.
    """
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    factor, info = torch.linalg.cholesky_ex(damped)
    inverse = torch.cholesky_inverse(factor)
    return inverse, (info == 0).all() & inverse.diagonal(dim1=-2, dim2=-1).sum().isfinite()


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [K, d], not negative, and eigenvectors [K, d, d] (columns) of a symmetric matrix [K, d, d]."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0), vectors


def carry_scales(scales: Tensor, overlap_g: Tensor, overlap_a: Tensor) -> Tensor:
    """E-KFAC's scales [K, d_out, d_in] in a new basis, from the squared overlaps of new and old eigenvectors.

    The diagonal of Q' diag(s) Q'^T in the new basis for overlaps Q' [K, d, d] of both sides; keeps the trace.
    """
    return overlap_g.square() @ scales @ overlap_a.square().mT
