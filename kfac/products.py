"""Sums of outer products that know their symmetry, and rows that are not in memory before they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from .linalg import aligned

BLOCK = 512  # rows of a block of a symmetric product: large enough for a fast product, small enough to skip a third


def gram(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """X^T diag(weights) X of [K, R, d] and [R]: [K, d, d]; a large one by the blocks on and below the diagonal."""
    weighted = x if weights is None else x * weights[:, None]
    d = x.shape[-1]
    if d <= BLOCK or (x.shape[-2] <= BLOCK and x.device.type != "cpu"):
        return x.mT @ weighted
    out = aligned(x, len(x), d, d)
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


class Unwritten(ABC):
    """Rows a [K, N, T, d_in] that are not in memory until `rows` is read."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Of the rows, [K, N, T, d_in]."""

    @property
    @abstractmethod
    def rows(self) -> Tensor:
        """The rows."""

    @abstractmethod
    def part(self, start: int, stop: int) -> Self:
        """Those of the examples from `start` to `stop`."""

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

    def part(self, start: int, stop: int) -> WithOne:
        return WithOne(self.x[:, start:stop])

    def of(self, examples: Tensor) -> WithOne:
        return WithOne(self.x[:, examples])
