"""Claims about planted targets: the spectrum is as asked, the teacher's loss is what it says, bytes repeat."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from pipeline import data, toy

SOURCE: dict[str, Any] = {
    "task": "regression",
    "inputs": 6,
    "outputs": 3,
    "condition": 50.0,
    "teacher": {"depth": 3, "width": 5, "activation": "none", "batch_norm": False, "scale": 2.0},
    "noise": 0.3,
    "train": 4000,
    "validation": 50,
    "test": 60,
    "population": 20000,
    "seed": 0,
}
BINARY = {**SOURCE, "task": "binary", "teacher": {**SOURCE["teacher"], "activation": "tanh"}, "noise": 0.0}
CLASSES = {**BINARY, "task": "classification", "outputs": 5}


def planted(folder: Path, **source: Any) -> data.Data:
    toy.make({**SOURCE, **source}, str(folder / "planted"))
    return data.load("planted", folder)


def test_the_covariance_has_the_condition_number_and_mean_variance_one() -> None:
    spread = toy.input_map(6, 50.0, torch.Generator().manual_seed(0))
    eigenvalues = torch.linalg.eigvalsh(spread.T @ spread)
    assert float(eigenvalues.mean()) == pytest.approx(1)
    ratios = eigenvalues[1:] / eigenvalues[:-1]
    assert ratios.tolist() == pytest.approx([50 ** (1 / 5)] * 5)


def test_inputs_have_the_planned_covariance(tmp_path: Path) -> None:
    inputs = planted(tmp_path).population.inputs  # type: ignore[union-attr]
    eigenvalues = torch.linalg.eigvalsh(inputs.T.cov().double())
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(50, rel=0.1)


def test_a_linear_teacher_is_recovered_by_least_squares_down_to_its_own_loss(tmp_path: Path) -> None:
    loaded = planted(tmp_path)
    assert loaded.teacher_loss == 0.0
    assert loaded.population is not None
    solution = torch.linalg.lstsq(loaded.train.inputs.double(), loaded.train.targets.double()).solution
    excess = mse_loss(loaded.population.inputs.double() @ solution, loaded.population.targets.double())
    assert float(excess) == pytest.approx(0.3**2 * 6 / 4000, rel=1.0)
    noise = mse_loss(loaded.train.inputs.double() @ solution, loaded.train.targets.double())
    assert float(noise) == pytest.approx(0.3**2, rel=0.1)


def test_outputs_have_the_planned_scale(tmp_path: Path) -> None:
    targets = planted(tmp_path).population.targets  # type: ignore[union-attr]
    assert targets.std(0).tolist() == pytest.approx([2.0] * 3, rel=0.05)


def test_labels_are_drawn_from_the_teachers_probabilities(tmp_path: Path) -> None:
    loaded = planted(tmp_path, **BINARY)
    assert loaded.population is not None
    assert set(loaded.train.targets.unique().tolist()) == {0.0, 1.0}
    probabilities = loaded.population.targets.double()
    logits = probabilities.logit()
    entropy = binary_cross_entropy_with_logits(logits, probabilities)
    assert loaded.teacher_loss == pytest.approx(float(entropy), rel=1e-4)
    assert loaded.train.targets.mean(0).tolist() == pytest.approx(probabilities.mean(0).tolist(), abs=0.05)


def test_classes_are_drawn_from_the_teachers_probabilities(tmp_path: Path) -> None:
    loaded = planted(tmp_path, **CLASSES)
    assert loaded.population is not None and loaded.train.targets.dtype == torch.int64
    assert loaded.train.targets.shape == (4000,) and set(loaded.train.targets.unique().tolist()) == set(range(5))
    assert loaded.population.targets.sum(1).tolist() == pytest.approx([1.0] * 20000)
    shares = torch.bincount(loaded.train.targets) / 4000
    assert shares.tolist() == pytest.approx(loaded.population.targets.mean(0).tolist(), abs=0.03)


@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize(
    ("source", "loss", "best"),
    [
        (SOURCE, mse_loss, lambda means: means),
        (BINARY, binary_cross_entropy_with_logits, torch.logit),
        (CLASSES, cross_entropy, torch.log),
    ],
    ids=["regression", "binary", "classification"],
)
def test_the_excess_is_zero_for_the_teacher_and_no_student_beats_it(
    tmp_path: Path, source: dict[str, Any], noise: float, loss: Any, best: Any
) -> None:
    loaded = planted(tmp_path, **{**source, "noise": noise})
    assert loaded.population is not None and loaded.teacher_loss is not None
    targets = loaded.population.targets.double()
    outputs = best(targets)

    def excess(outputs: Tensor) -> float:
        return float(loss(outputs, targets)) - float(loaded.teacher_loss or 0.0)

    assert excess(outputs) == pytest.approx(0.0, abs=1e-7)
    stream = torch.Generator().manual_seed(0)
    for size in (1e-2, 0.1, 1.0):
        direction = torch.randn(outputs.shape, generator=stream, dtype=torch.float64)
        both = [excess(outputs + sign * size * direction) for sign in (1, -1)]
        assert min(both) > 0
        assert min(excess(outputs * (1 + size)), excess(outputs * (1 - size))) > 0


@pytest.mark.parametrize("source", [BINARY, CLASSES], ids=["binary", "classification"])
def test_label_noise_draws_a_share_of_the_labels_blindly(tmp_path: Path, source: dict[str, Any]) -> None:
    sure = {**source, "teacher": {**source["teacher"], "scale": 1000.0}, "noise": 0.4}
    loaded = planted(tmp_path, **sure)
    assert loaded.population is not None
    probabilities = loaded.population.targets
    labels = 2 if source["task"] == "binary" else 5
    largest = torch.maximum(probabilities, 1 - probabilities) if labels == 2 else probabilities.amax(1)
    assert float(largest.median()) == pytest.approx(0.6 + 0.4 / labels, abs=1e-4)
    assert float(probabilities.min()) == pytest.approx(0.4 / labels, abs=1e-4)


@pytest.mark.parametrize("activation", ["none", "relu", "tanh"])
def test_a_deep_teacher_with_batch_norm_tells_inputs_apart(activation: str) -> None:
    stream = torch.Generator().manual_seed(0)
    sample = toy.white(2000, 6, stream)
    teacher = toy.Teacher(
        sample, 3, depth=64, width=20, activation=activation, batch_norm=True, scale=2.0, stream=stream
    )
    hidden = toy.white(2000, 6, stream)
    for weight, shift in zip(teacher.weights[:-1], teacher.shifts, strict=True):
        sums = hidden @ weight + shift
        assert sums.std(0).min() > 0.3 and sums.std(0).max() < 3  # of inputs that it was not set up on
        hidden = teacher.activation(sums)
    assert teacher(sample).std(0).tolist() == pytest.approx([2.0] * 3)


@pytest.mark.parametrize("source", [SOURCE, BINARY, CLASSES])
def test_the_same_configuration_makes_the_same_bytes(tmp_path: Path, source: dict[str, Any]) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name in ("one", "two"):
        toy.make(source, str(tmp_path / name))
    assert torch.equal(torch.get_rng_state(), before)
    for file in ("tensors.pt", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_another_seed_is_another_problem(tmp_path: Path) -> None:
    first = planted(tmp_path / "a").train.targets
    assert not torch.equal(first, planted(tmp_path / "b", seed=1).train.targets)


def test_parts_are_different_draws_of_the_sizes_asked_for(tmp_path: Path) -> None:
    loaded = planted(tmp_path)
    assert [len(part) for part in (loaded.train, loaded.validation, loaded.test)] == [4000, 50, 60]
    assert not torch.equal(loaded.validation.inputs, loaded.test.inputs[:50])
