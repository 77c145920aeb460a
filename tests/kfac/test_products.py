"""Every product that knows its symmetry equals the plain one, in float64."""

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
    assert torch.equal(rows.part(1, 3).rows, a[:, 1:3])
    assert torch.equal(rows.of(chosen).rows, a[:, chosen])
