"""Claims about the reading of image sets: every form gives the same set, and whatever is wrong is one line."""

import io
import os
import pwd
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_sets import CIFAR, CIFAR_100, DIGITS, arrays, class_folders, encoded, halves, official, packed

from pipeline import imagefiles
from pipeline.checks import ConfigError
from pipeline.imagefiles import Reading
from pipeline.imagesets import SETS, ImageSet


def read(folder: Path, known: ImageSet) -> Reading | None:
    for form in imagefiles.forms(folder, known):
        if (reading := form.read()) is not None:
            return reading
    return None


def refusal(folder: Path, known: ImageSet = CIFAR) -> str:
    with pytest.raises(ConfigError) as refused:
        read(folder, known)
    assert "\n" not in str(refused.value) and "expected" in str(refused.value)
    return str(refused.value)


def folders_here(known: ImageSet, folder: Path) -> ImageSet:
    class_folders(known, folder)
    return known


def one_archive(known: ImageSet, folder: Path) -> ImageSet:
    packed(class_folders(known, folder / ".unpacked"), folder / "all.tar")
    return known


def two_archives(known: ImageSet, folder: Path) -> ImageSet:
    halves(known, folder, folder / ".unpacked")
    return known


def compressed(known: ImageSet, folder: Path) -> ImageSet:
    return official(known, folder, compressed=True)


def official_in_an_archive(known: ImageSet, folder: Path) -> ImageSet:
    """Those of MNIST as they are published: each compressed."""
    below = folder / ".unpacked"
    known = official(known, below, compressed=not known.label_key)
    packed(below / Path(known.home).parts[0], folder / "official.tar")
    return known


FORMS = {
    "class folders": folders_here,
    "one archive": one_archive,
    "two archives": two_archives,
    "official files": official,
    "compressed official files": compressed,
    "an archive of official files": official_in_an_archive,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("known", [CIFAR, DIGITS], ids=lambda known: known.name)
@pytest.mark.parametrize("where", ["", "images", "images/below"])
def test_every_form_gives_the_same_images_in_the_original_order(
    tmp_path: Path, known: ImageSet, form: str, where: str
) -> None:
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    reading = read(tmp_path, FORMS[form](known, tmp_path / where))
    assert reading is not None
    pixels, labels = arrays(known)
    for part in known.counts:
        assert reading.pixels[part].dtype == np.uint8 and reading.labels[part].dtype == np.int64
        np.testing.assert_array_equal(reading.pixels[part], pixels[part])
        np.testing.assert_array_equal(reading.labels[part], labels[part])
    assert reading.facts["lossless"] and reading.facts["order"] == "original"
    assert reading.facts["published_checksums"] == form.endswith("official files")


def test_without_lists_the_order_is_by_class_and_number(tmp_path: Path) -> None:
    class_folders(CIFAR, tmp_path, ordered=False)
    reading = read(tmp_path, CIFAR)
    assert reading is not None and reading.facts["order"] == "by class"
    pixels, labels = arrays(CIFAR)
    rows = np.argsort(labels["train"], kind="stable")
    np.testing.assert_array_equal(reading.pixels["train"], pixels["train"][rows])


def test_jpegs_are_counted_by_content_and_are_not_lossless(tmp_path: Path) -> None:
    class_folders(CIFAR, tmp_path, ordered=False)
    image = arrays(CIFAR)[0]["train"][0]
    (tmp_path / "train" / "cat" / "0000.png").write_bytes(encoded(image, "JPEG"))
    reading = read(tmp_path, CIFAR)
    assert reading is not None
    assert (reading.facts["png"], reading.facts["jpg"], reading.facts["lossless"]) == (59, 1, False)


def test_a_folder_with_other_things_holds_nothing(tmp_path: Path) -> None:
    class_folders(DIGITS, tmp_path / "digits")
    packed(tmp_path / "digits", tmp_path / "digits.tar")
    (tmp_path / "notes.txt").write_text("x")
    assert read(tmp_path, CIFAR) is None


SPLITS = {
    "whole": [[""]],
    "parts": [["train", "order-train.txt"], ["test", "order-test.txt"]],
    "order lists apart": [["order-train.txt", "order-test.txt"], ["train", "test"]],
    "no order lists": [["train", "test"]],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("other", [CIFAR_100, DIGITS], ids=lambda known: known.name)
def test_archives_of_two_sets_may_have_the_same_folders_at_the_top(tmp_path: Path, other: ImageSet, split: str) -> None:
    for known in (CIFAR, other):
        source = class_folders(known, tmp_path / ".unpacked" / known.name)
        for k, members in enumerate(SPLITS[split]):
            packed(source, tmp_path / f"{known.name}-{k}.tar", members, at_top=True)
    order = "by class" if split == "no order lists" else "original"
    for known in (CIFAR, other):
        reading = read(tmp_path, known)
        assert reading is not None and reading.facts["order"] == order
        pixels, labels = arrays(known)
        for part in known.counts:
            rows = np.argsort(labels[part], kind="stable") if order == "by class" else slice(None)
            np.testing.assert_array_equal(reading.pixels[part], pixels[part][rows])
            np.testing.assert_array_equal(reading.labels[part], labels[part][rows])


def test_order_lists_that_lie_apart_are_checked(tmp_path: Path) -> None:
    source = class_folders(CIFAR, tmp_path / ".unpacked")
    (source / "order-train.txt").write_text("")
    packed(source, tmp_path / "images.tar", ["train", "test"])
    packed(source, tmp_path / "lists.tar", ["order-train.txt", "order-test.txt"])
    assert "lists.tar:.unpacked/order-train.txt: does not list every image once" in refusal(tmp_path)


@contextmanager
def not_as_root() -> Iterator[None]:
    """As a user for whom there are folders that cannot be read."""
    if os.geteuid() != 0:
        yield
        return
    nobody = pwd.getpwnam("nobody").pw_uid
    os.setresuid(nobody, nobody, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("place", ["lost+found", "mine/lost+found"])
def test_a_folder_that_cannot_be_read_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    class_folders(CIFAR, tmp_path / "cifar10")
    packed(class_folders(DIGITS, tmp_path / ".unpacked"), tmp_path / "mnist.tar")
    (tmp_path / place / "below").mkdir(parents=True)
    (tmp_path / "another_users").symlink_to(tmp_path / place / "below")
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # whose parents may be root's alone
    (tmp_path / place).chmod(0o000)
    try:
        with not_as_root():
            with pytest.raises(PermissionError):
                os.listdir(place)
            forms = [next(imagefiles.forms(Path("."), known)) for known in (CIFAR, DIGITS)]
            assert [len(form.files) for form in forms] == [62, 1]
            readings = [form.read() for form in forms]
    finally:
        (tmp_path / place).chmod(0o755)
    for known, reading in zip((CIFAR, DIGITS), readings, strict=True):
        assert reading is not None
        np.testing.assert_array_equal(reading.pixels["test"], arrays(known)[0]["test"])


def test_the_exact_form_is_preferred(tmp_path: Path) -> None:
    known = official(CIFAR, tmp_path)
    class_folders(CIFAR, tmp_path / "cifar10")
    reading = read(tmp_path, known)
    assert reading is not None and reading.facts["form"] == "official files"


def test_a_fingerprint_follows_the_files_and_not_other_files(tmp_path: Path) -> None:
    class_folders(CIFAR, tmp_path)
    (first,) = (form.fingerprint() for form in imagefiles.forms(tmp_path, CIFAR))
    (tmp_path / "readme.txt").write_text("x")
    assert [form.fingerprint() for form in imagefiles.forms(tmp_path, CIFAR)] == [first]
    os.utime(tmp_path / "train" / "cat" / "0001.png", (1, 1))
    assert [form.fingerprint() for form in imagefiles.forms(tmp_path, CIFAR)] != [first]


# ---------------------------------------------------------------- what is wrong is named


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_smaller(path: Path) -> None:
    path.write_bytes(encoded(np.zeros((3, 16, 20), np.uint8)))


def make_grey(path: Path) -> None:
    path.write_bytes(encoded(np.zeros((1, 32, 32), np.uint8)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_off, "0002.png: is corrupt"),
        (flip_a_bit, "0002.png: is corrupt"),
        (lambda path: path.write_bytes(b""), "0002.png: is corrupt"),
        (lambda path: path.write_text("not an image"), "0002.png: is corrupt"),
        (make_smaller, "0002.png: is RGB 20 x 16; expected RGB 32 x 32"),
        (make_grey, "0002.png: is grey 32 x 32; expected RGB 32 x 32"),
        (Path.unlink, "0002: is missing; expected 4 images, found 3"),
        (lambda path: path.rename(path.with_name("0009.png")), "order-train.txt: does not list every image once"),
        (lambda path: path.with_name("0004.png").write_bytes(path.read_bytes()), "0004.png: is one image too many"),
        (lambda path: path.with_suffix(".jpg").write_bytes(path.read_bytes()), "0002.png: is one image too many"),
    ],
)
@pytest.mark.parametrize("form", ["folders", "archive"])
def test_a_wrong_image_is_named(tmp_path: Path, damage: Callable[[Path], None], words: str, form: str) -> None:
    source = class_folders(CIFAR, tmp_path / "cifar10")
    damage(source / "train" / "cat" / "0002.png")
    place = tmp_path
    if form == "archive":
        place = tmp_path / "packed"
        place.mkdir()
        packed(source, place / "cifar10.tar.gz")
    assert words in refusal(place)
    assert "cifar10" in refusal(place)


def test_a_missing_class_and_an_unknown_one_are_named(tmp_path: Path) -> None:
    class_folders(CIFAR, tmp_path)
    (tmp_path / "test" / "cat").rename(tmp_path / "elsewhere")
    assert "test/cat: is missing; expected 2 images, found 0" in refusal(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "test" / "catt")
    assert "'catt' is no class of CIFAR-10; nearest: cat" in refusal(tmp_path)


def test_one_archive_of_two_is_named_as_incomplete(tmp_path: Path) -> None:
    halves(CIFAR, tmp_path, tmp_path / ".unpacked")
    (tmp_path / "half-1.tar.gz").unlink()
    assert "half-0.tar.gz:train/dog: is missing; expected 4 images" in refusal(tmp_path)


def test_an_image_that_is_in_two_archives_is_named(tmp_path: Path) -> None:
    halves(CIFAR, tmp_path, tmp_path / ".unpacked")
    (tmp_path / "half-00.tar.gz").write_bytes((tmp_path / "half-0.tar.gz").read_bytes())
    assert "half-00.tar.gz:cifar10/train/airplane/0000.png: is there twice" in refusal(tmp_path)


def test_archives_after_those_that_make_the_set_whole_are_not_read(tmp_path: Path) -> None:
    halves(CIFAR, tmp_path, tmp_path / ".unpacked")
    (tmp_path / "other.tar.gz").write_text("no archive")
    assert read(tmp_path, CIFAR) is not None


@pytest.mark.parametrize("damage", [cut_off, lambda path: path.write_text("no archive")])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    packed(class_folders(CIFAR, tmp_path / ".unpacked"), tmp_path / "cifar10.tar.gz")
    damage(tmp_path / "cifar10.tar.gz")
    with pytest.raises(ConfigError, match=r"cifar10\.tar\.gz: is corrupt or cut off"):
        read(tmp_path, CIFAR)


def test_an_archive_that_the_machine_does_not_give_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "cifar10.tar.gz").symlink_to("/proc/self/mem")  # a file that nobody can read from its beginning
    with pytest.raises(ConfigError, match=r"cifar10\.tar\.gz: cannot be read: Input/output error$"):
        read(tmp_path, CIFAR)


@pytest.mark.parametrize("kind", ["path", "link", "device"])
def test_an_archive_that_reaches_out_of_its_folder_is_refused(tmp_path: Path, kind: str) -> None:
    packed(class_folders(CIFAR, tmp_path / ".unpacked"), tmp_path / "cifar10.tar")
    member = tarfile.TarInfo("cifar10/../../../escaped.png" if kind == "path" else "cifar10/escaped.png")
    member.type = {"path": tarfile.REGTYPE, "link": tarfile.SYMTYPE, "device": tarfile.CHRTYPE}[kind]
    member.linkname = "../../../etc/passwd" if kind == "link" else ""
    with tarfile.open(tmp_path / "cifar10.tar", "a") as tar:
        tar.addfile(member, io.BytesIO())
    assert "cifar10.tar: is refused: " in refusal(tmp_path) and "escaped" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["data_batch_3", "train-labels-idx1-ubyte"])
def test_an_official_file_that_is_missing_or_altered_is_named(tmp_path: Path, name: str) -> None:
    known = official(CIFAR if "batch" in name else DIGITS, tmp_path)
    path = tmp_path / known.home / name
    flip_a_bit(path)
    assert f"{name}: is corrupt or another file, its MD5 is " in refusal(tmp_path, known)
    path.unlink()
    assert f"{name}: is missing; expected {known.accepted}" in refusal(tmp_path, known)


def test_official_files_of_a_wrong_count_are_named(tmp_path: Path) -> None:
    known = official(CIFAR, tmp_path)
    other = replace(known, counts={"train": (5, 3, *known.counts["train"][2:]), "test": known.counts["test"]})
    assert "the train files have 40 images" in refusal(tmp_path, other)


def test_checksums_and_names_are_those_that_torchvision_knows() -> None:
    from torchvision import datasets

    for known in SETS.values():
        source = getattr(datasets, known.torchvision)
        if known.label_key:
            assert [[*each] for each in known.files["train"].items()] == source.train_list
            assert [[*each] for each in known.files["test"].items()] == source.test_list
            assert known.home == source.base_folder
        else:
            assert {f"{file}.gz" for file in known.file_names} == {file for file, _ in source.resources}
        assert len(known.classes) == len(set(known.classes)) == len(known.counts["train"])
        assert list(known.classes) == sorted(known.classes)
