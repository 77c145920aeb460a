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
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_equals_the_plain_product_and_is_symmetric(d, weighted):
    x = torch.randn(2, 40, d, dtype=torch.float64)
    weights = torch.rand(40, dtype=torch.float64) if weighted else None
    actual = products.gram(x, weights)
    close(actual, x.mT @ (x if weights is None else weights[:, None] * x))
    close(actual, actual.mT)


@pytest.mark.parametrize("d", [1, 7, products.BLOCK + 1, 3 * products.BLOCK - 5])
def test_triangular_inverse_and_its_gram_give_the_inverse_of_the_matrix(d):
    x = torch.randn(2, d, d, dtype=torch.float64)
    matrix = x @ x.mT / d + torch.eye(d, dtype=torch.float64)
    factor = torch.linalg.cholesky(matrix)
    inverse = products.inverse_of_lower(factor)
    close(inverse, torch.linalg.inv(factor))
    close(products.gram_of_lower(inverse), inverse.mT @ inverse)
    close(products.gram_of_lower(inverse), torch.linalg.inv(matrix))


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 3, 1, 4), (2, 2, 2, 2), (4, 1, 3, 1), (1, 2, 1, 1)])
def test_autocorrelation_equals_the_sum_over_patches(shape):
    x = torch.randn(shape, dtype=torch.float64)
    patches = F.unfold(x, 3, padding=1).mT.flatten(0, 1)
    outer, total = products.autocorrelation(x)
    close(outer, patches.T @ patches)
    close(total, patches.sum(0))
