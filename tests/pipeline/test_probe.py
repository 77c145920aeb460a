"""Claims about the probe: right against dense curvature, the same for every optimizer, and invisible to training."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from runs import Listener, a_network, a_run, some_data
from torch import nn
from torch.func import functional_call

from pipeline import probe
from pipeline.data import Data
from pipeline.loop import Outcome, Training
from pipeline.probe import RELATIVE_DAMPING, probe_steps

OPTIMIZERS = {
    "sgd": ("torch.optim.SGD", {"lr": 0.05, "momentum": 0.9}),
    "adam": ("torch.optim.Adam", {"lr": 0.01}),
    "kfac": ("kfac.KFAC", {}),
    "ekfac": ("kfac.EKFAC", {}),
    "gkfac": ("kfac.GKFAC", {}),
}
WHOLE = {
    "top_eigenvalue",
    "second_eigenvalue",
    "trace",
    "gradient_norm",
    "examples",
    "update_norm",
    "cosine_gradient",
    "cosine_natural",
    "natural_residual",
    "reduction_ratio",
    "predicted_decrease",
    "actual_decrease",
}
WHOLE_KRONECKER = {"condition_a", "condition_g", "damping", "pi", "inverse_age", "factor_drift"}
LAYER_KRONECKER = {
    f"{name}_{side}" for name in ("condition", "largest", "smallest", "damping", "drift") for side in "ag"
}


def trained(
    name: str = "sgd", level: str = "light", *, batch_norm: bool = False, **changes: Any
) -> tuple[Training, Outcome]:
    target_class, options = OPTIMIZERS[name]
    run = a_run(optimizer=name, target_class=target_class, options=options, diagnostics=level, **changes)
    training = Training(run, some_data(run.loss), 0, a_network(dropout=True, batch_norm=batch_norm))
    outcome = training.train(Listener())
    assert outcome.failure is None, outcome.failure
    return training, outcome


def at(outcome: Outcome, step: int, layer: str = "") -> dict[str, float]:
    rows = [row for row in outcome.curvature if row["step"] == step and row["layer"] == layer]
    return {str(row["quantity"]): float(row["value"] or 0) for row in rows}


@pytest.mark.parametrize("steps", [20, 400, 401, 3])
def test_light_probes_are_few_evaluations_spaced_by_ratios_with_both_ends(steps: int) -> None:
    every = min(steps, 10)
    chosen = sorted(probe_steps(steps, every, "light"))
    assert chosen[0] == 0 and chosen[-1] == steps and len(chosen) <= 5
    assert all(step % every == 0 or step == steps for step in chosen)
    if steps == 400:
        assert chosen == [0, 10, 30, 120, 400]
    assert probe_steps(steps, every, "off") == frozenset()
    assert len(probe_steps(steps, every, "full")) == math.ceil(steps / every) + 1


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("level", ["light", "full"])
def test_diagnostics_do_not_alter_training(name: str, level: str) -> None:
    plain, of_plain = trained(name, "off", batch_norm=True)
    probed, of_probed = trained(name, level, batch_norm=True)
    drawn = torch.rand(1)
    for (key, one), other in zip(plain.model.state_dict().items(), probed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    for one_row, other_row in zip(of_plain.history, of_probed.history, strict=True):
        for key, value in one_row.items():
            if not any(word in key for word in ("seconds", "memory")):
                assert value == other_row[key], key
    for one_p, other_p in zip(plain.model.parameters(), probed.model.parameters(), strict=True):
        assert one_p.grad is not None and other_p.grad is not None and torch.equal(one_p.grad, other_p.grad)
    one_state, other_state = _tensors(plain.optimizer.state_dict()), _tensors(probed.optimizer.state_dict())
    assert len(one_state) == len(other_state)
    assert all(torch.equal(a, b) for a, b in zip(one_state, other_state, strict=True))
    trained(name, "off", batch_norm=True)
    assert torch.equal(drawn, torch.rand(1)), "the random stream of a run depends on its diagnostics"


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_gets_the_same_diagnostics_and_the_kronecker_family_more(name: str) -> None:
    _, outcome = trained(name)
    last, first = at(outcome, 20), at(outcome, 0)
    assert set(first) == {"top_eigenvalue", "second_eigenvalue", "trace", "gradient_norm", "examples"}
    layer = set(at(outcome, 20, "0"))
    if name in ("sgd", "adam"):
        assert set(last) == WHOLE and layer == {"gradient_norm", "update_norm"}
    else:
        assert set(last) >= WHOLE | WHOLE_KRONECKER
        assert layer == {"gradient_norm", "update_norm", "pi", "inverse_age"} | LAYER_KRONECKER
    assert ("coarse_gain" in last) == (name == "gkfac")
    assert all(math.isfinite(float(row["value"] or 0)) for row in outcome.curvature)


@pytest.mark.parametrize("loss", ["squared_error", "binary_cross_entropy", "cross_entropy"])
def test_whole_model_figures_are_those_of_the_dense_ggn(loss: str) -> None:
    data = some_data(loss, examples=30)  # both batches are then the whole training split
    run = a_run(loss=loss, diagnostics="full", steps=1, evaluate_every=1, options={"lr": 0.1}, batch_size=30)
    training = Training(run, data, 0, a_network())
    start = {key: value.clone() for key, value in training.model.state_dict().items()}
    outcome = training.train(Listener())
    end = dict(training.model.named_parameters())

    matrix, gradient = _dense(training, start, data)
    values = torch.linalg.eigvalsh(matrix)
    found = at(outcome, 1)
    assert found["top_eigenvalue"] == pytest.approx(float(values[-1]), rel=1e-2)
    assert found["second_eigenvalue"] == pytest.approx(float(values[-2]), rel=1e-2)
    assert found["trace"] == pytest.approx(float(values.sum()), rel=0.3)  # a stochastic estimate
    assert found["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    update = torch.cat([(end[name].detach() - start[name]).flatten() for name in end])
    assert found["update_norm"] == pytest.approx(float(update.norm()), rel=1e-5)
    assert found["cosine_gradient"] == pytest.approx(
        float(-(update @ gradient) / update.norm() / gradient.norm()), rel=1e-3
    )
    damping = RELATIVE_DAMPING * found["trace"] / len(gradient)
    natural = torch.linalg.solve(matrix + damping * torch.eye(len(gradient)), gradient)
    cosine = float(-(update @ natural) / update.norm() / natural.norm())
    assert found["cosine_natural"] == pytest.approx(cosine, abs=1e-2)
    predicted = -float(gradient @ update + update @ matrix @ update / 2)
    assert found["predicted_decrease"] == pytest.approx(predicted, rel=1e-3)
    blocks = [at(outcome, 1, layer) for layer in ("0", "2")]
    assert sum(block["trace"] for block in blocks) == pytest.approx(float(values.sum()), rel=0.3)
    assert blocks[0]["top_eigenvalue"] == pytest.approx(float(torch.linalg.eigvalsh(matrix[:30, :30])[-1]), rel=2e-2)


def _dense(training: Training, weights: dict[str, torch.Tensor], data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """GGN and gradient at ``weights`` on the training split, by plain Jacobians."""
    inputs, targets = data.train.inputs, data.train.targets
    criterion = type(training.criterion)()

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        parts, position = {}, 0
        for name, value in weights.items():
            parts[name] = flat[position : position + value.numel()].reshape(value.shape)
            position += value.numel()
        return functional_call(training.model, parts, (inputs,))

    flat = torch.cat([value.flatten() for value in weights.values()])
    jacobian = torch.autograd.functional.jacobian(outputs, flat).flatten(0, 1)
    at_output = outputs(flat)
    hessian = torch.autograd.functional.hessian(
        lambda z: criterion(z.reshape(at_output.shape), targets), at_output.flatten()
    )
    slope = torch.autograd.functional.jacobian(
        lambda z: criterion(z.reshape(at_output.shape), targets), at_output.flatten()
    )
    return jacobian.T @ hessian @ jacobian, jacobian.T @ slope


def test_the_model_of_a_small_step_predicts_the_decrease_of_the_loss() -> None:
    run = a_run(diagnostics="light", options={"lr": 1e-3}, batch_size=44)
    outcome = Training(run, some_data(), 0, a_network()).train(Listener())
    for step in (5, 20):
        assert at(outcome, step)["reduction_ratio"] == pytest.approx(1.0, abs=0.05)
        assert at(outcome, step)["cosine_gradient"] == pytest.approx(1.0, abs=1e-3)


def test_a_large_network_has_its_curvature_measured_on_fewer_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    _, small = trained(batch_size=30)
    monkeypatch.setitem(probe.PRICES, "light", replace(probe.PRICES["light"], operations=1))
    _, large = trained(batch_size=30)
    assert at(small, 20)["examples"] == 44 and at(large, 20)["examples"] == probe.LEAST == 16
    for quantity in ("actual_decrease", "cosine_gradient", "update_norm"):  # of the whole batch
        assert at(large, 20)[quantity] == at(small, 20)[quantity]
    for quantity in ("top_eigenvalue", "predicted_decrease", "cosine_natural"):
        assert at(large, 20)[quantity] != at(small, 20)[quantity]
        assert at(large, 20)[quantity] == pytest.approx(at(small, 20)[quantity], rel=0.5)


def test_the_operations_of_a_network_are_two_for_each_multiplication_by_a_weight() -> None:
    split = some_data().train
    assert probe._operations(a_network(batch_norm=True, dropout=True), split) == 2 * (4 * 6 + 6 * 3)


def test_factor_figures_are_those_of_the_optimizers_factors() -> None:
    training, outcome = trained("kfac", "light")
    shown = training.optimizer.curvature()["0"]  # type: ignore[attr-defined]
    found = at(outcome, 20, "0")
    values = torch.linalg.eigvalsh(shown.A.double())
    assert found["largest_a"] == pytest.approx(float(values[-1]))
    assert found["condition_a"] == pytest.approx(float((values[-1] + shown.damping_a) / (values[0] + shown.damping_a)))
    assert found["pi"] == pytest.approx(float(shown.pi)) and found["inverse_age"] == shown.age


def test_factors_that_did_not_change_have_not_drifted() -> None:
    training, _ = trained("kfac", "full")
    rows = training.probe.measure(20, training.model, training.optimizer)
    drifts = [row["value"] for row in rows if "drift" in str(row["quantity"])]
    assert drifts and all(drift == 0 for drift in drifts)


def test_convolutions_with_groups_are_summarised() -> None:
    data = some_data()
    images = Data(
        **{
            **vars(data),
            **{
                part: type(data.train)(split.inputs.reshape(-1, 4, 1, 1).expand(-1, 4, 2, 2), split.targets)
                for part, split in (("train", data.train), ("validation", data.validation), ("test", data.test))
            },
        }
    )
    model = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 3))
    run = a_run(target_class="kfac.KFAC", options={}, diagnostics="light")
    outcome = Training(run, images, 0, model).train(Listener())
    assert outcome.failure is None, outcome.failure
    assert {"condition_a", "pi", "damping_a"} <= set(at(outcome, 20, "0"))
