"""The output distribution behind a loss: which vectors, sent back through the network, make its curvature.

A loss L = sum_n c_n l(f_n, y_n) has the Gauss-Newton matrix sum_n c_n J_n^T H_n J_n, where H_n is the Hessian of l
in the network's output f_n. Vectors v with sum v v^T = c_n H_n (exactly, or in expectation) sent back unscaled to
the layers' outputs give everything that the Kronecker factors need; c_n carries the reduction and all weights, so
the curvature is that of the loss which the user minimises.

Protocol: any criterion module may bring its own curvature by having these members, which the built-in ones below
    have too:

    floor: float | None                                    the smallest value that the loss can take, None if unbounded
    outputs(output) -> int                                 output numbers of one example
    exact(output, target) -> Iterator[Tensor]              vectors v, each of output's shape, with sum v v^T = c H
    sampled(output, target, samples, generator) -> Iterator[Tensor]    the same in expectation
    empirical(output, target) -> Iterator[Tensor]          one vector sqrt(c) * dl/df at the true target
    mask(output, target) -> Tensor | None                  True for rows that count, False for ignored ones; or None
    terms(output) -> int                                   how many terms the loss averages (for "empirical" alone)

`target` is None where only the network's output is known (the criterion object was not the one called).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class SquaredError:
    """l = (f - y)^2 for every output number; H = 2. Criterion `nn.MSELoss`."""

    floor = 0.0

    def __init__(self, criterion: nn.MSELoss):
        self.reduction = criterion.reduction

    def outputs(self, output: Tensor) -> int:
        return _per_example(output)

    def terms(self, output: Tensor) -> int:
        return output.numel()

    def _coefficient(self, output: Tensor, target: Tensor | None) -> Tensor | float:
        return 1.0 / output.numel() if self.reduction == "mean" else 1.0

    def _hessian(self, output: Tensor) -> Tensor:
        return torch.full_like(output, 2.0)

    def exact(self, output: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        root = (self._hessian(output) * self._coefficient(output, target)).sqrt()
        flat = root.reshape(output.shape[0], -1) if output.dim() else root.reshape(1, 1)
        for k in range(flat.shape[1]):
            vector = torch.zeros_like(flat)
            vector[:, k] = flat[:, k]
            yield vector.reshape(output.shape)

    def sampled(
        self, output: Tensor, target: Tensor | None, samples: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        root = (self._hessian(output) * self._coefficient(output, target) / samples).sqrt()
        for _ in range(samples):
            yield root * torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)

    def empirical(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        yield 2.0 * (output - target) * self._coefficient(output, target) ** 0.5

    def mask(self, output: Tensor, target: Tensor | None) -> Tensor | None:
        return None


class BinaryCrossEntropy(SquaredError):
    """Independent Bernoulli outputs; H = s (1 - s), s = sigmoid(f). Criterion `nn.BCEWithLogitsLoss`.

    `weight` and `pos_weight` scale H; the latter depends on the target.
    """

    def __init__(self, criterion: nn.BCEWithLogitsLoss):
        self.reduction = criterion.reduction
        self.criterion = criterion

    def _coefficient(self, output: Tensor, target: Tensor | None) -> Tensor | float:
        coefficient: Tensor | float = 1.0 / output.numel() if self.reduction == "mean" else 1.0
        if self.criterion.weight is not None:
            coefficient = self.criterion.weight * coefficient
        if self.criterion.pos_weight is not None and target is not None:
            coefficient = (1 + (self.criterion.pos_weight - 1) * target) * coefficient
        return coefficient

    def _hessian(self, output: Tensor) -> Tensor:
        probability = torch.sigmoid(output)
        return probability * (1 - probability)

    def sampled(
        self, output: Tensor, target: Tensor | None, samples: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        probability = torch.sigmoid(output)
        root = (torch.as_tensor(self._coefficient(output, target), device=output.device) / samples).sqrt()
        for _ in range(samples):
            uniform = torch.rand(output.shape, generator=generator, device=output.device, dtype=output.dtype)
            yield (probability - (uniform < probability).to(output.dtype)) * root

    def empirical(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        weight = self.criterion.weight if self.criterion.weight is not None else 1.0
        positive = self.criterion.pos_weight if self.criterion.pos_weight is not None else 1.0
        scale = weight / output.numel() if self.reduction == "mean" else weight
        probability = torch.sigmoid(output)
        slope = probability * (1 - target) - positive * (1 - probability) * target
        yield slope * torch.as_tensor(scale, device=output.device).sqrt()


class CrossEntropy:
    """A categorical distribution per position; H = diag(p) - p p^T. Criterion `nn.CrossEntropyLoss`.

    Classes lie in dimension 1 (or 0 without a batch), as in torch. Class weights, ignore_index and label smoothing
    enter
    the coefficient: with target distribution q the Hessian is (sum_k w_k q_k) (diag(p) - p p^T).
    """

    floor = 0.0

    def __init__(self, criterion: nn.CrossEntropyLoss):
        self.criterion = criterion

    def outputs(self, output: Tensor) -> int:
        return _per_example(output)

    def terms(self, output: Tensor) -> int:
        return self._classes_last(output)[..., 0].numel()

    def _classes_last(self, output: Tensor) -> Tensor:
        return output.movedim(1, -1) if output.dim() > 1 else output[None]

    def _restore(self, vector: Tensor, output: Tensor) -> Tensor:
        return vector.movedim(-1, 1) if output.dim() > 1 else vector[0]

    def _targets(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor | float, Tensor | None]:
        """Weighted target distribution w_k q_k [..., C], the loss's divisor, and the mask of rows that count."""
        criterion, classes = self.criterion, logits.shape[-1]
        weight = criterion.weight if criterion.weight is not None else logits.new_ones(classes)
        mask = None
        if target.is_floating_point():
            q = target.movedim(1, -1) if target.dim() > 1 else target[None]
            divisor: Tensor | float = float(logits[..., 0].numel())
        else:
            labels = target if target.dim() else target[None]
            mask = labels != criterion.ignore_index
            labels = torch.where(mask, labels, 0)
            q = (labels[..., None] == torch.arange(classes, device=labels.device)).to(logits.dtype)
            divisor = (weight[labels] * mask).sum()
        smoothing = criterion.label_smoothing
        q = q * (1 - smoothing) + smoothing / classes
        weighted = q * weight
        if mask is not None:
            weighted = weighted * mask[..., None]
        return weighted, divisor if criterion.reduction == "mean" else 1.0, mask

    def _coefficient(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """c for every position, shape [...]."""
        if target is None:
            rows = logits[..., 0]
            return torch.full_like(rows, 1.0 / rows.numel() if self.criterion.reduction == "mean" else 1.0)
        weighted, divisor, _ = self._targets(logits, target)
        return weighted.sum(-1) / divisor

    def exact(self, output: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        logits = self._classes_last(output)
        coefficient = self._coefficient(logits, target)
        probability = logits.softmax(-1)
        scaled = (coefficient[..., None] * probability).sqrt()
        positions = scaled[0, ..., 0].numel()
        for k in range(logits.shape[-1]):
            vector = -scaled[..., k, None] * probability
            vector[..., k] += scaled[..., k]
            if positions == 1:
                yield self._restore(vector, output)
                continue
            # Positions of one example mix inside the network, so each needs a vector of its own.
            flat = vector.reshape(vector.shape[0], positions, -1)
            for t in range(positions):
                single = torch.zeros_like(flat)
                single[:, t] = flat[:, t]
                yield self._restore(single.reshape(vector.shape), output)

    def sampled(
        self, output: Tensor, target: Tensor | None, samples: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        logits = self._classes_last(output)
        root = (self._coefficient(logits, target) / samples).sqrt()[..., None]
        probability = logits.softmax(-1)
        cumulative = probability.cumsum(-1)
        for _ in range(samples):
            # Inverse transform sampling, cheaper than torch.multinomial; rounding leaves the sum only near 1.
            uniform = torch.rand(logits[..., :1].shape, generator=generator, device=logits.device, dtype=logits.dtype)
            label = (cumulative < uniform * cumulative[..., -1:]).sum(-1, keepdim=True)
            label = label.clamp_(max=logits.shape[-1] - 1)
            yield self._restore(probability.scatter_add(-1, label, -torch.ones_like(uniform)) * root, output)

    def empirical(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        logits = self._classes_last(output)
        weighted, divisor, _ = self._targets(logits, target)
        mass = weighted.sum(-1, keepdim=True)
        slope = logits.softmax(-1) * mass - weighted
        # slope / divisor is c times the gradient of l, with c = mass / divisor: divide by the root of c.
        vector = slope / (mass * divisor).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
        yield self._restore(vector, output)

    def mask(self, output: Tensor, target: Tensor | None) -> Tensor | None:
        if target is None:
            return None
        return self._targets(self._classes_last(output), target)[2]


_BUILT_IN: tuple[tuple[type, Any], ...] = (
    (nn.CrossEntropyLoss, CrossEntropy),
    (nn.BCEWithLogitsLoss, BinaryCrossEntropy),
    (nn.MSELoss, SquaredError),
)


def curvature_of(criterion: Any) -> Any:
    """The curvature of a criterion: its own, if it follows the protocol above, or the built-in one.

    Raises:
        ValueError: for an object that is neither, or a reduction other than "mean" and "sum".
    """
    if all(hasattr(criterion, member) for member in ("outputs", "exact", "sampled", "floor")):
        return criterion
    for kind, curvature in _BUILT_IN:
        if isinstance(criterion, kind):
            reduction: str = criterion.reduction  # type: ignore[attr-defined]
            if reduction not in ("mean", "sum"):
                raise ValueError(f"loss: reduction={reduction!r}; allowed: 'mean', 'sum'")
            return curvature(criterion)
    raise ValueError(
        f"loss: {type(criterion).__name__}; allowed: an instance of CrossEntropyLoss, BCEWithLogitsLoss or MSELoss, "
        "or a module that follows the protocol of kfac.losses"
    )


def _per_example(output: Tensor) -> int:
    return output[0].numel() if output.dim() else 1
