"""Matrix-free curvature diagnostics: how the loss curves, and how well a preconditioner knows it.

One idea: eigenvalues, traces, natural gradients and fidelities need nothing of the curvature but products
with it, so each function takes an operator (`GGN` or `Fisher`, made once for a fixed batch) and, if it draws,
a seed.

    operator = GGN(model, criterion, inputs, targets)
    top = largest_eigenvalues(operator, 2)
    how_good = fidelity(operator, operator.gradient, direction, damping=1e-3)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfac.operators import BATCH, GGN, CurvatureOperator, Fisher, Vector

__all__ = [
    "GGN",
    "Fidelity",
    "Fisher",
    "Solution",
    "Spectrum",
    "cosine",
    "damped_natural_gradient",
    "diagonal",
    "eigenpairs",
    "factor_spectrum",
    "fidelity",
    "largest_eigenvalues",
    "norm",
    "quadratic_model",
    "trace",
]

# Below this size a dense eigenvalue problem is cheaper than a Krylov one, which also needs k < size.
_DENSE_SIZE = 64
ROUGH = 0.01  # tolerance from which on eigenvalues are a rough answer


class Solution(NamedTuple):
    """Result of conjugate gradients: x, products used, and ‖g − (F + λI)x‖ / ‖g‖ as computed afresh."""

    direction: list[Tensor]
    iterations: int
    residual: float


class Fidelity(NamedTuple):
    """How near a preconditioned gradient x is to the exact x* = (F + λI)⁻¹ g; all 0-dim float64 tensors.

    cosine: of x with x*. relative_error: ‖x − x*‖ / ‖x*‖. share: of the decrease of the quadratic model that
    the step −x* achieves, the part that −x achieves (1 at best, negative for a step that climbs). best_share:
    the same after the best rescaling of x by a positive number. iterations, residual: of the exact solve.
    A zero gradient gives NaN.
    """

    cosine: Tensor
    relative_error: Tensor
    share: Tensor
    best_share: Tensor
    iterations: int
    residual: float


class Spectrum(NamedTuple):
    """Extreme eigenvalues and their ratio (inf where the smallest is not positive); 0-dim float64 tensors."""

    smallest: Tensor
    largest: Tensor
    condition: Tensor


def largest_eigenvalues(operator: CurvatureOperator, k: int = 1, *, seed: int = 0, tolerance: float = 1e-3) -> Tensor:
    """The k largest eigenvalues, descending, float64 [k]; see `eigenpairs`."""
    return eigenpairs(operator, k, seed=seed, tolerance=tolerance)[0]


def eigenpairs(
    operator: CurvatureOperator, k: int = 1, *, which: str = "largest", seed: int = 0, tolerance: float = 1e-3
) -> tuple[Tensor, list[list[Tensor]]]:
    """Extreme eigenvalues, float64 [k], outermost first, and k unit eigenvectors shaped as the parameters.

    Implicitly restarted Lanczos (``scipy.sparse.linalg.eigsh``) from a seeded Gaussian vector. `tolerance` is
    relative to the eigenvalue for the largest, to the largest eigenvalue for the smallest (which are zero
    wherever parameters outnumber residuals). Eigenvalues that have not converged within scipy's iteration
    limit are NaN. Every product makes a round trip to the host.
    """
    if which not in ("largest", "smallest"):
        raise ValueError(f"which: {which!r} given, 'largest' or 'smallest' expected")
    if not 1 <= k <= operator.size:
        raise ValueError(f"k: {k} given, 1 to {operator.size} (the number of parameters) expected")
    if operator.size <= max(_DENSE_SIZE, 2 * k):
        values, columns = torch.linalg.eigh(_symmetric(operator.dense()))
    else:
        values, columns = _lanczos(operator, k, which, seed, tolerance)
    order = values.argsort(descending=which == "largest")[:k]
    missing = k - order.numel()
    values = torch.cat([values[order], values.new_full((missing,), torch.nan)])
    vectors = torch.cat([columns.T[order], columns.new_full((missing, operator.size), torch.nan)])
    return values.to(operator.device), [operator.unflatten(row) for row in vectors]


def _lanczos(operator: CurvatureOperator, k: int, which: str, seed: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors (columns) in any order; fewer than k where not all converged."""
    import numpy
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    def product(row: Any) -> Any:
        flat = torch.from_numpy(numpy.ascontiguousarray(row, dtype=numpy.float64).reshape(-1))
        return operator.apply(flat.to(operator.device, operator.dtype)).cpu().double().numpy()

    start = numpy.random.default_rng(seed).standard_normal(operator.size)
    image = product(start)
    if not numpy.isfinite(image).all():
        raise ValueError("operator: not finite (diverged parameters, or inputs that are not finite)")
    if not image.any():  # the zero operator, on which ARPACK breaks down
        return torch.zeros(k, dtype=torch.float64), torch.eye(operator.size, k, dtype=torch.float64)
    shape = (operator.size, operator.size)
    # A rough answer needs few products, so its Lanczos vectors are few as well: each is orthogonalised to all others.
    vectors = max(2 * k + 1, 20 if tolerance < ROUGH else 8)
    options = {
        "v0": start,
        "tol": max(tolerance, torch.finfo(operator.dtype).eps),
        "ncv": min(operator.size, vectors),
    }
    shift = 0.0
    try:
        if which == "smallest":
            # ARPACK's tolerance is relative to the eigenvalue sought, which may be zero: look for it from the
            # other end of the spectrum, as the lowest of F - largest * I.
            plain = LinearOperator(shape, matvec=product, dtype=numpy.float64)
            shift = float(eigsh(plain, 1, which="LA", return_eigenvectors=False, **options)[0])
        linear = LinearOperator(shape, matvec=lambda row: product(row) - shift * row, dtype=numpy.float64)
        values, columns = eigsh(linear, k, which="LA" if which == "largest" else "SA", **options)
    except ArpackNoConvergence as failure:
        values, columns = failure.eigenvalues, failure.eigenvectors.reshape(operator.size, -1)
    return torch.from_numpy(values + shift), torch.from_numpy(numpy.ascontiguousarray(columns))


def trace(operator: CurvatureOperator, samples: int = 16, *, seed: int = 0) -> Tensor:
    """Hutchinson's estimate of the trace, the mean of zᵀFz over seeded Rademacher vectors z; 0-dim float64.

    Unbiased; variance 2 Σ_{i≠j} F_ij² / samples (Hutchinson 1990).
    """
    total = torch.zeros((), dtype=torch.float64, device=operator.device)
    for signs in _rademacher(operator, samples, seed):
        total += _dot(signs, operator.apply(signs))
    return total / samples


def diagonal(operator: CurvatureOperator, samples: int = 16, *, seed: int = 0) -> list[Tensor]:
    """Estimate of the diagonal, shaped as the parameters: the mean of z ∘ Fz over seeded Rademacher z.

    Unbiased; entry i has variance Σ_{j≠i} F_ij² / samples (Bekas, Kokiopoulou and Saad 2007). The sum over
    all entries is `trace` of the same seed and samples.
    """
    total = torch.zeros(operator.size, dtype=torch.float64, device=operator.device)
    for signs in _rademacher(operator, samples, seed):
        total += (signs.double() * operator.apply(signs).double()).sum(0)
    return operator.unflatten(total / samples)


def damped_natural_gradient(
    operator: CurvatureOperator,
    gradient: Vector,
    damping: float | Tensor,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
) -> Solution:
    """Solve (F + damping · I) x = gradient by conjugate gradients from zero.

    Stops at a residual of `tolerance` times ‖gradient‖, after `max_iterations` products, or at a direction of
    non-positive curvature (an indefinite operator: the loss is not convex in the output). The recurrences are
    in float64, products in the operator's type: float32 nets reach relative residuals of about 1e-6. Two
    numbers are read from the device per iteration.
    """
    shift = _damping(damping)
    b = operator.flatten(gradient).double()
    x, r = torch.zeros_like(b), b.clone()
    p, square = r, _dot(r, r)
    target = tolerance * tolerance * float(square)
    iterations = 0
    while iterations < max_iterations and float(square) > target:
        image = operator.apply(p.to(operator.dtype)).double() + shift * p
        curvature = _dot(p, image)
        iterations += 1
        if not float(curvature) > 0:
            break
        step = square / curvature
        x, r = x + step * p, r - step * image
        previous, square = square, _dot(r, r)
        p = r + (square / previous) * p
    length = float(b.norm())
    rest = b - operator.apply(x.to(operator.dtype)).double() - shift * x
    return Solution(operator.unflatten(x), iterations, float(rest.norm()) / length if length else 0.0)


def quadratic_model(
    operator: CurvatureOperator, gradient: Vector, step: Vector, damping: float | Tensor = 0.0
) -> Tensor:
    """Change of the loss that the quadratic model predicts: gᵀδ + ½ δᵀ(F + damping · I)δ; 0-dim float64.

    Negative for a step that decreases the model (Martens and Grosse 1503.05671, section 6.4).
    """
    shift = _damping(damping)
    delta = operator.flatten(step)
    linear = _dot(operator.flatten(gradient), delta)
    return linear + 0.5 * (_dot(delta, operator.apply(delta)) + shift * _dot(delta, delta))


def fidelity(
    operator: CurvatureOperator,
    gradient: Vector,
    direction: Vector,
    damping: float | Tensor,
    *,
    exact: Solution | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
) -> Fidelity:
    """Compare a preconditioned gradient `direction` ≈ (F + damping · I)⁻¹ `gradient` with the exact one.

    Its sign is that of the gradient: pass −update/lr for an update that was made. `exact` reuses an earlier
    solve at the same damping; else conjugate gradients run to `tolerance`, which bounds how far the shares
    can be trusted.
    """
    shift = _damping(damping)
    if exact is None:
        exact = damped_natural_gradient(operator, gradient, damping, tolerance=tolerance, max_iterations=max_iterations)
    g = operator.flatten(gradient).double()
    pair = torch.stack([operator.flatten(direction), operator.flatten(exact.direction)])
    x, best = pair.double()
    slope, full_slope = _dot(g, x), _dot(g, best)
    curvature, full_curvature = (pair.double() * operator.apply(pair).double()).sum(1) + shift * (
        pair.double() ** 2
    ).sum(1)
    achievable = full_slope - 0.5 * full_curvature
    return Fidelity(
        cosine=cosine([x], [best]),
        relative_error=(x - best).norm() / best.norm(),
        share=(slope - 0.5 * curvature) / achievable,
        best_share=0.5 * slope * slope.clamp(min=0) / curvature / achievable,
        iterations=exact.iterations,
        residual=exact.residual,
    )


def factor_spectrum(matrix: Tensor, damping: float | Tensor = 0.0) -> Spectrum:
    """Extreme eigenvalues and condition number, in float64, of a symmetric factor [..., d, d] + damping · I.

    A factor of which only the diagonal is kept is [d]. Leading dimensions (groups of a convolution): extremes over all
    of them, condition of the worst one. Only the lower triangle is read. A non-finite matrix gives NaN.
    """
    if matrix.dim() == 0 or (matrix.dim() > 1 and matrix.shape[-1] != matrix.shape[-2]):
        raise ValueError(f"matrix: shape {tuple(matrix.shape)} given, [..., d, d] or [d] expected")
    matrix = matrix.detach().double()
    diagonal = matrix.dim() == 1
    matrix = matrix[:, None, None] if diagonal else matrix
    if not bool(matrix.tril().isfinite().all()):
        nan = matrix.new_full((), torch.nan)
        return Spectrum(nan, nan, nan)
    values = torch.linalg.eigvalsh(matrix) + damping
    low, high = values[..., 0], values[..., -1]
    if diagonal:
        low, high = low.min(), high.max()
    condition = torch.where(low > 0, high / low, torch.inf)
    return Spectrum(low.min(), high.max(), condition.max())


def norm(u: Vector) -> Tensor:
    """Euclidean length of a list of tensors taken as one vector; 0-dim float64."""
    return torch.stack([t.detach().double().square().sum() for t in u]).sum().sqrt()


def cosine(u: Vector, v: Vector) -> Tensor:
    """Cosine of the angle between two lists of tensors; 0-dim float64, NaN if one is zero."""
    inner = torch.stack([_dot(a.detach().flatten(), b.detach().flatten()) for a, b in zip(u, v, strict=True)]).sum()
    return inner / (norm(u) * norm(v))


def _damping(damping: float | Tensor) -> float:
    value = float(damping)
    if not value >= 0:
        raise ValueError(f"damping: {value} given, a number of at least 0 expected")
    return value


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u.double() * v.double()).sum()


def _symmetric(matrix: Tensor) -> Tensor:
    matrix = matrix.double()
    return (matrix + matrix.T) / 2


def _rademacher(operator: CurvatureOperator, samples: int, seed: int) -> Iterator[Tensor]:
    """Rows of ±1 [<= BATCH, P], drawn on the host so that a seed means the same on every device."""
    if samples < 1:
        raise ValueError(f"samples: {samples} given, at least 1 expected")
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, samples, BATCH):
        count = min(BATCH, samples - first)
        bits = torch.randint(2, (count, operator.size), generator=generator, dtype=torch.int8)
        yield bits.to(operator.device).to(operator.dtype) * 2 - 1
