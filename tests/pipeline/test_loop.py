"""Claims about the training loop: fair, reproducible, honest about clocks, and clear about how a run ended."""

import copy
import math
import sys
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from runs import Listener, a_network, a_run, some_data
from torch import Tensor, nn

from pipeline.averaging import Average, averaging_coefficient
from pipeline.batches import Order, batch_size
from pipeline.clocks import PeakMemory, Stopwatch
from pipeline.config import ConfigError, RunConfig
from pipeline.evaluation import Evaluation
from pipeline.loop import Outcome, Training, learning_rate_factor
from pipeline.records import HISTORY_COLUMNS, SUMMARY_KEYS, is_measured


def train(run: RunConfig, *, seed: int = 0, model: nn.Module | None = None) -> Outcome:
    data = some_data(run.loss, planted=True)
    return Training(run, data, seed, model or a_network(seed)).train(Listener())


def unmeasured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not is_measured(name)} for row in rows]


class Recording(torch.optim.SGD):
    """SGD that remembers the gradients it was given, for all instances."""

    seen: ClassVar[list[list[Tensor]]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append([p.grad.clone() for g in self.param_groups for p in g["params"]])
        super().step()


class Exploding(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("no luck\nat all")


class Slow(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        time.sleep(0.015)
        super().step()


class Poisoned(torch.optim.SGD):
    """Makes the weights NaN, then trips over them, as a factorisation does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        weight = self.param_groups[0]["params"][0]
        if not weight.isfinite().all():
            raise RuntimeError("the factorization could not be completed")
        weight.data.fill_(math.nan)


class Curved(torch.optim.SGD):
    """Asks for the model, draws, keeps statistics and has phases, as the Kronecker optimizers do."""

    def __init__(self, model: nn.Module, *, loss: nn.Module, lr: float = 0.1, generator: Any = None) -> None:
        super().__init__(model.parameters(), lr=lr)
        self.loss, self.generator = loss, generator
        self.stats: dict[str, Tensor] = {}
        self.phase: Any = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.phase is not None:
            with self.phase("inverses"):
                time.sleep(0.002)
        super().step()
        self.stats = {"damping": torch.rand((), generator=self.generator)}


def test_a_run_records_the_columns_and_keys_of_the_record_files() -> None:
    outcome = train(a_run(loss="squared_error"))
    assert set(outcome.history[0]) == set(HISTORY_COLUMNS)
    assert set(outcome.summary) == set(SUMMARY_KEYS)
    assert outcome.summary["status"] == "finished" and outcome.summary["message"] == ""
    assert outcome.summary["steps"] == 20 and outcome.summary["examples"] == 200


@pytest.mark.parametrize("evaluate_every", [5, 7, 20])
def test_evaluation_is_at_the_start_at_every_interval_and_at_the_end(evaluate_every: int) -> None:
    steps = [row["step"] for row in train(a_run(evaluate_every=evaluate_every)).history]
    assert steps == [*range(0, 20, evaluate_every), 20]


@pytest.mark.parametrize("loss", ["squared_error", "binary_cross_entropy", "cross_entropy"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_training_lowers_the_loss(loss: str, name: str) -> None:
    outcome = train(a_run(loss=loss, target_class=f"torch.optim.{name}", options={"lr": 0.1}, steps=100))
    assert outcome.summary["train_loss"] < 0.8 * outcome.history[0]["train_loss"]
    assert outcome.summary["train_score"] > outcome.history[0]["train_score"]


@pytest.mark.parametrize("level", ["off", "light"])
@pytest.mark.parametrize("target_class", ["torch.optim.Adam", f"{__name__}.Curved"])
def test_a_run_made_again_is_the_same_to_the_bit_but_for_clocks(level: str, target_class: str) -> None:
    def outcome() -> Outcome:
        run = a_run(target_class=target_class, options={"lr": 0.05}, diagnostics=level, averaging=0.9)
        return train(run, model=a_network(dropout=True, batch_norm=True))

    first, second = outcome(), outcome()
    torch.rand(1)  # whatever happened to the global stream in between
    assert unmeasured(first.history) == unmeasured(second.history)
    assert first.curvature == second.curvature
    assert unmeasured([first.summary]) == unmeasured([second.summary])


def test_every_optimizer_sees_the_same_weights_and_examples_at_a_seed() -> None:
    gradients = []
    for options in ({"lr": 1e-9}, {"lr": 1e-9, "momentum": 0.9}):
        Recording.seen = []
        train(a_run(target_class=f"{__name__}.Recording", options=options, steps=8, evaluate_every=8))
        gradients.append(Recording.seen[-8:])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_order_of_examples_is_a_function_of_the_seed_alone() -> None:
    whole = Order(12, seed=3).next(0, 40)
    sizes, position, parts, order = [5, 1, 12, 12, 10], 0, [], Order(12, seed=3)
    for size in sizes:
        parts.append(order.next(position, size))
        position += size
    assert torch.equal(torch.cat(parts), whole)
    assert sorted(whole[:12].tolist()) == sorted(whole[12:24].tolist()) == list(range(12))
    assert not torch.equal(whole[:12], whole[12:24])
    assert not torch.equal(whole, Order(12, seed=4).next(0, 40))
    assert torch.equal(Order(12, seed=3).next(24, 12), whole[24:36])


def test_a_batch_schedule_grows_exponentially_and_then_stays() -> None:
    run = a_run(batch_size={"from": 10, "to": 40, "over_epochs": 2.0})
    assert [batch_size(run, seen, 100) for seen in (0, 100, 200, 1000)] == [10, 20, 40, 40]
    outcome = train(a_run(batch_size={"from": 4, "to": 16, "over_epochs": 1.0}, steps=10, evaluate_every=1))
    sizes = [row["batch_size"] for row in outcome.history]
    assert sizes == sorted(sizes) and sizes[0] == 4 and sizes[-1] == 16
    assert len({batch_size(run, seen, 100) for seen in range(300)}) == 7  # few shapes
    examples = [row["examples"] for row in outcome.history]
    assert [b - a for a, b in pairwise(examples)] == sizes[:-1]


def test_a_batch_larger_than_the_training_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size: 45 .* at most 44"):
        train(a_run(batch_size=45))


def test_the_average_has_the_coefficients_of_its_formula() -> None:
    assert averaging_coefficient(0, 0.9) == 0
    assert averaging_coefficient(10, 0.9) == 0.5
    assert averaging_coefficient(10_000, 0.9) == 0.9
    model = nn.BatchNorm1d(1)
    averaged = Average(model, 0.6)
    expected = 0.0
    for k in range(1, 30):
        with torch.no_grad():
            model.weight.fill_(float(k))
            model.running_mean.fill_(-float(k))  # type: ignore[union-attr]
            model.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        averaged.update_parameters(model)
        c = averaging_coefficient(k - 1, 0.6)
        expected = c * expected + (1 - c) * k
    assert averaged.module.weight.item() == pytest.approx(expected)
    assert float(averaged.module.running_mean) == pytest.approx(-expected)
    assert int(averaged.module.num_batches_tracked) == 29


def test_averaged_weights_are_the_ones_evaluated_and_the_raw_ones_are_trained() -> None:
    def run(averaging: float | None) -> tuple[Training, Outcome]:
        training = Training(a_run(averaging=averaging), some_data(), 0, a_network(batch_norm=True))
        return training, training.train(Listener())

    (raw, of_raw), (averaging, of_averaged) = run(None), run(0.9)
    for one, other in zip(raw.model.parameters(), averaging.model.parameters(), strict=True):
        assert torch.equal(one, other)
    evaluated = Evaluation("squared_error", averaging.data)(averaging.evaluated)
    assert of_averaged.summary["train_loss"] == evaluated["train_loss"] != of_raw.summary["train_loss"]
    assert of_averaged.history[0]["train_loss"] == of_raw.history[0]["train_loss"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.5 + math.sqrt(0.125), 0.5 - math.sqrt(0.125)]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule_to_the_end(schedule: str, expected: list[float]) -> None:
    factor = learning_rate_factor(a_run(steps=8, warmup=4, schedule=schedule))
    assert [factor(step) for step in (0, 1, 2, 3, 4, 5, 7)] == pytest.approx(expected)
    assert factor(8) == pytest.approx(0.0 if schedule != "constant" else 1.0)


def test_the_schedule_reaches_every_group_and_the_recorded_rate_is_that_of_the_last_step() -> None:
    run = a_run(steps=10, evaluate_every=1, schedule="linear", options={"lr": 1e-2})
    training = Training(run, some_data(), 0, a_network())
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5, "initial_lr": 0.5})
    training.scheduler.base_lrs.append(0.5)
    training.scheduler.lr_lambdas.append(training.scheduler.lr_lambdas[0])
    outcome = training.train(Listener())
    assert [row["lr"] for row in outcome.history] == pytest.approx([1e-2, *(1e-3 * k for k in range(10, 0, -1))])
    assert training.optimizer.param_groups[1]["lr"] == pytest.approx(0.0)


def test_the_summary_says_when_each_target_was_reached() -> None:
    history = train(a_run()).history
    early, late = history[1]["train_loss"], history[2]["train_loss"]
    summary = train(a_run(targets={"easy": early, "hard": late})).summary
    assert (summary["easy_step"], summary["hard_step"]) == (5, 10)
    assert 0 < summary["easy_seconds"] < summary["hard_seconds"] < summary["training_seconds"]
    missed = train(a_run(targets={"easy": late, "hard": history[-1]["train_loss"]})).summary
    assert (missed["hard_reached"], missed["hard_step"], missed["hard_seconds"]) == (False, None, None)


def test_a_budget_in_seconds_ends_a_run_at_the_evaluation_that_finds_it_spent() -> None:
    run = a_run(target_class=f"{__name__}.Slow", options={"lr": 0.1}, steps=1000, seconds=0.1)
    outcome = train(run)
    summary, clock = outcome.summary, [row["training_seconds"] for row in outcome.history]
    assert summary["status"] == "finished" and summary["steps"] % run.evaluate_every == 0
    assert clock[-2] < 0.1 <= clock[-1] == summary["training_seconds"]
    assert 5 <= summary["steps"] <= 10  # a step takes 15 ms at least


def test_a_target_that_is_reached_after_the_seconds_of_the_budget_is_missed() -> None:
    run = a_run(target_class=f"{__name__}.Slow", options={"lr": 0.1}, seconds=0.01)
    last = train(run).history[-1]
    assert last["step"] == 5
    late = train(replace(run, targets={"easy": 1e9, "hard": last["train_loss"]})).summary
    assert (late["easy_step"], late["hard_reached"]) == (0, False)


def test_the_error_is_the_share_of_wrong_answers_and_can_be_the_target() -> None:
    run = a_run(loss="cross_entropy", target_metric="validation_error", targets={"easy": 1.0, "hard": 0.0})
    outcome = train(run)
    assert all(row["validation_error"] == 1 - row["validation_score"] for row in outcome.history)
    assert outcome.summary["easy_step"] == 0 and not outcome.summary["hard_reached"]


def test_excess_loss_is_the_population_loss_over_the_teachers() -> None:
    data = some_data(planted=True)
    training = Training(a_run(target_metric="excess_loss", targets={"easy": 2e9, "hard": 1e9}), data, 0, a_network())
    outcome = training.train(Listener())
    assert data.population is not None and data.teacher_loss is not None
    loss = nn.functional.mse_loss(training.model(data.population.inputs), data.population.targets)
    assert outcome.summary["excess_loss"] == pytest.approx(loss.item() - data.teacher_loss)
    assert outcome.summary["hard_step"] == 0


def test_an_optimizer_that_asks_for_the_model_gets_it_with_the_criterion_and_a_seeded_generator() -> None:
    training = Training(a_run(target_class=f"{__name__}.Curved"), some_data(), 0, a_network())
    assert isinstance(training.optimizer, Curved)
    assert training.optimizer.loss is training.criterion
    outcome = training.train(Listener())
    other = train(a_run(target_class=f"{__name__}.Curved"), seed=1, model=a_network(0))
    drawn = [row["stats_damping"] for row in outcome.history[1:]]
    assert len(set(drawn)) == 4 and drawn != [row["stats_damping"] for row in other.history[1:]]


@pytest.mark.parametrize(
    ("options", "target_class", "said"),
    [
        ({"lr": -1.0}, "torch.optim.SGD", "Invalid learning rate"),
        ({"lr": 0.1}, "torch.optim.LBFGS", "closure"),
        ({"lr": 0.1, "momentun": 0.9}, "torch.optim.SGD", "momentum"),
        ({"lr": 0.1}, "torch.optim.Muon", "2D"),
    ],
)
def test_an_optimizer_that_cannot_be_built_is_refused_in_one_line(
    options: dict[str, Any], target_class: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        train(a_run(target_class=target_class, options=options))
    assert "optimizer.sgd" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged() -> None:
    outcome = train(a_run(options={"lr": 1e20}))
    assert outcome.summary["status"] == "diverged" and "step 5" in outcome.summary["message"]
    assert outcome.summary["steps"] == 5 and len(outcome.history) == 2
    assert outcome.failure is None


def test_a_loss_far_above_the_initial_one_for_long_ends_the_run_as_diverged() -> None:
    run = a_run(options={"lr": 1e-9}, evaluate_every=1)
    training = Training(run, some_data(), 0, a_network())
    worse = [1.0, 11.0, 11.0, 9.0, 11.0, 11.0, 11.0, 11.0, 11.0, 1.0]
    evaluation = training.evaluation(training.model)
    losses = iter(worse)

    def pretended(network: nn.Module) -> dict[str, Any]:
        return {**evaluation, "train_loss": next(losses)}

    training.evaluation = pretended  # type: ignore[assignment]
    pretended.test = lambda network: {}  # type: ignore[attr-defined]
    outcome = training.train(Listener())
    assert outcome.summary["status"] == "diverged" and outcome.summary["steps"] == 8
    assert "10 times the initial" in outcome.summary["message"]


def test_an_exception_over_finite_weights_is_a_failure_with_its_traceback() -> None:
    outcome = train(a_run(target_class=f"{__name__}.Exploding"))
    assert outcome.summary["status"] == "failed"
    assert "RuntimeError: no luck (pipeline/test_loop.py:" in outcome.summary["message"]
    assert "\n" not in outcome.summary["message"]
    assert outcome.failure is not None and "Traceback" in outcome.failure
    assert outcome.summary["test_loss"] is None and len(outcome.history) == 1


def test_an_exception_over_weights_that_are_not_finite_is_a_divergence() -> None:
    outcome = train(a_run(target_class=f"{__name__}.Poisoned"))
    assert outcome.summary["status"] == "diverged" and outcome.failure is None


def test_test_data_is_read_once_and_at_the_end() -> None:
    training = Training(a_run(), some_data(), 0, a_network())
    reads: list[int] = []
    honest = training.evaluation.test

    def counted(network: nn.Module) -> dict[str, float | None]:
        reads.append(training.progress.step)
        return honest(network)

    training.evaluation.test = counted  # type: ignore[method-assign]
    outcome = training.train(Listener())
    assert reads == [20] and outcome.summary["test_loss"] is not None


def test_the_rehearsal_leaves_no_trace() -> None:
    model = a_network(dropout=True, batch_norm=True)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    training = Training(a_run(), some_data(), 0, model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters()) and not training.optimizer.state
    assert not torch.equal(torch.get_rng_state(), state)  # the run's own stream starts now, whatever was before
    torch.manual_seed(6)
    again = torch.get_rng_state()
    Training(a_run(), some_data(), 0, a_network(dropout=True))
    Training(a_run(), some_data(), 0, a_network(dropout=True))
    assert not torch.equal(torch.get_rng_state(), again)


def test_phases_nest_and_add_up() -> None:
    watch = Stopwatch(torch.device("cpu"))
    start = time.perf_counter()
    with watch("forward_backward"):
        time.sleep(0.01)
        with watch("statistics"):
            time.sleep(0.02)
        with watch("statistics"):
            time.sleep(0.01)
    with watch("update"), watch("inverses"):
        time.sleep(0.01)
    total = time.perf_counter() - start
    seconds = watch.seconds()
    assert seconds["statistics"] >= 0.03 and 0.01 <= seconds["forward_backward"] < total - 0.03
    assert seconds["inverses"] >= 0.01 > seconds["update"] >= 0
    assert sum(seconds.values()) == pytest.approx(total, abs=5e-3)


def test_a_phase_that_raises_is_closed() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(ValueError, match="x"), watch("update"), watch("inverses"):
        raise ValueError("x")
    with watch("statistics"):
        pass
    assert set(watch.seconds()) == {"forward_backward", "statistics", "inverses", "update"}


def test_training_seconds_are_the_sum_of_the_phases_and_leave_evaluation_out() -> None:
    training = Training(a_run(target_class=f"{__name__}.Curved"), some_data(), 0, a_network())
    honest = training.evaluation

    def slow(network: nn.Module) -> dict[str, Any]:
        time.sleep(0.02)
        return honest(network)

    slow.test = honest.test  # type: ignore[attr-defined]
    training.evaluation = slow  # type: ignore[assignment]
    summary = training.train(Listener()).summary
    phases = ("forward_backward", "statistics", "inverses", "update")
    assert summary["training_seconds"] == pytest.approx(sum(summary[f"{phase}_seconds"] for phase in phases))
    assert summary["inverses_seconds"] >= 20 * 0.002 and summary["evaluation_seconds"] >= 5 * 0.02
    assert summary["statistics_seconds"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark can only be put back on Linux")
def test_peak_memory_counts_only_between_resume_and_pause() -> None:
    def peak(*, counted: bool) -> float:
        memory = PeakMemory(torch.device("cpu"))
        memory.resume()
        if not counted:
            memory.pause()
        torch.ones(25_000_000).sum()  # 95 MiB, given back at once
        if not counted:
            memory.resume()
        memory.pause()
        return memory.mib

    assert peak(counted=False) < 50 < 90 < peak(counted=True)


def test_scores_are_accuracy_for_classes_and_r_squared_for_numbers() -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3]

    data = some_data("cross_entropy")
    right = (data.train.inputs[:, :3].argmax(1) == data.train.targets).float().mean()
    assert Evaluation("cross_entropy", data)(Echo())["train_score"] == pytest.approx(float(right))

    data = some_data("binary_cross_entropy")
    right = ((data.train.inputs[:, :3] > 0) == (data.train.targets > 0)).float().mean()
    assert Evaluation("binary_cross_entropy", data)(Echo())["train_score"] == pytest.approx(float(right))

    data = some_data("squared_error")
    targets = data.train.targets
    residual = (data.train.inputs[:, :3] - targets).square().sum() / (targets - targets.mean(0)).square().sum()
    assert Evaluation("squared_error", data)(Echo())["train_score"] == pytest.approx(1 - float(residual))

    data.train.targets.sigmoid_()  # numbers between 0 and 1 that are no labels
    targets = data.train.targets
    residual = (data.train.inputs[:, :3].sigmoid() - targets).square().sum() / (
        targets - targets.mean(0)
    ).square().sum()
    assert Evaluation("binary_cross_entropy", data)(Echo())["train_score"] == pytest.approx(1 - float(residual))


def test_evaluation_leaves_mode_buffers_and_random_numbers_alone() -> None:
    model = a_network(dropout=True, batch_norm=True).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = Evaluation("squared_error", some_data())(model)
    assert first == Evaluation("squared_error", some_data())(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
