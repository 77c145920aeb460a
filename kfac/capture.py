"""What the layers saw: their inputs, and the gradients of curvature vectors at their outputs.

Hooks on the layers note inputs and outputs of a forward pass; the hook of the criterion notes the network's output and
target and puts a tensor hook on the loss. When the user's own backward starts there, curvature vectors are sent back
from the output to the layers by a nested `torch.autograd.grad`. Hence a forward without a backward leaves no trace,
there is never a second forward, and `.grad`, buffers and random streams stay as they are.

If the criterion object is not the one that is called (a functional loss), the output of the root module serves instead.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from . import compiling, distributed
from .batch import REENTRANT, Batch, Call, Forward, hold_buffers, remove, vector_on_its_way
from .layers import Block

Arguments = tuple[tuple[int, str], ...]  # positions and names of the criterion's arguments that the network computes


class Hook:
    """A hook that does not keep its owner alive, and is inert in copies and pickles of the module it sits on."""

    __name__ = "kfac_hook"

    def __init__(self, owner: Capture | None, method: str, block: Block | None = None):
        self.owner = weakref.ref(owner) if owner is not None else None
        self.method = method
        self.block = block

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling() or self.owner is None:  # first, so that a compiler folds all of it to nothing
            return
        owner = self.owner()
        if owner is None or not owner.active or _transformed():
            return
        getattr(owner, self.method)(*args, *(() if self.block is None else (self.block,)))

    def __deepcopy__(self, memo: dict) -> Hook:
        return Hook(None, self.method)

    def __reduce__(self):
        return Hook, (None, self.method)


class Capture:
    """Watches a model and its criterion while `active`, and hands every completed `Batch` to `receive`.

    Args:
        model: the network; wrappers (`torch.compile`, `DistributedDataParallel`) are looked through.
        criterion: the loss module that the training loop calls.
        blocks: the layers to watch.
        receive: called with a `Batch` inside the user's backward, under `torch.no_grad()` and without autocast; returns
            whether it was used.
        arguments: position and name of each of the criterion's arguments that the network computes. The first of the
            others is the target.

    Attributes:
        process_group: of the `DistributedDataParallel` around the model, known at the latest in its first forward.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: object,
        blocks: Iterable[Block],
        receive: Callable[[Batch], bool],
        arguments: Arguments = ((0, "input"),),
    ):
        self.criterion_called = False  # once it is, a backward that does not come from it is somebody else's
        self.process_group = distributed.process_group_of(model)
        self._active = False
        self._receive = receive
        self._arguments = arguments
        self._blocks = list(blocks)
        self._forwards: list[Forward] = []
        self._running: Forward | None = None  # between the root module's hooks
        self._numbers = itertools.count()
        self._task = -1
        self._root = compiling.unwrapped(model)
        self._criterion = compiling.unwrapped(criterion) if isinstance(criterion, nn.Module) else None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        weakref.finalize(self, remove, self._handles)

    @property
    def active(self) -> bool:
        """Whether hooks record; compiled code runs eagerly meanwhile."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        if active and not self._active:
            self._register()
        elif not active:
            remove(self._handles)
        self._active = active
        (compiling.arm if active else compiling.disarm)(self)

    def _register(self) -> None:
        """Hooks are there only while they are needed: at all other steps the model runs and compiles as without us."""
        for block in self._blocks:
            for module in block.modules:
                # Before hooks of others, which may replace the output.
                hook = Hook(self, "_note_call", block)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        for module in self._root.modules():
            if module._buffers:
                self._handles.append(module.register_forward_pre_hook(Hook(self, "_hold_buffers")))
        self._handles.append(self._root.register_forward_pre_hook(Hook(self, "_start")))
        self._handles.append(self._root.register_forward_hook(Hook(self, "_note_output")))
        if self._criterion is not None:
            hook = Hook(self, "_note_criterion")
            self._handles.append(self._criterion.register_forward_hook(hook, with_kwargs=True))

    def clear(self) -> None:
        """Forget forward passes whose backward has not come."""
        self._forwards, self._running, self._task = [], None, -1

    # Hooks of the forward pass.

    def _start(self, module: nn.Module, args: tuple) -> None:
        if _inside_backward():
            # Checkpointing without reentrance keeps the first forward's graph, so that is among the forwards.
            if not vector_on_its_way() and torch.is_grad_enabled() and not self._forwards:
                raise RuntimeError(REENTRANT)
            return
        self._running = None
        if not torch.is_grad_enabled():
            return
        self._forwards = [forward for forward in self._forwards if forward.alive()]
        self._running = Forward(next(self._numbers))
        self._forwards.append(self._running)
        wrapper = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is not None and compiling.unwrapped(wrapper) is module:
            self.process_group = wrapper.process_group

    def _note_call(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor, block: Block) -> None:
        if _inside_backward():  # activation checkpointing runs forwards again: not calls of their own
            if not vector_on_its_way() and torch.is_grad_enabled() and any(block in f.hidden for f in self._forwards):
                raise RuntimeError(REENTRANT)
            return
        if not output.numel():
            return  # an expert that got no token: nothing that could have rows
        if not torch.is_grad_enabled():
            if self._running is not None and all(call.block is not block for call in self._running.calls):
                self._running.hidden.add(block)
            return
        if not output.requires_grad:
            return  # frozen, and no layer before it is trained
        if not self._forwards:  # a layer called on its own, not through the root module
            self._forwards.append(Forward(next(self._numbers)))
        x = args[0] if args else kwargs["input" if "input" in kwargs else "x"]  # x: nn.RMSNorm
        self._forwards[-1].hidden.discard(block)
        context, leaf = block.context(module, output), (x if x._base is None else x._base).is_leaf
        self._forwards[-1].calls.append(Call(block, module, x.detach(), _edge(output), output.shape, context, leaf))

    def _hold_buffers(self, module: nn.Module, args: tuple) -> None:
        if _inside_backward():
            hold_buffers(module)

    def _note_output(self, module: nn.Module, args: tuple, output: Any) -> None:
        forward, self._running = self._running, None
        if forward is None or forward.awaited or _inside_backward():
            return  # where the model calls the criterion itself, its output is no output of the network
        tensors = {i: t for i, t in enumerate(_leaves(output)) if isinstance(t, Tensor) and t.requires_grad}
        forward.outputs = {i: get_gradient_edge(t) for i, t in tensors.items()}
        forward.tensors = [weakref.ref(t) for t in tensors.values()]
        if not tensors or len(self._arguments) > 1:
            return
        # The first that can be a batch of outputs: where a model returns its loss too, that has no dimension.
        index = next((i for i, t in tensors.items() if t.dim()), next(iter(tensors)))
        value = tensors[index].detach()
        # Only weak references: the hook lives on a node that the forward's edges lead back to.
        weak, weak_forward = weakref.ref(self), weakref.ref(forward)

        def arrive(gradient: Tensor) -> None:
            capture, forward = weak(), weak_forward()
            if capture is None or capture.criterion_called or forward is None or not forward.calls:
                return
            if vector_on_its_way() or torch._C._functorch.is_legacy_batchedtensor(gradient):
                return  # a curvature vector, or a Jacobian by many backwards at once: not a training step
            edges = (forward.outputs[index],)
            batch = Batch(forward.calls, value, edges, gradient=gradient.detach(), forward=forward.number)
            # Where the graph is kept (a gradient penalty), the criterion may be called later: the layers' calls stay.
            kept = torch._C._autograd._get_current_graph_task_keep_graph()
            if capture._deliver(batch, [] if kept else [forward]):
                handle.remove()

        handle = tensors[index].register_hook(arrive)

    def _note_criterion(self, module: nn.Module, args: tuple, kwargs: dict, loss: Tensor) -> None:
        if not self._forwards or not torch.is_grad_enabled() or _inside_backward():
            return
        given = dict(enumerate(args)) | kwargs
        output = tuple(given.get(position, given.get(name)) for position, name in self._arguments)
        edges = tuple(get_gradient_edge(x) if isinstance(x, Tensor) and x.requires_grad else None for x in output)
        if not isinstance(loss, Tensor) or not loss.requires_grad or not any(edges):
            return
        position = next(i for i in itertools.count() if all(i != used for used, _ in self._arguments))
        target = given.get(position, given.get("target"))
        found, crossings = _walk([edge for edge in edges if edge], self._forwards)
        forwards = [f for f in self._forwards if f in found.values()] or self._forwards[-1:]
        calls = [call for forward in forwards for call in forward.calls]
        if not calls:
            return
        values = tuple(x.detach() if isinstance(x, Tensor) else x for x in output)
        first = forwards[0]
        first.seen = frozenset(found) if first.seen is None else first.seen
        batch = Batch(
            calls,
            values if len(values) > 1 else values[0],
            edges,
            target,
            loss.detach().clone(),  # the loop may scale it in place
            forward=first.number,
            main=first.seen == frozenset(found),
            crossings=crossings,
        )
        for forward in forwards:
            forward.awaited += 1
        weak = weakref.ref(self)

        def arrive(weight: Tensor) -> None:
            capture = weak()
            if capture is None or not batch.calls or torch._C._functorch.is_legacy_batchedtensor(weight):
                return
            batch.weight = weight.detach()
            if capture._deliver(batch, forwards):
                capture.criterion_called = True

        loss.register_hook(arrive)

    def _deliver(self, batch: Batch, forwards: list[Forward]) -> bool:
        """Hand over a batch once; False where it is not one of the model (nothing came back to its layers)."""
        if not self.active:
            return False
        task = torch._C._current_graph_task_id()
        parameters = itertools.chain.from_iterable(block.parameters for block in self._blocks)
        batch.fresh = task != self._task and all(parameter.grad is None for parameter in parameters)
        device = batch.calls[0].input.device
        # Where the backward runs in a thread of its own it has modes of its own, so both are set here.
        with torch.no_grad(), without_autocast(device):
            taken = self._receive(batch)
        if taken:
            self._task = task
            batch.calls = []
            for forward in forwards:
                forward.taken()
        return taken


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which operations on `device` have the dtypes of their inputs, whatever region the caller is in."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _transformed() -> bool:
    """Whether this runs for a function transform (vmap, functional grad) or a trace: tensors are not a batch's."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.jit.is_tracing()


def _edge(output: Tensor) -> GradientEdge:
    """Where gradients of a layer's output arrive, whatever is done to it in place afterwards.

    An operation in place gives a view a new node, and its base's old one stays in the graph. So where the output views
    all of a base (`nn.Linear` on tokens, `nn.InstanceNorm2d`) they arrive there, in the base's shape.
    """
    base = output._base
    if base is None or not base.requires_grad or base.numel() != output.numel():
        return get_gradient_edge(output)
    return get_gradient_edge(base if base.is_contiguous() and output.is_contiguous() else output)


def _leaves(output: Any) -> Iterator[Any]:
    """What a network's output consists of: the leaves of its pytree, and of containers that pytree does not know."""
    for leaf in tree_leaves(output):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            leaf = vars(leaf)
        if isinstance(leaf, (dict, list, tuple)):
            yield from _leaves(list(leaf.values()) if isinstance(leaf, dict) else list(leaf))
        else:
            yield leaf


def _walk(
    starts: Iterable[GradientEdge], forwards: Sequence[Forward]
) -> tuple[dict[tuple, Forward], list[tuple[GradientEdge, GradientEdge]]]:
    """The networks' outputs that edges of the graph lead back to, and the nodes of DistributedDataParallel before them.

    With a single output this is a step or two; what lies behind an output is not looked at.
    """
    outputs = {(e.node, e.output_nr): forward for forward in forwards for e in forward.outputs.values()}
    found: dict[tuple, Forward] = {}
    crossings = []
    waiting = [(edge.node, edge.output_nr) for edge in starts] if outputs else []
    entered = set(waiting)
    while waiting:
        node, number = waiting.pop()
        if (node, number) in outputs:
            found[node, number] = outputs[node, number]
            continue
        behind = [(before, index) for before, index in node.next_functions if before is not None]
        if node.name() == "_DDPSinkBackward":
            # Its outputs are the leaves of the network's output, number by number.
            owner = next((outputs[edge] for edge in behind if edge in outputs), None)
            inner = owner.outputs.get(number) if owner is not None else None
            if inner is not None:
                crossings.append((GradientEdge(node, number), inner))
                behind = [(inner.node, inner.output_nr)]
        waiting += [edge for edge in behind if edge not in entered]
        entered.update(behind)
    return found, crossings
