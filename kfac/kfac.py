"""K-FAC: each layer's curvature as one Kronecker product (arXiv 1503.05671; convolutions arXiv 1602.01407)."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor, nn

from . import linalg
from .later import select
from .layers import Block
from .method import Method
from .optimizer import KroneckerOptimizer
from .options import Options, check_names, check_options, dtype_of
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

    def refresh(self, block: Block, state: BlockState, damping: Tensor) -> Tensor:
        return (
            invert(state, damping, block.unit, self.dtype) if self.solver == "cholesky" else decompose(state, damping)
        )

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


def invert(state: BlockState, damping: Tensor, unit: bool, dtype: torch.dtype | None) -> Tensor:
    """Damped inverses of both factors into `state.solver`; returns 1 where that failed.

    A failure keeps the last inverses. The next try has ten times the damping, one after two failures float64 too; a
    success takes a tenth of a power of ten back. In a `unit` block A is the number 1 and G has all of the damping.
    """
    raised = damping * 10 ** state.jitter.ceil()
    if unit:
        state.damping_a, state.damping_g = torch.zeros_like(state.pi), raised.expand_as(state.pi)
    else:
        state.pi = linalg.balance(state.A, state.G)
        state.damping_a, state.damping_g = state.pi * raised.sqrt(), raised.sqrt() / state.pi
    exact = torch.float64 if state.rung >= FLOAT64_RUNG and state.A.device.type != "mps" else state.A.dtype
    inverse_a, good_a = linalg.damped_inverse(state.A.to(exact), state.damping_a.to(exact))
    inverse_g, good_g = linalg.damped_inverse(state.G.to(exact), state.damping_g.to(exact))
    inverse_a, inverse_g = inverse_a.to(state.A.dtype), inverse_g.to(state.G.dtype)
    good = good_a & good_g
    last = state.solver or {"inverse_a": _identity(state.A), "inverse_g": _identity(state.G)}
    state.solver = {
        "inverse_a": _stored(select(good, inverse_a, last["inverse_a"].to(inverse_a.dtype)), dtype),
        "inverse_g": _stored(select(good, inverse_g, last["inverse_g"].to(inverse_g.dtype)), dtype),
    }
    state.jitter = torch.where(good, (state.jitter - 0.1).clamp_min(0), state.jitter.ceil() + 1)
    return 1.0 - good.to(state.A.dtype)


def _stored(inverse: Tensor, dtype: torch.dtype | None) -> Tensor:
    """An inverse in the dtype of its products, row by row: LAPACK's columns would be copied at each of them."""
    return inverse if dtype is None else inverse.to(dtype, memory_format=torch.contiguous_format)


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
