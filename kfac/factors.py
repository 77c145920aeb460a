"""Kronecker factors: running averages of the moments of inputs and output gradients (rows.py).

A = (1/(N T)) sum_{n,t} a a^T and G = sum_{n,t,vectors} g g^T, so that G (x) A approximates the block of the exact
curvature (Martens & Grosse 2015, arXiv 1503.05671, section 3; with T > 1 the product equals that of arXiv
1602.01407, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .later import seen_broken
from .parts import worth_joining


def update_averages(
    averages: Sequence[Tensor], new: Sequence[Tensor], counts: Sequence[Tensor], decay: float, finite: Tensor
) -> None:
    """average <- e average + (1 - e) new with e = min(1 - 1/count, decay), in place; a count includes its `new`.

    The first values are a plain mean, so that no zero start has to be corrected for (arXiv 1503.05671, section 5).
    Where `finite` is False the averages stay as they were.
    """
    if worth_joining(finite.device):
        shares: Sequence[Tensor] = _share(torch.stack(list(counts)), decay).unbind()
        new = [torch.where(finite, own, average) for average, own in zip(averages, new, strict=True)]
    elif seen_broken(finite):
        return
    else:
        shares = [_share(count, decay) for count in counts]
    for average, own, share in zip(averages, new, shares, strict=True):
        average.lerp_(own, share.to(average.dtype))


def _share(count: Tensor, decay: float) -> Tensor:
    """What the new value counts for, 1 - e."""
    return 1 - (1 - 1 / count.clamp_min(1)).clamp_max(decay)
