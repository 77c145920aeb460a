"""Curvature rows: the gradients of curvature vectors, example by example, and all sums over them.

A row is the matrix sum_t g a^T of one example and one vector; the curvature of the loss is the sum of all rows' outer
products (losses.py). For each layer they are kept as their parts (layers.py): a [K, N, T, d_in], or indices [K, N, T]
where a is one-hot, and g [K, M, N, T, d_out].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import Batch
from .layers import Block

MODEL_ROWS = 256  # examples that the quadratic model uses at least, before it takes a quarter of the batch


@dataclass
class Rows:
    """Curvature rows of one batch: (a, g) of each layer, with the same examples in dimension N; the batch's weight."""

    layers: dict[Block, tuple[Tensor, Tensor]]
    weight: Tensor


def send_back(batch: Batch, vectors: Sequence[Any], weight: Tensor) -> Rows:
    """Send curvature vectors back through a batch's graph and bring every layer to rows."""
    calls: dict[Block, list[tuple[Tensor, Tensor]]] = {}
    sent = [batch.send_back(vector) for vector in vectors]
    # Where some inputs differ from vector to vector, the examples of each vector are examples of their own.
    parted = len(vectors) > 1 and any(call.block.mixed for call in batch.calls)
    for call, arrived in zip(batch.calls, zip(*sent, strict=True), strict=True):
        gradients = [g for g in arrived if g is not None]
        if not gradients:
            continue  # a dead branch: the output does not depend on this call
        if len(gradients) < len(arrived):
            gradients = [torch.zeros_like(gradients[0]) if g is None else g for g in arrived]
        a, g = call.block.rows(call.rows, gradients, call.module)
        if parted and not call.block.mixed:
            a = a.repeat(1, g.shape[1], *[1] * (a.dim() - 2))
            g = g.flatten(1, 2)[:, None]
        calls.setdefault(call.block, []).append((a, g))
    layers = {}
    examples = math.gcd(*[a.shape[1] for parts in calls.values() for a, _ in parts])
    for block, parts in calls.items():
        # Further calls of a layer, and positions that were flattened into the batch, are positions T.
        inputs = [a.reshape(a.shape[0], examples, -1, *a.shape[3:]) for a, _ in parts]
        outputs = [g.reshape(*g.shape[:2], examples, -1, g.shape[-1]) for _, g in parts]
        a, g = _join(inputs, dim=2), _join(outputs, dim=3)
        layers[block] = (a[:, :, :1], g.sum(3, keepdim=True)) if block.unit else (a, g)
    return Rows(layers, weight)


def quarter(rows: Rows) -> Rows:
    """A quarter of the examples, at least `MODEL_ROWS`, scaled to stand for all."""
    layers = {}
    for block, (a, g) in rows.layers.items():
        examples = a.shape[1]
        kept = min(examples, max(examples // 4, MODEL_ROWS))
        layers[block] = (a[:, :kept], g[:, :, :kept] * math.sqrt(examples / kept)) if kept < examples else (a, g)
    return Rows(layers, rows.weight)


def moments(block: Block, a: Tensor, g: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The sums that Kronecker factors are made of: of a a^T, how many rows that is, and of g g^T.

    With `block.reduce` an example's positions are first averaged in a and summed in g (Eschenhagen et al. 2023, arXiv
    2311.00636). Sides that keep a diagonal give [K, d] instead of [K, d, d].

    Args:
        mask: 1 for examples or positions that count, 0 for those that the loss ignores; used where its size is N or
            N * T.
    """
    k, n, t = a.shape[:3]
    one = g.new_ones(())
    if block.unit:
        return g.new_ones(k, 1, 1), one, gradient_moment(g, block.diagonal_g)
    keep: Tensor | None = None
    if mask is not None and mask.numel() in (n, n * t):
        keep = mask.to(g.dtype).reshape(n, -1).expand(n, t)
    if (own := block.counts(a)) is not None:
        keep = own.to(g.dtype).reshape(n, t) if keep is None else keep * own.reshape(n, t)
    size = block.shape[2]
    if block.reduce and t > 1:
        g = g.sum(3, keepdim=True)
        weights = torch.ones(n, t, device=g.device, dtype=g.dtype) if keep is None else keep
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1)
        present = weights.sum(1)
        if a.dtype == torch.long:
            same, _ = _same_tokens(a[0])
            pooled = (same.to(g.dtype) @ weights[..., None])[..., 0]
            # Every position of a token has the token's whole weight, so that w * pooled adds up to its square.
            outer_a = g.new_zeros(size).index_add_(0, a.reshape(-1), (weights * pooled).reshape(-1))[None]
        else:
            mean = (a * weights[None, :, :, None]).sum(2, keepdim=True)
            outer_a = _second_moment(mean.flatten(1, 2), block.diagonal_a)
        return outer_a, present.sum(), gradient_moment(g, block.diagonal_g)
    count = one * (n * t) if keep is None else keep.sum()
    if a.dtype == torch.long:
        weights = torch.ones(n * t, device=g.device, dtype=g.dtype) if keep is None else keep.reshape(-1)
        outer_a = g.new_zeros(size).index_add_(0, a.reshape(-1), weights)[None]
    else:
        flat = a.flatten(1, 2)
        outer_a = _second_moment(flat, block.diagonal_a, None if keep is None else keep.reshape(-1))
    return outer_a, count, gradient_moment(g, block.diagonal_g)


def gradient_moment(g: Tensor, diagonal: bool = False) -> Tensor:
    """Sum of g g^T over vectors, examples and positions: [K, M, N, T, d_out] -> [K, d_out, d_out] (or its diagonal)."""
    return _second_moment(g.flatten(1, 3), diagonal)


def _second_moment(rows: Tensor, diagonal: bool, mask: Tensor | None = None) -> Tensor:
    weighted = rows if mask is None else rows * mask[:, None]
    return (weighted * rows).sum(1) if diagonal else rows.mT @ weighted


def squared_gradients(
    a: Tensor,
    g: Tensor,
    size: int,
    basis_a: Tensor | None = None,
    basis_g: Tensor | None = None,
    memory: int = 2**24,
) -> Tensor:
    """Second moments of rows in a basis, sum over n and vectors of (Q_g^T sum_t g a^T Q_a)^2, elementwise.

    This is the scale of E-KFAC (George et al. 2018, arXiv 1806.03884, equation 10).

    Args:
        a: rows [K, N, T, d_in], or indices [K, N, T].
        g: rows [K, M, N, T, d_out].
        size: d_in.
        basis_a, basis_g: [K, d, d], eigenvectors as columns; None for the identity.
        memory: largest number of numbers that a chunk of rows may hold.

    Returns:
        [K, d_out, d_in].
    """
    g = g if basis_g is None else g @ basis_g[:, None, None]
    if a.dtype == torch.long:
        same, count = _same_tokens(a[0])
        # Every position of a token has the square of the token's whole gradient; it is to count once.
        squares = ((same.to(g.dtype) @ g[0]).square() / count[..., None]).sum(0)
        return _by_token(a, squares, size)
    a = a if basis_a is None else a @ basis_a[:, None]
    if a.shape[2] == 1:
        return g[:, :, :, 0].square().sum(1).mT @ a[:, :, 0].square()
    total = a.new_zeros(a.shape[0], g.shape[-1], a.shape[-1])
    chunk = max(1, memory // (a.shape[0] * g.shape[-1] * a.shape[-1]))
    for vector in g.unbind(1):
        for first in range(0, a.shape[1], chunk):
            part = slice(first, first + chunk)
            total += (vector[:, part].mT @ a[:, part]).square().sum(1)
    return total


def row_products(a: Tensor, g: Tensor, directions: Tensor, memory: int = 2**24) -> Tensor:
    """Inner products of rows with some directions, sum_t <g, V a>.

    Args:
        a: rows [K, N, T, d_in], or indices [K, N, T].
        g: rows [K, M, N, T, d_out].
        directions: [I, K, d_out, d_in].
        memory: largest number of numbers that a chunk of per-example gradients may hold.

    Returns:
        [M * N, I]; for S of this shape, S^T S is the curvature along the directions within the layer.
    """
    if a.dtype == torch.long:
        columns = [(g[0] * direction[0].mT[a[0]]).sum((-2, -1)) for direction in directions]
        return torch.stack(columns, dim=-1).reshape(-1, len(directions))
    k, n, t, d_in = a.shape
    m, (count, _, d_out, _) = g.shape[1], directions.shape
    if m * (t + count) * d_in < t * count * (d_in + m):
        # Fewer products by the gradients of each example, sum_t g a^T, than by the directions' outputs V a.
        flat = directions.reshape(count, -1)
        chunk = max(1, memory // (m * flat.shape[1]))
        parts = []
        for some_a, some_g in zip(a.split(chunk, dim=1), g.split(chunk, dim=2), strict=True):
            gradients = (some_g.mT @ some_a[:, None]).movedim(0, 2)
            parts.append(gradients.reshape(m, -1, flat.shape[1]) @ flat.T)
        return torch.cat(parts, dim=1).reshape(-1, count)
    weights = directions.permute(1, 3, 0, 2).reshape(k, d_in, count * d_out)
    outputs = (a.reshape(k, n * t, d_in) @ weights).reshape(k, n, t, count, d_out)
    # Elementwise products and sums: as one einsum this is many small matrix products, three to ten times slower.
    columns = [(g * outputs[:, None, :, :, i]).sum((0, 3, 4)) for i in range(count)]
    return torch.stack(columns, dim=-1).reshape(-1, count)


def row_times(a: Tensor, g: Tensor, s: Tensor, size: int) -> Tensor:
    """Rows added up with a number each, sum over n and vectors of s g a^T: [K, d_out, d_in].

    Args:
        a: rows [K, N, T, d_in], or indices [K, N, T].
        g: rows [K, M, N, T, d_out].
        s: [M * N].
        size: d_in.
    """
    weighted = (s.reshape(1, g.shape[1], -1, 1, 1) * g).sum(1)
    if a.dtype == torch.long:
        return _by_token(a, weighted[0], size)
    return weighted.flatten(1, 2).mT @ a.flatten(1, 2)


def row_sums(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """1^T a [K, N, T] and 1^T g [K, M, N, T]."""
    return torch.ones_like(a, dtype=g.dtype) if a.dtype == torch.long else a.sum(-1), g.sum(-1)


def _same_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions of an example have the same token [N, T, T], and how many positions each one's token has."""
    same = tokens[:, :, None] == tokens[:, None]
    return same, same.sum(-1)


def _by_token(tokens: Tensor, values: Tensor, size: int) -> Tensor:
    """Values [N, T, d] added up by token: [1, d, size]."""
    flat = values.reshape(-1, values.shape[-1])
    return values.new_zeros(size, values.shape[-1]).index_add_(0, tokens.reshape(-1), flat).mT[None]


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
