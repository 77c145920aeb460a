"""What the layers saw: their inputs, and the gradients of curvature vectors at their outputs.

Hooks on the layers note inputs and outputs of a forward pass; the hook of the criterion notes the network's output and
target and puts a tensor hook on the loss. When the user's own backward starts there, curvature vectors are sent back
from the output to the layers by a nested `torch.autograd.grad`. Hence a forward without a backward leaves no trace,
there is never a second forward, and `.grad`, buffers and random streams stay as they are.

If the criterion object is not the one that is called (a functional loss), the output of the root module serves instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .layers import LinearBlock

_sending = False  # a curvature vector is on its way: it passes the hooks on the network's output, of every optimizer


@dataclass
class Call:
    """One call of a layer: its block, its input, and where gradients of its output arrive."""

    block: LinearBlock
    input: Tensor
    edge: GradientEdge

    @cached_property
    def rows(self) -> Tensor:
        """The input as rows a: [K, N, T, d_in]."""
        return self.block.inputs(self.input)


@dataclass
class Forward:
    """The calls of one forward pass, and the network's output, which is known only by a weak reference."""

    calls: list[Call] = field(default_factory=list)
    output: weakref.ref[Tensor] | None = None
    edge: GradientEdge | None = None
    taken: bool = False


@dataclass
class Batch:
    """One forward pass whose backward arrived: what `Capture.receive` gets.

    `weight` is the gradient that the backward put on the criterion's value (1/k in an accumulation of k micro-batches,
    times a loss scale), None where the criterion was not called; `loss` is that value; `gradient` is the gradient at
    the network's output where only that is known.
    """

    calls: list[Call]
    output: Tensor
    edge: GradientEdge
    target: Tensor | None = None
    loss: Tensor | None = None
    weight: Tensor | None = None
    gradient: Tensor | None = None

    def send_back(self, vector: Tensor) -> list[Tensor | None]:
        """The gradients at the outputs of `calls` of a vector at the network's output."""
        global _sending
        edges = [call.edge for call in self.calls]
        _sending = True
        try:
            return list(torch.autograd.grad(self.edge, edges, vector, retain_graph=True, allow_unused=True))
        finally:
            _sending = False


class Hook:
    """A hook that does not keep its owner alive, and is inert in copies and pickles of the module it sits on."""

    __name__ = "kfac_hook"

    def __init__(self, owner: Capture | None, method: str, block: LinearBlock | None = None):
        self.owner = weakref.ref(owner) if owner is not None else None
        self.method = method
        self.block = block

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling() or self.owner is None:
            return
        owner = self.owner()
        if owner is None or not owner.active or _inside_backward():
            return  # activation checkpointing runs forwards again inside the backward: not calls of their own
        getattr(owner, self.method)(*args, *(() if self.block is None else (self.block,)))

    def __deepcopy__(self, memo: dict) -> Hook:
        return Hook(None, self.method)

    def __reduce__(self):
        return Hook, (None, self.method)


class Capture:
    """Watches a model and its criterion while `active`, and hands every completed `Batch` to `receive`.

    Args:
        model: the network; a `DistributedDataParallel` wrapper is looked through.
        criterion: the loss module that the training loop calls.
        blocks: the layers to watch.
        receive: called with a `Batch` inside the user's backward, under `torch.no_grad()`; returns whether it was used.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: object,
        blocks: Iterable[LinearBlock],
        receive: Callable[[Batch], bool],
    ):
        self.active = False
        self.criterion_called = False  # once it is, a backward that does not come from it is somebody else's
        self._receive = receive
        self._forwards: list[Forward] = []
        root = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        handles = [
            block.module.register_forward_hook(Hook(self, "_note_call", block), with_kwargs=True) for block in blocks
        ]
        handles.append(root.register_forward_pre_hook(Hook(self, "_start")))
        handles.append(root.register_forward_hook(Hook(self, "_note_output")))
        if isinstance(criterion, nn.Module):
            handles.append(criterion.register_forward_hook(Hook(self, "_note_criterion"), with_kwargs=True))
        weakref.finalize(self, _remove, handles)

    def clear(self) -> None:
        """Forget forward passes whose backward has not come."""
        self._forwards = []

    def _start(self, module: nn.Module, args: tuple) -> None:
        self._forwards = [f for f in self._forwards if f.output is not None and f.output() is not None]
        self._forwards.append(Forward())

    def _note_call(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor, block: LinearBlock) -> None:
        if not torch.is_grad_enabled() or not output.requires_grad:
            return
        if not self._forwards:  # a layer called on its own, not through the root module
            self._forwards.append(Forward())
        x = args[0] if args else kwargs["input"]
        self._forwards[-1].calls.append(Call(block, x.detach(), get_gradient_edge(output)))

    def _note_criterion(self, module: nn.Module, args: tuple, kwargs: dict, loss: Tensor) -> None:
        output = args[0] if args else kwargs["input"]
        target = args[1] if len(args) > 1 else kwargs.get("target")
        if not self._forwards or not torch.is_grad_enabled() or not output.requires_grad:
            return
        own = [f for f in self._forwards if f.output is not None and f.output() is output]
        forward = own[0] if own else self._forwards[-1]
        if forward.taken or not forward.calls:
            return
        batch = Batch(forward.calls, output.detach(), get_gradient_edge(output), target, loss.detach())
        weak = weakref.ref(self)

        def arrive(weight: Tensor) -> None:
            batch.weight = weight.detach()
            if (capture := weak()) is not None and capture._deliver(forward, batch):
                capture.criterion_called = True

        loss.register_hook(arrive)

    def _note_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        output = _first_tensor(output)
        if not self._forwards or output is None or not output.requires_grad:
            return
        self._forwards[-1].output = weakref.ref(output)
        self._forwards[-1].edge = get_gradient_edge(output)
        value = output.detach()
        # Only weak references: the hook lives on a node that the forward's edges lead back to.
        weak, weak_forward = weakref.ref(self), weakref.ref(self._forwards[-1])

        def arrive(gradient: Tensor) -> None:
            capture, forward = weak(), weak_forward()
            if capture is None or capture.criterion_called or forward is None or forward.edge is None:
                return
            if _sending or torch._C._functorch.is_legacy_batchedtensor(gradient):
                return  # a curvature vector, or a Jacobian by many backwards at once: not a training step
            capture._deliver(forward, Batch(forward.calls, value, forward.edge, gradient=gradient.detach()))

        output.register_hook(arrive)

    def _deliver(self, forward: Forward, batch: Batch) -> bool:
        """Hand over a forward pass once; False where the batch is not one of it (nothing came back to its layers)."""
        if forward.taken or not self.active:
            return False
        with torch.no_grad():
            forward.taken = self._receive(batch)
        if forward.taken:
            forward.calls, batch.calls = [], []
        return forward.taken


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((found for value in values if (found := _first_tensor(value)) is not None), None)


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()
