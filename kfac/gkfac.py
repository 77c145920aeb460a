"""Two-level K-FAC: K-FAC's layer-wise solve and a coarse solve that sees all layers (arXiv 2011.00573)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from . import coarse, factors
from .kfac import KroneckerMethod
from .layers import Block
from .optimizer import KroneckerOptimizer
from .options import Options, check_options
from .rows import Rows, quarter
from .state import BlockState

if TYPE_CHECKING:
    from .curvature import Curvature


class TwoLevelMethod(KroneckerMethod):
    """K-FAC's solve and a coarse one; arguments as in `GKFAC`."""

    keeps_rows = True

    def __init__(
        self,
        solver: str = "cholesky",
        preconditioning_dtype: torch.dtype | str | None = None,
        coarse_space: str = "krylov",
        combination: str = "deflated",
        coarse_fisher: str = "exact",
    ):
        super().__init__(solver, preconditioning_dtype)
        check_options({"coarse_space": coarse_space, "combination": combination, "coarse_fisher": coarse_fisher})
        if coarse_fisher == "kronecker" and coarse_space != "constant":
            raise ValueError(f"coarse_fisher='kronecker' with coarse_space={coarse_space!r}; allowed: 'constant'")
        self.coarse_space, self.combination, self.coarse_fisher = coarse_space, combination, coarse_fisher
        self._kept: list[Rows] = []
        self._usable = torch.ones((), dtype=torch.bool)
        self._sums: dict[str, Tensor] = {}
        self._last: dict[Block, Tensor] = {}

    def refresh(self, block: Block, state: BlockState, damping: Tensor) -> Tensor:
        failed = super().refresh(block, state, damping)
        if self.coarse_space == "spectral":
            state.solver["extremes"] = coarse.extreme_eigenvectors(state.A, state.G)
        return failed

    def after_statistics(self, curvature: Curvature, rows: list[Rows], finite: Tensor) -> None:
        rows = [quarter(part) for part in rows]
        if finite.device.type != "cpu":  # there a step that is skipped comes this far
            rows = [Rows({b: _zero(*ag, finite) for b, ag in part.layers.items()}, part.weight) for part in rows]
        self._kept, self._usable = rows, finite
        if self.coarse_fisher == "kronecker":
            parts = [coarse.kronecker_sums([part.layers.get(b) for b in curvature.blocks]) for part in rows]
            new_a = torch.stack([a for a, _ in parts]).mean(0)
            new_g = torch.stack([g for _, g in parts]).sum(0)
            new_a, new_g, ranks = curvature.sum_over_ranks([new_a, new_g, torch.ones_like(new_a[0, 0])])
            if not self._sums:
                count = torch.zeros_like(ranks)
                self._sums = {"a": torch.zeros_like(new_a), "g": torch.zeros_like(new_g), "count": count}
            self._sums["count"] += finite
            factors.update_average(self._sums["a"], new_a / ranks, self._sums["count"], curvature.stat_decay, finite)
            factors.update_average(self._sums["g"], new_g, self._sums["count"], curvature.stat_decay, finite)

    def directions(self, curvature: Curvature, blocks: list[Block], gradients: list[Tensor]) -> list[Tensor]:
        solution = self._corrected(curvature, blocks, gradients)
        if self.coarse_space == "history":
            for block, new in zip(blocks, solution, strict=True):
                last = self._last.get(block, torch.zeros_like(new))
                self._last[block] = torch.where(new.isfinite().all(), new, last)
        return solution

    def _corrected(self, curvature: Curvature, blocks: list[Block], gradients: list[Tensor]) -> list[Tensor]:
        x = super().directions(curvature, blocks, gradients)
        model = coarse.Model(curvature, blocks, self._kept)
        if not model.parts:
            return x
        of_x = model.products([v[None] for v in x])
        curved = model.times(x, of_x)
        residual = coarse.difference(gradients, curved)
        spaces, products = self._space(curvature, model, x, of_x, curved, residual)
        if self.coarse_fisher == "kronecker":
            fisher = self._kronecker_fisher(curvature, blocks, spaces)
        else:
            fisher = model.fisher(products)
        system = coarse.block_gram(spaces, model.dampings) + fisher

        def solve(right_side: list[Tensor]) -> Tensor:
            return torch.where(self._usable, coarse.solve(system, coarse.restrict(spaces, right_side)), 0.0)

        if self.combination == "balanced":  # Q g + P^T K^-1 P g with P = I - (F + damping) Q
            y = solve(gradients)
            coarse_part = coarse.prolong(spaces, y)
            deflated = coarse.difference(gradients, model.times(coarse_part, [s @ y[:, None] for s in products]))
            z = super().directions(curvature, blocks, deflated)
            y = y - solve(model.times(z, model.products([v[None] for v in z])))
            solution = coarse.total(z, coarse.prolong(spaces, y))
            moved = coarse.difference(solution, x)
            bent = coarse.difference(model.times(solution, model.products([v[None] for v in solution])), curved)
            gain = coarse.inner(residual, moved) - 0.5 * coarse.inner(moved, bent)
            left = coarse.restrict(spaces, coarse.difference(residual, bent))
        else:
            y = solve(residual if self.combination == "deflated" else gradients)
            solution = coarse.total(x, coarse.prolong(spaces, y))
            restricted = coarse.restrict(spaces, residual)
            gain = restricted @ y - 0.5 * y @ system @ y
            left = restricted - system @ y
        size = coarse.restrict(spaces, residual).norm().clamp_min(torch.finfo(left.dtype).tiny)
        curvature.stats |= {"coarse_gain": gain, "coarse_residual": left.norm() / size}
        return solution

    def _space(
        self,
        curvature: Curvature,
        model: coarse.Model,
        x: list[Tensor],
        of_x: list[Tensor],
        curved: list[Tensor],
        residual: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The coarse vectors of each layer [I, K, d_out, d_in], and the products of all rows with them."""
        if self.coarse_space == "krylov":
            second = super().directions(curvature, model.blocks, curved)
            of_second = model.products([v[None] for v in second])
            # Columns layer by layer, as the spaces are: x_1, second_1, x_2, ...
            products = [torch.stack(pair, dim=2).flatten(1) for pair in zip(of_x, of_second, strict=True)]
            return [torch.stack(pair) for pair in zip(x, second, strict=True)], products
        if self.coarse_space == "constant":
            spaces = [torch.full_like(v, v.numel() ** -0.5)[None] for v in x]
            return spaces, model.constant_products()
        if self.coarse_space == "residual":
            spaces = [v[None] for v in super().directions(curvature, model.blocks, residual)]
        elif self.coarse_space == "spectral":
            spaces = [curvature.states[block].solver["extremes"] for block in model.blocks]
        else:
            last = [self._last.get(block) for block in model.blocks]
            spaces = [torch.zeros_like(v)[None] if z is None else z[None] for v, z in zip(x, last, strict=True)]
        return spaces, model.products(spaces)

    def _kronecker_fisher(self, curvature: Curvature, blocks: list[Block], spaces: list[Tensor]) -> Tensor:
        order = torch.tensor([curvature.blocks.index(block) for block in blocks], device=spaces[0].device)
        sums = (self._sums["a"] * self._sums["g"])[order][:, order]
        root = torch.stack([space.flatten()[0] for space in spaces])
        return sums * root[:, None] * root

    def save(self) -> dict[str, Any]:
        kept = [{block.name: list(rows) for block, rows in part.layers.items()} for part in self._kept]
        last = {block.name: direction for block, direction in self._last.items()}
        return {"kept": kept, "sums": dict(self._sums), "last": last}

    def load(self, saved: dict[str, Any], blocks: dict[str, Block], device: torch.device) -> None:
        self._kept = [
            Rows(
                {blocks[name]: (a.to(device), g.to(device)) for name, (a, g) in part.items()},
                torch.ones((), device=device),
            )
            for part in saved["kept"]
        ]
        self._usable = torch.ones((), dtype=torch.bool, device=device)
        self._sums = {name: value.to(device, copy=True) for name, value in saved["sums"].items()}
        self._last = {blocks[name]: value.to(device, copy=True) for name, value in saved["last"].items()}


def _zero(a: Tensor, g: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(finite, a, 0), torch.where(finite, g, 0.0)


class GKFAC(KroneckerOptimizer):
    """Two-level K-FAC: x = K^-1 g and a correction by the coarse solve Q = R0^T E^-1 R0, E = R0 (F + damping I) R0^T.

    Args:
        model, loss, solver, **options: see `KFAC` and `KroneckerOptimizer`.
        coarse_space: rows of R0, each within one layer, so that cross-layer curvature enters by E alone.
            "krylov": the blocks of x and of K^-1 (F + damping I) x: a step size of each layer and a second Krylov
            vector.
            "constant": ones, the space of arXiv 2011.00573.
            "residual": the blocks of K^-1 r with r = g - (F + damping I) x.
            "spectral": eigenvectors of the layer's Kronecker block with its largest and smallest eigenvalue; costs the
            eigenvectors of all factors at every renewal.
            "history": the layer's last natural gradient.
        combination: "deflated": x + Q (g - (F + damping I) x), the coarse solve on what is left of the residual.
            "additive": x + Q g, as in arXiv 2011.00573. "balanced": Q g + P^T K^-1 P g with P = I - (F + damping I) Q,
            symmetric; costs a second solve and two more products with F.
        coarse_fisher: "exact": inner products of each example. "kronecker": sums of cross-layer factors as in arXiv
            2011.00573, for the constant space.

    `stats` has `coarse_gain`, the decrease of the quadratic model by what is added to x, and `coarse_residual`, what
    is left of the residual in the coarse space, relative (0 for "deflated" and "balanced" with the exact Fisher). F is
    that of the last statistics step; of more than 256 examples it takes a quarter.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: nn.Module,
        solver: str = "cholesky",
        coarse_space: str = "krylov",
        combination: str = "deflated",
        coarse_fisher: str = "exact",
        **options: Unpack[Options],
    ):
        dtype = options.get("preconditioning_dtype")
        self._method = TwoLevelMethod(solver, dtype, coarse_space, combination, coarse_fisher)
        super().__init__(model, loss=loss, **options)
