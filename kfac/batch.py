"""A forward pass and a batch, as the hooks of capture.py note them, and how curvature vectors run back through it.

Vectors are sent by a `torch.autograd.grad` inside the user's own backward, which keeps the graph for it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .layers import Block
from .products import Unwritten

REENTRANT = (
    "activation checkpointing: use_reentrant=True keeps curvature vectors from the layers inside; "
    "allowed: torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
)

# While a curvature vector is on its way, for all optimizers alike: the buffers of modules whose forward was computed
# again for it (activation checkpointing), each with its value before. None otherwise.
_held: dict[nn.Module, list[tuple[str, Tensor, Tensor]]] | None = None


@dataclass(eq=False)
class Call:
    """One call of a layer: its block, its input, its output's shape, and where gradients of that arrive (see `_edge`).

    `context` is the block's. `foreign` says that no operation of the graph made the input, such as a batch of data:
    once the backward is over its owner may write into it.
    """

    block: Block
    module: nn.Module
    input: Tensor
    edge: GradientEdge
    shape: torch.Size
    context: Any = None
    foreign: bool = False

    @property
    def size(self) -> int:
        """How many numbers the output has."""
        return self.shape.numel()

    @property
    def rows(self) -> Tensor | Unwritten:
        """The input as rows a, as `Block.inputs` gives them; made anew, since most are used once and may be large."""
        return self.block.inputs(self.input, self.module, self.context)


@dataclass(eq=False)
class Forward:
    """The calls of one forward pass, and where the network's outputs lie in the graph.

    `outputs` are the edges of all tensors that the root module returned, by their position in it; `tensors` are weak.
    `hidden` are layers that ran without a graph only; `seen` are the outputs on which a criterion was called first, and
    `awaited` counts the criterion's calls whose backward has not come.
    """

    number: int
    calls: list[Call] = field(default_factory=list)
    outputs: dict[int, GradientEdge] = field(default_factory=dict)
    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)
    hidden: set[Block] = field(default_factory=set)
    seen: frozenset | None = None
    awaited: int = 0

    def alive(self) -> bool:
        """Whether anybody can still come back with an output."""
        return any(tensor() is not None for tensor in self.tensors)

    def taken(self) -> None:
        """One of the criterion's calls is done with; the layers' inputs are free after the last."""
        self.awaited -= 1
        if self.awaited <= 0:
            self.calls = []


@dataclass
class Batch:
    """A call of the criterion whose backward arrived, with the layers' calls behind it: what `receive` gets.

    Attributes:
        calls: of the layers, in the order in which they were made.
        output: what the network computed: a Tensor, or a tuple where the criterion takes several (`arguments`); an
            entry may be a number or None as it was given.
        edges: of these outputs in the graph, None for one that needs no gradient.
        target: of the criterion; None where only the network's output is known.
        loss: the criterion's value, None where it was not called.
        weight: the gradient that the backward put on that value (1/k in an accumulation of k micro-batches, times a
            loss scale); None where the criterion was not called.
        gradient: the gradient at the network's output where only that is known.
        forward: a number of the forward pass. `main` says whether the criterion saw those outputs of it on which it was
            called first: weights of such calls are parts of one loss (mixup) and add up to that of the forward pass;
            other calls (auxiliary heads) add curvature but no share.
        fresh: whether a new backward began while no layer had a gradient: what was received before belongs to gradients
            that have been dropped.
    """

    calls: list[Call]
    output: Any
    edges: tuple[GradientEdge | None, ...]
    target: Tensor | None = None
    loss: Tensor | None = None
    weight: Tensor | None = None
    gradient: Tensor | None = None
    forward: int = 0
    main: bool = True
    fresh: bool = False
    # Nodes of DistributedDataParallel between criterion and network, each with the edge of the network's output: a
    # vector must not run through them, which the wrapper would take for its own backward.
    crossings: list[tuple[GradientEdge, GradientEdge]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Of dimension 0 of the output."""
        first = self.output[0] if isinstance(self.output, tuple) else self.output
        return first.shape[0] if first.dim() else 1

    @functools.cached_property
    def foreign_inputs(self) -> set[int]:
        """Where the inputs lie in memory that their owner may write into."""
        return {call.input.untyped_storage().data_ptr() for call in self.calls if call.foreign}

    def output_in(self, dtype: torch.dtype) -> Any:
        """`output` with its tensors in a dtype: under autocast they may be in half precision."""
        if isinstance(self.output, tuple):
            return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in self.output)
        return self.output.to(dtype)

    def send_back(self, vector: Any) -> list[Tensor | None]:
        """The gradients at the outputs of `calls` of a vector at the network's output (shaped as `output`).

        Raises:
            RuntimeError: where reentrant activation checkpointing lies in between.
        """
        with _sending():
            arrived = _gradients(self._inside(vector), [call.edge for call in self.calls])
        pairs = zip(self.calls, arrived, strict=True)
        return [None if gradient is None else gradient.reshape(call.shape) for call, gradient in pairs]

    def pass_back(self, vector: Any, arrive: Callable[[Call, Tensor], None], ends: set[Block]) -> None:
        """`send_back` that keeps nothing: `arrive` is called with each gradient on its way, which is free after it.

        A vector runs only as far back as its gradient is asked for: at the outputs of `ends`, the layers that have no
        other before them. The first of a network is one; where the vector did not come by a layer, it is sent again for
        that one, which is then among `ends` too.
        """
        waiting = list(self.calls)
        asked = [call for call in waiting if call.block in ends] or waiting[:1]
        passed: set[Block] = set()

        def take(call: Call, gradient: Tensor | None) -> None:
            if gradient is not None:
                passed.add(call.block)
                arrive(call, gradient.reshape(call.shape))

        def watched(call: Call) -> torch.utils.hooks.RemovableHandle:
            return call.edge.node.register_prehook(lambda gradients: take(call, gradients[call.edge.output_nr]))

        with _sending():
            sent = self._inside(vector)
            while waiting:
                rest = [call for call in waiting if call not in asked]
                handles = [watched(call) for call in rest]
                try:
                    arrived = _gradients(sent, [call.edge for call in asked])
                finally:
                    remove(handles)
                for call, gradient in zip(asked, arrived, strict=True):
                    take(call, gradient)
                ends.update(call.block for call in asked if call.block in passed)
                waiting = [call for call in rest if call.block not in passed]
                asked = waiting[:1]

    def _inside(self, vector: Any) -> list[tuple[GradientEdge, Tensor]]:
        """Where a vector starts: at the network's output, or behind the nodes of a wrapper that it must not meet."""
        vectors = vector if isinstance(vector, tuple) else (vector,)
        sent = [(e, v) for e, v in zip(self.edges, vectors, strict=True) if e is not None and v is not None]
        if not self.crossings:
            return sent
        arrived = _gradients(sent, [outer for outer, _ in self.crossings])
        pairs = zip(self.crossings, arrived, strict=True)
        return [(inner, g) for (_, inner), g in pairs if g is not None]


def _gradients(sent: Sequence[tuple[GradientEdge, Tensor]], arriving: Sequence[GradientEdge]) -> list[Tensor | None]:
    if not sent:
        return [None] * len(arriving)
    edges, vectors = zip(*sent, strict=True)
    try:
        return list(torch.autograd.grad(edges, arriving, vectors, retain_graph=True, allow_unused=True))
    except RuntimeError as error:
        raise RuntimeError(REENTRANT) if "use_reentrant=True" in str(error) else error from error


def vector_on_its_way() -> bool:
    """Whether the backward that runs is a curvature vector's, of whichever optimizer, and not the user's own."""
    return _held is not None


def hold_buffers(module: nn.Module) -> None:
    """Keep buffers (running statistics) that a forward on behalf of a curvature vector is about to change."""
    if _held is not None and module not in _held:
        buffers = [(name, b) for name, b in module._buffers.items() if b is not None]
        _held[module] = [(name, b, b.detach().clone()) for name, b in buffers]


@contextmanager
def _sending() -> Iterator[None]:
    """Mark that a curvature vector is on its way; buffers that it changed are as before afterwards."""
    global _held
    _held = {}
    try:
        yield
    finally:
        held, _held = _held, None
        for module, buffers in held.items():
            for name, buffer, value in buffers:
                module._buffers[name] = buffer
                # The graph has saved some of them, and its check for changes would not know that this one undoes one.
                with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(buffer):
                    buffer.copy_(value)


def remove(handles: list) -> None:
    """Take hooks away, and the handles out of the list."""
    while handles:
        handles.pop().remove()
