"""E-KFAC: K-FAC's eigenbasis with the gradients' exact second moments in it (arXiv 1806.03884)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from . import factors, linalg
from .collect import Rows
from .kfac import decompose, solve_in_eigenbasis
from .layers import LinearBlock
from .optimizer import KroneckerOptimizer
from .options import Options, check_options, value_at
from .state import BlockState


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

    keeps_rows = True

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: nn.Module,
        scale_interval: int | Callable[[int], int] | None = None,
        **options: Unpack[Options],
    ):
        check_options({"scale_interval": scale_interval})
        self.scale_interval = scale_interval
        self._scales_at = -1
        super().__init__(model, loss=loss, **options)

    def _refresh(self, block: LinearBlock, state: BlockState, damping: Tensor) -> Tensor:
        old = dict(state.solver)
        failed = decompose(state, damping)
        if old:
            overlap_g = state.solver["basis_g"].mT @ old["basis_g"]
            overlap_a = state.solver["basis_a"].mT @ old["basis_a"]
            state.solver["scales"] = linalg.carry_scales(old["scales"], overlap_g, overlap_a)
        else:
            state.solver["scales"] = state.solver["values"].clone()
            state.solver["scale_count"] = torch.zeros_like(state.count)
        return failed

    def _after_statistics(self, rows: list[Rows], finite: Tensor) -> None:
        if self._scales_at >= 0 and self._steps - self._scales_at < value_at(self.scale_interval or 1, self._steps):
            return
        for block, state in self._states.items():
            own = [part.layers[block] for part in rows if block in part.layers]
            if not own or not state.solver:
                continue
            basis_g, basis_a = state.solver["basis_g"], state.solver["basis_a"]
            new = torch.stack(
                [factors.squared_gradients(a @ basis_a[:, None], g @ basis_g[:, None, None]) for a, g in own]
            ).sum(0)
            state.solver["scale_count"] += finite
            factors.update_average(state.solver["scales"], new, state.solver["scale_count"], self.stat_decay, finite)
        self._scales_at = self._steps

    def _solve(self, block: LinearBlock, state: BlockState, matrix: Tensor) -> Tensor:
        return solve_in_eigenbasis(state, matrix, state.solver["scales"] + state.damping_a[:, None, None])

    def _save_method(self) -> dict:
        return {"scales_at": self._scales_at}

    def _load_method(self, saved: dict) -> None:
        self._scales_at = saved["scales_at"]
