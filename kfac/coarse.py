"""The coarse level of two-level K-FAC: a small exact solve over a few directions in all layers at once.

Directions Z_k (rows of R0) span a coarse space; E = R0 (F + damping I) R0^T is the curvature on it and Q = R0^T E^-1
R0 the coarse solve. F enters by inner products of each example, s_nk = sum_t <g_n, Z_k a_n>, so F0 = S^T S has all
cross-layer curvature without a cross-layer matrix (Tselepidis, Kohler & Orvieto 2020, arXiv 2011.00573, has the
Kronecker form).

Coarse vectors are stacked layer by layer: `spaces[l]` is [I, K, d_out, d_in], and column l * I + i belongs to its
    vector i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import row_products, row_sums, row_times

Layers = Sequence[tuple[Tensor, Tensor] | None]  # for each layer rows a [K, N, T, d_in] and g [K, M, N, T, d_out]


def products(layers: Layers, spaces: Sequence[Tensor]) -> Tensor:
    """S [M * N, L * I]: the inner product of every curvature row with every coarse vector."""
    width = spaces[0].shape[0]
    rows = next(a.shape[1] * g.shape[1] for a, g in filter(None, layers))
    columns = [
        spaces[0].new_zeros(rows, width) if layer is None else row_products(*layer, space)
        for layer, space in zip(layers, spaces, strict=True)
    ]
    return torch.cat(columns, dim=1)


def constant_products(layers: Layers, sizes: Sequence[int]) -> Tensor:
    """S [M * N, L] for the constant vectors ones / sqrt(size): (1^T a)(1^T g) summed over positions."""
    rows = next(a.shape[1] * g.shape[1] for a, g in filter(None, layers))
    like = next(g for _, g in filter(None, layers))
    columns = [
        like.new_zeros(rows)
        if layer is None
        else torch.einsum("knt,kmnt->mn", *row_sums(*layer)).reshape(-1) / size**0.5
        for layer, size in zip(layers, sizes, strict=True)
    ]
    return torch.stack(columns, dim=1)


def kronecker_sums(layers: Layers) -> tuple[Tensor, Tensor]:
    """Cross-layer sums of factors, sum(A_ij) and sum(G_ij), each [L, L] (arXiv 2011.00573, section 3.2).

    An example's positions are averaged in A and summed in G, which needs no down-sampling between layers of
    different T.
    """
    first = next(g for _, g in filter(None, layers))
    vectors = next(g.shape[1] for _, g in filter(None, layers))
    n = first.shape[2]
    sums = [None if x is None else row_sums(*x) for x in layers]
    sums_a = [first.new_zeros(n) if x is None else x[0].mean((0, 2)) for x in sums]
    sums_g = [first.new_zeros(vectors * n) if x is None else x[1].sum((0, 3)).reshape(-1) for x in sums]
    a, g = torch.stack(sums_a, dim=1), torch.stack(sums_g, dim=1)
    return a.T @ a / n, g.T @ g


def curvature_times(layers: Layers, vectors: Sequence[Tensor], s: Tensor) -> list[Tensor]:
    """F x for a vector given by its blocks [K, d_out, d_in]: sum_n s_n g_n a_n^T with s_n = sum_l <g_n, x_l a_n>.

    `s` [M * N] is the sum over layers of `products` of the blocks.
    """
    out = []
    for layer, x in zip(layers, vectors, strict=True):
        if layer is None:
            out.append(torch.zeros_like(x))
            continue
        out.append(row_times(*layer, s, x.shape[-1]))
    return out


def block_gram(spaces: Sequence[Tensor], dampings: Sequence[Tensor]) -> Tensor:
    """R0 diag(damping) R0^T [L * I, L * I]: block-diagonal, since every coarse vector lives in one layer."""
    flat = [space.flatten(1) for space in spaces]
    return torch.block_diag(*[damping * (rows @ rows.T) for rows, damping in zip(flat, dampings, strict=True)])


def restrict(spaces: Sequence[Tensor], vectors: Sequence[Tensor]) -> Tensor:
    """R0 v [L * I]."""
    return torch.cat([space.flatten(1) @ v.flatten() for space, v in zip(spaces, vectors, strict=True)])


def prolong(spaces: Sequence[Tensor], coefficients: Tensor) -> list[Tensor]:
    """R0^T y, by blocks."""
    width = spaces[0].shape[0]
    return [torch.tensordot(y, space, dims=1) for y, space in zip(coefficients.split(width), spaces, strict=True)]


def solve(coarse_curvature: Tensor, right_side: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y = E^-1 b for the small system, scaled to a unit diagonal; directions that coincide share their part.

    Returns:
        y [C] (zero where E is not usable), the gain b^T y - 1/2 y^T E y, and the relative residual |b - E y| / |b|.
    """
    e, b = coarse_curvature.double(), right_side.double()
    scale = e.diagonal().clamp_min(torch.finfo(e.dtype).tiny).rsqrt()
    # Rounding of the entries, made in the working precision, bounds how far apart two directions can be told.
    jitter = len(b) * torch.finfo(coarse_curvature.dtype).eps
    scaled = scale[:, None] * e * scale + jitter * torch.eye(len(b), device=e.device, dtype=e.dtype)
    factor, info = torch.linalg.cholesky_ex(scaled)
    y = scale * torch.cholesky_solve((scale * b)[:, None], factor)[:, 0]
    y = torch.where((info == 0) & y.isfinite().all(), y, 0.0)
    gain = b @ y - 0.5 * y @ e @ y
    residual = (b - e @ y).norm() / b.norm().clamp_min(torch.finfo(e.dtype).tiny)
    dtype = coarse_curvature.dtype
    return y.to(dtype), gain.to(dtype), residual.to(dtype)
