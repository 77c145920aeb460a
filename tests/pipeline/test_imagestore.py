"""Claims about kept image sets: read once, found by checksum, made again when lost, downloaded or clearly refused."""

import contextlib
import functools
import hashlib
import http.server
import json
import multiprocessing
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Listener, a_run
from small_sets import CIFAR, DIGITS, arrays, class_folders, official

from pipeline import data, download, imagestore, models, prepare
from pipeline.checks import ConfigError
from pipeline.imagesets import SETS, ImageSet
from pipeline.loop import Training
from pipeline.records import is_measured

ROOT = Path(__file__).parents[2]
SOURCE: dict[str, Any] = {
    "source": "cifar10",
    "task": "classification",
    "validation": 0.25,
    "examples": None,
    "augmentation": "crop_flip",
    "split_seed": 0,
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A main workspace, with the images in its folder `images`, and the small set in place of the real one."""
    place = tmp_path / "workspace"
    class_folders(CIFAR, place / "images")
    monkeypatch.setenv("DVC_ROOT", str(place))
    monkeypatch.setenv("IMAGE_FOLDER", "images")
    monkeypatch.setitem(SETS, "cifar10", CIFAR)
    monkeypatch.chdir(place)
    return place


def prepared(place: Path, name: str = "small", known: ImageSet = CIFAR, **changes: Any) -> data.Data:
    prepare.make_split({**SOURCE, **changes}, f"data/{name}", known, place / "images")
    return data.load(name)


def test_a_classifier_gets_the_images_normalised_by_its_training_split(workspace: Path) -> None:
    loaded = prepared(workspace)
    pixels, labels = arrays(CIFAR)
    assert (loaded.input_shape, loaded.outputs) == ((3, 32, 32), 10)
    assert [len(part) for part in (loaded.train, loaded.validation, loaded.test)] == [30, 10, 20]
    inputs, targets = loaded.train.batch(slice(None))
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    assert Counter(targets.tolist()) == dict.fromkeys(range(10), 3)
    assert torch.equal(loaded.test.inputs, torch.from_numpy(pixels["test"]))
    assert loaded.test.targets.tolist() == labels["test"].tolist()
    assert loaded.train.augmented and not loaded.validation.augmented and not loaded.test.augmented
    everything = torch.cat((loaded.train.inputs, loaded.validation.inputs))
    assert {image.numpy().tobytes() for image in everything} == {image.tobytes() for image in pixels["train"]}


def test_an_autoencoder_of_the_same_set_shares_the_file(workspace: Path) -> None:
    prepared(workspace)
    loaded = prepared(workspace, "other", task="autoencoder", augmentation="none")
    assert (loaded.input_shape, loaded.outputs, loaded.train.augmented) == ((3072,), 3072, False)
    assert len([*(workspace / "raw").glob("*.pt")]) == 1


def test_what_dvc_keeps_is_small_says_all_and_names_no_folder_of_the_user(workspace: Path) -> None:
    loaded = prepared(workspace)
    files = {path.name: path.read_bytes() for path in (workspace / "data" / "small").iterdir()}
    assert files.keys() == {"manifest.json", "split.pt"} and sum(map(len, files.values())) < 10_000
    manifest = json.loads(files["manifest.json"])
    assert manifest == loaded.manifest and str(workspace) not in files["manifest.json"].decode()
    assert manifest["read"] == {
        "form": "class folders", "png": 60, "jpg": 0, "lossless": True, "published_checksums": False,
        "order": "original",
    }  # fmt: skip
    assert manifest["examples_by_class"]["validation"] == dict.fromkeys(CIFAR.classes, 1)
    assert manifest["set"]["licence"] and manifest["set"]["made_by"]
    inputs = loaded.train.inputs.double() / 255
    assert manifest["mean"] == pytest.approx(inputs.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert manifest["std"] == pytest.approx(inputs.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_the_same_split_of_two_benchmarks_is_the_same_bytes(workspace: Path) -> None:
    prepared(workspace), prepared(workspace, "other")
    for file in ("manifest.json", "split.pt"):
        assert (workspace / "data/small" / file).read_bytes() == (workspace / "data/other" / file).read_bytes()


def test_images_are_read_once_for_all_benchmarks(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(workspace), prepared(workspace, "other", split_seed=1)
    assert capsys.readouterr().out.count("images read from class folders") == 1
    os.utime(workspace / "images" / "train" / "cat" / "0001.png", (1, 1))
    prepared(workspace)
    assert capsys.readouterr().out.count("images read from class folders") == 1


def test_examples_limits_training_and_validation_and_keeps_every_class_in_its_share(workspace: Path) -> None:
    loaded = prepared(workspace, examples=20, validation=0.5)
    for part in (loaded.train, loaded.validation):
        assert Counter(part.targets.tolist()) == dict.fromkeys(range(10), 1)
    assert len(loaded.test) == 20


@pytest.mark.parametrize("count", [1, 17, 160])
def test_a_subset_has_every_class_in_its_share_to_the_nearest_example(count: int) -> None:
    classes = [0] * 100 + [1] * 40 + [2] * 20
    rows = prepare.subset(classes, count, 0)
    assert len(set(rows)) == len(rows) == count
    found = Counter(classes[row] for row in rows)
    for label, size in enumerate((100, 40, 20)):
        assert abs(found[label] - count * size / 160) <= 1
    assert count == 160 or rows != prepare.subset(classes, count, 1)


@pytest.mark.parametrize("task", ["classification", "autoencoder"])
def test_a_network_trains_on_a_set_to_the_same_numbers_each_time(workspace: Path, task: str) -> None:
    loaded = prepared(workspace, task=task)
    model = {"name": "cnn", "channels": [4], "activation": "relu", "batch_norm": False}
    if task == "autoencoder":
        model = {"name": "autoencoder", "widths": [8], "activation": "tanh"}
    loss = "cross_entropy" if task == "classification" else "binary_cross_entropy"
    run = a_run(loss=loss, options={"lr": 0.05}, diagnostics="light", model=model)

    def train() -> list[dict[str, Any]]:
        network = models.build({**model, "init": "default", "gain": 1.0}, loaded.input_shape, loaded.outputs, 0)
        outcome = Training(run, loaded, 0, network).train(Listener())
        assert outcome.summary["status"] == "finished" and outcome.summary["test_score"] is not None
        return [{k: v for k, v in row.items() if not is_measured(k)} for row in [*outcome.history, *outcome.curvature]]

    first = train()
    assert first == train()
    assert first[4]["train_loss"] < first[0]["train_loss"]


# ---------------------------------------------------------------- lost, damaged, at once


def kept_file(workspace: Path) -> Path:
    (path,) = (workspace / "raw").glob("*.pt")
    return path


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:99999])])
def test_a_lost_file_is_made_again_when_training_needs_it(workspace: Path, damage: Any) -> None:
    before = prepared(workspace)
    path = kept_file(workspace)
    content = path.read_bytes()
    damage(path)
    assert torch.equal(data.load("small").train.inputs, before.train.inputs)
    assert path.read_bytes() == content


def test_one_altered_pixel_is_noticed(workspace: Path) -> None:
    before = prepared(workspace)
    path = kept_file(workspace)
    stored = torch.load(path)
    stored["pixels"]["train"][3, 0, 5, 5] += 1
    torch.save(stored, path)
    assert torch.equal(data.load("small").train.inputs, before.train.inputs)


def test_a_lost_file_whose_images_have_changed_is_named_with_the_remedy(workspace: Path) -> None:
    prepared(workspace)
    kept_file(workspace).unlink()
    (workspace / "images" / "order-train.txt").unlink()
    with pytest.raises(ConfigError, match=r"raw/cifar10-\w+\.pt: is missing, and .* prepare@small") as refused:
        data.load("small")
    assert "\n" not in str(refused.value)


def test_a_set_prepared_before_serves_without_the_folder(workspace: Path) -> None:
    prepared(workspace)
    prepare.make_split(SOURCE, "data/other", CIFAR, None)
    assert len(data.load("other").train) == 30


def test_a_split_that_was_altered_is_named(workspace: Path) -> None:
    prepared(workspace)
    path = workspace / "data" / "small" / "split.pt"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"split\.pt: is truncated or altered.*dvc repro"):
        data.load("small")


def one_of_several(workspace: Path, name: str) -> None:
    os.environ["DVC_ROOT"] = str(workspace)
    os.chdir(workspace)
    prepare.make_split(SOURCE, f"data/{name}", CIFAR, workspace / "images")


def test_processes_at_once_read_once_and_leave_one_whole_file(
    workspace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spawn = multiprocessing.get_context("fork")
    several = [spawn.Process(target=one_of_several, args=(workspace, f"b{k}")) for k in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join()
    assert [process.exitcode for process in several] == [0] * 4
    assert capfd.readouterr().out.count("images read") == 1
    assert len([*(workspace / "raw").iterdir()]) == 2  # the file and the lock
    assert all(len(data.load(f"b{k}").train) == 30 for k in range(4))


def test_what_a_killed_process_had_half_written_goes_when_the_set_is_needed_next(workspace: Path) -> None:
    def write_half(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def killed() -> None:
        Path.write_bytes = write_half  # type: ignore[method-assign]
        one_of_several(workspace, "small")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len([*(workspace / "raw").glob(".cifar10-*.pt.*")]) == 1
    prepared(workspace)
    assert {path.name for path in (workspace / "raw").iterdir()} == {kept_file(workspace).name, ".cifar10.lock"}


# ---------------------------------------------------------------- download, or what to do instead


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def served_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageSet]:
    """torchvision's addresses of MNIST are a refused one and a server of a small one."""
    from torchvision import datasets

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    known = official(DIGITS, tmp_path / "server", compressed=True)
    folder = tmp_path / "server" / known.home
    files = [(p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in sorted(folder.iterdir())]
    with served(folder) as address:
        monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/", address])
        monkeypatch.setattr(datasets.MNIST, "resources", files)
        yield known


def test_without_a_folder_the_set_is_downloaded_and_only_the_tensor_file_stays(
    tmp_path: Path, served_digits: ImageSet
) -> None:
    kept, checksum = imagestore.obtain(served_digits, None)
    assert torch.equal(kept.pixels["train"], torch.from_numpy(arrays(DIGITS)[0]["train"]))
    assert kept.facts["published_checksums"]
    names = {path.name for path in (tmp_path / "raw").iterdir()}
    assert names == {f"mnist-{checksum[:12]}.pt", ".mnist.lock"}


def test_a_download_with_another_checksum_is_refused(
    tmp_path: Path, served_digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    files = [(name, "0" * 32) for name, _ in datasets.MNIST.resources]
    monkeypatch.setattr(datasets.MNIST, "resources", files)
    with pytest.raises(
        ConfigError, match=r"MNIST: no image folder is named and the download of .* has another checksum"
    ):
        imagestore.obtain(served_digits, None)
    assert [path.name for path in (tmp_path / "raw").iterdir()] == [".mnist.lock"]


@pytest.mark.parametrize("folder", [None, "images"])
def test_an_address_that_says_nothing_is_given_up_and_the_remedy_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None
) -> None:
    from torchvision import datasets

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(download, "ANSWER_WITHIN", 0.3)
    images = tmp_path / folder if folder else None
    if images:
        images.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(
            datasets.CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/cifar-10-python.tar.gz"
        )
        start = time.monotonic()
        with pytest.raises(ConfigError) as refused:
            imagestore.obtain(CIFAR, images)
    assert time.monotonic() - start < 3
    line = str(refused.value)
    assert "\n" not in line and "127.0.0.1" not in line
    assert f"{images} holds no CIFAR-10" in line if images else "no image folder is named" in line
    for words in ("cifar-10-python.tar.gz", "{train,test}/CLASS/NNNN.png", "IMAGE_FOLDER", "image_folder"):
        assert words in line


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"no HTTP\r\n\r\n", "torchvision's addresses of it do not answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\n", "download of cifar-10-python.tar.gz broke off"),
    ],
    ids=["no HTTP", "cut off"],
)
def test_an_answer_that_is_no_http_or_breaks_off_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, words: str
) -> None:
    from torchvision import datasets

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(10_000)
            self.request.sendall(answer)

    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/cifar-10-python.tar.gz"
        monkeypatch.setattr(datasets.CIFAR10, "url", address)
        with pytest.raises(ConfigError, match=words):
            imagestore.obtain(CIFAR, None)
        server.shutdown()


# ---------------------------------------------------------------- the setting


def stage(workspace: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The stage prepare on the digits' workspace, as DVC starts it."""
    names = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-X", "importtime", "-m", "pipeline.prepare", "digits_cnn"]
    return subprocess.run(command, cwd=workspace, env=names, capture_output=True, text=True, check=False)


def with_params(workspace: Path, image_folder: str | None) -> None:
    """The committed params.yaml, with a benchmark turned into one on MNIST."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    values = yaml.load(ROOT / "params.yaml")
    values["image_folder"] = image_folder
    values["images"]["digits_cnn"] = {**SOURCE, "source": "mnist", "validation": 0.1, "augmentation": "none"}
    yaml.dump(values, workspace / "params.yaml")


@pytest.mark.parametrize(
    ("variable", "named"),
    [("nowhere", "IMAGE_FOLDER"), ("~nobody-has-this-name/x", "IMAGE_FOLDER"), ("", "image_folder")],
)
def test_a_setting_that_is_no_folder_is_refused_before_torch_is_imported(
    tmp_path: Path, variable: str, named: str
) -> None:
    with_params(tmp_path, "absent")
    ended = stage(tmp_path, IMAGE_FOLDER=variable, DVC_ROOT=str(tmp_path))
    *imports, line = ended.stderr.splitlines()
    assert ended.returncode == 2 and line.startswith(f"error: {named}: '{variable or 'absent'}' is no folder; expected")
    assert not [each for each in imports if each.endswith(" torch")]


def test_images_that_are_wrong_are_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    with_params(tmp_path, "images")
    class_folders(DIGITS, tmp_path / "images")
    ended = stage(tmp_path, IMAGE_FOLDER="", DVC_ROOT=str(tmp_path))
    assert ended.returncode == 2
    assert "images/train/0/0003: is missing; expected 5923 images, found 3" in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "data").exists() and not [*(tmp_path / "raw").glob("*.pt")]
