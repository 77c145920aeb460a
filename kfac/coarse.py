"""The coarse level of two-level K-FAC: a small exact solve over a few directions in all layers at once.

Directions Z_k (rows of R0) span a coarse space; E = R0 (F + damping I) R0^T is the curvature on it and Q = R0^T E^-1
R0 the coarse solve. F enters by inner products of each example, s_nk = sum_t <g_n, Z_k a_n>, so F0 = S^T S has all
cross-layer curvature without a cross-layer matrix (Tselepidis, Kohler & Orvieto 2020, arXiv 2011.00573, has the
Kronecker form).

Vectors are lists of blocks [K, d_out, d_in]. Coarse vectors are stacked layer by layer: `spaces[l]` is
[I, K, d_out, d_in], and column l * I + i belongs to its vector i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from . import linalg
from .layers import Block
from .rows import Rows, row_products, row_sums, row_times

if TYPE_CHECKING:
    from .curvature import Curvature

Layers = Sequence[tuple[Tensor, Tensor] | None]  # for each layer rows a [K, N, T, d_in] and g [K, M, N, T, d_out]


class Model:
    """F + damping I over some blocks, by the rows of a statistics step (of all ranks)."""

    def __init__(self, curvature: Curvature, blocks: list[Block], kept: Sequence[Rows]):
        self.blocks = blocks
        self.dampings = [curvature.dampings[block] for block in blocks]
        self.sizes = [torch.Size(block.shape).numel() for block in blocks]
        self._sum = curvature.sum_over_ranks
        layers = [[part.layers.get(block) for block in blocks] for part in kept]
        self.parts = [part for part in layers if any(layer is not None for layer in part)]

    def products(self, spaces: Sequence[Tensor]) -> list[Tensor]:
        """For each part S [M * N, L * I], the inner products of every row with every coarse vector."""
        return [products(layers, spaces) for layers in self.parts]

    def constant_products(self) -> list[Tensor]:
        """The same for the constant vectors, cheaper."""
        return [constant_products(layers, self.sizes) for layers in self.parts]

    def fisher(self, matrices: Sequence[Tensor]) -> Tensor:
        """F0 = S^T S [L * I, L * I]."""
        return self._sum([torch.stack([s.T @ s for s in matrices]).sum(0)])[0]

    def times(self, vectors: Sequence[Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
        """(F + damping I) v, from the products of all rows with the blocks of v (their sum over columns counts)."""
        curved = [torch.zeros_like(v) for v in vectors]
        for layers, s in zip(self.parts, matrices, strict=True):
            curved = total(curved, curvature_times(layers, vectors, s.sum(1)))
        return [c + damping * v for c, damping, v in zip(self._sum(curved), self.dampings, vectors, strict=True)]


def products(layers: Layers, spaces: Sequence[Tensor]) -> Tensor:
    """S [M * N, L * I]: the inner product of every curvature row with every coarse vector."""
    width = spaces[0].shape[0]
    count = next(g.shape[1] * g.shape[2] for _, g in filter(None, layers))
    columns = [
        spaces[0].new_zeros(count, width) if layer is None else row_products(*layer, space)
        for layer, space in zip(layers, spaces, strict=True)
    ]
    return torch.cat(columns, dim=1)


def constant_products(layers: Layers, sizes: Sequence[int]) -> Tensor:
    """S [M * N, L] for the constant vectors ones / sqrt(size): (1^T a)(1^T g) summed over positions."""
    like = next(g for _, g in filter(None, layers))
    columns = [
        like.new_zeros(like.shape[1] * like.shape[2])
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
    m, n = first.shape[1:3]
    sums = [None if x is None else row_sums(*x) for x in layers]
    sums_a = [first.new_zeros(n) if x is None else x[0].mean((0, 2)) for x in sums]
    sums_g = [first.new_zeros(m * n) if x is None else x[1].sum((0, 3)).reshape(-1) for x in sums]
    a, g = torch.stack(sums_a, dim=1), torch.stack(sums_g, dim=1)
    return a.T @ a / n, g.T @ g


def curvature_times(layers: Layers, vectors: Sequence[Tensor], s: Tensor) -> list[Tensor]:
    """F x for a vector given by its blocks: sum_n s_n g_n a_n^T with s_n = sum_l <g_n, x_l a_n>, [M * N]."""
    return [
        torch.zeros_like(x) if layer is None else row_times(*layer, s, x.shape[-1])
        for layer, x in zip(layers, vectors, strict=True)
    ]


def extreme_eigenvectors(a: Tensor, g: Tensor) -> Tensor:
    """Eigenvectors of G (x) A with the largest and the smallest eigenvalue, of norm 1: [2, K, d_out, d_in].

    Over K groups they are those of every group together. Where eigenvectors do not converge they are zero.
    """
    try:
        (low_a, high_a), (low_g, high_g) = _extremes(a), _extremes(g)
    except torch.linalg.LinAlgError:
        return a.new_zeros(2, a.shape[0], g.shape[-1], a.shape[-1])
    pairs = [high_g[:, :, None] * high_a[:, None], low_g[:, :, None] * low_a[:, None]]
    return torch.stack(pairs) / a.shape[0] ** 0.5


def _extremes(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors [K, d] of a factor with its smallest and its largest eigenvalue."""
    values, vectors = linalg.eigenbasis(factor)
    if vectors is None:
        ends = values.argmin(-1), values.argmax(-1)
        low, high = (F.one_hot(end, values.shape[-1]).to(values.dtype) for end in ends)
        return low, high
    return vectors[..., 0], vectors[..., -1]


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


def solve(coarse_curvature: Tensor, right_side: Tensor) -> Tensor:
    """y = E^-1 b [C] for the small system, scaled to a unit diagonal; zero where E is not usable.

    Directions that coincide share their part, and directions that vanish have none.
    """
    e, b = coarse_curvature.double(), right_side.double()
    scale = e.diagonal().clamp_min(torch.finfo(e.dtype).tiny).rsqrt()
    # Rounding of the entries, made in the working precision, bounds how far apart two directions can be told.
    jitter = len(b) * torch.finfo(coarse_curvature.dtype).eps
    scaled = scale[:, None] * e * scale + jitter * torch.eye(len(b), device=e.device, dtype=e.dtype)
    factor, info = torch.linalg.cholesky_ex(scaled)
    y = scale * torch.cholesky_solve((scale * b)[:, None], factor)[:, 0]
    return torch.where((info == 0) & y.isfinite().all(), y, 0.0).to(coarse_curvature.dtype)


def total(u: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """u + v, block by block."""
    return [x + y for x, y in zip(u, v, strict=True)]


def difference(u: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """u - v, block by block."""
    return [x - y for x, y in zip(u, v, strict=True)]


def inner(u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
    """<u, v> over all blocks."""
    return torch.stack([(x * y).sum() for x, y in zip(u, v, strict=True)]).sum()
