"""How a layer's weights, inputs and output gradients become matrices: after this file no maths knows about layers.

Every layer is brought to one format, with a leading dimension K for the groups of a convolution, or for the channels of
a norm layer (K = 1 elsewhere):

    inputs     a: [K, N, T, d_in]        N examples, T positions that share the weights; a last 1 where there is a bias
    gradients  g: [K, M, N, T, d_out]    the gradients of M curvature vectors at the layer's output
    weights    V: [K, d_out, d_in]       the bias is the last column

so that the gradient of the weights is sum_{n,t} g a^T. Inputs of an embedding are one-hot rows and stay indices,
a: [K, N, T], -1 for a row that counts nowhere (its g is zero). Convolutions are in convolution.py, norm layers and lone
biases in affine.py, and which layers of a model have a block in find.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .products import Unwritten, WithOne


class Block:
    """A layer, or several that share a weight, whose parameters have a curvature block.

    Args:
        name: of the layer in the model.
        modules: the layers; several where they are tied.
        parameters: those of the block, the weight first.
        reduce: whether factors sum over positions before they average over examples (see rows.moment_g).
        max_factor_size: a side that is larger keeps the diagonal of its factor only.

    Attributes:
        kind: what it is, for `summary`.
        unit: A is the number 1 (d_in = 1 and a = 1), so that the block is G and its damping is exact.
        together: rows of a vector depend on the other vectors, so that all have to be sent back at once.
    """

    kind = ""
    unit = False
    together = False

    def __init__(
        self,
        name: str,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        reduce: bool = False,
        max_factor_size: int = 8192,
    ):
        self.name, self.modules, self.parameters = name, list(modules), list(parameters)
        self.reduce, self.max_factor_size = reduce, max_factor_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """[K, d_out, d_in] of the weight matrix; known once the layer is initialised."""
        raise NotImplementedError

    @property
    def diagonal_a(self) -> bool:
        """Whether A is kept as a diagonal [K, d_in]."""
        return self.shape[2] > self.max_factor_size

    @property
    def diagonal_g(self) -> bool:
        """Whether G is kept as a diagonal [K, d_out]."""
        return self.shape[1] > self.max_factor_size

    def initialised(self) -> bool:
        """Whether shapes are known: a lazy layer's are after its first forward."""
        return not any(is_lazy(p) for p in self.parameters)

    def has_gradient(self) -> bool:
        """Whether the block takes part in a step: one of its parameters may be frozen meanwhile."""
        return any(p.grad is not None for p in self.parameters)

    def matrix(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Tensors shaped as `parameters` (None for zeros) as one matrix [K, d_out, d_in]."""
        raise NotImplementedError

    def added(self, tensors: Sequence[Tensor | None], matrix: Tensor, factor: float) -> Tensor:
        """`matrix(tensors)` + factor * matrix."""
        return torch.add(self.matrix(tensors), matrix, alpha=factor)

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `matrix`: tensors shaped as `parameters`."""
        raise NotImplementedError

    def context(self, module: Any, output: Tensor) -> Any:
        """What a call's rows need beside its input and may change after it."""
        return None

    def inputs(self, x: Tensor, module: Any, context: Any) -> Tensor | Unwritten:
        """The layer's input as rows a: [K, N, T, d_in]."""
        raise NotImplementedError

    def gradients(self, g: Tensor, module: Any) -> Tensor:
        """A gradient at the layer's output as rows g: [K, N, T, d_out]."""
        raise NotImplementedError

    def rows(self, inputs: Any, gradients: Sequence[Tensor], module: Any) -> tuple[Tensor | Unwritten, Tensor]:
        """Rows (a, g) of a call, from what `inputs` gave and its output's gradients of M vectors.

        Where a depends on the vector it is [K, M, N, T, d_in].
        """
        parts = [self.gradients(g.to(self.dtype), module)[:, None] for g in gradients]
        return inputs, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @property
    def dtype(self) -> torch.dtype:
        """Of rows, factors and solves: the parameters' own, or float32 where that is a half precision."""
        own = self.parameters[0].dtype
        return own if own in (torch.float32, torch.float64) else torch.promote_types(own, torch.float32)

    def _filled(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        pairs = zip(tensors, self.parameters, strict=True)
        return [torch.zeros_like(p, dtype=self.dtype) if x is None else x.to(self.dtype) for x, p in pairs]


class MatrixBlock(Block):
    """A weight matrix whose bias, if any, is a last column."""

    @property
    def has_bias(self) -> bool:
        return len(self.parameters) > 1

    @property
    def groups(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, int, int]:
        weight = self.parameters[0]
        return self.groups, weight.shape[0] // self.groups, weight.shape[1:].numel() + self.has_bias

    def matrix(self, tensors: Sequence[Tensor | None]) -> Tensor:
        weight, *bias = self._filled(tensors)
        matrix = self._to_matrix(weight)
        return torch.cat([matrix, bias[0].reshape(*matrix.shape[:2], 1)], dim=2) if bias else matrix

    def added(self, tensors: Sequence[Tensor | None], matrix: Tensor, factor: float) -> Tensor:
        if not self.has_bias:
            return super().added(tensors, matrix, factor)
        weight, bias = self._filled(tensors)
        out = torch.empty_like(matrix)  # in one pass, without the matrix of `tensors`
        torch.add(self._to_matrix(weight), matrix[:, :, :-1], alpha=factor, out=out[:, :, :-1])
        torch.add(bias.reshape(*out.shape[:2], 1), matrix[:, :, -1:], alpha=factor, out=out[:, :, -1:])
        return out

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        if not self.has_bias:
            return [self._from_matrix(matrix)]
        return [self._from_matrix(matrix[:, :, :-1]), matrix[:, :, -1].reshape(self.parameters[1].shape)]

    def _to_matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.parameters[0].shape)


class LinearBlock(MatrixBlock):
    """`nn.Linear` on any number of leading dimensions; dimension 0 is the batch."""

    kind = "linear"

    def inputs(self, x: Tensor, module: Any, context: Any) -> Tensor | Unwritten:
        rows = _rows(x.to(self.dtype))
        return WithOne(rows) if self.has_bias else rows

    def gradients(self, g: Tensor, module: Any) -> Tensor:
        return _rows(g)


class EmbeddingBlock(Block):
    """`nn.Embedding`: A is the diagonal of token frequencies, V = weight^T."""

    kind = "embedding"
    diagonal_a = True

    @property
    def shape(self) -> tuple[int, int, int]:
        tokens, width = self.parameters[0].shape
        return 1, width, tokens

    def matrix(self, tensors: Sequence[Tensor | None]) -> Tensor:
        return self._filled(tensors)[0].mT[None]

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        return [matrix[0].mT]

    def inputs(self, x: Tensor, module: Any, context: Any) -> Tensor:
        return _indices(x, module)

    def gradients(self, g: Tensor, module: Any) -> Tensor:
        return _rows(g)

    def rows(self, inputs: Any, gradients: Sequence[Tensor], module: Any) -> tuple[Tensor | Unwritten, Tensor]:
        _, g = super().rows(inputs, gradients, module)
        return inputs, _without_padding(inputs, g, module)


class TiedEmbeddingBlock(LinearBlock):
    """An embedding whose weight is a decoder's too: V = weight, [1, tokens, width].

    The decoder's rows are those of a Linear layer. The embedding's are g = one-hot and a = the gradient at its output.
    At every position the a of all vectors have mean square norm 1, with g scaled inversely: the gradients g a^T stay,
    and factors of rows that differ by orders of magnitude add up to a product with the right trace. Such rows are never
    reduced.
    """

    kind = "tied"
    together = True

    def inputs(self, x: Tensor, module: Any, context: Any) -> Tensor | Unwritten:
        return _indices(x, module) if isinstance(module, nn.Embedding) else super().inputs(x, module, context)

    def rows(self, inputs: Any, gradients: Sequence[Tensor], module: Any) -> tuple[Tensor | Unwritten, Tensor]:
        _, arrived = super().rows(inputs, gradients, module)
        if isinstance(module, nn.Embedding):
            a = _without_padding(inputs, arrived, module)
            one_hot = arrived.new_zeros(*inputs.shape, self.shape[1])
            one_hot.scatter_(-1, inputs.clamp_min(0)[..., None], (inputs >= 0)[..., None].to(self.dtype))
            g = one_hot[:, None].expand(-1, a.shape[1], -1, -1, -1)
        else:
            a, g = inputs[:, None].expand(-1, arrived.shape[1], -1, -1, -1), arrived
        size = a.square().sum(-1, keepdim=True).mean(1, keepdim=True).sqrt()
        size = torch.where(size > 0, size, 1.0)
        return a / size, g * size


def _rows(x: Tensor) -> Tensor:
    """[N, ..., d] as [1, N, T, d]; a single vector is one example."""
    return x.reshape(1, x.shape[0] if x.dim() > 1 else 1, -1, x.shape[-1])


def _indices(x: Tensor, module: nn.Embedding) -> Tensor:
    """Token numbers [N, ...] as [1, N, T], -1 for padding, which torch gives no gradient."""
    tokens = x.long() if module.padding_idx is None else torch.where(x == module.padding_idx, -1, x.long())
    return tokens.reshape(1, tokens.shape[0] if tokens.dim() else 1, -1)


def _without_padding(index: Tensor, g: Tensor, module: nn.Embedding) -> Tensor:
    return g if module.padding_idx is None else g * (index >= 0)[:, None, ..., None]
