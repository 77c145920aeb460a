"""Claims about data sets: deterministic bytes, stratified splits, checksums, and one clear line for damage."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import data, prepare
from pipeline.checks import ConfigError

SOURCE: dict[str, Any] = {
    "source": "digits",
    "task": "classification",
    "validation": 0.15,
    "test": 0.15,
    "split_seed": 0,
}


def digits(folder: Path, **changes: Any) -> data.Data:
    prepare.make({**SOURCE, **changes}, str(folder / "digits"))
    return data.load("digits", folder)


def test_classification_data_are_images_and_classes(tmp_path: Path) -> None:
    loaded = digits(tmp_path)
    assert loaded.input_shape == (1, 8, 8)
    assert loaded.outputs == 10
    assert loaded.train.inputs.dtype == torch.float32
    assert loaded.train.inputs.shape[1:] == (1, 8, 8)
    assert loaded.train.targets.dtype == torch.int64
    assert loaded.population is None
    assert loaded.teacher_loss is None
    assert 0 <= loaded.train.inputs.min() < loaded.train.inputs.max() <= 1


def test_autoencoder_data_are_their_own_targets(tmp_path: Path) -> None:
    loaded = digits(tmp_path, task="autoencoder")
    assert loaded.input_shape == (64,)
    assert loaded.outputs == 64
    assert torch.equal(loaded.test.inputs, loaded.test.targets)


def test_every_example_is_in_one_part_and_every_class_in_its_share() -> None:
    classes = [0] * 100 + [1] * 40 + [2] * 20
    parts = prepare.split(classes, 0.1, 0.2, 0)
    assert sorted(row for rows in parts.values() for row in rows) == list(range(160))
    assert Counter(classes[row] for row in parts["test"]) == {0: 20, 1: 8, 2: 4}
    assert Counter(classes[row] for row in parts["validation"]) == {0: 10, 1: 4, 2: 2}


MNIST_CLASSES = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


@pytest.mark.parametrize(
    ("sizes", "fraction", "expected"),
    [
        ([100, 40, 20], 0.1, [10, 4, 2]),
        ([3, 3, 3], 1 / 3, [1, 1, 1]),
        ([7, 7, 7], 0.1, [1, 1, 0]),  # 0.7 of each, 2.1 of all
        ([5, 5], 0.0, [0, 0]),
        (MNIST_CLASSES, 0.1, [592, 674, 596, 613, 584, 542, 592, 627, 585, 595]),  # 6,000 of 60,000
    ],
)
def test_shares_of_classes_add_up_to_the_share_of_all(sizes: list[int], fraction: float, expected: list[int]) -> None:
    assert prepare.shares(sizes, fraction) == expected
    assert sum(expected) == round(fraction * sum(sizes))


def test_test_examples_do_not_depend_on_the_validation_fraction() -> None:
    classes = [k % 3 for k in range(90)]
    assert set(prepare.split(classes, 0.1, 0.2, 0)["test"]) == set(prepare.split(classes, 0.4, 0.2, 0)["test"])


def test_another_split_seed_makes_another_split() -> None:
    classes = [k % 3 for k in range(90)]
    assert prepare.split(classes, 0.1, 0.2, 0)["test"] != prepare.split(classes, 0.1, 0.2, 1)["test"]


def test_the_same_configuration_makes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.rand(3)
        prepare.make(SOURCE, str(tmp_path / name))
    for file in ("tensors.pt", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_nothing_but_the_two_files_is_left_behind(tmp_path: Path) -> None:
    digits(tmp_path)
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["manifest.json", "tensors.pt"]


@pytest.mark.parametrize("file", ["tensors.pt", "manifest.json"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    digits(tmp_path)
    (tmp_path / "digits" / file).unlink()
    with pytest.raises(ConfigError, match=f"digits/{file}: is missing; .*dvc repro"):
        data.load("digits", tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-9] + b"x" + b[-8:], lambda b: b""])
def test_a_truncated_or_altered_file_is_named(tmp_path: Path, damage: Any) -> None:
    digits(tmp_path)
    path = tmp_path / "digits" / "tensors.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"tensors\.pt: is truncated or altered") as refusal:
        data.load("digits", tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 1'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    digits(tmp_path)
    (tmp_path / "digits" / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=r"manifest\.json: is not a manifest"):
        data.load("digits", tmp_path)


def test_the_manifest_says_what_the_data_were_made_from(tmp_path: Path) -> None:
    loaded = digits(tmp_path)
    assert loaded.manifest["source"] == SOURCE
    assert sum(loaded.manifest["examples"].values()) == 1797
    assert json.loads((tmp_path / "digits" / "manifest.json").read_text()) == loaded.manifest


def test_a_folder_that_cannot_be_written_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "digits").write_text("a file in the way")
    with pytest.raises(OSError):
        prepare.make(SOURCE, str(tmp_path / "digits"))
    assert (tmp_path / "digits").read_text() == "a file in the way"
