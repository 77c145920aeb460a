"""The coarse level of two-level K-FAC: a small exact solve over a few directions in all layers at once.

Directions Z_k (rows of R0) span a coarse space; E = R0 (F + damping I) R0^T is the curvature on it and Q = R0^T E^-1
R0 the coarse solve. F enters by inner products of each example, s_nk = sum_t <g_n, Z_k a_n>, so F0 = S^T S has all
cross-layer curvature without a cross-layer matrix (Tselepidis, Kohler & Orvieto 2020, arXiv 2011.00573, has the
Kronecker form).

Vectors are lists of blocks [K, d_out, d_in]. Coarse vectors come layer by layer: `spaces[l]` are the I of layer l, each
[K, d_out, d_in], and column l * I + i belongs to its vector i.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import linalg
from .layers import Block
from .products import Unwritten
from .quadratic import dot
from .rows import Rows, row_products, row_sums, row_times

Layers = Sequence[tuple[Any, Tensor] | None]  # for each layer rows a [K, N, T, d_in] and g [K, M, N, T, d_out]
Spaces = Sequence[Sequence[Tensor]]


class Model:
    """F + damping I over some blocks, by the rows of a statistics step.

    Args:
        kept: the rows, weighted so that those of several batches add up.
        dampings: of each block, in the order of all lists of blocks here.
        sum_over_ranks: tensors summed over all processes that have rows.
    """

    def __init__(
        self,
        kept: Sequence[Rows],
        dampings: dict[Block, Tensor],
        sum_over_ranks: Callable[[Sequence[Tensor]], list[Tensor]],
    ):
        self.blocks, self.dampings = list(dampings), list(dampings.values())
        self.sizes = [torch.Size(block.shape).numel() for block in self.blocks]
        self._sum = sum_over_ranks
        layers = [[part.layers.get(block) for block in self.blocks] for part in kept]
        self._parts: list[Layers] = [part for part in layers if any(layer is not None for layer in part)]

    @property
    def layers(self) -> Layers | None:
        """The rows, where they are all of one part."""
        return self._parts[0] if len(self._parts) == 1 else None

    def products(self, spaces: Spaces, chosen: Sequence[int] | None = None) -> list[Tensor]:
        """For each part of the rows S [M * N, L * I], the inner products of every row with every coarse vector.

        `chosen` are the places of the L layers in `blocks`, all by default.
        """
        return [products(_of(layers, chosen), spaces, _count(layers)) for layers in self._parts]

    def constant_products(self) -> list[Tensor]:
        """The same for the constant vectors, cheaper."""
        return [constant_products(layers, self.sizes) for layers in self._parts]

    def gram(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """V^T F W [C, C'] from the products of all rows with V [M * N, C] and with W [M * N, C']."""
        return self._sum([torch.stack([s.T @ t for s, t in zip(left, right, strict=True)]).sum(0)])[0]

    def times(
        self, vectors: Sequence[Tensor], s: Sequence[Tensor], chosen: Sequence[int] | None = None, damped: bool = False
    ) -> list[Tensor]:
        """F v or (F + damping I) v in the chosen layers, from the products [M * N, 1] of all rows with v."""
        wanted = list(vectors) if chosen is None else [vectors[i] for i in chosen]
        dampings = self.dampings if chosen is None else [self.dampings[i] for i in chosen]
        parts = zip(self._parts, s, strict=True)
        images = (curvature_times(_of(layers, chosen), column, wanted) for layers, column in parts)
        curved = self._sum(functools.reduce(total, images))
        return [torch.addcmul(c, d, v) for c, d, v in zip(curved, dampings, wanted, strict=True)] if damped else curved


class Preconditioned:
    """K^-1 F x without a solve, for rows with one position each and K = G (x) A of inverses that are known.

    K^-1 sum_n s_n g_n a_n^T = sum_n s_n (G^-1 g_n)(A^-1 a_n)^T, and the inner products of the rows with it are P s with
    P = (g G^-1 g^T) * (a A^-1 a^T), elementwise.

    Args:
        a: [1, N, 1, d_in]. g: [1, M, N, 1, d_out]. inverse_a, inverse_g: [1, d, d], or diagonals [1, d].
    """

    def __init__(self, a: Tensor, g: Tensor, inverse_a: Tensor, inverse_g: Tensor):
        rows_a = a[:, None, :, 0].expand(*g.shape[:3], -1).flatten(1, 2)
        rows_g = g.flatten(1, 3)
        solved_a = linalg.apply(None, rows_a.to(inverse_a.dtype), inverse_a).to(a.dtype)
        solved_g = linalg.apply(None, rows_g.to(inverse_g.dtype), inverse_g).to(g.dtype)
        self._a, self._g = solved_a[0], solved_g[0]
        self._kernel = (rows_g[0] @ self._g.T) * (rows_a[0] @ self._a.T)

    @staticmethod
    def serves(a: Tensor | Unwritten, g: Tensor) -> bool:
        """Whether rows have one position each and are so few that their products with each other cost less than V a."""
        if isinstance(a, Unwritten):
            return False
        one = a.dim() == 4 and a.shape[0] == a.shape[2] == 1 and a.is_floating_point()
        d_in, d_out = a.shape[-1], g.shape[-1]
        return one and g.shape[1:3].numel() * (d_in + d_out) <= d_in * d_out

    def times(self, s: Tensor) -> Tensor:
        """[1, d_out, d_in], for s [M * N, 1]."""
        return ((s * self._g).T @ self._a)[None]

    def products(self, s: Tensor) -> Tensor:
        """[M * N, 1]."""
        return self._kernel @ s


def products(layers: Layers, spaces: Spaces, count: int) -> Tensor:
    """S [M * N, L * I]: the inner product of each of `count` curvature rows with every coarse vector."""
    columns = [
        space[0].new_zeros(count, len(space)) if layer is None else row_products(*layer, space)
        for layer, space in zip(layers, spaces, strict=True)
    ]
    return torch.cat(columns, dim=1) if columns else torch.empty(count, 0)


def constant_products(layers: Layers, sizes: Sequence[int]) -> Tensor:
    """S [M * N, L] for the constant vectors ones / sqrt(size): (1^T a)(1^T g) summed over positions."""
    count, like = _count(layers), _like(layers)
    columns = [
        like.new_zeros(count)
        if layer is None
        else torch.einsum("knt,kmnt->mn", *row_sums(*layer)).reshape(-1) / size**0.5
        for layer, size in zip(layers, sizes, strict=True)
    ]
    return torch.stack(columns, dim=1)


def kronecker_sums(layers: Layers, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the cross-layer factors, for the constant vectors ones / sqrt(size) (arXiv 2011.00573, section 3.2).

    An example's positions are averaged in A and summed in G, which needs no down-sampling between layers of
    different T.

    Returns:
        [L, L] the sum over examples of what sum(A_ij) is the mean of, how many examples that is, and
        [L, L] sum(G_ij) / sqrt(size_i size_j).
    """
    like = _like(layers)
    m, n = like.shape[1:3]
    sums = [None if x is None else row_sums(*x) for x in layers]
    sums_a = [like.new_zeros(n) if x is None else x[0].mean((0, 2)) for x in sums]
    sums_g = [
        like.new_zeros(m * n) if x is None else x[1].sum((0, 3)).reshape(-1) / size**0.5
        for x, size in zip(sums, sizes, strict=True)
    ]
    a, g = torch.stack(sums_a, dim=1), torch.stack(sums_g, dim=1)
    return a.T @ a, torch.full_like(a[0, 0], n), g.T @ g


def _of(layers: Layers, chosen: Sequence[int] | None) -> Layers:
    return layers if chosen is None else [layers[i] for i in chosen]


def _like(layers: Layers) -> Tensor:
    """g of a layer that has rows."""
    return next(g for _, g in filter(None, layers))


def _count(layers: Layers) -> int:
    """M * N, the number of rows of every layer."""
    return _like(layers).shape[1:3].numel()


def curvature_times(layers: Layers, s: Tensor, vectors: Sequence[Tensor]) -> list[Tensor]:
    """F x for a vector given by its blocks: sum_n s_n g_n a_n^T with s_n = sum_l <g_n, x_l a_n>, [M * N, 1]."""
    return [
        torch.zeros_like(x) if layer is None else row_times(*layer, s[:, 0], x.shape[-1])
        for layer, x in zip(layers, vectors, strict=True)
    ]


def leading_eigenvectors(
    a: Tensor, g: Tensor, basis_a: Tensor | None = None, basis_g: Tensor | None = None, count: int = 2
) -> Tensor:
    """Eigenvectors of G (x) A with the largest eigenvalues, of norm 1: [count, K, d_out, d_in].

    Over K groups they are those of every group together. Where there are fewer, or they do not converge, they are zero.

    Args:
        a, g: factors [K, d, d], or diagonals [K, d].
        basis_a, basis_g: their eigenvectors in ascending order, where those are known.
    """
    k, d_out, d_in = a.shape[0], g.shape[-1], a.shape[-1]
    found = a.new_zeros(count, k, d_out, d_in)
    try:
        (values_a, vectors_a), (values_g, vectors_g) = _leading(a, basis_a, count), _leading(g, basis_g, count)
    except torch.linalg.LinAlgError:
        return found
    pairs = (values_g[:, :, None] * values_a[:, None]).flatten(1)
    index = pairs.topk(min(count, pairs.shape[1])).indices[..., None]
    chosen_g = vectors_g.take_along_dim(index // values_a.shape[1], 1)
    chosen_a = vectors_a.take_along_dim(index % values_a.shape[1], 1)
    found[: index.shape[1]] = (chosen_g[..., None] * chosen_a[:, :, None]).movedim(1, 0) / k**0.5
    return found


def _leading(factor: Tensor, basis: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues [K, c] of a factor and their eigenvectors [K, c, d], c = min(count, d)."""
    if factor.dim() == 2:
        values, index = factor.topk(min(count, factor.shape[1]))
        return values, F.one_hot(index, factor.shape[1]).to(factor.dtype)
    _, known = linalg.eigenbasis(factor) if basis is None else (None, basis)
    assert known is not None
    vectors = known[..., -count:].mT
    return ((vectors @ factor) * vectors).sum(-1), vectors


def overlaps(spaces: Spaces) -> list[Tensor]:
    """The inner products of each layer's coarse vectors, [I, I]."""
    found = []
    for space in spaces:
        own = {(i, j): _dot(u, space[j]) for i, u in enumerate(space) for j in range(i + 1)}
        rows = [[own[max(i, j), min(i, j)] for j in range(len(space))] for i in range(len(space))]
        found.append(torch.stack([torch.stack(row) for row in rows]))
    return found


def block_gram(overlaps: Sequence[Tensor], dampings: Sequence[Tensor]) -> Tensor:
    """R0 diag(damping) R0^T [L * I, L * I]: block-diagonal, since every coarse vector lives in one layer."""
    return torch.block_diag(*[damping * own for own, damping in zip(overlaps, dampings, strict=True)])


def restrict(spaces: Spaces, vectors: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Tensor:
    """R0 v [L * I], or R0 diag(weights) v with a number for each layer."""
    products = [torch.stack([_dot(u, v) for u in space]) for space, v in zip(spaces, vectors, strict=True)]
    return torch.cat([w * p for w, p in zip(weights, products, strict=True)] if weights else products)


def prolonged(vectors: Sequence[Tensor], spaces: Spaces, coefficients: Tensor) -> list[Tensor]:
    """v + R0^T y, by blocks."""
    moved = []
    for v, space, own in zip(vectors, spaces, coefficients.split(len(spaces[0])), strict=True):
        present = sum((y for u, y in zip(space, own, strict=True) if u is v), torch.zeros_like(coefficients[0]))
        total = v * (1 + present)
        for u, y in zip(space, own, strict=True):
            if u is not v:
                total.addcmul_(u, y)
        moved.append(total)
    return moved


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """<u, v>; of one number that is expanded to all of u without writing it down."""
    return dot(u, v) if any(u.stride()) else u.flatten()[0] * v.sum()


def solve(coarse_curvature: Tensor, right_side: Tensor) -> Tensor:
    """y = E^-1 b [C] for the small system, scaled to a unit diagonal; zero where E is not usable.

    Directions that coincide share their part, and directions that vanish have none.
    """
    exact = torch.float64 if coarse_curvature.device.type != "mps" else coarse_curvature.dtype
    e, b = coarse_curvature.to(exact), right_side.to(exact)
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


def inner(u: Sequence[Tensor], v: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Tensor:
    """<u, v> over all blocks, or <u, diag(weights) v> with a number for each layer."""
    products = [dot(x, y) for x, y in zip(u, v, strict=True)]
    return torch.stack([w * p for w, p in zip(weights, products, strict=True)] if weights else products).sum()
