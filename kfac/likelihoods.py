"""The distributions behind torch's losses: each gives the vectors v of the protocol in losses.py.

Losses of independent output numbers (`Elementwise`) know the second derivative h and the slope of each; those of
classes share how weights, ignored targets and positions enter. Everywhere reduction and weights multiply l with c.

A sampled vector is a root of H times random signs. The slope at a target drawn from the network's own distribution has
the same second moment, but where a probability p is small it shows that once in 1/p draws only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Elementwise:
    """l = sum_k l_k(f_k, y_k): H is diagonal."""

    floor: Any = 0.0

    def __init__(self, criterion: Any):
        self.criterion = criterion

    def outputs(self, output: Tensor) -> int:
        return _per_example(output)

    def terms(self, output: Tensor) -> int:
        return output.numel()

    def exact(self, output: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        return _one_by_one((self._hessian(output, target) * self._coefficient(output)).sqrt())

    def sampled(
        self, output: Tensor, target: Tensor | None, samples: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        root = (self._hessian(output, target) * self._coefficient(output) / samples).sqrt()
        for _ in range(samples):
            yield root * _signs(root, generator)

    def empirical(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        yield self._slope(output, target) * self._coefficient(output).sqrt()

    def mask(self, output: Tensor, target: Tensor | None) -> Tensor | None:
        return None

    def _coefficient(self, output: Tensor) -> Tensor:
        """c, 0-dim or of a shape that broadcasts to output's."""
        return _constant(self.criterion, output)

    def _hessian(self, output: Tensor, target: Tensor | None) -> Tensor:
        """h > 0 for every output number, shaped as output."""
        raise NotImplementedError

    def _slope(self, output: Tensor, target: Tensor) -> Tensor:
        """dl/df for every output number, shaped as output."""
        raise NotImplementedError


class SquaredError(Elementwise):
    """l = (f - y)^2; h = 2. Criterion `nn.MSELoss`."""

    def _hessian(self, output: Tensor, target: Tensor | None) -> Tensor:
        return torch.full_like(output, 2.0)

    def _slope(self, output: Tensor, target: Tensor) -> Tensor:
        return 2 * (output - target)


class _Bernoulli(Elementwise):
    def _coefficient(self, output: Tensor) -> Tensor:
        coefficient = _constant(self.criterion, output)
        return coefficient if self.criterion.weight is None else self.criterion.weight * coefficient


class BinaryCrossEntropy(_Bernoulli):
    """Bernoulli outputs by their logits; h = p (1 - p), p = sigmoid(f). Criterion `nn.BCEWithLogitsLoss`.

    `weight` enters c; `pos_weight` multiplies h where the target is 1.
    """

    def _positive(self, target: Tensor | None) -> Tensor | float:
        """What `pos_weight` makes of h."""
        weight = self.criterion.pos_weight
        return 1.0 if weight is None or target is None else 1 + (weight - 1) * target

    def _hessian(self, output: Tensor, target: Tensor | None) -> Tensor:
        p = output.sigmoid()
        return p * (1 - p) * self._positive(target)

    def _slope(self, output: Tensor, target: Tensor) -> Tensor:
        p, weight = output.sigmoid(), self.criterion.pos_weight
        return p * (1 - target) - (1 - p) * target * (1.0 if weight is None else weight)


class BinaryProbabilities(_Bernoulli):
    """Bernoulli outputs by their probabilities p; Fisher information 1 / (p (1 - p)). Criterion `nn.BCELoss`.

    The denominator has the lower bound that it has in torch's gradient.
    """

    def _hessian(self, output: Tensor, target: Tensor | None) -> Tensor:
        return 1 / (output * (1 - output)).clamp_min(1e-12)

    def _slope(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target) * self._hessian(output, target)


class Poisson(Elementwise):
    """Counts; criterion `nn.PoissonNLLLoss`.

    With `log_input` l = exp(f) - y f and h = exp(f). Without, l = f - y log(f + eps) is, but for a constant, that of
    the rate r = f + eps, whose Fisher information is 1 / r: E y / r^2 with E y = r.
    """

    def _hessian(self, output: Tensor, target: Tensor | None) -> Tensor:
        return output.exp() if self.criterion.log_input else 1 / (output + self.criterion.eps)

    def _slope(self, output: Tensor, target: Tensor) -> Tensor:
        return output.exp() - target if self.criterion.log_input else 1 - target / (output + self.criterion.eps)

    def floor(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss where every rate is its target; -inf where one is negative, which no rate fits."""
        y = target.to(output.dtype)
        least = y - y.xlogy(y)
        if not self.criterion.log_input:
            least = least - self.criterion.eps
        if self.criterion.full:  # Stirling's formula for log y!, as torch has it
            stirling = y.xlogy(y) - y + 0.5 * (2 * math.pi * y).log()
            least = least + torch.where(y > 1, stirling, 0.0)
        least = torch.where(y < 0, -math.inf, least).expand_as(output)
        return least.mean() if self.criterion.reduction == "mean" else least.sum()


class Gaussian:
    """Mean m and variance s from the network; Fisher information 1 / s and 1 / (2 s^2). Criterion `nn.GaussianNLLLoss`.

    `output` is (m, s); s may be a number, or have fewer entries than m, each for as many terms of the loss. Below `eps`
    the loss is that of s = eps while torch's gradient passes as if s were eps, and so does the curvature.
    """

    arguments = ((0, "input"), (2, "var"))

    def __init__(self, criterion: nn.GaussianNLLLoss):
        self.criterion = criterion

    def floor(self, output: tuple[Tensor, Any], target: Tensor) -> Tensor:
        """Every variance is eps and every mean its target."""
        mean = output[0]
        least = 0.5 * mean.new_full((), self.criterion.eps).log()
        if self.criterion.full:
            least = least + 0.5 * math.log(2 * math.pi)
        return least if self.criterion.reduction == "mean" else least * mean.numel()

    def outputs(self, output: tuple[Tensor, Any]) -> int:
        return sum(_per_example(x) for x in output if isinstance(x, Tensor))

    def exact(self, output: tuple[Tensor, Any], target: Tensor | None) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        of_mean, of_var = self._roots(output)
        for vector in _one_by_one(of_mean):
            yield vector, None
        if of_var is not None:
            for vector in _one_by_one(of_var):
                yield None, vector

    def sampled(
        self, output: tuple[Tensor, Any], target: Tensor | None, samples: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        of_mean, of_var = self._roots(output)
        scale = samples**-0.5
        for _ in range(samples):
            drawn = of_mean * _signs(of_mean, generator) * scale
            yield drawn, None if of_var is None else of_var * _signs(of_var, generator) * scale

    def empirical(self, output: tuple[Tensor, Any], target: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        mean, var = output
        s, root = self._variance(output), _constant(self.criterion, mean).sqrt()
        residual = mean - target
        of_var = None
        if isinstance(var, Tensor):
            of_var = (root * (0.5 / s - 0.5 * (residual / s) ** 2)).sum_to_size(s.shape).reshape(var.shape)
        yield root * residual / s, of_var

    def mask(self, output: tuple[Tensor, Any], target: Tensor | None) -> Tensor | None:
        return None

    def _variance(self, output: tuple[Tensor, Any]) -> Tensor:
        """s >= eps in a shape that broadcasts to the mean's, by torch's rule: its last dimension may be left out."""
        mean, var = output
        if not isinstance(var, Tensor):
            return mean.new_full((), max(var, self.criterion.eps)).expand_as(mean)
        if var.shape != mean.shape and var.shape == mean.shape[:-1]:
            var = var[..., None]
        return var.clamp_min(self.criterion.eps)

    def _roots(self, output: tuple[Tensor, Any]) -> tuple[Tensor, Tensor | None]:
        """sqrt(c h) of every mean and every variance, shaped as they are."""
        mean, var = output
        s, c = self._variance(output), _constant(self.criterion, mean)
        of_mean = (c / s).sqrt().expand_as(mean)
        if not isinstance(var, Tensor):
            return of_mean, None
        shared = mean.numel() // max(var.numel(), 1)
        return of_mean, ((c * (0.5 * shared)).sqrt() / s).reshape(var.shape)


class CrossEntropy:
    """A categorical distribution per position; H = diag(p) - p p^T, p = softmax(f). Criterion `nn.CrossEntropyLoss`.

    Classes lie in dimension 1 (or 0 without a batch), as in torch. Class weights, ignore_index and label smoothing
    enter c: with target distribution q the Hessian is (sum_k w_k q_k) (diag(p) - p p^T).
    """

    floor = 0.0

    def __init__(self, criterion: nn.CrossEntropyLoss | nn.NLLLoss):
        self.criterion = criterion
        self.smoothing: float = getattr(criterion, "label_smoothing", 0.0)

    def outputs(self, output: Tensor) -> int:
        return _per_example(_classes_last(output))

    def terms(self, output: Tensor) -> int:
        return _classes_last(output)[..., 0].numel()

    def exact(self, output: Tensor, target: Tensor | None) -> Iterator[Tensor]:
        logits = _classes_last(output)
        probability = logits.softmax(-1)
        scaled = (self._coefficient(logits, target)[..., None] * probability).sqrt()
        positions = scaled[0, ..., 0].numel()
        for k in range(logits.shape[-1]):
            vector = self._column(scaled[..., k, None], probability, k)
            if positions == 1:
                yield _restored(vector, output)
                continue
            # Positions of one example mix inside the network, so each needs a vector of its own.
            flat = vector.reshape(vector.shape[0], positions, -1)
            for t in range(positions):
                single = torch.zeros_like(flat)
                single[:, t] = flat[:, t]
                yield _restored(single.reshape(vector.shape), output)

    def sampled(
        self, output: Tensor, target: Tensor | None, samples: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        logits = _classes_last(output)
        scale, q = (self._coefficient(logits, target) / samples).sqrt()[..., None], logits.softmax(-1).sqrt()
        for _ in range(samples):
            yield _restored(self._drawn(q, _signs(q, generator)) * scale, output)

    def empirical(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        logits = _classes_last(output)
        weighted, divisor, _ = self._targets(logits, target)
        mass = weighted.sum(-1, keepdim=True)
        slope = self._constant_slope(logits.softmax(-1)) * mass - weighted
        # slope / divisor is c times the gradient of l, with c = mass / divisor: divide by the root of c.
        vector = slope / (mass * divisor).clamp_min(torch.finfo(logits.dtype).tiny).sqrt()
        yield _restored(vector, output)

    def mask(self, output: Tensor, target: Tensor | None) -> Tensor | None:
        if target is None:
            return None
        return self._targets(_classes_last(output), target)[2]

    def _column(self, scaled: Tensor, probability: Tensor, k: int) -> Tensor:
        """sqrt(c p_k) (e_k - p), from sqrt(c p_k) [..., 1] and p [..., C]."""
        vector = -scaled * probability
        vector[..., k] += scaled[..., 0]
        return vector

    def _drawn(self, q: Tensor, signs: Tensor) -> Tensor:
        """A root of H times random signs, from q = sqrt(p) [..., C].

        H = diag(q) (I - q q^T) diag(q), and the first C - 1 columns of a reflection that takes the last axis to -q are
        a root of I - q q^T. So with two classes a draw is exact, and with equal ones its length is.
        """
        signs[..., -1] = 0
        share = (q * signs).sum(-1, keepdim=True) / (1 + q[..., -1:])
        reflected = signs - share * q
        reflected[..., -1:] -= share
        return q * reflected

    def _constant_slope(self, probability: Tensor) -> Tensor:
        """The part of dl/df [..., C] that is the same for every label y; the other is -e_y."""
        return probability

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
        q = q * (1 - self.smoothing) + self.smoothing / classes
        weighted = q * weight
        if mask is not None:
            weighted = weighted * mask[..., None]
        return weighted, divisor if criterion.reduction == "mean" else 1.0, mask

    def _coefficient(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """c for every position, shape [...]."""
        if target is None:
            rows = logits[..., 0]
            return _constant(self.criterion, rows).expand_as(rows)
        weighted, divisor, _ = self._targets(logits, target)
        return weighted.sum(-1) / divisor


class LogProbabilities(CrossEntropy):
    """A categorical distribution by its log-probabilities f = log p. Criterion `nn.NLLLoss`.

    l = -f_y is linear in f, so its own Hessian is 0: H is the Fisher information E e_y e_y^T = diag(p). Behind a
    log-softmax this makes the curvature of `nn.CrossEntropyLoss` on what the log-softmax was given.
    """

    def _column(self, scaled: Tensor, probability: Tensor, k: int) -> Tensor:
        vector = torch.zeros_like(probability)
        vector[..., k] = scaled[..., 0]
        return vector

    def _drawn(self, q: Tensor, signs: Tensor) -> Tensor:
        return q * signs

    def _constant_slope(self, probability: Tensor) -> Tensor:
        return torch.zeros_like(probability)


def _per_example(output: Tensor) -> int:
    return output[0].numel() if output.dim() else 1


def _constant(criterion: Any, terms: Tensor) -> Tensor:
    """c without weights, 0-dim; `terms` has an entry for each term of the loss."""
    return terms.new_full((), 1.0 / terms.numel() if criterion.reduction == "mean" else 1.0)


def _one_by_one(root: Tensor) -> Iterator[Tensor]:
    """A vector for each output number of an example, with the entries of root there and zeros elsewhere."""
    flat = root.reshape(root.shape[0], -1) if root.dim() else root.reshape(1, 1)
    for k in range(flat.shape[1]):
        vector = torch.zeros_like(flat)
        vector[:, k] = flat[:, k]
        yield vector.reshape(root.shape)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent random signs, of the shape and dtype of `like`; one draw of 64 bits gives 64 of them."""
    count, device = like.numel(), like.device
    words = torch.empty(-(-count // 64), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    place = torch.ones(8, dtype=torch.uint8, device=device) << torch.arange(8, dtype=torch.uint8, device=device)
    bits = (place[:, None] & words.view(torch.uint8)).view(-1)[:count].reshape(like.shape)
    return bits.ne_(0).to(like.dtype).mul_(2).sub_(1)


def _classes_last(output: Tensor) -> Tensor:
    return output.movedim(1, -1) if output.dim() > 1 else output[None]


def _restored(vector: Tensor, output: Tensor) -> Tensor:
    return vector.movedim(-1, 1) if output.dim() > 1 else vector[0]
