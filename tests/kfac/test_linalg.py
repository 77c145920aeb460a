"""Products in any layout; damped inverses: large ones, made by quarters on a CPU, equal the plain inverse; a failure is
noticed."""

import pytest
import torch

from kfac import linalg

SIZES = [1, 5, linalg.WHOLE, linalg.WHOLE + 1, 3 * linalg.WHOLE + 7]


def positive(count: int, d: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Symmetric [K, d, d] with eigenvalues over three orders of magnitude, without a definite upper triangle."""
    x = torch.randn(count, 2 * d, d, dtype=torch.float64) * torch.logspace(0, -1.5, d, dtype=torch.float64)
    return (x.mT @ x / (2 * d)).to(dtype)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


LAYOUTS = {
    "dense": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows apart": lambda x: torch.cat([x, torch.full_like(x[..., :3], torch.nan)], dim=-1)[..., :-3],
    "one row": lambda x: x[..., :1, :].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("onednn", [True, False])
def test_a_product_is_that_of_its_numbers_in_any_layout(onednn, left, right, dtype, monkeypatch):
    if not onednn:
        monkeypatch.setattr(linalg, "_has_onednn", lambda: False)
    for count, m, k, n in ((1, 150, 200, 135), (1, 3, 130, 129), (1, 40, 20, 30), (1, 0, 130, 129), (2, 30, 40, 20)):
        x = LAYOUTS[left](torch.randn(count, m, k, dtype=dtype)) if m else torch.randn(count, m, k, dtype=dtype)
        y = LAYOUTS[right](torch.randn(count, k, n, dtype=dtype))
        expected = x.double() @ y.double()
        found = linalg.product(x, y)
        assert found.dtype == dtype and found.shape == expected.shape
        unit = torch.finfo(dtype).eps
        assert (found - expected).norm() <= 2 * unit * k**0.5 * expected.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_product_hides_nothing_that_is_not_finite(bad):
    x, y = torch.randn(1, 140, 150), torch.zeros(1, 150, 160)
    x[0, 3, 4] = bad
    assert not linalg.product(x, y)[0, 3].isfinite().any()


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_damped_inverse_is_that_of_the_lower_triangle(count, d):
    matrix, damping = positive(count, d), torch.rand(count, dtype=torch.float64) * 1e-2
    lower = matrix.tril() + torch.full_like(matrix, 7.0).triu(1)
    inverse, good = linalg.damped_inverse(lower, damping)
    expected = torch.linalg.inv(matrix + damping[:, None, None] * torch.eye(d, dtype=torch.float64))
    assert good.shape == (count,) and good.all()
    torch.testing.assert_close(inverse, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("d", SIZES[-2:])
def test_by_quarters_is_as_accurate_as_lapack_in_single_precision(d):
    matrix, damping = positive(1, d, torch.float32), torch.tensor([1e-4])
    exact = torch.linalg.inv(matrix.double() + 1e-4 * torch.eye(d, dtype=torch.float64))
    lapack = torch.cholesky_inverse(torch.linalg.cholesky(matrix + 1e-4 * torch.eye(d)))
    error = (linalg.damped_inverse(matrix, damping)[0] - exact).norm()
    assert error <= 4 * (lapack - exact).norm()


@pytest.mark.parametrize("d", SIZES[1:])
@pytest.mark.parametrize("place", [0, -1])
def test_a_factor_that_is_not_positive_is_noticed_wherever_that_shows(d, place):
    matrix = positive(1, d)
    matrix[0, place, place] = -1.0
    assert not linalg.damped_inverse(matrix, torch.zeros(1, dtype=torch.float64))[1]
    matrix[0, place, place] = torch.nan
    assert not linalg.damped_inverse(matrix, torch.zeros(1, dtype=torch.float64))[1]


def test_eigenvectors_that_are_not_finite_are_made_in_float64(monkeypatch):
    """As LAPACK gave for the first factor of the MNIST autoencoder: two columns of NaN, and no error."""
    plain = torch.linalg.eigh

    def faulty(matrix):
        values, vectors = plain(matrix)
        if matrix.dtype == torch.float32:
            vectors[..., :2] = torch.nan
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", faulty)
    matrix = positive(2, 30, torch.float32)
    values, basis = linalg.eigenbasis(matrix)
    torch.testing.assert_close(basis @ (values[..., None] * basis.mT), matrix)
    assert basis.dtype == torch.float32
    with pytest.raises(torch.linalg.LinAlgError):
        linalg.eigenbasis(torch.full((1, 3, 3), torch.nan, dtype=torch.float64))
