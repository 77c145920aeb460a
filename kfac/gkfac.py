"""Two-level K-FAC: K-FAC's layer-wise solve and a coarse solve that sees all layers (arXiv 2011.00573)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from . import coarse, factors
from .collect import Rows
from .kfac import KroneckerMethod
from .layers import LinearBlock
from .optimizer import KroneckerOptimizer
from .options import Options, check_options

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

    def after_statistics(self, curvature: Curvature, rows: list[Rows], finite: Tensor) -> None:
        if finite.device.type != "cpu":  # there a step that is skipped comes this far
            rows = [Rows({b: _zero(*ag, finite) for b, ag in part.layers.items()}, part.weight) for part in rows]
        self._kept, self._usable = rows, finite
        if self.coarse_fisher == "kronecker":
            parts = [coarse.kronecker_sums([part.layers.get(b) for b in curvature.blocks]) for part in rows]
            new_a = torch.stack([a for a, _ in parts]).mean(0)
            new_g = torch.stack([g for _, g in parts]).sum(0)
            if not self._sums:
                count = torch.zeros((), device=new_a.device, dtype=new_a.dtype)
                self._sums = {"a": torch.zeros_like(new_a), "g": torch.zeros_like(new_g), "count": count}
            self._sums["count"] += finite
            factors.update_average(self._sums["a"], new_a, self._sums["count"], curvature.stat_decay, finite)
            factors.update_average(self._sums["g"], new_g, self._sums["count"], curvature.stat_decay, finite)

    def directions(self, curvature: Curvature, blocks: list[LinearBlock], gradients: list[Tensor]) -> list[Tensor]:
        x = super().directions(curvature, blocks, gradients)
        parts = [[part.layers.get(block) for block in blocks] for part in self._kept]
        parts = [layers for layers in parts if any(layer is not None for layer in layers)]
        if not parts:
            return x
        dampings = [curvature.dampings[block] for block in blocks]
        curved = [torch.zeros_like(v) for v in x]
        of_x = [coarse.products(layers, [v[None] for v in x]) for layers in parts]
        for layers, s in zip(parts, of_x, strict=True):
            curved = [c + f for c, f in zip(curved, coarse.curvature_times(layers, x, s.sum(1)), strict=True)]
        curved = curvature.sum_over_ranks(curved)
        curved = [c + damping * v for c, damping, v in zip(curved, dampings, x, strict=True)]
        residual = [g - c for g, c in zip(gradients, curved, strict=True)]
        if self.coarse_space == "krylov":
            second = super().directions(curvature, blocks, curved)
            spaces = [torch.stack(pair) for pair in zip(x, second, strict=True)]
            of_second = [coarse.products(layers, [v[None] for v in second]) for layers in parts]
            # Columns layer by layer, as the spaces are: x_1, second_1, x_2, ...
            matrices = [torch.stack(pair, dim=2).flatten(1) for pair in zip(of_x, of_second, strict=True)]
            fisher = torch.stack([s.T @ s for s in matrices]).sum(0)
        else:
            spaces = [torch.full_like(v, v.numel() ** -0.5)[None] for v in x]
            fisher = self._constant_fisher(curvature, blocks, parts, spaces)
        if self.coarse_fisher == "exact":
            (fisher,) = curvature.sum_over_ranks([fisher])
        system = coarse.block_gram(spaces, dampings) + fisher
        right_side = coarse.restrict(spaces, residual if self.combination == "deflated" else gradients)
        y, gain, left = coarse.solve(system, right_side)
        y = torch.where(self._usable, y, 0.0)
        if self.combination == "additive":
            gain = coarse.restrict(spaces, residual) @ y - 0.5 * y @ system @ y
        curvature.stats |= {"coarse_gain": gain, "coarse_residual": left}
        return [v + correction for v, correction in zip(x, coarse.prolong(spaces, y), strict=True)]

    def _constant_fisher(
        self, curvature: Curvature, blocks: list[LinearBlock], parts: list, spaces: list[Tensor]
    ) -> Tensor:
        sizes = [space[0].numel() for space in spaces]
        if self.coarse_fisher == "exact":
            matrices = [coarse.constant_products(layers, sizes) for layers in parts]
            return torch.stack([s.T @ s for s in matrices]).sum(0)
        order = torch.tensor([curvature.blocks.index(block) for block in blocks], device=spaces[0].device)
        sums = (self._sums["a"] * self._sums["g"])[order][:, order]
        root = torch.stack([space.flatten()[0] for space in spaces])
        return sums * root[:, None] * root

    def save(self) -> dict[str, Any]:
        kept = [{block.name: list(rows) for block, rows in part.layers.items()} for part in self._kept]
        return {"kept": kept, "sums": dict(self._sums)}

    def load(self, saved: dict[str, Any], blocks: dict[str, LinearBlock], device: torch.device) -> None:
        self._kept = [
            Rows(
                {blocks[name]: (a.to(device), g.to(device)) for name, (a, g) in part.items()},
                torch.ones((), device=device),
            )
            for part in saved["kept"]
        ]
        self._usable = torch.ones((), dtype=torch.bool, device=device)
        self._sums = {name: value.to(device, copy=True) for name, value in saved["sums"].items()}


def _zero(a: Tensor, g: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(finite, a, 0.0), torch.where(finite, g, 0.0)


class GKFAC(KroneckerOptimizer):
    """Two-level K-FAC: x = K^-1 g and a correction by the coarse solve Q = R0^T E^-1 R0.

    Args:
        model, loss, solver, **options: see `KFAC` and `KroneckerOptimizer`.
        coarse_space: "krylov": in every layer the blocks of x and of K^-1 (F + damping I) x, so a step size of each
            layer and a second Krylov vector come from exact cross-layer curvature. "constant": one vector of ones
            for each layer, the space of arXiv 2011.00573.
        combination: "deflated": x + Q (g - (F + damping I) x), the coarse solve on what is left of the residual.
            "additive": x + Q g, as in arXiv 2011.00573.
        coarse_fisher: "exact": inner products of each example. "kronecker": sums of cross-layer factors as in arXiv
            2011.00573, for the constant space.

    `stats` has `coarse_gain`, the decrease of the quadratic model by the coarse step, and `coarse_residual`, what
    the coarse system leaves, relative. F is that of the last statistics step.
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
