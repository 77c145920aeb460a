"""Choosing on the device, where the host does not look: by the "meta" device, which has no values to look at."""

import pytest
import torch

from kfac.later import select


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_chosen_has_the_dtype_of_what_is_new(device: str, dtype: torch.dtype) -> None:
    """Token numbers among the rows of a two-level step have to stay numbers."""
    condition = torch.ones((), dtype=torch.bool, device=device)
    new = torch.ones(3, dtype=dtype, device=device)
    assert select(condition, new, None).dtype == dtype
    assert select(condition, new, torch.zeros_like(new)).dtype == dtype
