"""Kronecker factors: running averages of the moments of inputs and output gradients (rows.py).

A = (1/(N T)) sum_{n,t} a a^T and G = sum_{n,t,vectors} g g^T, so that G (x) A approximates the block of the exact
curvature (Martens & Grosse 2015, arXiv 1503.05671, section 3; with T > 1 the product equals that of arXiv
1602.01407, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .later import seen_broken


def update_average(average: Tensor, new: Tensor, count: Tensor, decay: float, finite: Tensor) -> None:
    """average <- e average + (1 - e) new with e = min(1 - 1/count, decay), in place; count includes `new`.

    The first values are a plain mean, so that no zero start has to be corrected for (arXiv 1503.05671, section 5).
    Where `finite` is False the average stays as it was.
    """
    keep = (1 - 1 / count.clamp_min(1)).clamp_max(decay).to(average.dtype)
    if finite.device.type != "cpu":
        average.copy_(torch.where(finite, torch.lerp(new, average, keep), average))
    elif not seen_broken(finite):
        average.lerp_(new, 1 - keep)
