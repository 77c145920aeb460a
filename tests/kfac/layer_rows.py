"""Rows of a model's blocks for random vectors at its output, and what they have to be: each example's gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from kfac import rows
from kfac.find import find_blocks
from kfac.layers import Block


def send(model: nn.Module, inputs: Any, count: int = 2) -> tuple[rows.Rows, list[Tensor], Tensor, list[Block]]:
    """Rows of `count` random vectors at the output, the vectors, the output, and the blocks."""
    blocks = find_blocks(model)
    calls: list[Any] = []
    handles = []
    for block in blocks:
        for module in block.modules:

            def hook(module: nn.Module, args: tuple, output: Tensor, block: Block = block) -> None:
                seen = args[0].detach(), block.context(module, output)
                calls.append(SimpleNamespace(block=block, module=module, seen=seen, output=output))

            handles.append(module.register_forward_hook(hook))
    output = model(inputs)
    for handle in handles:
        handle.remove()
    torch.manual_seed(3)
    vectors = [torch.randn_like(output) for _ in range(count)]
    for call in calls:
        call.rows = call.block.inputs(call.seen[0], call.module, call.seen[1])
    arriving = [call.output for call in calls]
    batch = SimpleNamespace(
        calls=calls,
        size=output.shape[0] if output.dim() else 1,
        send_back=lambda v: torch.autograd.grad(output, arriving, v, retain_graph=True, allow_unused=True),
    )
    with torch.no_grad():
        return rows.send_back(batch, vectors, output.new_ones(())), vectors, output, blocks


def dense(block: Block, a: Tensor) -> Tensor:
    """Rows a without indices."""
    a = rows.written(a)
    if a.is_floating_point():
        return a
    return (a[..., None] == torch.arange(block.shape[2])).double()


def check_rows_are_example_gradients(model: nn.Module, inputs: Any, examples: int) -> None:
    got, vectors, output, blocks = send(model, inputs)
    assert blocks and got.layers.keys() == set(blocks)
    parts = output.reshape(examples, -1)
    for block in blocks:
        a, g = got.layers[block]
        gradients = torch.einsum("kmnti,kntj->mnkij", g, dense(block, a))
        gradients = gradients.transpose(0, 1) if got.vectors == 1 else gradients
        gradients = gradients.reshape(examples, len(vectors), *block.shape)
        for m, vector in enumerate(vectors):
            for n in range(examples):
                inner = (parts[n] * vector.reshape(examples, -1)[n]).sum()
                own = torch.autograd.grad(inner, block.parameters, retain_graph=True, materialize_grads=True)
                torch.testing.assert_close(gradients[n, m], block.matrix(own), rtol=1e-10, atol=1e-10)
