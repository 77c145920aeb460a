"""Each loss's curvature vectors against autograd, at the network's output: exact, sampled, empirical, and its floor.

The reference is the Hessian of the criterion itself. Where that is not the Fisher information it is taken at targets
with the moments of the model's distribution: l is linear in a count or a 0/1 label (so the expected target will do),
and quadratic in a normal target (so m - sqrt(s) and m + sqrt(s) will).
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import ground_truth as truth
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F

from kfac import KFAC, losses

REDUCTIONS = ["mean", "sum"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case(NamedTuple):
    """A criterion (of a reduction), the network's output, the target, and weight of l in the sum that L is.

    `weight` broadcasts to the (first) output; a mean divides by `divisor`, the number of terms by default.
    """

    criterion: Callable[..., Any]
    output: Any
    target: Tensor
    weight: Any = 1.0
    divisor: Any = None

    def tensors(self) -> list[Tensor]:
        parts = self.output if isinstance(self.output, tuple) else (self.output,)
        return [x for x in parts if isinstance(x, Tensor)]

    def make(self, reduction: str) -> tuple[Any, Callable[..., Tensor], Any]:
        """The criterion, the loss as a function of `tensors()` and target, and c."""
        criterion = self.criterion(reduction=reduction)
        constants = self.output[1:] if isinstance(self.output, tuple) else ()

        def loss(*given: Any) -> Tensor:
            *tensors, target = given
            mean, *var = [*tensors, *constants][: 1 + len(constants)]
            return criterion(mean, target, *var)

        terms = self.tensors()[0].numel() if self.divisor is None else self.divisor
        return criterion, loss, self.weight / terms if reduction == "mean" else self.weight


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1])
PIXELS = torch.tensor([[0, 1], [2, 3], [1, 1]])
BINARY = rand(3, 4, seed=1).round()
COUNTS = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 3.0]], dtype=torch.float64)
CHANCES = 0.05 + 0.9 * rand(3, 4)
LOG_CHANCES = randn(3, 4).log_softmax(-1)


def build(kind: type, **options: Any) -> Callable[..., Any]:
    return lambda reduction: kind(reduction=reduction, **options)


def smoothed(labels: Tensor, smoothing: float) -> Tensor:
    """sum_k w_k q_k [N, 1]."""
    return (WEIGHT[labels] * (1 - smoothing) + smoothing * WEIGHT.mean())[:, None]


KEPT = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)  # LABELS other than 3

DIRECT: dict[str, Case] = {  # the Hessian at the true target is the Gauss-Newton matrix's
    "mse": Case(build(nn.MSELoss), randn(3, 4), randn(3, 4, seed=1)),
    "mse-vector": Case(build(nn.MSELoss), randn(3), randn(3, seed=1)),
    "mse-number": Case(build(nn.MSELoss), randn(1)[0], randn(1, seed=1)[0]),
    "mse-image": Case(build(nn.MSELoss), randn(3, 2, 2), randn(3, 2, 2, seed=1)),
    "bce-logits": Case(build(nn.BCEWithLogitsLoss), randn(3, 4), BINARY),
    "bce-logits-weights": Case(
        build(nn.BCEWithLogitsLoss, weight=WEIGHT, pos_weight=3 * WEIGHT), randn(3, 4), BINARY, WEIGHT
    ),
    "ce": Case(build(nn.CrossEntropyLoss), randn(3, 4), LABELS, divisor=3),
    "ce-unbatched": Case(build(nn.CrossEntropyLoss), randn(4), LABELS[1], divisor=1),
    "ce-pixels": Case(build(nn.CrossEntropyLoss), randn(3, 4, 2), PIXELS, divisor=6),
    "ce-ignored": Case(build(nn.CrossEntropyLoss, ignore_index=3), randn(3, 4), LABELS, KEPT, divisor=2),
    "ce-weights-smoothing": Case(
        build(nn.CrossEntropyLoss, weight=WEIGHT, label_smoothing=0.2),
        randn(3, 4),
        LABELS,
        smoothed(LABELS, 0.2),
        WEIGHT[LABELS].sum(),
    ),
    "ce-distributions": Case(build(nn.CrossEntropyLoss), randn(3, 4), randn(3, 4, seed=1).softmax(-1), divisor=3),
}
EXPECTED: dict[str, Case] = {  # the Hessian at targets as the model expects them
    "bce": Case(build(nn.BCELoss), CHANCES, BINARY),
    "bce-weights": Case(build(nn.BCELoss, weight=WEIGHT), CHANCES, BINARY, WEIGHT),
    "bce-vector": Case(build(nn.BCELoss), CHANCES[:, 0], rand(3, seed=2)),
    "poisson": Case(build(nn.PoissonNLLLoss), randn(2, 3), COUNTS),
    "poisson-full": Case(build(nn.PoissonNLLLoss, full=True), randn(2, 3), COUNTS),
    "poisson-rates": Case(build(nn.PoissonNLLLoss, log_input=False), 0.2 + rand(2, 3), COUNTS),
    "poisson-rates-eps": Case(build(nn.PoissonNLLLoss, log_input=False, eps=0.5, full=True), rand(2, 3), COUNTS),
}
GAUSSIAN: dict[str, Case] = {
    "gaussian": Case(build(nn.GaussianNLLLoss), (randn(3, 2), 0.1 + rand(3, 2)), randn(3, 2, seed=1)),
    "gaussian-full": Case(build(nn.GaussianNLLLoss, full=True), (randn(3, 2), 0.1 + rand(3, 2)), randn(3, 2, seed=1)),
    "gaussian-shared": Case(build(nn.GaussianNLLLoss), (randn(3, 2), 0.1 + rand(3, 1)), randn(3, 2, seed=1)),
    "gaussian-left-out": Case(build(nn.GaussianNLLLoss), (randn(3, 2), 0.1 + rand(3)), randn(3, 2, seed=1)),
    "gaussian-image": Case(build(nn.GaussianNLLLoss), (randn(3, 2, 2), 0.1 + rand(3, 1, 2)), randn(3, 2, 2, seed=1)),
    "gaussian-clamped": Case(
        build(nn.GaussianNLLLoss, eps=0.4), (randn(3, 2), torch.linspace(0, 1, 6).double().view(3, 2)), randn(3, 2)
    ),
    "gaussian-number": Case(build(nn.GaussianNLLLoss), (randn(3, 2), 0.7), randn(3, 2, seed=1)),
    "gaussian-number-clamped": Case(build(nn.GaussianNLLLoss, eps=0.4), (randn(3, 2), 0.1), randn(3, 2, seed=1)),
}
NLL: dict[str, Case] = {
    "nll": Case(build(nn.NLLLoss), LOG_CHANCES, LABELS, divisor=3),
    "nll-unbatched": Case(build(nn.NLLLoss), LOG_CHANCES[0], LABELS[1], divisor=1),
    "nll-pixels": Case(build(nn.NLLLoss), randn(3, 4, 2).log_softmax(1), PIXELS, divisor=6),
    "nll-ignored": Case(build(nn.NLLLoss, ignore_index=3), LOG_CHANCES, LABELS, KEPT, divisor=2),
    "nll-weights": Case(
        build(nn.NLLLoss, weight=WEIGHT), LOG_CHANCES, LABELS, WEIGHT[LABELS][:, None], WEIGHT[LABELS].sum()
    ),
}
ALL = DIRECT | EXPECTED | GAUSSIAN | NLL


def expected_targets(criterion: Any, output: Any) -> list[Tensor]:
    """Targets whose mean l is the expectation of l under the model."""
    if isinstance(criterion, nn.GaussianNLLLoss):
        mean, var = output
        var = torch.as_tensor(var, dtype=mean.dtype).clamp_min(criterion.eps)
        root = (var[:, None] if var.dim() == 1 else var).sqrt()
        return [mean + root, mean - root]
    if isinstance(criterion, nn.PoissonNLLLoss):
        return [output.exp() if criterion.log_input else output + criterion.eps]
    return [output]


def reference(case: Case, reduction: str) -> Tensor:
    """c H over all output numbers, [outputs, outputs]."""
    criterion, loss, c = case.make(reduction)
    tensors = case.tensors()
    if isinstance(criterion, nn.NLLLoss):
        probability = case.output.exp()
        return torch.diag((c * probability).reshape(-1))
    curvature = isinstance(criterion, nn.MSELoss | nn.BCEWithLogitsLoss | nn.CrossEntropyLoss)
    targets = [case.target] if curvature else expected_targets(criterion, case.output)
    total = torch.zeros(())
    for target in targets:
        blocks = hessian(lambda *x, y=target: loss(*x, y), tuple(tensors))
        rows = [
            torch.cat([block.reshape(a.numel(), b.numel()) for block, b in zip(row, tensors, strict=True)], 1)
            for row, a in zip(blocks, tensors, strict=True)
        ]
        total = total + torch.cat(rows) / len(targets)
    return total


def flat(vector: Any, case: Case) -> Tensor:
    """A vector over all output numbers; None is zero, and what is no tensor gets nothing."""
    if not isinstance(case.output, tuple):
        assert vector.shape == case.output.shape
        return vector.reshape(-1)
    parts = []
    for part, like in zip(vector, case.output, strict=True):
        if not isinstance(like, Tensor):
            assert part is None
            continue
        assert part is None or part.shape == like.shape
        parts.append((torch.zeros_like(like) if part is None else part).reshape(-1))
    return torch.cat(parts)


def summed(vectors: Any, case: Case) -> Tensor:
    """sum v v^T where both indices belong to one example: vectors of different examples never meet."""
    stacked = torch.stack([flat(vector, case) for vector in vectors])
    owners = [
        torch.zeros(t.numel())
        if t.dim() == 0 or (t.dim() == 1 and case.target.dim() == 0)
        else torch.arange(len(t)).repeat_interleave(t[0].numel())
        for t in case.tensors()
    ]
    owner = torch.cat(owners)
    return stacked.T @ stacked * (owner[:, None] == owner)


every = pytest.mark.parametrize("name", ALL)
both = pytest.mark.parametrize("reduction", REDUCTIONS)


@both
@every
def test_exact_vectors_sum_to_the_curvature(name: str, reduction: str) -> None:
    case = ALL[name]
    curvature = losses.curvature_of(case.make(reduction)[0])
    vectors = list(curvature.exact(case.output, case.target))
    torch.testing.assert_close(summed(vectors, case), reference(case, reduction), rtol=1e-10, atol=1e-14)
    assert len(vectors) == curvature.outputs(case.output)


@both
@every
def test_sampled_vectors_sum_to_the_curvature_in_expectation(name: str, reduction: str) -> None:
    case, generator = ALL[name], torch.Generator().manual_seed(0)
    curvature = losses.curvature_of(case.make(reduction)[0])
    vectors = list(curvature.sampled(case.output, case.target, 2500, generator))
    assert len(vectors) == 2500
    found, expected = summed(vectors, case), reference(case, reduction)
    assert 0 < truth.relative_error(found, expected) < 0.15


@pytest.mark.parametrize("logit", [0.0, 3.0, 9.0])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()], ids=["classes", "bernoulli"])
def test_a_single_draw_shows_all_curvature_even_of_a_sure_network(criterion: nn.Module, logit: float) -> None:
    """Where a drawn target would differ from the sure one once in exp(logit) draws."""
    output, generator = torch.tensor([[logit, -logit]], dtype=torch.float64), torch.Generator().manual_seed(0)
    curvature = losses.curvature_of(criterion)
    exact = torch.stack([vector**2 for vector in curvature.exact(output, None)]).sum(0)
    (drawn,) = curvature.sampled(output, None, 1, generator)
    torch.testing.assert_close(drawn**2, exact, rtol=1e-6, atol=0.0)
    assert (exact > 0).all()


@both
@every
def test_empirical_vector_is_the_gradient_over_the_root_of_its_weight(name: str, reduction: str) -> None:
    """dL/df = c dl/df, and v = sqrt(c) dl/df."""
    case = ALL[name]
    criterion, loss, c = case.make(reduction)
    tensors = [x.clone().requires_grad_() for x in case.tensors()]
    gradients = list(torch.autograd.grad(loss(*tensors, case.target), tensors))
    (vector,) = losses.curvature_of(criterion).empirical(case.output, case.target)
    root = torch.as_tensor(c, dtype=torch.float64).sqrt()
    if isinstance(case.output, tuple):
        expected = torch.cat([(g / root).reshape(-1) for g in gradients])
    else:
        expected = torch.where(root > 0, gradients[0] / root, 0.0).reshape(-1)
    torch.testing.assert_close(flat(vector, case), expected, rtol=1e-12, atol=1e-14)
    if reduction == "mean" and not isinstance(case.output, tuple) and isinstance(case.weight, float):
        assert losses.curvature_of(criterion).terms(case.output) == (case.divisor or case.output.numel())


@both
@every
def test_without_a_target_every_term_counts_alike(name: str, reduction: str) -> None:
    case = ALL[name]
    plain = losses.curvature_of(case.make(reduction)[0])
    assert torch.isfinite(summed(plain.exact(case.output, None), case)).all()
    assert plain.mask(case.output, None) is None


@both
@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT}, {"ignore_index": 3}], ids=["plain", "weights", "ignored"])
def test_log_probabilities_behind_a_log_softmax_have_the_curvature_of_cross_entropy(
    options: dict, reduction: str
) -> None:
    logits = randn(3, 4)
    curvature = losses.curvature_of(nn.NLLLoss(reduction=reduction, **options))
    case = Case(build(nn.NLLLoss, **options), logits.log_softmax(-1), LABELS)
    step = jacobian(lambda x: x.log_softmax(-1), logits).reshape(12, 12)
    criterion = nn.CrossEntropyLoss(reduction=reduction, **options)
    expected = hessian(lambda x: criterion(x, LABELS), logits).reshape(12, 12)
    found = step.T @ summed(curvature.exact(case.output, LABELS), case) @ step
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@both
def test_log_probabilities_have_the_expected_outer_product_of_gradients(reduction: str) -> None:
    criterion, expected = nn.NLLLoss(reduction=reduction), torch.zeros(4, 4, dtype=torch.float64)
    output = LOG_CHANCES[:1].clone().requires_grad_()
    for label in range(4):
        (g,) = torch.autograd.grad(criterion(output, torch.tensor([label])), output)
        expected += output[0, label].exp().detach() * g.T @ g
    case = Case(build(nn.NLLLoss), LOG_CHANCES[:1], LABELS[:1])
    found = summed(losses.curvature_of(criterion).exact(LOG_CHANCES[:1], LABELS[:1]), case)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [nn.NLLLoss, nn.CrossEntropyLoss])
def test_mask_leaves_out_ignored_positions(kind: Any) -> None:
    mask = losses.curvature_of(kind(ignore_index=1)).mask(randn(3, 4, 2), PIXELS)
    assert torch.equal(mask, PIXELS != 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_probabilities_have_finite_curvature(dtype: torch.dtype) -> None:
    output = torch.tensor([[0.0, 1.0, 0.5]], dtype=dtype)
    curvature = losses.curvature_of(nn.BCELoss())
    vectors = torch.stack(list(curvature.exact(output, None)))
    assert torch.isfinite(vectors).all() and (vectors.amax((1, 2)) > 0).all()
    (empirical,) = curvature.empirical(output, 1 - output)
    leaf = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.BCELoss()(leaf, 1 - output), leaf)
    torch.testing.assert_close(empirical, gradient * 3**0.5)


@both
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
@pytest.mark.parametrize("log_input", [True, False])
def test_floor_of_counts_is_the_loss_of_rates_equal_to_them(log_input: bool, eps: float, full: bool, reduction: str):
    criterion = nn.PoissonNLLLoss(log_input=log_input, full=full, eps=eps, reduction=reduction)
    counts = COUNTS + 0.25
    best = counts.log() if log_input else counts - eps
    floor = losses.floor_of(losses.curvature_of(criterion), best, counts)
    torch.testing.assert_close(floor, criterion(best, counts), rtol=1e-12, atol=1e-12)  # 0-dim too
    for seed in range(5):
        other = best + 0.1 * randn(2, 3, seed=seed)
        assert criterion(other, counts) > floor
    assert losses.has_floor(losses.curvature_of(criterion))


def test_floor_of_counts_takes_zeros_and_integers_and_refuses_to_bound_negative_ones() -> None:
    curvature = losses.curvature_of(nn.PoissonNLLLoss(full=True))
    counts = torch.tensor([0, 1, 4])
    expected = (0 + 1 + 4 - 4 * math.log(4) + 4 * math.log(4) - 4 + 0.5 * math.log(8 * math.pi)) / 3
    assert float(losses.floor_of(curvature, randn(3), counts)) == pytest.approx(expected, rel=1e-12)  # type: ignore[arg-type]
    assert losses.floor_of(curvature, randn(3), torch.tensor([0, -1, 4])) == -math.inf


@both
@pytest.mark.parametrize("full", [False, True])
def test_floor_of_a_normal_distribution_is_the_loss_at_the_smallest_variance(full: bool, reduction: str) -> None:
    criterion = nn.GaussianNLLLoss(full=full, eps=1e-3, reduction=reduction)
    target, curvature = randn(3, 2), losses.curvature_of(criterion)
    for var in (torch.zeros(3, 2).double(), torch.zeros(3, 1).double(), 0.0):
        floor = losses.floor_of(curvature, (target, var), target)
        torch.testing.assert_close(floor, criterion(target, target, var), rtol=1e-12, atol=1e-12)
    assert criterion(target + 0.01, target, rand(3, 2) * 1e-3) > floor


@pytest.mark.parametrize("name", [*DIRECT, *NLL, "bce", "bce-weights"])
def test_floor_of_the_others_is_zero(name: str) -> None:
    case = ALL[name]
    assert losses.floor_of(losses.curvature_of(case.make("mean")[0]), case.output, case.target) == 0


def test_floor_may_be_absent_or_depend_on_a_target_that_is_not_known() -> None:
    curvature = losses.curvature_of(nn.PoissonNLLLoss())
    assert losses.floor_of(curvature, randn(3), None) is None and losses.has_floor(curvature)
    unbounded = example()(torch.ones(2))
    unbounded.floor = None
    assert not losses.has_floor(losses.curvature_of(unbounded))
    assert losses.floor_of(unbounded, randn(3, 2), randn(3, 2)) is None


KINDS = [
    nn.CrossEntropyLoss,
    nn.NLLLoss,
    nn.BCEWithLogitsLoss,
    nn.BCELoss,
    nn.MSELoss,
    nn.PoissonNLLLoss,
    nn.GaussianNLLLoss,
]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_without_a_reduction_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"^loss: reduction='none'; allowed: 'mean', 'sum'$"):
        losses.curvature_of(kind(reduction="none"))


def test_other_losses_are_refused_with_a_list_of_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"^loss: L1Loss; allowed: .*protocol of kfac.losses$") as error:
        losses.curvature_of(nn.L1Loss())
    assert all(kind.__name__ in str(error.value) for kind in KINDS)


def example() -> Any:
    """The loss that the documentation of the protocol shows."""
    _, text = inspect.getdoc(losses).split("class Scaled", 1)  # type: ignore[union-attr]
    names: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(textwrap.dedent("    class Scaled" + text), names)
    return names["Scaled"]


def test_the_documented_example_follows_the_protocol() -> None:
    criterion = example()(torch.tensor([0.5, 2.0], dtype=torch.float64))
    case = Case(lambda reduction: criterion, randn(3, 2), randn(3, 2, seed=1))
    assert losses.curvature_of(criterion) is criterion
    expected = hessian(lambda x: criterion(x, case.target), case.output).reshape(6, 6)
    torch.testing.assert_close(summed(criterion.exact(case.output, case.target), case), expected)
    drawn = criterion.sampled(case.output, case.target, 2500, torch.Generator().manual_seed(0))
    assert truth.relative_error(summed(drawn, case), expected) < 0.15


class Head(nn.Module):
    """A linear layer and what makes its output the argument(s) of a criterion."""

    def __init__(self, out: int, ending: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.ending = nn.Linear(3, out).double(), ending

    def forward(self, value: Tensor) -> Any:
        return self.ending(self.linear(value))


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :2], F.softplus(x[:, 2:]) + 0.1


ENDINGS: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Any], int, Tensor]] = {
    "nll": (nn.NLLLoss, lambda x: x.log_softmax(-1), 4, torch.tensor([0, 3, 1, 1])),
    "bce": (nn.BCELoss, torch.sigmoid, 2, rand(4, 2).round()),
    "poisson": (nn.PoissonNLLLoss, lambda x: x, 2, COUNTS.reshape(-1)[:4, None].expand(4, 2)),
    "poisson-rates": (
        build(nn.PoissonNLLLoss, log_input=False),
        F.softplus,
        2,
        COUNTS.reshape(-1)[:4, None].expand(4, 2),
    ),
    "gaussian": (nn.GaussianNLLLoss, mean_and_variance, 4, randn(4, 2)),
    "gaussian-number": (nn.GaussianNLLLoss, lambda x: (x, 0.7), 2, randn(4, 2)),
    "gaussian-constant": (nn.GaussianNLLLoss, lambda x: (x, 0.7 + rand(1, 2).expand(4, 2)), 2, randn(4, 2)),
}


@both
@pytest.mark.parametrize("name", ENDINGS)
def test_first_step_is_a_dense_natural_gradient_step(name: str, reduction: str) -> None:
    """All examples have the same input, so that the layer's Fisher is one Kronecker product exactly.

    The Fisher is the expected Hessian in the parameters of the loss, whatever the network's last function is.
    """
    kind, ending, out, target = ENDINGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, criterion = Head(out, ending), kind(reduction=reduction)
    inputs, damping = randn(1, 3, seed=3).expand(4, 3), 0.05

    def loss(weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        output = ending(F.linear(inputs, weight, bias))
        return criterion(output[0], target, output[1]) if isinstance(output, tuple) else criterion(output, target)

    weight, bias = (x.detach().clone().requires_grad_() for x in (model.linear.weight, model.linear.bias))
    output = ending(F.linear(inputs, weight, bias).detach())
    if name == "nll":  # identical examples: all of one class, with its probability
        points = [(torch.full((4,), k), output[0, k].exp()) for k in range(out)]
    else:
        targets = expected_targets(criterion, output)
        points = [(y, torch.tensor(1 / len(targets), dtype=torch.float64)) for y in targets]
    fisher = torch.zeros(())
    for point, chance in points:
        (ww, wb), (bw, bb) = hessian(lambda w, b, y=point: loss(w, b, y), (weight, bias))
        n, m = weight.numel(), bias.numel()
        top, bottom = [ww.reshape(n, n), wb.reshape(n, m)], [bw.reshape(m, n), bb.reshape(m, m)]
        fisher = fisher + chance * torch.cat([torch.cat(top, 1), torch.cat(bottom, 1)])
    gradient = truth.vector(torch.autograd.grad(loss(weight, bias, target), (weight, bias)))
    expected = -torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=torch.float64), gradient)

    options = {**truth.BARE, "damping": damping, "fisher": "exact"}
    optimizer = KFAC(model, loss=criterion, solver="eigh", **options)
    before = truth.vector(model.parameters()).detach()
    output = model(inputs)
    (criterion(output[0], target, output[1]) if isinstance(output, tuple) else criterion(output, target)).backward()
    optimizer.step()
    moved = truth.vector(model.parameters()).detach() - before
    assert truth.relative_error(moved, expected) < 1e-8
