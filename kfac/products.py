"""Sums of outer products that know what they multiply: symmetric results, patches of images.

All are exact rearrangements of plain products.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight

BLOCK = 512  # rows of a block of a symmetric product: large enough for a fast product, small enough to skip a third


def gram(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """X^T diag(weights) X of [K, R, d] and [R]: [K, d, d]; a large one by the blocks on and below the diagonal."""
    weighted = x if weights is None else x * weights[:, None]
    d = x.shape[-1]
    if min(d, x.shape[-2]) <= BLOCK:
        return x.mT @ weighted
    out = x.new_empty(len(x), d, d)
    for one, left, right in zip(out, x, weighted, strict=True):
        for first in range(0, d, BLOCK):
            last = min(first + BLOCK, d)
            torch.mm(left[:, first:last].T, right[:, :last], out=one[first:last, :last])
            one[:first, first:last] = one[first:last, :first].T
    return out


def outer_sum(rows: Tensor) -> Tensor:
    """Sum of the outer products of rows [K, B, T, d]: [K, d, d]; no copy where each of the B is stored as [d, T]."""
    d, t = rows.shape[-1], rows.shape[-2]
    if rows.stride(-1) != 1 and rows.stride(-2) == 1 and d <= t:
        return (rows.mT @ rows).sum(1)
    return gram(rows.flatten(1, 2))


def autocorrelation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all 3x3 patches of an image padded by one zero: of a a^T, and of a, without the patches.

    Patches that are shifted against each other meet in the same products of pixels, so a a^T depends on the shift alone
    but for the border: what the pad cuts off is an outer row, an outer column, or both, and is subtracted.

    Args:
        x: [N, C, H, W].

    Returns:
        [C * 9, C * 9] and [C * 9], in the order (c, y, x) of a convolution's weight.
    """
    c = x.shape[1]
    dense = x.contiguous(memory_format=torch.channels_last)  # twice as fast
    shifts = conv2d_weight(
        dense, (c, c, 5, 5), dense, padding=2
    )  # by c, c', and the shift from the first to the second
    sums = shifts.unfold(2, 3, 1).unfold(3, 3, 1).flip(2, 3)  # c, c', y, x, y', x'
    total = x.sum(0)
    mean = total.sum((1, 2))[:, None, None].repeat(1, 3, 3)
    for place, cut in ((0, -1), (2, 0)):  # a patch's first row never sees the image's last one
        row, column = x[:, :, cut], x[:, :, :, cut]
        sums[:, :, place, :, place, :] -= _strip(row)
        sums[:, :, :, place, :, place] -= _strip(column)
        mean[:, place] -= total[:, cut].sum(1)[:, None]
        mean[:, :, place] -= total[:, :, cut].sum(1)[:, None]
        for place_x, cut_x in ((0, -1), (2, 0)):
            corner = x[:, :, cut, cut_x]
            sums[:, :, place, place_x, place, place_x] += corner.T @ corner
            mean[:, place, place_x] += total[:, cut, cut_x]
    return sums.permute(0, 2, 3, 1, 4, 5).reshape(c * 9, c * 9), mean.reshape(c * 9)


def _strip(line: Tensor) -> Tensor:
    """Products of pixels of a line [N, C, W], by c, c' and places of both in a patch of three: [C, C, 3, 3]."""
    c = line.shape[1]
    return conv1d_weight(line, (c, c, 5), line, padding=2).unfold(2, 3, 1).flip(2)


class Unwritten(ABC):
    """Rows a [K, N, T, d_in] that are not in memory until `rows` is read."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Of the rows, [K, N, T, d_in]."""

    @property
    @abstractmethod
    def rows(self) -> Tensor:
        """The rows, written once."""

    @abstractmethod
    def first(self, count: int) -> Self:
        """Those of the first `count` examples."""

    @abstractmethod
    def of(self, examples: Tensor) -> Self:
        """Those of some examples, by their places."""


@dataclass
class WithOne(Unwritten):
    """Rows of x [K, N, T, d] with a one for the bias at their end: a part of the examples is chosen before the copy."""

    x: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.x.shape[-1] + 1))

    @cached_property
    def rows(self) -> Tensor:
        a = self.x.new_empty(self.shape)
        a[..., :-1], a[..., -1] = self.x, 1.0
        return a

    def first(self, count: int) -> WithOne:
        return WithOne(self.x[:, :count])

    def of(self, examples: Tensor) -> WithOne:
        return WithOne(self.x[:, examples])


@dataclass
class Patches(Unwritten):
    """Rows a of a 3x3 convolution with stride 1 and padding 1, as its input; a one for the bias is last.

    x: [N, C, H, W]. Where no more than sums are needed the rows are never written down.
    """

    x: Tensor
    bias: bool

    @property
    def shape(self) -> torch.Size:
        n, c, h, w = self.x.shape
        return torch.Size((1, n, h * w, 9 * c + self.bias))

    @cached_property
    def rows(self) -> Tensor:
        n, c, h, w = self.x.shape
        windows = F.pad(self.x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # [N, C, H, W, 3, 3]
        a = self.x.new_empty(self.shape)
        a[..., : 9 * c].view(n, h, w, c, 3, 3).copy_(windows.permute(0, 2, 3, 1, 4, 5))
        a[..., 9 * c :] = 1.0
        return a

    def first(self, count: int) -> Patches:
        return Patches(self.x[:count], self.bias)

    def of(self, examples: Tensor) -> Patches:
        return Patches(self.x[examples], self.bias)

    def outer_sum(self, keep: Tensor | None) -> Tensor:
        """Sum of a a^T over all rows, times 0 or 1 for each example in `keep` [N]: [1, d_in, d_in]."""
        x = self.x if keep is None else self.x * keep[:, None, None, None]
        outer, total = autocorrelation(x)
        if self.bias:
            _, n, t, _ = self.shape
            count = torch.full_like(total[:1], n * t) if keep is None else keep.sum()[None] * t
            outer = torch.cat([outer, total[None]])
            outer = torch.cat([outer, torch.cat([total, count])[:, None]], dim=1)
        return outer[None]

    def products(self, g: Tensor, directions: Sequence[Tensor] | Tensor) -> Tensor:
        """Inner products of rows with directions, sum_t <g, V a>, as one convolution.

        Args:
            g: [1, M, N, T, d_out]. directions: I times [1, d_out, d_in].

        Returns:
            [M * N, I].
        """
        count, (n, c, h, w) = len(directions), self.x.shape
        flat = torch.cat([direction[0] for direction in directions])
        outputs = F.conv2d(self.x, flat[:, : 9 * c].reshape(-1, c, 3, 3), flat[:, -1] if self.bias else None, padding=1)
        outputs = outputs.reshape(n, count, -1, h * w)
        columns = [(g[0].mT * outputs[:, i]).sum((2, 3)) for i in range(count)]
        return torch.stack(columns, dim=-1).reshape(-1, count)
