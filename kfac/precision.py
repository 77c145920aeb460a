"""Products in bfloat16 with sums in float32, where a CPU is faster at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def rounded_products(wanted: bool) -> Iterator[None]:
    """Float32 products and convolutions on a CPU may round what they multiply to bfloat16 here, if `wanted`.

    Whether they do is oneDNN's choice: on an AMD EPYC with AVX512_BF16 they do not, and are faster than BLAS
    nevertheless. A sum of outer products stays positive semi-definite: it is that of the rounded rows.
    """
    if not wanted:
        yield
        return
    kinds: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "bf16"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
