"""Levenberg-Marquardt damping: the ratio of what happened to what was promised, and steps taken back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import ground_truth as truth
import pytest
import torch
from cases import BY_NAME, LOSSES, Case, Problem, mlp
from layer_cases import LayerCase, Mean, numbers, tokens
from torch import Tensor, nn

from kfac import EKFAC, GKFAC, KFAC

OPTIMIZERS = pytest.mark.parametrize("optimizer", [KFAC, EKFAC, GKFAC])
TUNING = pytest.mark.parametrize("tuned", [False, True], ids=["fixed", "self-tuning"])
OMEGA = (19 / 20) ** 5
FIXED: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "damping": 0.3, "kl_clip": None, "factor_interval": 1, "inverse_interval": 1,
}  # fmt: skip
QUADRATIC = Case("quadratic", lambda: mlp(4, 3), LOSSES["mse-mean"], (30, 4))
DEEP = Case("deep", lambda: mlp(4, 6, 3, activation=nn.Tanh), LOSSES["ce-mean"], (30, 4))


def closure_of(problem: Problem, optimizer: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    return closure


def build(optimizer: Any, problem: Problem, tuned: bool = False, **options: Any) -> Any:
    return optimizer(
        problem.model, loss=problem.criterion, adapt_damping=True, fisher="exact", **({} if tuned else FIXED), **options
    )


def turn(optimizer: Any, problem: Problem) -> float:
    return float(optimizer.step(closure_of(problem, optimizer)).detach())


def weights(problem: Problem) -> Tensor:
    return truth.vector(p.detach().clone() for p in problem.model.parameters())


@OPTIMIZERS
@TUNING
def test_the_reduction_ratio_is_one_on_a_quadratic(optimizer: Any, tuned: bool) -> None:
    """A linear layer under squared error, all data: the model without its damping term is the loss itself."""
    problem = QUADRATIC.make()
    used = build(optimizer, problem, tuned)
    seen = []
    for _ in range(11):
        turn(used, problem)
        if "reduction_ratio" in used.stats:
            seen.append(float(used.stats["reduction_ratio"]))
    assert len(seen) >= 2
    for ratio in seen:
        assert ratio == pytest.approx(1, abs=1e-6)


class Language(nn.Module):
    """Tokens to logits with one table at both ends, a norm between: blocks with cross terms of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(6, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.decode = nn.Linear(4, 6, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, value: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.norm(self.mix(self.embed(value))))).movedim(-1, 1)


NETS: dict[str, Any] = {
    "mlp": DEEP,
    "tied": LayerCase("tied", Language, tokens(6, 5, 2), LOSSES["ce-mean"]),
    "tokens": LayerCase(
        "tokens",
        lambda: nn.Sequential(nn.Embedding(6, 4), nn.RMSNorm(4), nn.Linear(4, 5), nn.Tanh(), Mean(), nn.Linear(5, 3)),
        tokens(6, 8, 3),
        LOSSES["ce-mean"],
    ),
    "images": LayerCase(
        "images",
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, groups=2),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 2, 2, stride=2, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(48, 3),
        ),
        numbers(6, 2, 2, 3),
        LOSSES["bce-mean"],
    ),
}


@OPTIMIZERS
@pytest.mark.parametrize(
    ("net", "options"),
    [
        *((net, {"tuned": tuned}) for net in NETS for tuned in (False, True)),
        ("tokens", {"sharing": "reduce"}),
        ("images", {"sharing": "reduce"}),
        ("tokens", {"max_factor_size": 3}),
    ],
    ids=str,
)
def test_the_reduction_ratio_is_what_happened_over_what_was_promised(
    optimizer: Any, net: str, options: dict[str, Any]
) -> None:
    """Against the dense Gauss-Newton matrix over all parameters: the model has every cross term between layers,
    whatever the preconditioner makes of them."""
    problem = NETS[net].make()
    used = build(optimizer, problem, **options)
    for _ in range(6):
        start, before = problem.copy(), weights(problem)
        turn(used, problem)
        if "reduction_ratio" not in used.stats or float(used.stats["rejected"]):
            continue
        parameters = list(start.model.parameters())
        slope, bend = truth.gradient(start, parameters), truth.ggn(start, parameters)
        step = weights(problem) - before
        promised = float(slope @ step + 0.5 * step @ bend @ step)
        happened = float(problem.loss().detach() - start.loss().detach())
        assert float(used.stats["reduction_ratio"]) == pytest.approx(happened / promised, rel=1e-6)
        break
    else:
        raise AssertionError("no step was kept: the test shows nothing")


class BatchSecond(nn.Module):
    """Layers on [T, N, d], as attention and recurrent nets have it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(value.transpose(0, 1)))).mean(0)


@OPTIMIZERS
def test_the_model_knows_the_examples_where_the_batch_is_the_second_dimension(optimizer: Any) -> None:
    """The network's output says how many examples there are."""
    problem = LayerCase("batch-second", BatchSecond, numbers(6, 4, 4), LOSSES["ce-mean"]).make()
    used, start, before = build(optimizer, problem), problem.copy(), weights(problem)
    turn(used, problem)
    assert float(used.stats["rejected"]) == 0
    parameters = list(start.model.parameters())
    slope, bend = truth.gradient(start, parameters), truth.ggn(start, parameters)
    step = weights(problem) - before
    promised = float(slope @ step + 0.5 * step @ bend @ step)
    happened = float(problem.loss().detach() - start.loss().detach())
    assert float(used.stats["reduction_ratio"]) == pytest.approx(happened / promised, rel=1e-6)


@OPTIMIZERS
def test_at_a_minimum_nothing_moves_and_the_damping_stays(optimizer: Any) -> None:
    """Nothing promised and nothing gained is no sign of a bad model."""
    problem = QUADRATIC.make()
    problem.targets = problem.model(problem.inputs).detach()
    used = build(optimizer, problem)
    for _ in range(11):
        before = weights(problem)
        turn(used, problem)
        assert torch.equal(weights(problem), before)
        assert float(used.stats["damping"]) <= 0.3 * (1 + 1e-6)


@OPTIMIZERS
def test_damping_falls_by_omega_to_the_fifth_every_five_steps_where_the_model_is_right(optimizer: Any) -> None:
    problem = QUADRATIC.make()
    used = build(optimizer, problem)
    seen = []
    for _ in range(16):
        turn(used, problem)
        seen.append(float(used.stats["damping"]))
    changes = [new / old for old, new in itertools.pairwise(seen)]
    falls = [count for count, change in enumerate(changes) if change != 1]
    assert len(falls) == 3 and {b - a for a, b in itertools.pairwise(falls)} == {5}, changes
    assert all(changes[count] == pytest.approx(OMEGA, rel=1e-6) for count in falls)


class Misjudged(nn.Module):
    """`factor` times the mean squared error, with the curvature of the error alone: how wrong the model is is known."""

    floor = 0.0

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.factor * (output - target).square().mean()

    def outputs(self, output: Tensor) -> int:
        return output[0].numel()

    def exact(self, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        for column in torch.eye(output.shape[1], dtype=output.dtype):
            yield (2 / output.numel()) ** 0.5 * column.expand_as(output)

    def sampled(self, output: Tensor, target: Tensor, samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        for _ in range(samples):
            noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            yield (2 / output.numel() / samples) ** 0.5 * noise


@OPTIMIZERS
@pytest.mark.parametrize(
    ("factor", "expected"), [(1.85, 1 / OMEGA), (1.4, 1.0), (1.0, OMEGA)], ids=["poor", "fair", "right"]
)
def test_damping_follows_the_ratio(optimizer: Any, factor: float, expected: float) -> None:
    """At almost no damping the Newton step of the misjudged model overshoots by `factor`.

    With h = factor q and curvature of q, the step is d = -factor F^-1 g_q. The model promises -factor^2 s / 2 with
    s = g_q F^-1 g_q and the loss gives factor (-factor + factor^2 / 2) s, so the ratio is 2 - factor.
    """
    problem = QUADRATIC.make()
    problem.criterion = Misjudged(factor)
    used = optimizer(
        problem.model, loss=problem.criterion, adapt_damping=True, fisher="exact",
        **{**FIXED, "damping": 1e-9, **({} if optimizer is EKFAC else {"solver": "eigh"})},
    )  # fmt: skip
    turn(used, problem)
    assert float(used.stats["reduction_ratio"]) == pytest.approx(2 - factor, rel=1e-5)
    first = float(used.stats["damping"])
    turn(used, problem)
    assert float(used.stats["damping"]) / first == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "weight-frozen"])
@OPTIMIZERS
def test_a_step_that_raised_the_loss_is_taken_back_bit_for_bit(optimizer: Any, frozen: bool) -> None:
    """Overshooting more than twice: the loss rises; weights, momentum and AdamW's part are as before."""
    problem = QUADRATIC.make()
    problem.criterion = Misjudged(2.5)
    used = optimizer(
        problem.model, loss=problem.criterion, adapt_damping=True, fisher="exact",
        **{**FIXED, "damping": 1e-9, "momentum": 0.5},
    )  # fmt: skip
    for parameter in problem.model.parameters():
        parameter.requires_grad_(not frozen or parameter.dim() == 1)
    before, start = weights(problem), problem.loss().item()
    turn(used, problem)
    assert float(used.stats["rejected"]) == 1
    assert torch.equal(weights(problem), before) and problem.loss().item() == start
    buffers = [state["momentum_buffer"] for state in used.state.values() if "momentum_buffer" in state]
    assert not any(buffer.any() for buffer in buffers)
    turn(used, problem)
    assert float(used.stats["damping"]) == pytest.approx(1e-9 / OMEGA, rel=1e-6)


@OPTIMIZERS
def test_a_good_step_is_kept_and_is_the_step_without_the_check(optimizer: Any) -> None:
    """Up to the first change of damping both make the same steps."""
    plain, checked = DEEP.make(), DEEP.make()
    options = {**FIXED, "lr": 0.1, "fisher": "exact"}
    first = optimizer(plain.model, loss=plain.criterion, **options)
    second = optimizer(checked.model, loss=checked.criterion, adapt_damping=True, **options)
    turn(first, plain)
    turn(second, checked)
    assert float(second.stats["rejected"]) == 0
    assert truth.relative_error(weights(checked), weights(plain)) < 1e-12


class Noisy(nn.Module):
    """Dropout, batch norm and a parameter without a block: everything that a second evaluation could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4)
        self.scale, self.second = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.drop(torch.tanh(self.norm(self.first(value)))) * self.scale)


@OPTIMIZERS
@TUNING
def test_the_second_evaluation_leaves_gradients_buffers_and_the_random_stream_alone(
    optimizer: Any, tuned: bool
) -> None:
    problem = DEEP.make()
    problem.model = Noisy().double()
    alone = problem.copy()
    used = build(optimizer, problem, tuned)
    torch.manual_seed(3)
    alone.loss().backward()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    turn(used, problem)
    assert torch.equal(torch.get_rng_state(), after), "the mask of the check was drawn from the user's stream"
    for (name, buffer), other in zip(problem.model.named_buffers(), alone.model.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    for (name, one), other in zip(problem.model.named_parameters(), alone.model.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("seed", range(4))
def test_the_check_uses_the_same_masks(seed: int) -> None:
    """A step of almost nothing changes the loss by almost what it promised, unless the masks differ."""
    problem = DEEP.make()
    problem.model = Noisy().double()
    used = KFAC(
        problem.model, loss=problem.criterion, adapt_damping=True, fisher="exact",
        **{**FIXED, "lr": 1e-6},
    )  # fmt: skip
    used.param_groups[-1]["lr"] = 1e-9
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        turn(used, problem)
    assert float(used.stats["reduction_ratio"]) == pytest.approx(1, abs=1e-2)


@OPTIMIZERS
@TUNING
def test_without_a_closure_there_is_one_clear_line(optimizer: Any, tuned: bool) -> None:
    problem = DEEP.make()
    used = build(optimizer, problem, tuned)
    before = weights(problem)
    problem.loss().backward()
    with pytest.raises(ValueError) as caught:
        used.step()
    message = str(caught.value)
    assert "closure" in message and "adapt_damping" in message and "\n" not in message
    assert torch.equal(weights(problem), before)


@OPTIMIZERS
@TUNING
def test_training_with_it_goes_down_and_never_up_at_a_checked_step(optimizer: Any, tuned: bool) -> None:
    problem = DEEP.make()
    used = build(optimizer, problem, tuned)
    losses = [turn(used, problem) for _ in range(25)]
    assert losses[-1] < 0.85 * losses[0]
    for count in range(0, 24, 5):
        assert losses[count + 1] <= losses[count], count


@OPTIMIZERS
@TUNING
def test_its_state_resumes_bit_for_bit(optimizer: Any, tuned: bool) -> None:
    straight, resumed = QUADRATIC.make(), QUADRATIC.make()
    used, other = build(optimizer, straight, tuned), build(optimizer, resumed, tuned)
    for count in range(14):
        if count == 7:
            saved = used.state_dict()
            resumed.model.load_state_dict(straight.model.state_dict())
            other.load_state_dict(saved)
            if not tuned:
                assert float(used.stats["damping"]) != 0.3, "the damping was never adapted: the test shows nothing"
        turn(used, straight)
        if count >= 7:
            turn(other, resumed)
            assert used.stats["damping"] == other.stats["damping"], count
    assert torch.equal(weights(straight), weights(resumed))
    assert used.stats.keys() == other.stats.keys()


def test_a_gradient_that_is_not_finite_is_a_skipped_step_under_a_closure_too() -> None:
    problem = DEEP.make()
    used = build(KFAC, problem)
    turn(used, problem)
    before, good = weights(problem), problem.inputs
    for _ in range(6):
        problem.inputs = good * float("nan")
        turn(used, problem)
        assert float(used.stats["skipped"]) == 1 and torch.equal(weights(problem), before)
    problem.inputs = good
    turn(used, problem)
    assert weights(problem).isfinite().all() and not torch.equal(weights(problem), before)


def test_plain_closures_work_without_adapting() -> None:
    one, two = BY_NAME["mlp-ce-mean"].make(), BY_NAME["mlp-ce-mean"].make()
    first, second = KFAC(one.model, loss=one.criterion), KFAC(two.model, loss=two.criterion)
    for _ in range(4):
        truth.step(first, one)
        assert turn(second, two) > 0
    assert torch.equal(weights(one), weights(two))
