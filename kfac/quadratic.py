"""The local quadratic model of the loss along a few directions: step size, momentum, and a bound on what it promises.

M(d) - h = <gradient, d> + 1/2 d^T (F + damping I) d along d = alpha * direction + mu * previous step (Martens & Grosse
2015, arXiv 1503.05671, sections 6.4 and 7), with F from curvature vectors sent back through the network anyway.
All functions work on small tensors on the device and never synchronise with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def minimise_in_box(gradient: Tensor, curvature: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The minimiser of gradient . w + 1/2 w^T curvature w over lower <= w <= upper, for two unknowns.

    A convex quadratic in two variables has its constrained minimum inside or on one of the four edges; all five
    candidates are computed and the best is taken, without a branch on the data.

    Args:
        gradient: [2]. curvature: [2, 2], positive semi-definite. lower, upper: [2].

    Returns:
        [2].
    """
    tiny = torch.finfo(curvature.dtype).tiny
    (c00, c01), (_, c11) = curvature
    g0, g1 = gradient
    determinant = c00 * c11 - c01 * c01
    inside = torch.stack([c01 * g1 - c11 * g0, c01 * g0 - c00 * g1]) / determinant.clamp_min(tiny)
    usable = (determinant > 1e-6 * c00 * c11) & (inside >= lower).all() & (inside <= upper).all()
    candidates = [torch.where(usable, inside, lower)]
    for bound in (lower, upper):
        along_1 = (-(g1 + c01 * bound[0]) / c11.clamp_min(tiny)).clamp(lower[1], upper[1])
        along_0 = (-(g0 + c01 * bound[1]) / c00.clamp_min(tiny)).clamp(lower[0], upper[0])
        candidates += [torch.stack([bound[0], along_1]), torch.stack([along_0, bound[1]])]
    w = torch.stack(candidates)
    value = w @ gradient + 0.5 * ((w @ curvature) * w).sum(1)
    best = value.nan_to_num(torch.inf).argmin(keepdim=True)
    return w.index_select(0, best)[0]  # w[best] would read `best` on the host


def bounded_scale(slope: Tensor, curvature: Tensor, largest: Tensor) -> Tensor:
    """The factor s in (0, 1] at which the promised decrease s slope - 1/2 s^2 curvature is at most `largest`.

    `slope` is minus the directional derivative of the step, `curvature` its quadratic form, `largest` the decrease
    that is allowed; all 0-dimensional.
    """
    room = slope.square() - 2 * curvature * largest
    scale = 2 * largest / (slope + room.clamp_min(0).sqrt()).clamp_min(torch.finfo(slope.dtype).tiny)
    return torch.where(room > 0, scale.clamp(0, 1), 1.0)


def dot(u: Tensor, v: Tensor) -> Tensor:
    """The inner product of two tensors of one shape."""
    return torch.dot(u.reshape(-1), v.reshape(-1))
