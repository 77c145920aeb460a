"""`preconditioning_dtype=torch.bfloat16`: what else is rounded on a CPU, and what is not."""

from __future__ import annotations

from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import mlp
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC
from kfac.precision import rounded_products

SETTINGS = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]


def settings() -> list[str]:
    return [setting.fp32_precision for setting in SETTINGS]


def factors(optimizer: Any, fisher: str, dtype: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A and G after one step of a net of 64-wide layers with 40 outputs, drawn alike for every dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = mlp(64, 64, 64, 40), torch.randn(96, 64)
    criterion = nn.MSELoss()
    used = optimizer(model, loss=criterion, fisher=fisher, preconditioning_dtype=dtype)
    criterion(model(inputs), torch.zeros(96, 40)).backward()
    used.step()
    return {name: (layer.A, layer.G) for name, layer in used.curvature().items()}


@pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
def test_factors_of_drawn_vectors_are_near_those_in_full_precision(optimizer: Any) -> None:
    full, half = (factors(optimizer, "sampled", dtype) for dtype in (None, torch.bfloat16))
    for name, pair in full.items():
        for one, other in zip(pair, half[name], strict=True):
            assert truth.relative_error(other, one) < 0.01, name
            assert torch.linalg.eigvalsh(other.double()).min() > -1e-5 * other.norm(), "not positive semi-definite"


def test_factors_of_exact_vectors_are_those_in_full_precision() -> None:
    full, half = (factors(KFAC, "exact", dtype) for dtype in (None, torch.bfloat16))
    assert all(torch.equal(x, y) for name in full for x, y in zip(full[name], half[name], strict=True))


@pytest.mark.parametrize("before", ["none", "tf32"])
def test_the_process_has_its_own_precision_back(before: str) -> None:
    kept = settings()
    try:
        for setting in SETTINGS:
            setting.fp32_precision = before
        with pytest.raises(KeyError), rounded_products(True):
            assert settings() == ["bf16", "bf16"]
            raise KeyError
        assert settings() == [before, before]
        with rounded_products(False):
            assert settings() == [before, before]
        factors(KFAC, "sampled", torch.bfloat16)
        assert settings() == [before, before]
    finally:
        for setting, value in zip(SETTINGS, kept, strict=True):
            setting.fp32_precision = value
