"""Claims about the real sets, read from the folder that IMAGE_FOLDER names, whichever of them are there."""

import hashlib
import os
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import imagefiles
from pipeline.data import pixel_statistics
from pipeline.imagefiles import Form, Reading
from pipeline.imagesets import SETS

FOLDER = os.environ.get("IMAGE_FOLDER", "")

pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.skipif(not Path(FOLDER or "/nowhere").is_dir(), reason="IMAGE_FOLDER names no folder of real images"),
]

SAFELY: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11 has it from 3.11.4 on
# From the literature: mean of the training pixels by channel.
MEANS = {"mnist": (0.1307,), "cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}


def form_of(name: str, folder: Path) -> Form:
    form = next(imagefiles.forms(folder, SETS[name]), None)
    if form is None:
        pytest.skip(f"IMAGE_FOLDER holds no {name}")
    return form


@pytest.fixture(scope="module", params=list(SETS))
def real(request: pytest.FixtureRequest) -> tuple[str, Reading]:
    form = form_of(request.param, Path(FOLDER))
    start = time.monotonic()
    reading = form.read()
    if reading is None:
        pytest.skip(f"IMAGE_FOLDER holds no {request.param}")
    print(f"\n{request.param}: {time.monotonic() - start:.1f} s, {reading.facts}")
    return request.param, reading


def test_counts_shapes_and_means_are_the_published_ones(real: tuple[str, Reading]) -> None:
    import torch

    name, reading = real
    known = SETS[name]
    for part, counts in known.counts.items():
        assert reading.pixels[part].shape == (sum(counts), *known.shape)
        assert tuple(np.bincount(reading.labels[part]).tolist()) == counts
    mean, _ = pixel_statistics(torch.from_numpy(reading.pixels["train"]))
    # JPEG moves a mean by less than a thousandth
    assert mean == pytest.approx(MEANS[name], abs=6e-5 if name != "cifar100" or reading.facts["lossless"] else 1e-3)


def test_mnist_is_the_published_set_to_the_bit(real: tuple[str, Reading]) -> None:
    name, reading = real
    if name != "mnist":
        pytest.skip("of MNIST alone")
    assert reading.facts["published_checksums"]
    header = bytes.fromhex("00000803 0000ea60 0000001c 0000001c")
    content = header + reading.pixels["train"].tobytes()
    assert hashlib.md5(content).hexdigest() == "6bbc9ace898e44ae57da46a324031adb"


def test_a_tar_and_what_it_unpacks_to_are_the_same_set(real: tuple[str, Reading], tmp_path: Path) -> None:
    name, reading = real
    if reading.facts["form"] != "tar archives":
        pytest.skip("not read from tar archives")
    for archive in form_of(name, Path(FOLDER)).files:
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path, **SAFELY)
    unpacked = form_of(name, tmp_path).read()
    assert unpacked is not None and unpacked.facts == {**reading.facts, "form": "class folders"}
    for part in reading.pixels:
        np.testing.assert_array_equal(unpacked.pixels[part], reading.pixels[part])
        np.testing.assert_array_equal(unpacked.labels[part], reading.labels[part])
