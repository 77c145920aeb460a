"""Rows of convolutions: the patch of the input that each output pixel sees, written only where nothing cheaper serves.

For most sums the input is enough: inner products with rows are a convolution, rows added up with a number each are the
gradient of one, and sums of their outer products are those of an image with itself, shifted. All are exact
rearrangements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from .parts import worth_joining
from .products import Unwritten, gram, outer_sum

FEW = 128  # on an H200, batch 128: 64 channels cost .15 ms against .95, 160 cost 2.4 against 2.3
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_WEIGHTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


@dataclass
class Patches(Unwritten):
    """Rows a [K, N, T, d_in] of a convolution in K groups, as its input; a one for the bias is last.

    x: [N, C, ...]. `kernel`, `stride`, `dilation` and `padding` (zeros on both sides) have a number for each dimension
    of the image.
    """

    x: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    bias: bool

    @property
    def out(self) -> list[int]:
        """Output pixels along each dimension of the image."""
        geometry = zip(self.x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in geometry]

    @property
    def shape(self) -> torch.Size:
        n, channels = self.x.shape[:2]
        size = channels // self.groups * torch.Size(self.kernel).numel()
        return torch.Size((self.groups, n, torch.Size(self.out).numel(), size + self.bias))

    @property
    def rows(self) -> Tensor:
        x = F.pad(self.x, [p for p in reversed(self.padding) for _ in range(2)]) if any(self.padding) else self.x
        n, channels = x.shape[:2]
        step_n, step_c, *steps = x.stride()
        per_group = channels // self.groups
        patches = x.as_strided(
            (self.groups, n, *self.out, per_group, *self.kernel),
            (
                per_group * step_c,
                step_n,
                *(s * step for s, step in zip(self.stride, steps, strict=True)),
                step_c,
                *(d * step for d, step in zip(self.dilation, steps, strict=True)),
            ),
            x.storage_offset(),
        )
        # One copy: the patches are written beside the ones of the bias.
        size = per_group * torch.Size(self.kernel).numel()
        a = x.new_empty(*patches.shape[: 2 + len(steps)], size + self.bias)
        a[..., :size].view(patches.shape).copy_(patches)
        a[..., size:] = 1.0
        return a.flatten(2, -2)

    def part(self, start: int, stop: int) -> Patches:
        return replace(self, x=self.x[start:stop])

    def of(self, examples: Tensor) -> Patches:
        return replace(self, x=self.x[examples])

    def outer_sum(self, keep: Tensor | None) -> Tensor:
        """Sum of a a^T over all rows, times 0 or 1 for each example in `keep` [N]: [K, d_in, d_in]."""
        single = all(k == s == 1 for k, s in zip(self.kernel, self.stride, strict=True)) and not any(self.padding)
        common = (3, 3), (1, 1), (1, 1), (1, 1)  # kernel, stride, padding, dilation
        shiftable = self.groups == 1 and (self.kernel, self.stride, self.padding, self.dilation) == common
        if not single and not (shiftable and self._worth_shifting()):
            return self._outer_sum_by_parts(keep)
        x = self.x if keep is None else self.x * keep.reshape(-1, *[1] * (self.x.dim() - 1))
        if single:
            pixels = x.reshape(len(x), self.groups, -1, x[0, 0].numel()).transpose(0, 1)  # [K, N, c, T]
            outer, total = outer_sum(pixels.mT), pixels.sum((1, 3))
        else:
            outer, total = (sums[None] for sums in autocorrelation(x))
        if self.bias:
            k, n, t, _ = self.shape
            count = total.new_full((), n * t) if keep is None else keep.sum() * t
            outer = torch.cat([outer, total[:, None]], dim=1)
            outer = torch.cat([outer, torch.cat([total, count.expand(k, 1)], dim=1)[..., None]], dim=2)
        return outer

    def _worth_shifting(self) -> bool:
        """Whether the products of an image with itself cost less than those of its patches.

        They are a third of the work in ten times the calls, which a GPU notices up to `FEW` channels.
        """
        return not worth_joining(self.x.device) or self.x.shape[1] > FEW

    def _outer_sum_by_parts(self, keep: Tensor | None) -> Tensor:
        total: Tensor | None = None
        for start, stop, rows in self.written_by_parts():
            weights = None if keep is None else keep[start:stop, None].expand(-1, rows.shape[2]).reshape(-1)
            new = gram(rows.flatten(1, 2), weights)
            total = new if total is None else total.add_(new)
        assert total is not None
        return total

    def written_by_parts(self, memory: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """The rows of some examples after others: from, to, rows; `memory` is the largest number of numbers at once."""
        if memory is None:
            memory = 2**26 if worth_joining(self.x.device) else 2**24
        k, n, t, d_in = self.shape
        size = max(1, memory // (k * t * d_in))
        for start in range(0, n, size):
            yield start, min(start + size, n), self.part(start, start + size).rows

    def products(self, g: Tensor, directions: Sequence[Tensor] | Tensor) -> Tensor:
        """Inner products of rows with directions, sum_t <g, V a>, as one convolution.

        Args:
            g: [K, M, N, T, d_out]. directions: I times [K, d_out, d_in].

        Returns:
            [M * N, I].
        """
        count, k, n, d_out = len(directions), self.groups, len(self.x), g.shape[-1]
        flat = torch.cat(list(directions), dim=1)  # [K, I * d_out, d_in]: a group's outputs side by side
        weight = flat[..., : flat.shape[-1] - self.bias].reshape(k * count * d_out, -1, *self.kernel)
        bias = flat[..., -1].reshape(-1) if self.bias else None
        convolution = _CONVOLUTIONS[len(self.kernel)]
        outputs = convolution(self.x, weight, bias, self.stride, self.padding, self.dilation, k)
        if worth_joining(self.x.device) and k == g.shape[1] == 1:
            return (outputs.reshape(n, count, -1) @ g[0, 0].mT.reshape(n, -1, 1))[..., 0]
        outputs = outputs.reshape(n, k, count, d_out, -1).permute(2, 1, 0, 3, 4)[:, :, None]
        columns = [(g.mT * output).sum((0, 3, 4)) for output in outputs]
        return torch.stack(columns, dim=-1).reshape(-1, count)

    def times(self, g: Tensor) -> Tensor:
        """Sum over all rows of g a^T, for g [K, N, T, d_out]: [K, d_out, d_in]."""
        k, n, _, d_out = g.shape
        pixels = g.permute(1, 0, 3, 2).reshape(n, k * d_out, *self.out)
        shape = (k * d_out, self.x.shape[1] // k, *self.kernel)
        arguments = (self.stride, self.padding, self.dilation, k)
        total = _WEIGHTS[len(self.kernel)](self.x, shape, pixels, *arguments).reshape(k, d_out, -1)
        return torch.cat([total, g.sum((1, 2))[..., None]], dim=2) if self.bias else total

    def sums(self) -> Tensor:
        """1^T a: [K, N, T]."""
        ones = self.x.new_ones(self.groups, self.x.shape[1] // self.groups, *self.kernel)
        bias = self.x.new_ones(self.groups) if self.bias else None
        convolution = _CONVOLUTIONS[len(self.kernel)]
        outputs = convolution(self.x, ones, bias, self.stride, self.padding, self.dilation, self.groups)
        return outputs.flatten(2).transpose(0, 1)


def autocorrelation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all 3x3 patches of an image padded by one zero: of a a^T, and of a, without the patches.

    Patches that are shifted against each other meet in the same products of pixels, so a a^T depends on the shift alone
    but for the border: what the pad cuts off is an outer row, an outer column, or both, and is subtracted.

    Args:
        x: [N, C, H, W].

    Returns:
        [C * 9, C * 9] and [C * 9], in the order (c, y, x) of a convolution's weight.
    """
    c = x.shape[1]
    dense = x.contiguous(memory_format=torch.channels_last)  # twice as fast
    shifts = conv2d_weight(
        dense, (c, c, 5, 5), dense, padding=2
    )  # by c, c', and the shift from the first to the second
    sums = shifts.unfold(2, 3, 1).unfold(3, 3, 1).flip(2, 3)  # c, c', y, x, y', x'
    total = x.sum(0)
    mean = total.sum((1, 2))[:, None, None].repeat(1, 3, 3)
    for place, cut in ((0, -1), (2, 0)):  # a patch's first row never sees the image's last one
        row, column = x[:, :, cut], x[:, :, :, cut]
        sums[:, :, place, :, place, :] -= _strip(row)
        sums[:, :, :, place, :, place] -= _strip(column)
        mean[:, place] -= total[:, cut].sum(1)[:, None]
        mean[:, :, place] -= total[:, :, cut].sum(1)[:, None]
        for place_x, cut_x in ((0, -1), (2, 0)):
            corner = x[:, :, cut, cut_x]
            sums[:, :, place, place_x, place, place_x] += corner.T @ corner
            mean[:, place, place_x] += total[:, cut, cut_x]
    return sums.permute(0, 2, 3, 1, 4, 5).reshape(c * 9, c * 9), mean.reshape(c * 9)


def _strip(line: Tensor) -> Tensor:
    """Products of pixels of a line [N, C, W], by c, c' and places of both in a patch of three: [C, C, 3, 3]."""
    c = line.shape[1]
    return conv1d_weight(line, (c, c, 5), line, padding=2).unfold(2, 3, 1).flip(2)
