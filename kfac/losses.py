"""From a criterion to its curvature: the protocol that a loss follows, and the curvature of torch's own losses.

A loss L = sum_n c_n l(f_n, y_n) has the Gauss-Newton matrix sum_n c_n J_n^T H_n J_n, where H_n is the Hessian of l
in the network's output f_n, or the Fisher information of the distribution behind l where the two differ. Vectors v with
sum v v^T = c_n H_n (exactly, or in expectation) sent back unscaled to the layers' outputs give everything that the
Kronecker factors need; c_n carries the reduction and all weights, so the curvature is that of the loss which the user
minimises.

Protocol: any criterion may bring its own curvature by having these members, which the built-in ones have too.

    needed
    floor: float | None | (output, target) -> Tensor       the smallest value that the loss can take on this batch, None
                                                           if unbounded
    outputs(output) -> int                                 output numbers of one example
    exact(output, target) -> Iterator[Tensor]              vectors v, each of output's shape, with sum v v^T = c H
    sampled(output, target, samples, generator) -> Iterator[Tensor]    `samples` vectors: the same in expectation

    optional
    empirical(output, target) -> Iterator[Tensor]          one vector sqrt(c) * dl/df at the target (fisher="empirical")
    terms(output) -> int                                   how many terms the loss averages (fisher="empirical", where
                                                           the criterion object is not the one that is called)
    mask(output, target) -> Tensor | None                  True for rows that count, False for ignored ones; or None
    reduction: str                                         "sum" if L sums over the examples; anything else is a mean
    arguments: tuple[tuple[int, str], ...]                 position and name of the arguments that the network computes,
                                                           ((0, "input"),) by default

With several `arguments` output is a tuple of them, and so is a vector, with None for an entry through which nothing is
sent; an entry that does not come from the network is a plain Tensor or a number. `target`, the first of the other
arguments, is None where only the network's output is known (the criterion object was not the one called).

Example, squares measured in units of an error of each output, whose H is 2 / error^2:

    class Scaled(nn.Module):
        floor = 0.0

        def __init__(self, error):  # [C]
            super().__init__()
            self.register_buffer("error", error)

        def forward(self, output, target):  # [N, C]
            return (((output - target) / self.error) ** 2).mean()

        def outputs(self, output):
            return output.shape[1]

        def exact(self, output, target):
            root = (2 / output.numel()) ** 0.5 / self.error
            for k in range(output.shape[1]):
                vector = torch.zeros_like(output)
                vector[:, k] = root[k]
                yield vector

        def sampled(self, output, target, samples, generator):
            root = (2 / output.numel() / samples) ** 0.5 / self.error
            for _ in range(samples):
                yield root * torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import likelihoods

_BUILT_IN: tuple[tuple[type, Any], ...] = (
    (nn.CrossEntropyLoss, likelihoods.CrossEntropy),
    (nn.NLLLoss, likelihoods.LogProbabilities),
    (nn.BCEWithLogitsLoss, likelihoods.BinaryCrossEntropy),
    (nn.BCELoss, likelihoods.BinaryProbabilities),
    (nn.MSELoss, likelihoods.SquaredError),
    (nn.PoissonNLLLoss, likelihoods.Poisson),
    (nn.GaussianNLLLoss, likelihoods.Gaussian),
)


def curvature_of(criterion: Any) -> Any:
    """The curvature of a criterion: its own, if it follows the protocol above, or the built-in one.

    Raises:
        ValueError: for an object that is neither, or a reduction other than "mean" and "sum".
    """
    if all(hasattr(criterion, member) for member in ("outputs", "exact", "sampled", "floor")):
        return criterion
    for kind, curvature in _BUILT_IN:
        if isinstance(criterion, kind) and type(criterion).forward is kind.forward:  # type: ignore[attr-defined]
            reduction: str = criterion.reduction  # type: ignore[attr-defined]
            if reduction not in ("mean", "sum"):
                raise ValueError(f"loss: reduction={reduction!r}; allowed: 'mean', 'sum'")
            return curvature(criterion)
    *names, last = (kind.__name__ for kind, _ in _BUILT_IN)
    raise ValueError(
        f"loss: {type(criterion).__name__}; allowed: an instance of {', '.join(names)} or {last} "
        "with that class's forward, or a module that follows the protocol of kfac.losses"
    )


def has_floor(curvature: Any) -> bool:
    """Whether the loss has a smallest value."""
    return curvature.floor is not None


def floor_of(curvature: Any, output: Any, target: Tensor | None) -> Tensor | float | None:
    """The smallest value that the loss can take on a batch, a number or a 0-dim Tensor.

    None where it is unbounded, or unknown because it depends on a batch whose target is.
    """
    if not callable(curvature.floor):
        return curvature.floor
    return None if target is None else curvature.floor(output, target)
