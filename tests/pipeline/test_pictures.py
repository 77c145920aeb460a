"""Claims about the picture of an autoencoder: inputs above, what the trained network makes of them below."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy
import pytest
import torch
from runs import a_run
from torch import Tensor, nn

from pipeline import data as datasets
from pipeline import pictures, prepare, tracking
from pipeline.data import Data, Images, Split
from pipeline.records import FILES
from pipeline.train import Untracked, train

SOURCE = {"source": "digits", "task": "autoencoder", "validation": 0.15, "test": 0.15, "split_seed": 0}
MODEL = {"name": "autoencoder", "widths": [16, 4], "activation": "tanh", "init": "xavier_normal", "gain": 1.0}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    prepare.make(SOURCE, str(folder / "digits"))
    return datasets.load("digits", folder)


def test_images_that_are_kept_as_bytes_are_drawn_as_the_numbers_that_the_network_gets(digits: Data) -> None:
    grey = digits.validation.inputs.mul(255).round()
    numbers = torch.zeros(1)
    kept = Images(
        inputs=grey.to(torch.uint8).reshape(-1, 1, 8, 8),
        targets=torch.zeros(len(grey), dtype=torch.int64),
        mean=numbers,
        std=numbers + 1,
        task="autoencoder",
    )
    as_bytes, as_floats = replace(digits, validation=kept), replace(digits, validation=Split(grey / 255, grey / 255))
    assert (drawn(as_bytes, Inverse()) == drawn(as_floats, Inverse())).all()


class Inverse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 - x


def pixels(content: bytes) -> Any:
    return matplotlib.image.imread(io.BytesIO(content))[:, :, :3]


def drawn(data: Data, network: nn.Module, loss: str = "squared_error") -> Any:
    return pixels(pictures.of_run(a_run(loss=loss), data, network)["reconstructions.png"])


def test_inputs_stay_and_reconstructions_below_them_follow_the_network(digits: Data) -> None:
    same, inverse = drawn(digits, nn.Identity()), drawn(digits, Inverse())
    changed = numpy.flatnonzero((same != inverse).any(axis=(1, 2)))
    middle = len(same) / 2
    assert changed.min() > middle - 0.1 * len(same) and len(changed) > 0.25 * len(same)
    upper = same[: changed.min()]
    assert numpy.unique(upper).size > 10


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "summed_binary_cross_entropy"])
def test_logits_are_drawn_as_probabilities(digits: Data, loss: str) -> None:
    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(0.001, 0.999).logit()

    assert numpy.abs(drawn(digits, Logits(), loss) - drawn(digits, nn.Identity())).max() < 0.01


def test_the_same_network_gives_the_same_bytes(digits: Data) -> None:
    first, second = (pictures.of_run(a_run(), digits, nn.Identity()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("numbers", "there"), [(784, True), (3072, True), (60, False)])
def test_gray_and_coloured_squares_are_images_and_other_lengths_are_not(numbers: int, there: bool) -> None:
    split = Split(torch.rand(4, numbers), torch.rand(4, numbers))
    data = Data(split, split, split, None, None, (numbers,), numbers, {"source": SOURCE})
    assert bool(pictures.of_run(a_run(), data, nn.Identity())) == there


def test_the_train_stage_keeps_the_picture_with_the_records_of_an_autoencoder_that_finished(
    tmp_path: Path, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(tracking, "start", lambda *arguments: Untracked())
    monkeypatch.setattr(datasets, "load", lambda benchmark, device: digits)
    run = {"model": MODEL, "loss": "binary_cross_entropy", "steps": 5}
    train(a_run(**run), tmp_path)
    train(a_run(**run, optimizer="astray", options={"lr": 1e38}), tmp_path)
    folder = tmp_path / "tiny" / "sgd" / "seed-0"
    assert {path.name for path in folder.iterdir()} == {*FILES, "reconstructions.png"}
    assert pixels((folder / "reconstructions.png").read_bytes()).shape[2] == 3
    assert {path.name for path in (tmp_path / "tiny" / "astray" / "seed-0").iterdir()} == set(FILES)


def test_other_tasks_have_no_picture(digits: Data) -> None:
    data = Data(digits.train, digits.validation, digits.test, None, None, (64,), 10, {"source": {"task": "binary"}})
    assert pictures.of_run(a_run(), data, nn.Identity()) == {}
