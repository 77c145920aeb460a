"""Sums over the processes of `nn.parallel.DistributedDataParallel`, so that every rank has the same curvature."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def process_group_of(model: nn.Module) -> Any:
    """The process group of a `DistributedDataParallel` wrapper, compiled or not; None without one."""
    for module in (model, model._modules.get("_orig_mod")):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
    return None


def sum_over_ranks(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Every tensor summed over the ranks of a group, by one collective call for each dtype; as given without a group.

    All ranks have to give tensors of the same shapes and dtypes in the same order.
    """
    summed = list(tensors)
    if group is None:
        return summed
    by_kind: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        by_kind[tensor.dtype, tensor.device].append(index)
    for indices in by_kind.values():
        flat = torch.cat([tensors[i].reshape(-1) for i in indices])
        torch.distributed.all_reduce(flat, group=group)
        for i, part in zip(indices, flat.split([tensors[i].numel() for i in indices]), strict=True):
            summed[i] = part.reshape(tensors[i].shape)
    return summed
