"""Curvature rows: the gradients of curvature vectors, example by example, and all sums over them.

A row is the matrix sum_t g a^T of one example and one vector; the curvature of the loss is the sum of all rows' outer
products (losses.py). For each layer they are kept as their parts (layers.py): a [K, N, T, d_in], or indices [K, N, T]
where a is one-hot (-1 for a row that counts nowhere), and g [K, M, N, T, d_out].
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import chain
from .batch import Batch, Call
from .layers import Block
from .linalg import product
from .patches import Patches
from .products import Unwritten, WithOne, gram, outer_sum

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
MODEL_ROWS = 125  # examples that the quadratic model uses at least, before it takes an eighth of the batch


@dataclass
class Rows:
    """Curvature rows of one batch: (a, g) of each layer, with the same examples in dimension N; the batch's weight.

    The a may still be `Unwritten`, which every function here accepts. `vectors` is how many vectors lie side
    by side in N for every example, because inputs differ between them.
    """

    layers: dict[Block, tuple[Any, Tensor]]  # a is a Tensor or Unwritten
    weight: Tensor
    vectors: int = 1

    def kept(self, batch: Batch) -> Rows:
        """The same for later: what lies in an input that the loop may write into again is copied."""
        layers = {block: (_kept(a, batch.foreign_inputs), g) for block, (a, g) in self.layers.items()}
        return replace(self, layers=layers)


def _kept(a: Tensor | Unwritten, inputs: set[int]) -> Tensor | Unwritten:
    if isinstance(a, WithOne):
        return a.rows
    x = a.x if isinstance(a, Patches) else written(a)
    if x.untyped_storage().data_ptr() not in inputs:
        return a
    return replace(a, x=copied(x)) if isinstance(a, Patches) else copied(x)


def copied(x: Tensor) -> Tensor:
    """A copy in the same layout: what is expanded stays so."""
    once = x[tuple(slice(None if stride else 1) for stride in x.stride())]
    return once.clone().expand(x.shape)


def written(a: Tensor | Unwritten) -> Tensor:
    """Rows a as a tensor."""
    return a.rows if isinstance(a, Unwritten) else a


def send_back(batch: Batch, vectors: Sequence[Any], weight: Tensor) -> Rows:
    """Send curvature vectors back through a batch's graph and bring every layer to rows of the same examples."""
    calls: list[tuple[Block, Tensor | Unwritten, Tensor]] = []
    arrived = list(zip(*[batch.send_back(vector) for vector in vectors], strict=True))
    for index, call in enumerate(batch.calls):
        received, arrived[index] = arrived[index], ()  # a gradient of which only sums are needed is free after them
        gradients = [g for g in received if g is not None]
        if not gradients:
            continue  # a dead branch: the output does not depend on this call
        if len(gradients) < len(received):
            gradients = [torch.zeros_like(gradients[0]) if g is None else g for g in received]
        call_rows = call.block.rows(call.rows, gradients, call.module)
        calls.append((call.block, *_batch_first(*call_rows, batch.size)))
    if not calls:
        return Rows({}, weight)
    usual, examples = _examples([(a, g) for _, a, g in calls], batch.size)
    aligned: dict[Block, list[tuple[Tensor | Unwritten, Tensor]]] = {}
    for block, a, g in calls:
        aligned.setdefault(block, []).append(_align(a, g, usual, examples))
    layers: dict[Block, tuple[Tensor | Unwritten, Tensor]] = {}
    for block, parts in aligned.items():
        if len(parts) == 1 and not block.unit:
            layers[block] = parts[0]
            continue
        # Further calls of a layer are positions T.
        a = _join([written(a) for a, _ in parts], dim=2 if _is_index(parts[0][0]) else -2)
        g = _join([g for _, g in parts], dim=3)
        if block.unit:  # its input is always 1: the sum over positions is exact
            a, g = a[:, :, :1], g.sum(3, keepdim=True)
        layers[block] = (a, g)
    if not any(_differs(a) for a, _ in layers.values()):
        return Rows(layers, weight)
    return Rows({block: _side_by_side(written(a), g) for block, (a, g) in layers.items()}, weight, len(vectors))


def pass_back(
    batch: Batch, vector: Any, ends: set[Block], take: Callable[[Block, Tensor | Unwritten, Tensor], None]
) -> bool:
    """`send_back` of one vector that keeps no rows: `take` gets those of a layer as soon as its gradient arrives.

    False where a layer's rows depend on other calls or on their shapes; what was taken is then not all.
    """
    whole = _one_by_one(batch)

    def arrive(call: Call, gradient: Tensor) -> None:
        nonlocal whole
        a, g = call.block.rows(call.rows, [gradient], call.module)
        whole = whole and a.shape[1] == g.shape[2] == batch.size
        if not whole:
            return
        if call.block.unit:
            a, g = written(a)[:, :, :1], g.sum(3, keepdim=True)
        take(call.block, a, g)

    if whole:
        batch.pass_back(vector, arrive, ends)
    return whole


def pass_back_some(
    batch: Batch, vector: Any, places: Tensor, take: Callable[[Block, Tensor | Unwritten, Tensor], None]
) -> bool:
    """`pass_back` of the examples at `places` alone, of which `take` gets g, and a of the whole batch.

    False, and nothing was taken, where the graph behind the output is no chain.
    """
    calls = {call.edge.node: call for call in batch.calls}
    dtypes = {call.block.dtype for call in batch.calls}
    start = batch.edges[0]
    simple = isinstance(vector, Tensor) and not batch.crossings and _one_by_one(batch) and len(dtypes) == 1
    nodes = chain.find(start, [call.edge for call in batch.calls], *dtypes) if simple and start is not None else None
    if nodes is None:
        return False

    def arrive(node: Any, gradient: Tensor) -> None:
        if call := calls.get(node):
            take(call.block, *call.block.rows(call.rows, [gradient], call.module))

    chain.pass_back(nodes, vector, places, arrive)
    return True


def _one_by_one(batch: Batch) -> bool:
    """Whether every layer was called once, on the examples of the batch."""
    return len({call.block for call in batch.calls}) == len(batch.calls) and not any(
        call.block.together or call.input.dim() == 0 or call.input.shape[0] != batch.size for call in batch.calls
    )


def _batch_first(a: Tensor | Unwritten, g: Tensor, size: int) -> tuple[Tensor | Unwritten, Tensor]:
    """Rows of a call on [T, N, d], as attention and recurrent nets have it, with N before T; `size` is the output's."""
    n, t = g.shape[2:4]
    if isinstance(a, Patches) or n == 1 or n % size == 0 or t != size:
        return a, g
    a = written(a)
    lead = 2 if _differs(a) else 1
    return a.transpose(lead, lead + 1), g.transpose(2, 3)


def _examples(calls: Sequence[tuple[Tensor | Unwritten, Tensor]], size: int) -> tuple[int, int]:
    """The usual size of dimension 0 over all calls, and the number of examples: what the calls that fit it share.

    Usual is `size`, that of the output, where a call has it.
    """
    sizes = [g.shape[2] for _, g in reversed(calls)]
    frequency = Counter(n for n in sizes if n > 1)
    usual = frequency.most_common(1)[0][0] if frequency else 1
    usual = size if size in frequency else usual
    return usual, math.gcd(*[g.shape[2] for a, g in calls if _fits(a, g, usual)])


def _fits(a: Tensor | Unwritten, g: Tensor, usual: int) -> bool:
    """Whether dimension 0 of a call is the batch, or the batch and positions in one."""
    n = g.shape[2]
    if _is_index(a) and g.shape[3] == 1:
        return n == usual  # other plain lists of indices are positions
    return n % usual == 0 or (n > 1 and usual % n == 0)


def _align(a: Tensor | Unwritten, g: Tensor, usual: int, examples: int) -> tuple[Tensor | Unwritten, Tensor]:
    """Rows of a call with `examples` in N.

    What all examples share (positions, a task's embedding) has one gradient, the sum over examples, and no rows of its
    own for each. Every example takes an equal part of its square, which keeps the expectation for drawn vectors.
    """
    if isinstance(a, Unwritten):
        if a.shape[1] == examples:
            return a, g
        a = a.rows
    lead = 2 if _differs(a) else 1
    n, t, *tail = a.shape[lead:]
    if _fits(a, g, usual):
        # Positions that were flattened into the batch are positions T.
        return a.reshape(*a.shape[:lead], examples, -1, *tail), g.reshape(*g.shape[:2], examples, -1, g.shape[-1])
    if t == examples:  # the batch is dimension 1
        return a.transpose(lead, lead + 1), g.transpose(2, 3)
    a = a.reshape(*a.shape[:lead], 1, n * t, *tail).expand(*a.shape[:lead], examples, n * t, *tail)
    g = g.reshape(*g.shape[:2], 1, n * t, g.shape[-1]) / math.sqrt(examples)
    return a, g.expand(-1, -1, examples, -1, -1)


def _side_by_side(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors of each example as examples of their own: N M of them, M = 1."""
    if not _differs(a):
        a = a[:, None].expand(-1, g.shape[1], *a.shape[1:])
    return a.transpose(1, 2).flatten(1, 2), g.transpose(1, 2).flatten(1, 2)[:, None]


def _is_index(a: Tensor | Unwritten) -> bool:
    return isinstance(a, Tensor) and a.dtype == torch.long


def _differs(a: Tensor | Unwritten) -> bool:
    """Whether inputs differ from vector to vector."""
    return len(a.shape) == 5


def an_eighth(examples: int) -> int:
    """Of so many examples, at least `MODEL_ROWS`."""
    return min(examples, max(examples // 8, MODEL_ROWS))


def eighth(rows: Rows) -> Rows:
    """The first eighth of the examples (`an_eighth`), scaled to stand for all."""
    layers: dict[Block, tuple[Tensor | Unwritten, Tensor]] = {}
    for block, (a, g) in rows.layers.items():
        examples = a.shape[1]
        kept = an_eighth(examples // rows.vectors) * rows.vectors
        layers[block] = first(a, kept), scaled(g[:, :, :kept], examples / kept)
    return replace(rows, layers=layers)


def first(a: Tensor | Unwritten, kept: int) -> Tensor | Unwritten:
    """Rows a of the first so many examples."""
    if kept == a.shape[1]:
        return a
    return a.part(0, kept) if isinstance(a, Unwritten) else a[:, :kept]


def scaled(g: Tensor, stands_for: float) -> Tensor:
    """Rows g of examples of which each stands for so many."""
    return g if stands_for == 1 else g * math.sqrt(stands_for)


def places(n: int, enough: int, device: torch.device) -> Tensor | None:
    """Which of n examples to keep: one of every few, so that at least `enough` are left. None: all of them."""
    return None if n // enough < 2 else torch.tensor(spread(n, n // enough)).to(device, non_blocking=True)


def stands_for(n: int, index: Tensor | None) -> float:
    """How many of n examples each of those at the places `index` stands for."""
    return 1.0 if index is None else n / len(index)


def chosen(a: Tensor | Unwritten, index: Tensor | None) -> Tensor | Unwritten:
    """Rows a of the examples at the places `index`."""
    if index is None:
        return a
    return a.of(index) if isinstance(a, Unwritten) else a[:, index]


def thinned(a: Tensor | Unwritten, g: Tensor, index: Tensor | None) -> tuple[Tensor | Unwritten, Tensor]:
    """The rows at the places `index`, scaled to stand for all."""
    some = g if index is None else g[:, :, index]
    return chosen(a, index), scaled(some, stands_for(g.shape[2], index))


def thinned_mask(mask: Tensor | None, n: int, index: Tensor | None) -> Tensor | None:
    """What a mask of n examples, or of their positions, says of those at the places `index`."""
    if mask is None or index is None or mask.numel() % n:
        return mask
    return mask.reshape(n, -1)[index]


def spread(count: int, stride: int) -> list[int]:
    """One place of every `stride` in a row; which one follows the golden ratio, so that no period of the examples and
    no order of them matters."""
    places = [first + int(i * GOLDEN_RATIO % 1 * stride) for i, first in enumerate(range(0, count, stride))]
    return [place for place in places if place < count]


def moment_g(block: Block, a: Tensor | Unwritten, g: Tensor) -> Tensor:
    """The sum of g g^T that a Kronecker factor is made of: [K, d, d], or [K, d] of a side that keeps a diagonal.

    With `block.reduce` an example's positions are first averaged in a and summed in g (Eschenhagen et al. 2023, arXiv
    2311.00636).
    """
    summed = g.sum(3, keepdim=True) if _reduced(block, a) else g
    return summed.square().sum((1, 2, 3)) if block.diagonal_g else outer_sum(summed.flatten(1, 2))


def moment_a(
    block: Block, a: Tensor | Unwritten, like: Tensor, mask: Tensor | None, vectors: int = 1
) -> tuple[Tensor, Tensor]:
    """The sum of a a^T, as `moment_g`, and how many rows that is.

    Args:
        like: a tensor of the rows' dtype and device.
        mask: 1 for examples or positions that count, 0 for those that the loss ignores; used where its size is N or
            N * T.
        vectors: how many vectors lie side by side in N.
    """
    k, n, t = a.shape[:3]
    if block.unit:
        return like.new_ones(k, 1, 1), like.new_ones(())
    if isinstance(a, Patches):
        alike = mask is None or mask.numel() == n
        if alike and not block.reduce and not block.diagonal_a:
            kept = None if mask is None else mask.to(like.dtype).reshape(n)
            return a.outer_sum(kept), like.new_ones(()) * (n * t) if kept is None else kept.sum() * t
    keep: Tensor | None = None
    if mask is not None and mask.numel() * vectors in (n, n * t):
        keep = mask.to(like.dtype).reshape(n // vectors, 1, -1).expand(-1, vectors, t).reshape(n, t)
    if isinstance(a, Patches):
        parts = [
            _moment_a(block, written, like, None if keep is None else keep[start:stop])
            for start, stop, written in a.written_by_parts()
        ]
        outer, count = zip(*parts, strict=True)
        return torch.stack(outer).sum(0), torch.stack(count).sum(0)
    return _moment_a(block, written(a), like, keep)


def _moment_a(block: Block, a: Tensor, like: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """`moment_a` of rows that are written, times `keep` [N, T]."""
    k, n, t = a.shape[:3]
    if _is_index(a):
        known = (a[0] >= 0).to(like.dtype)
        keep = known if keep is None else keep * known
    if _reduced(block, a):
        shares = like.new_ones(n, t) if keep is None else keep
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1)
        if _is_index(a):
            a = like.new_zeros(k, n, block.shape[2]).scatter_add_(2, a.clamp_min(0), shares[None])[:, :, None]
        else:
            a = shares[:, None] @ a
        # Examples of which nothing counts are zeros now.
        return _second_moment(a.flatten(1, 2), block.diagonal_a), (shares.sum(1) > 0).sum().to(like.dtype)
    count = like.new_ones(()) * (n * t) if keep is None else keep.sum()
    if _is_index(a):
        assert keep is not None
        return _by_token(a, keep[..., None], block.shape[2])[:, 0], count
    return _second_moment(a.flatten(1, 2), block.diagonal_a, None if keep is None else keep.reshape(-1)), count


def _reduced(block: Block, a: Tensor | Unwritten) -> bool:
    return block.reduce and a.shape[2] > 1


def _second_moment(rows: Tensor, diagonal: bool, mask: Tensor | None = None) -> Tensor:
    if not diagonal:
        return gram(rows, mask)
    squares = rows.square()
    return squares.sum(1) if mask is None else mask @ squares


def squared_gradients(
    a: Tensor | Unwritten,
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
    if isinstance(a, Patches):
        chunks = ((g[:, :, start:stop], rows) for start, stop, rows in a.written_by_parts(memory))
        parts = (squared_gradients(rows, own, size, basis_a, basis_g, memory) for own, rows in chunks)
        return functools.reduce(Tensor.add_, parts)
    a = written(a)
    g = g if basis_g is None else _times(g, basis_g)
    if _is_index(a):
        return _squares_by_token(a, g, size)
    a = a if basis_a is None else _times(a, basis_a)
    if a.shape[2] == 1:
        return g[:, :, :, 0].square().sum(1).mT @ a[:, :, 0].square()
    total = a.new_zeros(a.shape[0], g.shape[-1], a.shape[-1])
    chunk = max(1, memory // (a.shape[0] * g.shape[-1] * a.shape[-1]))
    for vector in g.unbind(1):
        for first in range(0, a.shape[1], chunk):
            part = slice(first, first + chunk)
            total += (vector[:, part].mT @ a[:, part]).square().sum(1)
    return total


def _times(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows [K, ..., d] times [K, d, d], as one product for each k instead of one for each example."""
    return (rows.flatten(1, -2) @ basis).reshape(rows.shape)


def row_products(
    a: Tensor | Unwritten, g: Tensor, directions: Sequence[Tensor] | Tensor, memory: int = 2**24
) -> Tensor:
    """Inner products of rows with some directions, sum_t <g, V a>.

    Args:
        a: rows [K, N, T, d_in], or indices [K, N, T].
        g: rows [K, M, N, T, d_out].
        directions: I times [K, d_out, d_in].
        memory: largest number of numbers that a chunk of per-example gradients may hold.

    Returns:
        [M * N, I]; for S of this shape, S^T S is the curvature along the directions within the layer.
    """
    if isinstance(a, Patches):
        return a.products(g, directions)
    a = written(a)
    if _is_index(a):
        columns = [(g[0] * direction[0].mT[a[0].clamp_min(0)]).sum((-2, -1)) for direction in directions]
        return torch.stack(columns, dim=-1).reshape(-1, len(directions))
    k, n, t, d_in = a.shape
    m, count = g.shape[1], len(directions)
    if t == d_in == 1:  # the gradients of an example are its g, of all K side by side
        flat = torch.stack([direction.reshape(-1) for direction in directions])
        return (g * a[:, None]).permute(1, 2, 0, 3, 4).reshape(m * n, -1) @ flat.T
    if m * (t + count) * d_in < t * count * (d_in + m):
        # Fewer products by the gradients of each example, sum_t g a^T, than by the directions' outputs V a.
        flat = torch.stack([direction.reshape(-1) for direction in directions])
        chunk = max(1, memory // (m * flat.shape[1]))
        parts = []
        for some_a, some_g in zip(a.split(chunk, dim=1), g.split(chunk, dim=2), strict=True):
            gradients = (some_g.mT @ some_a[:, None]).movedim(0, 2)
            parts.append(gradients.reshape(m, -1, flat.shape[1]) @ flat.T)
        return torch.cat(parts, dim=1).reshape(-1, count)
    outputs = [product(a.reshape(k, n * t, d_in), direction.mT).reshape(k, 1, n, t, -1) for direction in directions]
    # Elementwise products and sums: as one einsum this is many small matrix products, three to ten times slower.
    columns = [(g * output).sum((0, 3, 4)) for output in outputs]
    return torch.stack(columns, dim=-1).reshape(-1, count)


def row_times(a: Tensor | Unwritten, g: Tensor, s: Tensor, size: int) -> Tensor:
    """Rows added up with a number each, sum over n and vectors of s g a^T: [K, d_out, d_in].

    Args:
        a: rows [K, N, T, d_in], or indices [K, N, T].
        g: rows [K, M, N, T, d_out].
        s: [M * N].
        size: d_in.
    """
    weighted = (s.reshape(1, g.shape[1], -1, 1, 1) * g).sum(1)
    if isinstance(a, Patches):
        return a.times(weighted)
    a = written(a)
    if _is_index(a):
        return _by_token(a, weighted[0], size)
    return weighted.flatten(1, 2).mT @ a.flatten(1, 2)


def row_sums(a: Tensor | Unwritten, g: Tensor) -> tuple[Tensor, Tensor]:
    """1^T a [K, N, T] and 1^T g [K, M, N, T]."""
    if isinstance(a, Patches):
        return a.sums(), g.sum(-1)
    a = written(a)
    return (a >= 0).to(g.dtype) if _is_index(a) else a.sum(-1), g.sum(-1)


def _squares_by_token(a: Tensor, g: Tensor, size: int) -> Tensor:
    """Rows of an example that have the same token are added up before they are squared: [1, d_out, size]."""
    tokens, order = a[0].sort(dim=1, stable=True)
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    place = first.long().cumsum(1) - 1  # of each token among those of its example
    squares = torch.zeros_like(g[0, 0])
    for vector in g[0]:
        summed = torch.zeros_like(vector)
        summed.scatter_add_(1, place[..., None].expand_as(vector), vector.gather(1, order[..., None].expand_as(vector)))
        squares += summed.square()
    return _by_token(torch.full_like(tokens, -1).scatter_(1, place, tokens)[None], squares, size)


def _by_token(a: Tensor, values: Tensor, size: int) -> Tensor:
    """Values [N, T, d] added up by token: [1, d, size]; those of -1 have to be zero."""
    flat = values.reshape(-1, values.shape[-1])
    return values.new_zeros(size, values.shape[-1]).index_add_(0, a.reshape(-1).clamp_min(0), flat).mT[None]


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
