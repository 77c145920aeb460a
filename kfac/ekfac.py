"""E-KFAC: K-FAC's eigenbasis with the gradients' exact second moments in it (arXiv 1806.03884)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from . import factors, linalg
from .kfac import BASES, bases_of, decompose, solve_in_eigenbasis
from .layers import Block
from .method import Method
from .optimizer import KroneckerOptimizer
from .options import Options, check_names, check_options, dtype_of, value_at
from .rows import Rows, squared_gradients
from .state import BlockState

if TYPE_CHECKING:
    from .curvature import Curvature


class KroneckerEigenMethod(Method):
    """F_l = (Q_g (x) Q_a) diag(s) (Q_g (x) Q_a)^T; arguments as in `EKFAC`."""

    name = "E-KFAC"
    keeps_rows = True
    solves_with = (*BASES, "scales")
    keeps = ("values", "scales", "scale_count")

    def __init__(
        self,
        scale_interval: int | Callable[[int], int] | None = None,
        preconditioning_dtype: torch.dtype | str | None = None,
    ):
        super().__init__()
        check_options({"scale_interval": scale_interval, "preconditioning_dtype": preconditioning_dtype})
        self.scale_interval, self.dtype = scale_interval, dtype_of(preconditioning_dtype)
        self._scales_at = -1

    def refresh(
        self, blocks: Sequence[Block], states: Sequence[BlockState], dampings: Sequence[Tensor]
    ) -> list[Tensor]:
        return [self._renew(state, damping) for state, damping in zip(states, dampings, strict=True)]

    def _renew(self, state: BlockState, damping: Tensor) -> Tensor:
        scales, old = state.solver.get("scales"), bases_of(state)
        failed = decompose(state, damping)
        if scales is not None:
            pairs = zip(bases_of(state), old, strict=True)
            overlap_a, overlap_g = (None if q is None or before is None else q.mT @ before for q, before in pairs)
            state.solver["scales"] = linalg.carry_scales(scales, overlap_g, overlap_a)
        else:
            state.solver["scales"] = state.solver["values"].clone()
            state.solver["scale_count"] = torch.zeros_like(state.count)
        return failed

    def after_statistics(self, curvature: Curvature, rows: list[Rows], finite: Tensor) -> None:
        interval = value_at(self.scale_interval or 1, curvature.step)
        if self._scales_at >= 0 and curvature.step - self._scales_at < interval:
            return
        measured = [b for b in curvature.states if curvature.ready(b) and any(b in part.layers for part in rows)]
        new = []
        for block in measured:
            basis_a, basis_g = bases_of(curvature.states[block])
            own = [(*part.layers[block], part.weight) for part in rows if block in part.layers]
            parts = [squared_gradients(a, g, block.shape[2], basis_a, basis_g).mul_(w) for a, g, w in own]
            new.append(torch.stack(parts).sum(0))
        if measured:
            solvers = [curvature.states[block].solver for block in measured]
            counts = [solver["scale_count"] for solver in solvers]
            torch._foreach_add_(counts, [finite.to(counts[0].dtype)] * len(counts))
            averages = [solver["scales"] for solver in solvers]
            factors.update_averages(averages, curvature.sum_over_ranks(new), counts, curvature.stat_decay, finite)
        self._scales_at = curvature.step

    def due_again(self) -> None:
        self._scales_at = -1

    def solve(self, block: Block, state: BlockState, matrix: Tensor) -> Tensor:
        divisor = state.solver["scales"] + state.damping_a[:, None, None]
        return solve_in_eigenbasis(state, matrix, divisor, self.dtype)

    def save(self) -> dict[str, Any]:
        return {"scales_at": self._scales_at}

    def load(self, saved: dict[str, Any], blocks: dict[str, Block], device: torch.device) -> None:
        self._scales_at = saved["scales_at"]


class EKFAC(KroneckerOptimizer):
    """One-level E-KFAC: F_l = (Q_g (x) Q_a) diag(s) (Q_g (x) Q_a)^T, damped exactly.

    Q are the eigenvectors of K-FAC's factors, renewed every `inverse_interval` steps; s is the running average of
    (Q_g^T (g_n a_n^T) Q_a)^2 summed over examples. When the basis changes, s is carried over by the squared overlaps of
    old and new eigenvectors.

    Args:
        model, loss, **options: see `KroneckerOptimizer`.
        scale_interval: steps between updates of s, a number or a callable of the step; they happen at statistics steps
            only, and None is at each of those.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: nn.Module,
        scale_interval: int | Callable[[int], int] | None = None,
        **options: Unpack[Options],
    ):
        check_names(self, options)
        self._method = KroneckerEigenMethod(scale_interval, options.get("preconditioning_dtype"))
        super().__init__(model, loss=loss, **options)
