"""What a method has to say: how factors become a preconditioner, and what it does with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .layers import Block
from .rows import Rows
from .state import BlockState

if TYPE_CHECKING:
    from .curvature import Curvature


class Method:
    """Base of the preconditioners: `refresh` and `solve`, and `directions` where layers are not solved one by one."""

    name: str  # as states and messages have it
    keeps_rows = False  # whether rows of a statistics step are needed for more than the factors
    least_momentum = 0.3  # of the self-tuning rule: 0.4 and more is faster without noise, and stays high with it
    dtype: torch.dtype | None = None  # of the products that precondition, None for the parameters' own

    def refresh(self, block: Block, state: BlockState, damping: Tensor) -> Tensor:
        """Renew `state.solver` from the averages; returns 1 where that failed, else 0 (0-dimensional)."""
        raise NotImplementedError

    def solve(self, block: Block, state: BlockState, matrix: Tensor) -> Tensor:
        """The preconditioner of one block times a matrix [K, d_out, d_in]."""
        raise NotImplementedError

    def directions(self, curvature: Curvature, blocks: list[Block], gradients: list[Tensor]) -> list[Tensor]:
        """The preconditioner times the gradients of some blocks."""
        return [self.solve(b, curvature.states[b], g) for b, g in zip(blocks, gradients, strict=True)]

    def after_statistics(self, curvature: Curvature, rows: list[Rows], finite: Tensor) -> None:
        """Called with the rows of a statistics step and their weights, once the preconditioners are renewed."""

    def save(self) -> dict[str, Any]:
        """What the method keeps beside the blocks' states: plain tensors and numbers."""
        return {}

    def load(self, saved: dict[str, Any], blocks: dict[str, Block], device: torch.device) -> None:
        """Take over what `save` gave, as copies on `device`."""
