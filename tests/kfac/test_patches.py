"""Sums and products of a convolution's rows equal those of the patches written down, in float64."""

import pytest
import torch
from torch.nn import functional as F

from kfac import patches
from kfac.patches import Patches

# channels, image, kernel, stride, padding, dilation, groups
GEOMETRIES = {
    "3x3": (3, (5, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3 in groups": (6, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), 3),
    "3x3 strided": (3, (7, 6), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1": (4, (3, 5), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 in groups": (4, (3, 5), (1, 1), (1, 1), (0, 0), (1, 1), 2),
    "1x1 strided": (4, (4, 4), (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "dilated": (2, (8, 9), (3, 2), (1, 2), (2, 0), (2, 3), 1),
    "1d": (4, (9,), (4,), (2,), (1,), (1,), 2),
    "3d": (2, (3, 4, 4), (2, 3, 3), (1, 1, 2), (0, 1, 1), (1, 1, 1), 1),
}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def written(rows: Patches) -> torch.Tensor:
    """The rows, pixel by pixel of each window."""
    pads = [p for p in reversed(rows.padding) for _ in range(2)]
    x = F.pad(rows.x, pads)
    n = len(x)
    out = []
    for place in torch.cartesian_prod(*[torch.arange(size) for size in rows.out]).reshape(-1, len(rows.out)):
        index = [slice(None), slice(None)]
        for first, k, s, d in zip(place.tolist(), rows.kernel, rows.stride, rows.dilation, strict=True):
            index.append(slice(first * s, first * s + d * (k - 1) + 1, d))
        out.append(x[tuple(index)].reshape(n, rows.groups, -1))
    a = torch.stack(out, dim=2).transpose(0, 1)
    return F.pad(a, (0, 1), value=1.0) if rows.bias else a


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_patches_give_the_sums_and_products_of_their_rows(name, bias):
    channels, image, *geometry, groups = GEOMETRIES[name]
    rows = Patches(torch.randn(4, channels, *image, dtype=torch.float64), *geometry, groups, bias)
    a = written(rows)
    assert torch.equal(rows.rows, a) and rows.shape == a.shape
    assert torch.equal(rows.part(1, 3).rows, a[:, 1:3])
    assert torch.equal(rows.of(torch.tensor([3, 0])).rows, a[:, [3, 0]])
    parts = list(rows.written_by_parts(memory=2 * a[:, 0].numel()))
    assert torch.equal(torch.cat([part for *_, part in parts], dim=1), a) and len(parts) == 2

    close(rows.outer_sum(None), a.flatten(1, 2).mT @ a.flatten(1, 2))
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    close(rows.outer_sum(keep), a[:, keep > 0].flatten(1, 2).mT @ a[:, keep > 0].flatten(1, 2))
    close(rows.sums(), a.sum(-1))
    g = torch.randn(groups, 2, 4, a.shape[2], 5, dtype=torch.float64)
    directions = torch.randn(3, groups, 5, a.shape[-1], dtype=torch.float64)
    close(rows.products(g, directions), torch.einsum("kmnto,ikod,kntd->mni", g, directions, a).reshape(-1, 3))
    close(rows.times(g[:, 0]), torch.einsum("knto,kntd->kod", g[:, 0], a))


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 3, 1, 4), (2, 2, 2, 2), (4, 1, 3, 1), (1, 2, 1, 1)])
def test_autocorrelation_equals_the_sum_over_patches(shape):
    x = torch.randn(shape, dtype=torch.float64)
    unfolded = F.unfold(x, 3, padding=1).mT.flatten(0, 1)
    outer, total = patches.autocorrelation(x)
    close(outer, unfolded.T @ unfolded)
    close(total, unfolded.sum(0))
