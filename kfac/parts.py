"""The vectors that a step rule works on: on a CPU the layers' matrices one by one, elsewhere all of a group in one.

A GPU does little work in the time that one of its calls takes, so there every operation of a rule is one call for all
layers of a parameter group. On a CPU calls are cheap and passes over memory are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layers import Block

ONE_BY_ONE = {"cpu"}  # devices on which many small operations are as good as few large ones


def worth_joining(device: torch.device) -> bool:
    """Whether few large operations are better there than many small ones."""
    return device.type not in ONE_BY_ONE


class Parts:
    """Which layers make up each part, for matrices [K, d_out, d_in] of `blocks` in their order.

    Args:
        blocks, groups: the layers and their parameter groups.
        joined: whether the layers of a group (of one dtype, on one device) are one part.

    Attributes:
        groups: the parameter group of each part.
        first: the first layer of each part, by its number.
        of: the part of each layer, by its number.
    """

    def __init__(self, blocks: Sequence[Block], groups: Sequence[dict[str, Any]], joined: bool):
        self.blocks, self.joined = list(blocks), joined
        numbers: dict[object, int] = {}
        self.of: list[int] = []
        self.first: list[int] = []
        for i, (block, group) in enumerate(zip(blocks, groups, strict=True)):
            key: object = (id(group), block.dtype, block.parameters[0].device) if joined else i
            if key not in numbers:
                numbers[key] = len(numbers)
                self.first.append(i)
            self.of.append(numbers[key])
        self.groups = [groups[i] for i in self.first]

    def gathered(self, tensors: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
        """The parts of tensors shaped as the layers' parameters, None for zeros."""
        return self.join([block.matrix(own) for block, own in zip(self.blocks, tensors, strict=True)])

    def added(
        self, tensors: Sequence[Sequence[Tensor | None]], parts: Sequence[Tensor], factors: Sequence[float]
    ) -> list[Tensor]:
        """`gathered(tensors)` + factor * part, for each part."""
        if self.joined:
            return [x.add_(part, alpha=f) for x, part, f in zip(self.gathered(tensors), parts, factors, strict=True)]
        inputs = zip(self.blocks, tensors, parts, factors, strict=True)
        return [block.added(own, part, factor) for block, own, part, factor in inputs]

    def join(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The parts of the layers' matrices."""
        if not self.joined:
            return list(matrices)
        pieces: list[list[Tensor]] = [[] for _ in self.first]
        for matrix, part in zip(matrices, self.of, strict=True):
            pieces[part].append(matrix.reshape(-1))
        return [torch.cat(own) for own in pieces]

    def split(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The layers' matrices, views of the parts."""
        if not self.joined:
            return list(parts)
        sizes: list[list[int]] = [[] for _ in parts]
        for block, part in zip(self.blocks, self.of, strict=True):
            sizes[part].append(math.prod(block.shape))
        pieces = [iter(part.split(own)) for part, own in zip(parts, sizes, strict=True)]
        return [next(pieces[part]).view(block.shape) for block, part in zip(self.blocks, self.of, strict=True)]


def trained(block: Block, matrix: Tensor) -> Tensor:
    """A block's matrix with zeros for the parameters that have no gradient in this step, which do not move."""
    if all(p.grad is not None for p in block.parameters):
        return matrix
    pairs = zip(block.parameters, block.tensors(matrix), strict=True)
    return block.matrix([None if p.grad is None else own for p, own in pairs])
