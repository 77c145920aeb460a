"""The backward of some examples, where a network's graph is a chain of Linear layers and activations.

`torch.autograd.grad` sends a vector back for a whole batch, of which factors and model often need a part (collect.py).
Along a chain each example has gradients of its own, so they are computed for that part alone, from what autograd saved
for the user's backward: there is no second forward. Any other graph is left to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .linalg import product

aten = torch.ops.aten

# By the name of an activation's node: what it saved, and the gradient at its input from that at its output.
_ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor, Tensor, Any], Tensor]]] = {
    "TanhBackward0": ("result", lambda g, y, node: aten.tanh_backward(g, y)),
    "SigmoidBackward0": ("result", lambda g, y, node: aten.sigmoid_backward(g, y)),
    "ReluBackward0": ("result", lambda g, y, node: aten.threshold_backward(g, y, 0)),
    "LeakyReluBackward0": (
        "self",
        lambda g, x, node: aten.leaky_relu_backward(g, x, node._saved_negative_slope, False),
    ),
    "SiluBackward0": ("self", lambda g, x, node: aten.silu_backward(g, x)),
    "GeluBackward0": ("self", lambda g, x, node: aten.gelu_backward(g, x, approximate=node._saved_approximate)),
}
_LINEAR = {"AddmmBackward0": 1, "MmBackward0": 0}  # which argument is the input; the next is the weight, transposed


def find(start: GradientEdge, ends: Sequence[GradientEdge], dtype: torch.dtype) -> list[Node] | None:
    """The nodes from a network's output back to the last of its layers' outputs `ends`, which are nodes among them.

    None where that is no chain: another kind of node, a weight that is computed from something, a saved tensor that is
    recomputed or was moved away, another dtype on the way. Hooks that the user has put on tensors are not asked.
    """
    waiting = {end.node for end in ends}
    if len(waiting) < len(ends) or any(edge.output_nr for edge in (start, *ends)):
        return None
    nodes: list[Node] = []
    node: Any = start.node
    while True:
        nodes.append(node)
        waiting.discard(node)
        if not waiting:
            return nodes
        if node.name() in _LINEAR:
            place, kept, scale = _LINEAR[node.name()], "mat2", getattr(node, "_saved_alpha", 1)
            others = [before for i, (before, _) in enumerate(node.next_functions) if i != place]
        elif node.name() in _ACTIVATIONS:
            place, kept, scale, others = 0, _ACTIVATIONS[node.name()][0], 1, []
        else:
            return None
        if scale != 1 or not all(map(_is_parameter, others)) or not _plain(node, kept, dtype):
            return None
        node, number = node.next_functions[place]
        if node is None or number:
            return None


def pass_back(nodes: Sequence[Node], vector: Tensor, places: Tensor, arrive: Callable[[Node, Tensor], None]) -> None:
    """Send the rows `places` of a vector at a network's output back along `nodes`, as `find` gave them.

    `arrive` is called with each node and the gradient at its output, [len(places), ...].
    """
    gradient = vector[places]
    for node in nodes:
        arrive(node, gradient)
        if node is nodes[-1]:
            return
        if node.name() in _LINEAR:
            gradient = product(gradient[None], node._saved_mat2.mT[None])[0]  # type: ignore[attr-defined]
        else:
            kept, backward = _ACTIVATIONS[node.name()]
            gradient = backward(gradient, getattr(node, f"_saved_{kept}")[places], node)


def _plain(node: Any, kept: str, dtype: torch.dtype) -> bool:
    """Whether a node holds a tensor as it is; hooks that pack it may allow a single look only (checkpointing)."""
    saved = getattr(node, f"_raw_saved_{kept}")
    if getattr(saved, "unpack_hook", saved) is not None:
        return False
    tensor = getattr(node, f"_saved_{kept}")
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype == dtype


def _is_parameter(node: Node | None) -> bool:
    """Whether nothing but a leaf, or its transpose, lies behind an argument."""
    if node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    return node is None or node.name() == "torch::autograd::AccumulateGrad"
