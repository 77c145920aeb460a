"""Matrix products that know what they multiply: symmetric results, triangles, images under small kernels.

All are exact rearrangements of plain products; they halve the work or spare copies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight

BLOCK = 256  # rows of a block of a symmetric product: large enough for a fast product, small enough to skip a half


def gram(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """X^T diag(weights) X of [K, R, d] and [R]: [K, d, d], by the blocks on and below the diagonal."""
    weighted = x if weights is None else x * weights[:, None]
    d = x.shape[-1]
    if d <= BLOCK:
        return x.mT @ weighted
    out = x.new_empty(*x.shape[:-2], d, d)
    for first in range(0, d, BLOCK):
        last = min(first + BLOCK, d)
        out[..., first:last, :last] = x[..., first:last].mT @ weighted[..., :last]
        out[..., :first, first:last] = out[..., first:last, :first].mT
    return out


def inverse_of_lower(factor: Tensor) -> Tensor:
    """L^-1 of lower triangular [K, d, d], by halves: most of the work is plain products."""
    d = factor.shape[-1]
    if d <= BLOCK:
        identity = torch.eye(d, device=factor.device, dtype=factor.dtype)
        return torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    half = d // 2
    inverse = torch.zeros_like(factor)
    inverse[..., :half, :half] = top = inverse_of_lower(factor[..., :half, :half])
    inverse[..., half:, half:] = bottom = inverse_of_lower(factor[..., half:, half:])
    inverse[..., half:, :half] = -(bottom @ (factor[..., half:, :half] @ top))
    return inverse


def gram_of_lower(lower: Tensor) -> Tensor:
    """L^T L of lower triangular [K, d, d]: [K, d, d], without the products by its zeros."""
    d = lower.shape[-1]
    if d <= BLOCK:
        return lower.mT @ lower
    out = torch.empty_like(lower)
    for first in range(0, d, BLOCK):
        last = min(first + BLOCK, d)
        out[..., first:last, :last] = lower[..., first:, first:last].mT @ lower[..., first:, :last]
        out[..., :first, first:last] = out[..., first:last, :first].mT
    return out


def autocorrelation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all 3x3 patches of an image padded by one zero: of a a^T, and of a, without the patches.

    Patches that are shifted against each other meet in the same products of pixels, so a a^T depends on the shift alone
    but for the border: what the pad cuts off is an outer row, an outer column, or both, and is subtracted.

    Args:
        x: [N, C, H, W].

    Returns:
        [C * 9, C * 9] and [C * 9], in the order (c, y, x) of a convolution's weight.
    """
    c, h, w = x.shape[1:]
    shifts = conv2d_weight(x, (c, c, 5, 5), x, padding=2)  # by c, c', and the shift from the first to the second
    index = torch.arange(3, device=x.device)
    shift = index - index[:, None] + 2  # [first, second]
    sums = shifts[:, :, shift[:, None, :, None], shift[None, :, None, :]]  # c, c', y, x, y', x'
    total = x.sum(0)
    mean = total.sum((1, 2))[:, None, None].repeat(1, 3, 3)
    for place, cut in ((0, -1), (2, 0)):  # a patch's first row never sees the image's last one
        row, column = x[:, :, cut], x[:, :, :, cut]
        sums[:, :, place, :, place, :] -= conv1d_weight(row, (c, c, 5), row, padding=2)[:, :, shift]
        sums[:, :, :, place, :, place] -= conv1d_weight(column, (c, c, 5), column, padding=2)[:, :, shift]
        mean[:, place] -= total[:, cut].sum(1)[:, None]
        mean[:, :, place] -= total[:, :, cut].sum(1)[:, None]
        for place_x, cut_x in ((0, -1), (2, 0)):
            corner = x[:, :, cut, cut_x]
            sums[:, :, place, place_x, place, place_x] += corner.T @ corner
            mean[:, place, place_x] += total[:, cut, cut_x]
    return sums.permute(0, 2, 3, 1, 4, 5).reshape(c * 9, c * 9), mean.reshape(c * 9)
