"""Curvature operators: products with the exact Gauss–Newton or Fisher matrix of a model on one batch.

One idea: the forward graph is built once, on an isolated copy of the model, and every product with J (double
backward), with the Hessian of the loss in the network output, and with Jᵀ (backward) walks that same graph.
Nothing of size parameters² is formed (``dense`` apart). Vectors are lists of tensors shaped as the
parameters; inside, one flat row.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Vector = Sequence[Tensor]

# Vectors that share one pass over the graph where several are known: halves the time of a small dense net or
# better, costs a convolutional one nothing. Memory grows with it.
BATCH = 8


class CurvatureOperator:
    """Symmetric Jᵀ M J of a model on one batch; a subclass supplies M, the curvature in the output."""

    def __init__(self, model: nn.Module, inputs: Any, parameters: Vector | None):
        originals = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
        if not originals:
            raise ValueError("parameters: none given and none of the model requires a gradient")
        with _grad_mode():
            twin, self.parameters = _isolated(model, originals)
        self._shapes = [p.shape for p in originals]
        self._sizes = [p.numel() for p in originals]
        self.size = sum(self._sizes)
        self.device = originals[0].device
        self.dtype = originals[0].dtype
        for p in originals[1:]:
            self.dtype = torch.promote_types(self.dtype, p.dtype)

        with _reproducible_forward(twin, self.device):
            leaves, self._structure = tree_flatten(twin(_ordinary(inputs)))
        self._leaves = leaves
        self._differentiable = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
        self._outputs: list[Tensor] = [leaves[i] for i in self._differentiable]
        with _grad_mode():
            # The gradient is linear in the cotangent; differentiating it there gives products with J.
            self._cotangents = [torch.zeros_like(t, requires_grad=True) for t in self._outputs]
            gradients: Sequence[Tensor | None] = [None] * len(self.parameters)
            if self._outputs:
                gradients = torch.autograd.grad(
                    self._outputs, self.parameters, self._cotangents, create_graph=True, allow_unused=True
                )
        self._used = [i for i, g in enumerate(gradients) if g is not None]
        self._gradients = [g for g in gradients if g is not None]

    def matvec(self, v: Vector) -> list[Tensor]:
        """The product with `v`; both are lists of tensors shaped as the parameters."""
        return self.unflatten(self.apply(self.flatten(v)))

    def apply(self, flat: Tensor) -> Tensor:
        """The product with a flat vector [P], or with each row of [K, P] (in one pass: keep K small)."""
        batched = flat.dim() == 2
        if not self._used:
            return torch.zeros_like(flat)
        parts = self.unflatten(flat)
        with _grad_mode():
            tangents = _pull(self._gradients, self._cotangents, [parts[i] for i in self._used], batched)
            tangents = self._metric(tangents, batched)
            used = [self.parameters[i] for i in self._used]
            rows = _pull(self._outputs, used, tangents, batched)
        for i, row in zip(self._used, rows, strict=True):
            parts[i] = row
        for i in set(range(len(parts))).difference(self._used):
            parts[i] = torch.zeros_like(parts[i])
        return self.flatten(parts, batched=batched)

    def dense(self) -> Tensor:
        """The matrix [P, P], in the order of `flatten`. P products: for small nets."""
        identity = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return torch.cat([self.apply(rows) for rows in identity.split(BATCH)])

    def dot(self, u: Vector, v: Vector) -> Tensor:
        """uᵀ (operator) v, a 0-dim float64 tensor."""
        return (self.flatten(u).double() * self.apply(self.flatten(v)).double()).sum()

    def flatten(self, v: Vector, *, batched: bool = False) -> Tensor:
        """One flat vector [P] of tensors shaped as the parameters ([K, P] of [K, *shape] if `batched`)."""
        if len(v) != len(self._shapes):
            raise ValueError(f"vector: {len(v)} tensors given, one for each of {len(self._shapes)} parameters expected")
        lead = v[0].shape[:1] if batched else torch.Size()
        for i, (t, shape) in enumerate(zip(v, self._shapes, strict=True)):
            if t.shape != lead + shape:
                raise ValueError(f"vector: tensor {i} has shape {tuple(t.shape)}, its parameter {tuple(shape)}")
        return torch.cat([t.detach().reshape(*lead, -1).to(self.device, self.dtype) for t in v], -1)

    def unflatten(self, flat: Tensor) -> list[Tensor]:
        """Inverse of `flatten`, for [P] and [K, P] alike."""
        if flat.shape[-1] != self.size:
            raise ValueError(f"vector: {flat.shape[-1]} numbers given, {self.size} expected")
        pieces = flat.split(self._sizes, -1)
        return [
            piece.reshape(*flat.shape[:-1], *p.shape).to(p.device, p.dtype)
            for piece, p in zip(pieces, self.parameters, strict=True)
        ]

    def _metric(self, tangents: list[Tensor], batched: bool) -> list[Tensor]:
        raise NotImplementedError


class GGN(CurvatureOperator):
    """Generalised Gauss–Newton operator Jᵀ H J of the loss that is minimised, with its reduction and weights.

    J is the Jacobian of the network output in the parameters, H the Hessian of ``criterion(output, targets)``
    in the output, by autograd: any criterion that is twice differentiable in the output will do, and the
    network may return tensors nested in tuples, lists and dicts. (Schraudolph 2002, "Fast curvature
    matrix-vector products"; Martens 1412.1193, section 8.) For cross-entropy, BCE with logits and squared
    error the GGN is the Fisher matrix; where the last layer already is a log-probability (``NLLLoss``) H is
    zero, and `Fisher` is what is meant.

    Args:
        model: evaluated once, as ``model(inputs)``, in the mode that it is in; dropout keeps one mask for all
            products. The evaluation is of a copy: buffers, ``.grad``, random state and hooks of the original
            are left alone. Hooks are not called, apart from torch's own weight reparametrisations.
        criterion: ``criterion(output, targets)`` returns a scalar.
        parameters: the parameters to differentiate in; default: those that require a gradient. They are
            copied: the operator stays that of the point at which it was made. A parameter that the output
            does not depend on has zero rows.

    Attributes:
        loss: the loss at that point (0-dim). gradient: its gradient, a list shaped as the parameters.
        size: P, the number of parameters. dtype, device: of the flat vectors.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        inputs: Any,
        targets: Any,
        parameters: Vector | None = None,
    ):
        super().__init__(model, inputs, parameters)
        with _grad_mode():
            if isinstance(criterion, nn.Module):
                criterion, _ = _isolated(criterion, [])
            self._points = [t.detach().requires_grad_() for t in self._outputs]
            leaves = list(self._leaves)
            for i, point in zip(self._differentiable, self._points, strict=True):
                leaves[i] = point
            loss = criterion(tree_unflatten(leaves, self._structure), _ordinary(targets))
            if loss.numel() != 1:
                raise ValueError(f"criterion: returned shape {tuple(loss.shape)}, a scalar is needed (reduction)")
            self.loss = loss.detach().reshape(())
            slopes: Sequence[Tensor | None] = [None] * len(self._points)
            if loss.requires_grad:
                slopes = torch.autograd.grad(loss, self._points, create_graph=True, allow_unused=True)
            # A slope without a graph is constant: the loss is linear in that output.
            self._curved = [i for i, s in enumerate(slopes) if s is not None and s.requires_grad]
            self._slopes = [s for s in slopes if s is not None and s.requires_grad]
            down = [torch.zeros_like(p) if s is None else s.detach() for s, p in zip(slopes, self._points, strict=True)]
            self.gradient = [torch.zeros_like(p) for p in self.parameters]
            used = [self.parameters[i] for i in self._used]
            for i, g in zip(self._used, _pull(self._outputs, used, down, False) if used else [], strict=True):
                self.gradient[i] = g

    def _metric(self, tangents: list[Tensor], batched: bool) -> list[Tensor]:
        if not self._slopes:
            return [torch.zeros_like(t) for t in tangents]
        return _pull(self._slopes, self._points, [tangents[i] for i in self._curved], batched)


class Fisher(CurvatureOperator):
    """Fisher operator Σ_n Σ_k (J_nᵀ v_nk)(J_nᵀ v_nk)ᵀ of vectors v at the network output, J_n of example n.

    Args:
        model, inputs, parameters: as for `GGN`; the output is one tensor [N, ...].
        vectors: a function from the (detached) output [N, ...] to vectors [K, N, ...]. All columns of a root
            of the output's Fisher give the exact one; scaled gradients at drawn labels the sampled one;
            scaled gradients at the true labels the empirical one (1905.12558 on what that is not).
    """

    def __init__(
        self,
        model: nn.Module,
        vectors: Callable[[Tensor], Tensor],
        inputs: Any,
        parameters: Vector | None = None,
    ):
        super().__init__(model, inputs, parameters)
        if len(self._outputs) != 1:
            raise ValueError(f"model: {len(self._outputs)} differentiable output tensors, Fisher takes exactly one")
        output = self._outputs[0]
        v = vectors(output.detach()).detach()
        if v.dim() < 2 or v.shape[1:] != output.shape:
            raise ValueError(
                f"vectors: shape {tuple(v.shape)} given, [K, {', '.join(map(str, output.shape))}] expected"
            )
        self._vectors = v.to(output.dtype).flatten(2) if v.dim() > 2 else v.to(output.dtype)[..., None]

    def _metric(self, tangents: list[Tensor], batched: bool) -> list[Tensor]:
        [t] = tangents
        rows = t.reshape(*t.shape[:1] if batched else (), *self._vectors.shape[1:])
        inner = torch.einsum("knc,...nc->...kn", self._vectors, rows)
        return [torch.einsum("knc,...kn->...nc", self._vectors, inner).reshape(t.shape)]


def _pull(outputs: Sequence[Tensor], points: Sequence[Tensor], cotangents: Vector, batched: bool) -> list[Tensor]:
    """Vector-Jacobian product on a graph that is kept; `batched` cotangents have a leading dimension."""

    def one(vectors: Vector, several: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            outputs, points, vectors, retain_graph=True, allow_unused=True, is_grads_batched=several
        )
        lead = vectors[0].shape[:1] if several else ()
        return [p.new_zeros(*lead, *p.shape) if g is None else g for g, p in zip(found, points, strict=True)]

    try:
        return one(cotangents, batched)
    except RuntimeError:
        if not batched:
            raise
        # Operations without a batching rule, recomputed segments, too little memory: one vector at a time.
        rows = [one(row, False) for row in zip(*cotangents, strict=True)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]


def _isolated(module: nn.Module, parameters: Vector) -> tuple[nn.Module, list[Tensor]]:
    """A copy of `module` that shares nothing with it and calls no hooks, and its copies of `parameters`.

    Only these require a gradient in the copy. Hooks watch a module on someone else's behalf (an optimizer's
    statistics, a logger), so they stay behind; torch's own reparametrisations are kept, being part of the
    function.
    """
    while True:  # wrappers that only add communication or compilation, neither of which differentiates twice
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(vars(module).get("_modules", {}).get("_orig_mod"), nn.Module):
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            break
    shapeless = [n for n, p in module.named_parameters() if nn.parameter.is_lazy(p)]
    if shapeless:
        raise ValueError(f"model: parameter {shapeless[0]} has no shape yet; run a forward first")
    memo: dict[int, Any] = {}
    for part in module.modules():
        # A dictionary that deepcopy finds in its memo is taken as the copy: hooks' owners are never copied.
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = getattr(part, kind)
            memo[id(hooks)] = OrderedDict(
                (key, hook) for key, hook in hooks.items() if type(hook).__module__.startswith("torch.nn.utils.")
            )
        # Tensors with a graph cannot be copied (results kept by a module, weights made by a
        # reparametrisation).
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    twin = copy.deepcopy(module, memo)
    own = {id(p) for p in module.parameters()}
    for i, given in enumerate(parameters):
        if id(given) not in own:
            raise ValueError(f"parameters: tensor {i} of shape {tuple(given.shape)} is not a parameter of the model")
    twin.requires_grad_(False)
    copies: list[Tensor] = [memo[id(p)].requires_grad_() for p in parameters]
    return twin, copies


@contextmanager
def _grad_mode() -> Iterator[None]:
    """Differentiation on, wherever the caller evaluates."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _ordinary(data: Any) -> Any:
    """Tensors made in inference mode cannot take part in a graph; copies can."""
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) and t.is_inference() else t, data)


@contextmanager
def _reproducible_forward(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave the global random state alone and choose kernels that can be differentiated twice."""
    with ExitStack() as stack:
        stack.enter_context(_grad_mode())
        devices = [] if device.type == "cpu" else [device]
        kind = "cuda" if device.type == "cpu" else device.type
        stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(part, nn.RNNBase) for part in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
