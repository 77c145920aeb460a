"""Every rearranged product equals the plain one, in float64."""

import pytest
import torch
from torch.nn import functional as F

from kfac import products


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("d", [1, 7, products.BLOCK, products.BLOCK + 1, 3 * products.BLOCK - 5])
@pytest.mark.parametrize("rows", [40, products.BLOCK + 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_equals_the_plain_product_and_is_symmetric(d, rows, weighted):
    x = torch.randn(2, rows, d, dtype=torch.float64)
    weights = torch.rand(rows, dtype=torch.float64) if weighted else None
    actual = products.gram(x, weights)
    close(actual, x.mT @ (x if weights is None else weights[:, None] * x))
    close(actual, actual.mT)


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 3, 1, 4), (2, 2, 2, 2), (4, 1, 3, 1), (1, 2, 1, 1)])
def test_autocorrelation_equals_the_sum_over_patches(shape):
    x = torch.randn(shape, dtype=torch.float64)
    patches = F.unfold(x, 3, padding=1).mT.flatten(0, 1)
    outer, total = products.autocorrelation(x)
    close(outer, patches.T @ patches)
    close(total, patches.sum(0))


@pytest.mark.parametrize("bias", [False, True])
def test_patches_give_the_sums_and_products_of_their_rows(bias):
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    patches = products.Patches(x, bias)
    unfolded = F.unfold(x, 3, padding=1).mT[None]
    a = F.pad(unfolded, (0, 1), value=1.0) if bias else unfolded
    assert torch.equal(patches.rows, a) and patches.shape == a.shape
    close(patches.outer_sum(None), a.flatten(1, 2).mT @ a.flatten(1, 2))
    keep = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    close(patches.outer_sum(keep), a[:, keep > 0].flatten(1, 2).mT @ a[:, keep > 0].flatten(1, 2))
    g = torch.randn(1, 2, 4, 30, 5, dtype=torch.float64)
    directions = torch.randn(3, 1, 5, a.shape[-1], dtype=torch.float64)
    expected = torch.einsum("kmnto,ikod,kntd->mni", g, directions, a).reshape(-1, 3)
    close(patches.products(g, directions), expected)
    assert torch.equal(patches.first(2).rows, a[:, :2])


@pytest.mark.parametrize("shape", [(2, 3, 10, 4), (2, 3, 4, 10)])
def test_sum_of_outer_products_does_not_depend_on_the_layout(shape):
    rows = torch.randn(shape, dtype=torch.float64)
    flat = rows.flatten(1, 2)
    for stored in (rows, rows.mT.contiguous().mT):
        close(products.outer_sum(stored), flat.mT @ flat)


def test_rows_with_a_one_are_those_of_the_chosen_examples():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    a = F.pad(x, (0, 1), value=1.0)
    rows, chosen = products.WithOne(x), torch.tensor([4, 0])
    assert rows.shape == a.shape and torch.equal(rows.rows, a)
    assert torch.equal(rows.first(2).rows, a[:, :2])
    assert torch.equal(rows.of(chosen).rows, a[:, chosen])
