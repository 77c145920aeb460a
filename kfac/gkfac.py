"""Two-level K-FAC: K-FAC's layer-wise solve and a coarse solve that sees all layers (arXiv 2011.00573)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from . import coarse, factors
from .kfac import KroneckerMethod, bases_of
from .later import select
from .layers import Block
from .optimizer import KroneckerOptimizer
from .options import Options, check_names, check_options
from .patches import Patches
from .rows import MODEL_ROWS, Rows, spread
from .state import BlockState

if TYPE_CHECKING:
    from .curvature import Curvature

LARGEST_STRIDE = 8  # of so many examples in a row at least one has a part in the coarse curvature


class TwoLevelMethod(KroneckerMethod):
    """K-FAC's solve and a coarse one; arguments as in `GKFAC`."""

    name = "two-level K-FAC"
    keeps_rows = True
    least_momentum = 0.0  # the coarse solve fits the batch's noise too, of which momentum would keep more

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
        if coarse_space == "spectral":
            self.keeps += ("leading",)
        self._kept: list[Rows] = []
        self._usable = torch.ones((), dtype=torch.bool)  # whether the rows are finite
        self._sums: dict[str, Tensor] = {}  # of the Kronecker form: averages over all blocks, and their count
        self._places: dict[Block, Tensor] = {}  # history: where layers were at the last call
        self._moves: dict[Block, Tensor] = {}  # history: and their last movements
        self._fixed: tuple[list[Block], coarse.Spaces, list[Tensor], list[Tensor]] | None = None
        self._rows: dict[Block, coarse.Preconditioned] = {}  # krylov: the rows with the preconditioner applied

    def refresh(
        self, blocks: Sequence[Block], states: Sequence[BlockState], dampings: Sequence[Tensor]
    ) -> list[Tensor]:
        failed = super().refresh(blocks, states, dampings)
        self._rows = {}
        if self.coarse_space == "spectral":
            for state in states:
                state.solver["leading"] = coarse.leading_eigenvectors(state.A, state.G, *bases_of(state))
            self._fixed = None
        return failed

    def after_statistics(self, curvature: Curvature, rows: list[Rows], finite: Tensor) -> None:
        self._kept, self._usable, self._fixed, self._rows = _thinned(rows, finite), finite, None, {}
        if self.coarse_fisher == "kronecker":
            self._average_sums(curvature, finite)

    def _average_sums(self, curvature: Curvature, finite: Tensor) -> None:
        sizes = [torch.Size(block.shape).numel() if block.initialised() else 1 for block in curvature.blocks]
        parts = [
            coarse.kronecker_sums([part.layers.get(block) for block in curvature.blocks], sizes) for part in self._kept
        ]
        sum_a, count, new_g = curvature.sum_over_ranks([torch.stack(x).sum(0) for x in zip(*parts, strict=True)])
        if not self._sums:
            self._sums = {"a": torch.zeros_like(sum_a), "g": torch.zeros_like(new_g), "count": torch.zeros_like(count)}
        self._sums["count"] += finite
        averages, counts = [self._sums["a"], self._sums["g"]], [self._sums["count"]] * 2
        factors.update_averages(averages, [sum_a / count, new_g], counts, curvature.stat_decay, finite)

    def directions(self, curvature: Curvature, blocks: list[Block], gradients: list[Tensor]) -> list[Tensor]:
        solution = super().directions(curvature, blocks, gradients)
        if self.coarse_space == "history":
            self._follow(blocks)
        # A layer without rows at the last statistics step would seem to have no curvature: K-FAC alone serves it.
        seen = [i for i, block in enumerate(blocks) if any(block in part.layers for part in self._kept)]
        if seen:
            dampings = {blocks[i]: curvature.dampings[blocks[i]] for i in seen}
            model = coarse.Model(self._kept, dampings, curvature.sum_over_ranks)
            two_level = self._two_level(curvature, model, [gradients[i] for i in seen], [solution[i] for i in seen])
            for i, new in zip(seen, two_level, strict=True):
                solution[i] = new
        return solution

    def _follow(self, blocks: list[Block]) -> None:
        """Note how layers moved since the last call; where one did not, its last movement stays."""
        for block in blocks:
            place = block.matrix(block.parameters).clone()
            if block in self._places:
                move = place - self._places[block]
                self._moves[block] = torch.where(move.any(), move, self._moves.get(block, move))
            self._places[block] = place

    def _two_level(
        self, curvature: Curvature, model: coarse.Model, gradients: list[Tensor], x: list[Tensor]
    ) -> list[Tensor]:
        """The combination of x = K^-1 g and the coarse solve; C stands for F + damping I."""
        of_layers = model.products([[v] for v in x])
        of_x = [s.sum(1, keepdim=True) for s in of_layers]
        spaces, products, overlaps = self._space(curvature, model, gradients, x, of_layers)
        gram = model.gram(products, [torch.cat(pair, dim=1) for pair in zip(products, of_x, strict=True)])
        damping = coarse.block_gram(overlaps, model.dampings)
        exact = damping + gram[:, :-1]
        restricted = coarse.restrict(spaces, gradients)
        if self.coarse_space == "krylov":  # x is the sum of the first vectors
            damped_x = damping[:, ::2].sum(1)
        else:
            damped_x = coarse.restrict(spaces, x, model.dampings)
        residual = restricted - gram[:, -1] - damped_x  # R0 (g - C x)
        system = exact if self.coarse_fisher == "exact" else damping + self._kronecker_fisher(curvature, model)

        def solve(right_side: Tensor) -> Tensor:
            return torch.where(self._usable, coarse.solve(system, right_side), 0.0)

        if self.combination != "balanced":
            y = solve(residual if self.combination == "deflated" else restricted)
            solution = coarse.prolonged(x, spaces, y)
            bent = exact @ y
            gain = residual @ y - 0.5 * y @ bent
        else:  # Q g + P^T K^-1 P g with P = I - C Q
            y = solve(restricted)
            zeros = [torch.zeros_like(v) for v in x]
            image = model.times(coarse.prolonged(zeros, spaces, y), [s @ y[:, None] for s in products], damped=True)
            z = super().directions(curvature, model.blocks, coarse.difference(gradients, image))
            of_z = [s.sum(1, keepdim=True) for s in model.products([[v] for v in z])]
            y = y - solve(model.gram(products, of_z)[:, 0] + coarse.restrict(spaces, z, model.dampings))
            solution = coarse.prolonged(z, spaces, y)
            moved = coarse.difference(solution, x)
            of_moved = [s + p @ y[:, None] - t for s, p, t in zip(of_z, products, of_x, strict=True)]
            sides = [torch.cat(three, dim=1) for three in zip(products, of_x, of_moved, strict=True)]
            *curved, along_x, along_moved = model.gram(sides, of_moved)[:, 0].split([len(y), 1, 1])
            bent = curved[0] + coarse.restrict(spaces, moved, model.dampings)
            slope = coarse.inner(gradients, moved) - along_x[0] - coarse.inner(x, moved, model.dampings)
            gain = slope - 0.5 * (along_moved[0] + coarse.inner(moved, moved, model.dampings))
        size = residual.norm().clamp_min(torch.finfo(residual.dtype).tiny)
        curvature.stats |= {"coarse_gain": gain, "coarse_residual": (residual - bent).norm() / size}
        return solution

    def _space(
        self,
        curvature: Curvature,
        model: coarse.Model,
        gradients: list[Tensor],
        x: list[Tensor],
        of_x: list[Tensor],
    ) -> tuple[coarse.Spaces, list[Tensor], list[Tensor]]:
        """The coarse vectors, the products of all rows with them, and the inner products of each layer's.

        `of_x` are the products of all rows with the blocks of x.
        """
        if self.coarse_space in ("constant", "spectral"):
            return self._fixed_space(curvature, model, x)
        if self.coarse_space == "krylov":
            second, of_second = self._second(curvature, model, x, of_x)
            spaces: coarse.Spaces = [list(pair) for pair in zip(x, second, strict=True)]
            # Columns layer by layer, as the spaces are: x_1, second_1, x_2, ...
            products = [torch.stack(pair, dim=2).flatten(1) for pair in zip(of_x, of_second, strict=True)]
            return spaces, products, coarse.overlaps(spaces)
        if self.coarse_space == "residual":
            curved = model.times(x, [s.sum(1, keepdim=True) for s in of_x], damped=True)
            residual = coarse.difference(gradients, curved)
            spaces = [[v] for v in super().directions(curvature, model.blocks, residual)]
        else:
            spaces = [[self._moves.get(b, torch.zeros_like(v))] for b, v in zip(model.blocks, x, strict=True)]
        return spaces, model.products(spaces), coarse.overlaps(spaces)

    def _second(
        self, curvature: Curvature, model: coarse.Model, x: list[Tensor], of_x: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """K^-1 F x, and the products of all rows with its blocks."""
        s = [p.sum(1, keepdim=True) for p in of_x]
        ready = self._preconditioned_rows(curvature, model)
        rest = [i for i, rows in enumerate(ready) if rows is None]
        curved = model.times(x, s, rest)
        solved = super().directions(curvature, [model.blocks[i] for i in rest], curved)
        of_solved = model.products([[v] for v in solved], rest)
        second = dict(zip(rest, solved, strict=True))
        columns = [dict(zip(rest, part.unbind(1), strict=True)) for part in of_solved]
        for i, rows in enumerate(ready):
            if rows is not None:
                second[i] = rows.times(s[0])
                columns[0][i] = rows.products(s[0])[:, 0]
        order = range(len(x))
        return [second[i] for i in order], [torch.stack([part[i] for i in order], dim=1) for part in columns]

    def _preconditioned_rows(self, curvature: Curvature, model: coarse.Model) -> list[coarse.Preconditioned | None]:
        """For each layer its rows with the preconditioner applied, where that is possible and saves a solve."""
        if model.layers is None or self.solver != "cholesky" or curvature.distributed:
            return [None] * len(model.blocks)
        for block, layer in zip(model.blocks, model.layers, strict=True):
            if block not in self._rows and layer is not None and coarse.Preconditioned.serves(*layer):
                solver = curvature.states[block].solver
                self._rows[block] = coarse.Preconditioned(*layer, solver["inverse_a"], solver["inverse_g"])
        return [self._rows.get(block) for block in model.blocks]

    def _fixed_space(
        self, curvature: Curvature, model: coarse.Model, x: list[Tensor]
    ) -> tuple[coarse.Spaces, list[Tensor], list[Tensor]]:
        """The spaces that stay until new statistics or new factors come, and with them what `_space` returns."""
        if self._fixed is None or self._fixed[0] != model.blocks:
            if self.coarse_space == "constant":
                spaces: coarse.Spaces = [[v.new_full((), v.numel() ** -0.5).expand(v.shape)] for v in x]
                products = model.constant_products()
            else:
                spaces = [list(curvature.states[block].solver["leading"]) for block in model.blocks]
                products = model.products(spaces)
            self._fixed = model.blocks, spaces, products, coarse.overlaps(spaces)
        return self._fixed[1:]

    def _kronecker_fisher(self, curvature: Curvature, model: coarse.Model) -> Tensor:
        sums = self._sums["a"] * self._sums["g"]
        for _ in range(2):  # first of rows, then of columns, those of the model's blocks
            sums = torch.stack([sums[curvature.blocks.index(block)] for block in model.blocks]).mT
        return sums

    def save(self) -> dict[str, Any]:
        return {
            "kept": [
                {block.name: [vars(a) if isinstance(a, Patches) else a, g] for block, (a, g) in part.layers.items()}
                for part in self._kept
            ],
            "usable": self._usable,
            "sums": dict(self._sums),
            "places": {block.name: place for block, place in self._places.items()},
            "moves": {block.name: move for block, move in self._moves.items()},
        }

    def check(self, saved: dict[str, Any], layers: dict[str, dict[str, Any]]) -> None:
        super().check(saved, layers)
        if self.coarse_fisher == "kronecker" and saved["kept"] and not saved["sums"]:
            raise ValueError(
                "state_dict: it has no sums of the Kronecker form; allowed: one saved with coarse_fisher='kronecker'"
            )

    def load(self, saved: dict[str, Any], blocks: dict[str, Block], device: torch.device) -> None:
        self._kept = [
            Rows({blocks[name]: (_on(device, a), g.to(device)) for name, (a, g) in part.items()}, torch.ones(()))
            for part in saved["kept"]
        ]
        self._usable = saved["usable"].to(device)
        self._sums = {name: value.to(device, copy=True) for name, value in saved["sums"].items()}
        self._places = {blocks[name]: value.to(device) for name, value in saved["places"].items()}
        self._moves = {blocks[name]: value.to(device) for name, value in saved["moves"].items()}
        self._fixed, self._rows = None, {}


def _thinned(parts: list[Rows], finite: Tensor) -> list[Rows]:
    """One example of every s in a row over all batches, with what it stands for; s <= 8, and `MODEL_ROWS` are left.

    Zeros unless `finite`.
    """
    parts = [part for part in parts if part.layers]
    sizes = [next(iter(part.layers.values()))[1].shape[2] for part in parts]
    examples = sum(sizes)
    stride = max(1, min(LARGEST_STRIDE, examples // MODEL_ROWS))
    chosen = spread(examples, stride)
    scale = math.sqrt(examples / len(chosen))
    thinned, start = [], 0
    for part, size in zip(parts, sizes, strict=True):
        own = torch.tensor([i - start for i in chosen if start <= i < start + size])
        start += size
        if len(own):
            own = own.to(finite.device, non_blocking=True)
            root = scale * part.weight.sqrt()
            layers = {
                block: (_chosen(a, own, finite), select(finite, g[:, :, own].mul_(root), None))
                for block, (a, g) in part.layers.items()
            }
            thinned.append(Rows(layers, torch.ones_like(root)))
    return thinned


def _on(device: torch.device, a: Any) -> Tensor | Patches:
    """Rows a as they were saved, on a device."""
    return Patches(**a | {"x": a["x"].to(device)}) if isinstance(a, dict) else a.to(device)


def _chosen(a: Tensor | Patches, examples: Tensor, finite: Tensor) -> Tensor | Patches:
    if isinstance(a, Patches):
        chosen = a.of(examples)
        return replace(chosen, x=select(finite, chosen.x, None))
    return select(finite, a[:, examples], None)


class GKFAC(KroneckerOptimizer):
    """Two-level K-FAC: x = K^-1 g and a coarse solve Q = R0^T E^-1 R0, E = R0 C R0^T, C = F + damping I.

    Args:
        model, loss, solver, **options: see `KFAC` and `KroneckerOptimizer`.
        coarse_space: rows of R0, each within one layer, so that cross-layer curvature enters by E alone.
            "krylov": in every layer the blocks of x and of K^-1 F x: a step size of each layer and a second Krylov
            vector.
            "constant": ones, the space of arXiv 2011.00573.
            "residual": the blocks of K^-1 r with r = g - C x.
            "spectral": the two eigenvectors of the layer's Kronecker block with the largest eigenvalues (the smallest
            take away nothing of what is left to gain); costs eigenvectors of all factors at every renewal, except
            with `solver="eigh"`, which has them.
            "history": how the layer moved in the last step; keeps two copies of the parameters.
        combination: "deflated": x + Q r, the coarse solve on what is left of the residual. "additive": x + Q g, as in
            arXiv 2011.00573. "balanced": Q g + P^T K^-1 P g with P = I - C Q, symmetric; costs a second solve and two
            more products of all rows.
        coarse_fisher: "exact": inner products of each example. "kronecker": sums of cross-layer factors as in arXiv
            2011.00573, for the constant space; only in E.

    F is that of the last statistics step. Of the examples that its factors are of, all have a part in it up to 249,
    then one in two, from 375 on one in three, and so on to one in eight from 1000 on.

    `stats` has, by this F, `coarse_gain`, the decrease of the quadratic model 1/2 x^T C x - g^T x from K-FAC's x to the
    solution, and `coarse_residual`, the norm of R0 (g - C solution) over that of R0 (g - C x): 0 for "deflated" and
    "balanced" with the exact F.
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
        check_names(self, options)
        dtype = options.get("preconditioning_dtype")
        self._method = TwoLevelMethod(solver, dtype, coarse_space, combination, coarse_fisher)
        super().__init__(model, loss=loss, **options)
