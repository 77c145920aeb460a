"""K-FAC: each layer's curvature as one Kronecker product (arXiv 1503.05671; convolutions arXiv 1602.01407)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from . import linalg
from .later import select
from .layers import Block
from .method import Method
from .optimizer import KroneckerOptimizer
from .options import Options, check_names, check_options, dtype_of
from .parts import worth_joining
from .state import BlockState

INVERSES = ("inverse_a", "inverse_g")
BASES = ("basis_a", "basis_g")


class KroneckerMethod(Method):
    """F_l = G_l (x) A_l, inverted block by block; `solver` and `dtype` as in `KFAC`."""

    name = "K-FAC"

    def __init__(self, solver: str = "cholesky", preconditioning_dtype: torch.dtype | str | None = None):
        super().__init__()
        check_options({"solver": solver, "preconditioning_dtype": preconditioning_dtype})
        self.solver, self.dtype = solver, dtype_of(preconditioning_dtype)
        self.solves_with = INVERSES if solver == "cholesky" else (*BASES, "values")
        self.keeps = INVERSES if solver == "cholesky" else ("values",)

    def refresh(
        self, blocks: Sequence[Block], states: Sequence[BlockState], dampings: Sequence[Tensor]
    ) -> list[Tensor]:
        if self.solver != "cholesky":
            return [decompose(state, damping) for state, damping in zip(states, dampings, strict=True)]
        failed: dict[int, Tensor] = {}
        for places in alike(blocks, states):
            own = [states[i] for i in places]
            found = invert(own, [dampings[i] for i in places], blocks[places[0]].unit, self.dtype)
            failed |= zip(places, found, strict=True)
        return [failed[i] for i in range(len(blocks))]

    def solve(self, block: Block, state: BlockState, matrix: Tensor) -> Tensor:
        if self.solver == "cholesky":
            inverse_g, inverse_a = state.solver["inverse_g"], state.solver["inverse_a"]
            right = None if block.unit else inverse_a  # which is 1
            return linalg.apply(inverse_g, matrix.to(inverse_g.dtype), right).to(matrix.dtype)
        return solve_in_eigenbasis(state, matrix, state.solver["values"] + state.damping_a[:, None, None], self.dtype)


class KFAC(KroneckerOptimizer):
    """One-level K-FAC: F_l = G_l (x) A_l, inverted layer by layer.

    Args:
        model, loss, **options: see `KroneckerOptimizer`.
        solver: how a block is inverted, which chooses its damping too. "cholesky": factored Tikhonov damping,
            (G + sqrt(damping) / pi I)^-1 V (A + pi sqrt(damping) I)^-1 (arXiv 1503.05671, section 6.3). "eigh":
            damping is added exactly, Q_g [(Q_g^T V Q_a) / (d_g d_a^T + damping)] Q_a^T; costs about five times the
            inverse.

    Example:
        >>> criterion = nn.CrossEntropyLoss()
        >>> optimizer = KFAC(model, loss=criterion)
        >>> loss = criterion(model(x), y); loss.backward(); optimizer.step(); optimizer.zero_grad()
    """

    def __init__(self, model: nn.Module, *, loss: nn.Module, solver: str = "cholesky", **options: Unpack[Options]):
        check_names(self, options)
        self._method = KroneckerMethod(solver, options.get("preconditioning_dtype"))
        super().__init__(model, loss=loss, **options)


FLOAT64_RUNG = 2  # failures of a block before its inverse is tried in float64
LARGEST = 1024  # side of a layer up to which inverses of several layers are made in one call


def alike(blocks: Sequence[Block], states: Sequence[BlockState]) -> list[list[int]]:
    """The places of blocks that are inverted together: where that is faster, those of one shape."""
    groups: dict[object, list[int]] = {}
    for i, (block, state) in enumerate(zip(blocks, states, strict=True)):
        together = worth_joining(state.A.device) and max(block.shape[1:]) <= LARGEST
        shapes = (block.unit, state.A.shape[1:], state.G.shape[1:])
        where = (state.A.dtype, state.A.device, state.rung >= FLOAT64_RUNG, bool(state.solver))
        groups.setdefault((*shapes, *where) if together else i, []).append(i)
    return list(groups.values())


def invert(
    states: Sequence[BlockState], dampings: Sequence[Tensor], unit: bool, dtype: torch.dtype | None
) -> list[Tensor]:
    """Damped inverses of both factors of layers of one shape into `state.solver`; returns 1 for each that failed.

    A failure keeps the last inverses. The next try has ten times the damping, one after two failures float64 too; a
    success takes a tenth of a power of ten back. In a `unit` block A is the number 1 and G has all of the damping.
    """
    lengths = [len(state.pi) for state in states]
    a, g = _cat([state.A for state in states]), _cat([state.G for state in states])
    jitter = torch.stack([state.jitter for state in states])
    raised = _for_each(torch.stack(list(dampings)) * 10 ** jitter.ceil(), lengths)
    pi = torch.ones_like(raised) if unit else linalg.balance(a, g)
    damping_a = torch.zeros_like(raised) if unit else pi * raised.sqrt()
    damping_g = raised if unit else raised.sqrt() / pi
    exact = torch.float64 if states[0].rung >= FLOAT64_RUNG and a.device.type != "mps" else a.dtype
    inverse_a, good_a = linalg.damped_inverse(a.to(exact), damping_a.to(exact))
    inverse_g, good_g = linalg.damped_inverse(g.to(exact), damping_g.to(exact))
    good = torch.stack([one.all() for one in (good_a & good_g).split(lengths)])
    for name, factor, inverse in (("inverse_a", a, inverse_a.to(a.dtype)), ("inverse_g", g, inverse_g.to(g.dtype))):
        new, known = _stored(inverse, dtype), name in states[0].solver
        last = _cat([state.solver[name] for state in states]) if known else _identity(factor)
        last = last.to(new.dtype)
        if len(states) == 1:
            chosen = select(good[0], new, last)
        else:
            chosen = torch.where(_for_each(good, lengths).reshape(-1, *[1] * (new.dim() - 1)), new, last)
        for state, own in zip(states, chosen.split(lengths), strict=True):
            state.solver[name] = own
    jitter = torch.where(good, (jitter - 0.1).clamp_min(0), jitter.ceil() + 1)
    columns = (pi.split(lengths), damping_a.split(lengths), damping_g.split(lengths), jitter.unbind())
    for state, own_pi, own_a, own_g, own_jitter in zip(states, *columns, strict=True):
        state.pi, state.damping_a, state.damping_g, state.jitter = own_pi, own_a, own_g, own_jitter
    return list((1.0 - good.to(a.dtype)).unbind())


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _for_each(numbers: Tensor, lengths: Sequence[int]) -> Tensor:
    """A number for each of some layers [L] as one for each of their K."""
    if all(k == 1 for k in lengths):
        return numbers
    return torch.cat([number.expand(k) for number, k in zip(numbers.unbind(), lengths, strict=True)])


def _stored(inverse: Tensor, dtype: torch.dtype | None) -> Tensor:
    """An inverse in the dtype of its products, row by row: LAPACK's columns would be copied at each of them."""
    if dtype is None or dtype == inverse.dtype:
        return inverse.contiguous()
    return inverse.to(dtype, memory_format=torch.contiguous_format)


def decompose(state: BlockState, damping: Tensor) -> Tensor:
    """Eigenbases of both factors and the outer product of their eigenvalues into `state.solver`.

    Where eigenvectors do not converge, in float64 neither, the last ones stay; returns 1 then.
    """
    try:
        values_a, basis_a = linalg.eigenbasis(state.A)
        values_g, basis_g = linalg.eigenbasis(state.G)
    except torch.linalg.LinAlgError:
        if state.solver:
            return damping.new_ones(())
        values_a, basis_a = linalg.diagonal(state.A), _identity(state.A)
        values_g, basis_g = linalg.diagonal(state.G), _identity(state.G)
    state.pi = linalg.balance(state.A, state.G)
    state.damping_a = state.damping_g = damping.expand(state.A.shape[0])
    values = values_g[:, :, None] * values_a[:, None, :]
    bases = {"basis_a": basis_a, "basis_g": basis_g}
    state.solver |= {name: basis for name, basis in bases.items() if basis is not None} | {"values": values}
    return damping.new_zeros(())


def solve_in_eigenbasis(state: BlockState, matrix: Tensor, divisor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Q_g [(Q_g^T V Q_a) / divisor] Q_a^T, the products in `dtype`."""
    used = dtype or matrix.dtype
    basis_a, basis_g = (None if basis is None else basis.to(used) for basis in bases_of(state))
    transposed_a, transposed_g = (None if basis is None else basis.mT for basis in (basis_a, basis_g))
    projected = linalg.apply(transposed_g, matrix.to(used), basis_a).to(matrix.dtype) / divisor
    return linalg.apply(basis_g, projected.to(used), transposed_a).to(matrix.dtype)


def bases_of(state: BlockState) -> tuple[Tensor | None, Tensor | None]:
    """Eigenvectors of A and G; None for the identity."""
    basis_a, basis_g = (state.solver.get(name) for name in BASES)
    return basis_a, basis_g


def _identity(factor: Tensor) -> Tensor:
    if factor.dim() == 2:
        return torch.ones_like(factor)
    return torch.eye(factor.shape[-1], device=factor.device, dtype=factor.dtype).expand_as(factor)
