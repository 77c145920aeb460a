"""Damped inverses and eigenbases of Kronecker factors; no host synchronisation where a Cholesky factor serves.

A factor is [K, d, d], or [K, d] where only its diagonal is kept. The eigenbasis of a diagonal is the identity, None.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

ROW = 64  # bytes to which rows are aligned, a cache line


def diagonal(matrix: Tensor) -> Tensor:
    """The diagonal [K, d] of a factor."""
    return matrix if matrix.dim() == 2 else matrix.diagonal(dim1=-2, dim2=-1)


def apply(left: Tensor | None, matrix: Tensor, right: Tensor | None) -> Tensor:
    """left @ matrix @ right for factors on both sides of [K, d_out, d_in]; None is the identity."""
    if left is not None:
        matrix = left[..., None] * matrix if left.dim() == 2 else product(left, matrix)
    if right is not None:
        matrix = matrix * right[:, None] if right.dim() == 2 else product(matrix, right)
    return matrix.contiguous()


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of [K, m, k] and [K, k, n], by the fastest way there is; its rows may be `aligned`."""
    if not len(left) == len(right) == 1:
        return left @ right
    one, other = left[0], right[0]  # of a batch of one a batched product would copy bfloat16 of odd sizes
    if one.is_contiguous() and (other.is_contiguous() or other.mT.is_contiguous()) and _by_onednn(one, other):
        return torch.ops.mkldnn._linear_pointwise(one, other.mT, None, "none", [], "")[None]
    out = aligned(left, 1, left.shape[1], right.shape[2])
    torch.mm(one, other, out=out[0])
    return out


def _by_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN is to multiply two matrices: on an AMD EPYC in 0.9 of the time that BLAS takes in `torch.mm`.

    Their layout has to be dense: for other strides it has no fast kernel. In bfloat16 `torch.mm` is as fast.
    """
    suits = left.device.type == "cpu" and left.dtype == right.dtype == torch.float32
    return suits and min(right.shape) > WHOLE and _has_onednn()


@functools.cache
def _has_onednn() -> bool:
    """Whether torch has oneDNN's product of dense matrices here, which is no public function."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    try:
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], ""), x @ x.T)
    except (AttributeError, RuntimeError):
        return False


def aligned(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor for a product to be written to, on a CPU with rows that start at multiples of 64 bytes.

    Without, a width of 785, pixels and a bias, makes a product in float32 take 1.15 times as long (in bfloat16 not).
    """
    if like.device.type != "cpu" or like.itemsize < 4 or shape[-1] <= WHOLE:
        return like.new_empty(shape)
    width = -(-shape[-1] * like.itemsize // ROW) * ROW // like.itemsize
    return like.new_empty(*shape[:-1], width)[..., : shape[-1]]


def balance(a: Tensor, g: Tensor) -> Tensor:
    """pi = sqrt((tr A / d_A) / (tr G / d_G)), the split of the damping between the factors; 1 where a trace vanishes.

    Martens & Grosse 2015, arXiv 1503.05671, section 6.3. Returns [K].
    """
    mean_a, mean_g = diagonal(a).mean(-1), diagonal(g).mean(-1)
    ratio = mean_a / mean_g
    return torch.where((mean_a > 0) & (mean_g > 0) & ratio.isfinite(), ratio, 1.0).sqrt()


def damped_inverse(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(matrix + damping I)^-1 by Cholesky, and whether it succeeded.

    Args:
        matrix: symmetric [K, d, d], only its lower triangle is read; or a diagonal [K, d].
        damping: [K].

    Returns:
        the inverse, shaped as `matrix`, and a bool for each of the K; where it is False the inverse is not to be used.
    """
    if matrix.dim() == 2:
        inverse = 1 / (matrix + damping[:, None])
        return inverse, inverse.isfinite().all(-1) & (inverse > 0).all(-1)
    inverse = aligned(matrix, *matrix.shape).copy_(matrix)
    inverse.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
    if inverse.device.type == "cpu" and inverse.shape[-1] > WHOLE:
        good = torch.stack([_invert_by_quarters(one) for one in inverse])
    else:
        good = _invert(inverse)
    return inverse, good & inverse.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()


def _invert(matrix: Tensor) -> Tensor:
    """Put the inverse of positive definite matrices [..., d, d], whose lower triangle is read, in their place.

    Returns whether all pivots were positive, [...].
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    # What is left of a failed factor may be singular, at which `cholesky_inverse` raises.
    factor.diagonal(dim1=-2, dim2=-1).masked_fill_((info != 0)[..., None], 1.0)
    matrix.copy_(torch.cholesky_inverse(factor))
    return info == 0


WHOLE = 128  # size up to which LAPACK inverts a matrix on a CPU; beyond, products of its quarters are faster


def _invert_by_quarters(matrix: Tensor) -> Tensor:
    """The same for [[A, B^T], [B, C]] by the inverses of A and of C - B A^-1 B^T, and so on."""
    d = len(matrix)
    if d <= WHOLE:
        return _invert(matrix)
    half = (d // 2 + 15) // 16 * 16  # aligned
    a, b, c = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    good = _invert_by_quarters(a)
    left = b @ a
    c.addmm_(left, b.T, alpha=-1)
    good = good & _invert_by_quarters(c)
    below = c @ left
    a.addmm_(left.T, below)
    torch.neg(below, out=b)
    matrix[:half, half:] = b.T
    return good


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues [K, d], not negative, and eigenvectors [K, d, d] (columns) of a symmetric factor.

    Where they do not converge float64 is tried. LAPACK's divide and conquer in float32 may also give back NaN and say
    that all is well, for a factor with many equal eigenvalues (dead pixels).

    Raises:
        torch.linalg.LinAlgError: when that fails too.
    """
    if matrix.dim() == 2:
        return matrix.clamp_min(0), None
    try:
        values, vectors = _finite(*torch.linalg.eigh(matrix))
    except torch.linalg.LinAlgError:
        if matrix.dtype == torch.float64:
            raise
        values, vectors = (x.to(matrix.dtype) for x in _finite(*torch.linalg.eigh(matrix.double())))
    return values.clamp_min(0), vectors


def _finite(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    if not (values.sum() + vectors.sum()).isfinite():
        raise torch.linalg.LinAlgError("eigenvectors that are not finite")
    return values, vectors


def carry_scales(scales: Tensor, overlap_g: Tensor | None, overlap_a: Tensor | None) -> Tensor:
    """E-KFAC's scales [K, d_out, d_in] in a new basis, from the squared overlaps of new and old eigenvectors.

    The diagonal of Q' diag(s) Q'^T in the new basis for overlaps Q' [K, d, d] of both sides (None where the basis
    stays); keeps the trace.
    """
    squared_a = None if overlap_a is None else overlap_a.square().mT
    return apply(None if overlap_g is None else overlap_g.square(), scales, squared_a)
