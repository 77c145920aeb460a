"""Reads MNIST, CIFAR-10 and CIFAR-100 from a folder of the user's, in whichever form they lie there.

The one idea: a form is found by what is inside, and all that is wrong with it is one line naming the file, before a
tensor is made of it. The forms, the most exact first: the official files in torchvision's layout, compressed or not
(compared with the published checksums); class folders `{train,test}/CLASS/NNNN.png|jpg`; tar archives of either, one
or several. Each lies at the top or a folder or two below. `order-train.txt` and `order-test.txt` beside the class
folders, paths one a line, give the examples their original order. `docs/data.md` has the same for users.
"""

import gzip
import hashlib
import io
import lzma
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from pipeline.checks import ConfigError, nearest
from pipeline.config import load
from pipeline.imagesets import PARTS, ImageSet
from pipeline.store import workspace

VARIABLE = "IMAGE_FOLDER"
ENDINGS = (".png", ".jpg", ".jpeg")
ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2")
LARGEST_ARCHIVE = 2**30  # bytes; a larger one holds something else, and is not searched
_CUT_OFF = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError)


def image_folder() -> Path | None:
    """The folder that IMAGE_FOLDER or else params.yaml's `image_folder` names; a relative path is one below the main
    workspace. Raises ConfigError when it is no folder.
    """
    named, value = VARIABLE, os.environ.get(VARIABLE)
    if not value:
        named, value = "image_folder", load().image_folder
    if not value:
        return None
    folder = workspace() / os.path.expanduser(value)
    if not folder.is_dir():
        raise ConfigError(f"{named}: {value!r} is no folder; expected the one that holds the images (docs/data.md)")
    return folder


@dataclass(frozen=True)
class Reading:
    """pixels: uint8 [N, C, H, W], labels: int64 [N], of the parts train and test; facts: how they were read."""

    pixels: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A place where the set may be; `read` is None when nothing of the set is there after all."""

    files: list[Path]
    read: Callable[[], Reading | None]

    def fingerprint(self) -> str:
        """Changes when a file does, or its time; no content is read."""
        digest = hashlib.sha256()
        for path in self.files:
            status = path.stat()
            digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file in a folder or an archive: its name for a message, and its content."""

    where: str
    content: Callable[[], bytes]


@dataclass
class Classes:
    """Image files by part, class and name, and the order lists by part."""

    images: dict[str, dict[str, dict[str, Entry]]] = field(default_factory=lambda: {part: {} for part in PARTS})
    order: dict[str, Entry] = field(default_factory=dict)

    def add(self, part: str, name: str, file: str, entry: Entry) -> None:
        files = self.images[part].setdefault(name, {})
        if file in files:
            raise ConfigError(f"{entry.where}: is there twice, also as {files[file].where}; expected once")
        files[file] = entry

    def entries(self) -> Iterator[Entry]:
        yield from self.order.values()
        for classes in self.images.values():
            for files in classes.values():
                yield from files.values()

    def complete(self, known: ImageSet) -> bool:
        """Whether nothing can be missing: the order lists and as many images as the set has."""
        images = sum(len(files) for classes in self.images.values() for files in classes.values())
        return self.order.keys() == set(PARTS) and images >= sum(map(sum, known.counts.values()))

    def belong_to(self, known: ImageSet) -> bool:
        """Whether at least half of the class names are the set's."""
        return _are_of({name for classes in self.images.values() for name in classes}, known)

    def may_order(self, known: ImageSet) -> bool:
        """Whether there are order lists alone, and they name no other set's classes."""
        if any(self.images.values()):
            return False
        names = {path.split("/")[1] for entry in self.order.values() for path in _listed(entry) if path.count("/") == 2}
        return not names or _are_of(names, known)


def _are_of(names: set[str], known: ImageSet) -> bool:
    return bool(names) and 2 * len(names & set(known.classes)) >= len(names)


def forms(folder: Path, known: ImageSet) -> Iterator[Form]:
    """The places in `folder` where the set may be, the most exact first. Raises ConfigError for what is damaged."""
    below = _readable_folders(folder)
    places = [folder, *below, *(inner for each in below for inner in _readable_folders(each))]
    for place in (folder, *(each / known.home for each in places)):
        official = {file: path for file in known.file_names if (path := _either(place / file))}
        if official and (place != folder or len(official) == len(known.file_names)):
            entries = {file: Entry(str(path), path.read_bytes) for file, path in official.items()}
            yield Form(sorted(official.values()), partial(official_files, entries, known, str(place)))
    for place in sorted(places, key=lambda each: each.name != known.name):
        found = _class_folders(place) if (place / "train").is_dir() else Classes()
        if found.belong_to(known):
            paths = [Path(entry.where) for entry in found.entries()]
            yield Form(paths, partial(class_images, found, known, f"{place}/", "class folders"))
    archives = sorted(path for each in places for path in _files(each) if path.name.endswith(ARCHIVES))
    archives = [path for path in archives if path.stat().st_size <= LARGEST_ARCHIVE]
    if archives:
        yield Form(archives, partial(from_archives, archives, known))


# ---------------------------------------------------------------- the official files


def official_files(entries: dict[str, Entry], known: ImageSet, place: str) -> Reading:
    """The set from its official files, each compared with its published checksum."""
    pixels, labels = {}, {}
    for part, files in known.files.items():
        contents = {}
        for file, md5 in files.items():
            if file not in entries:
                raise ConfigError(f"{place}/{file}: is missing; expected {known.accepted}")
            contents[file] = _published(entries[file], md5)
        pixels[part], labels[part] = _pickles(contents, known) if known.label_key else _idx(contents)
        counts = tuple(np.bincount(labels[part], minlength=len(known.classes)).tolist())
        if counts != known.counts[part] or pixels[part].shape != (len(labels[part]), *known.shape):
            raise ConfigError(
                f"{place}: the {part} files have {len(pixels[part])} images of shape {pixels[part].shape[1:]}, "
                f"{list(counts)} by class; expected {known.size}, {list(known.counts[part])}"
            )
    facts = {"form": "official files", "lossless": True, "published_checksums": True, "order": "original"}
    return Reading(pixels, labels, facts)


def _published(entry: Entry, md5: str) -> bytes:
    content = entry.content()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except _CUT_OFF as error:
            raise ConfigError(f"{entry.where}: is corrupt or cut off: {_reason(error)}") from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ConfigError(f"{entry.where}: is corrupt or another file, its MD5 is {found}; expected {md5}")
    return content


def _idx(contents: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels from IDX files: a magic number, the sizes, all big-endian, then the bytes."""
    pixels = labels = np.empty(0, np.uint8)
    for content in contents.values():
        dimensions = content[3]
        sizes = struct.unpack_from(f">{dimensions}I", content, 4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)
        if dimensions == 3:
            pixels = values[:, None]
        else:
            labels = values
    return pixels.copy(), labels.astype(np.int64)


def _pickles(contents: dict[str, bytes], known: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels from the python batches, which are known to the byte and so safe to unpickle."""
    batches = [pickle.loads(content, encoding="latin1") for content in contents.values()]
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, *known.shape)
    return pixels, np.concatenate([np.asarray(batch[known.label_key], np.int64) for batch in batches])


# ---------------------------------------------------------------- images in class folders


def class_images(found: Classes, known: ImageSet, place: str, form: str) -> Reading:
    """The set from its single images, every one of them decoded and checked."""
    pixels, labels, kinds = {}, {}, {"PNG": 0, "JPEG": 0}
    chosen = {part: _arranged(found, known, part, place) for part in PARTS}
    for part, entries in chosen.items():
        pixels[part] = np.empty((len(entries), *known.shape), np.uint8)
        labels[part] = np.array([label for _, label in entries], np.int64)
        for row, (entry, _) in enumerate(entries):
            kinds[_decode(entry, known, pixels[part][row])] += 1
    facts = {
        "form": form,
        "png": kinds["PNG"],
        "jpg": kinds["JPEG"],
        "lossless": kinds["JPEG"] == 0,
        "published_checksums": False,
        "order": "original" if found.order.keys() == set(PARTS) else "by class",
    }
    return Reading(pixels, labels, facts)


def _arranged(found: Classes, known: ImageSet, part: str, place: str) -> list[tuple[Entry, int]]:
    """The images of a part with their labels: in the listed order, else by class and number."""
    classes = found.images[part]
    for name, images in classes.items():
        if name not in known.classes:
            where = next(iter(images.values())).where
            raise ConfigError(
                f"{where}: {name!r} is no class of {known.title}{nearest(name, known.classes)}; "
                f"expected {len(known.classes)} classes, from {known.classes[0]} to {known.classes[-1]}"
            )
    by_class: list[tuple[str, tuple[Entry, int]]] = []
    for label, (name, count) in enumerate(zip(known.classes, known.counts[part], strict=True)):
        files = sorted(classes.get(name, {}), key=_number)
        if len(files) < count:
            absent = _absent(files, count)
            raise ConfigError(f"{place}{part}/{name}{absent}: is missing; expected {count} images, found {len(files)}")
        if len(files) > count:
            where = classes[name][_surplus(files, count)].where
            raise ConfigError(f"{where}: is one image too many; expected {count}, found {len(files)}")
        by_class += [(f"{part}/{name}/{file}", (classes[name][file], label)) for file in files]
    if part not in found.order:
        return [image for _, image in by_class]
    ordered, listed = dict(by_class), _listed(found.order[part])
    if sorted(listed) != sorted(ordered):
        wrong = sorted(set(listed) ^ set(ordered)) or [line for line in listed if listed.count(line) > 1]
        raise ConfigError(
            f"{found.order[part].where}: does not list every image once, see {wrong[0]}; expected the "
            f"{len(ordered)} paths {part}/CLASS/NNNN of the images, one a line"
        )
    return [ordered[path] for path in listed]


def _listed(order: Entry) -> list[str]:
    """The paths PART/CLASS/FILE of an order list."""
    lines = order.content().decode(errors="replace").splitlines()
    return ["/".join(PurePosixPath(line.strip()).parts[-3:]) for line in lines if line.strip()]


def _number(file: str) -> tuple[float, str]:
    stem = file.rpartition(".")[0]
    return (int(stem) if stem.isdigit() else float("inf"), file)


def _absent(files: list[str], count: int) -> str:
    """The first number without an image, as far as the names are numbers."""
    stems = {file.rpartition(".")[0] for file in files}
    if not all(stem.isdigit() for stem in stems) or not stems:
        return ""
    width = len(min(stems, key=len))
    return "/" + next(stem for number in range(count) if (stem := f"{number:0{width}d}") not in stems)


def _surplus(files: list[str], count: int) -> str:
    """The first image whose number is there before or is out of range, or else the last."""
    numbers = [_number(file)[0] for file in files]
    return next((file for k, file in enumerate(files) if numbers[k] >= count or numbers[k] in numbers[:k]), files[-1])


def _decode(entry: Entry, known: ImageSet, target: np.ndarray) -> str:
    """Write the image's pixels into `target` [C, H, W]; PNG or JPEG, by content."""
    content = entry.content()
    channels, height, width = known.shape
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            image.verify()  # a PNG's checksums, which decoding skips
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            kind, mode, size = str(image.format), image.mode, image.size
            fits = size == (width, height) and mode == ("RGB" if channels == 3 else "L")
            values = np.asarray(image) if fits else None
    except Exception as error:  # a damaged file makes the decoder raise all sorts of errors
        raise ConfigError(f"{entry.where}: is corrupt: {_reason(error)}; expected {known.size}") from None
    if values is None:
        found = {"L": "grey", "1": "black and white"}.get(mode, mode)
        raise ConfigError(f"{entry.where}: is {found} {size[0]} x {size[1]}; expected {known.size}")
    target[:] = values.transpose(2, 0, 1) if channels == 3 else values
    return kind


# ---------------------------------------------------------------- archives and folders


def from_archives(archives: list[Path], known: ImageSet) -> Reading | None:
    """The set from one or several tars, by name until it is complete: official files where there are any, else class
    folders, over all archives.

    Nothing is unpacked to disk, yet every member passes the filter that refuses paths out of the folder and devices.
    """
    official: dict[str, Entry] = {}
    found: dict[tuple[Path, str], Classes] = {}  # by archive and folder in it: two sets may both be at the top
    for archive in archives:
        for name, content in _members(archive):
            path, where = PurePosixPath(name), f"{archive}:{name}"
            file = path.name.removesuffix(".gz")
            if file in known.file_names and str(path.parent).endswith(known.home):
                official[file] = _in_memory(where, content())
            elif path.name in [f"order-{part}.txt" for part in PARTS]:
                part = path.stem.removeprefix("order-")
                found.setdefault((archive, str(path.parent)), Classes()).order[part] = _in_memory(where, content())
            elif len(path.parts) > 2 and path.parts[-3] in PARTS and path.name.lower().endswith(ENDINGS):
                part, name = path.parts[-3:-1]
                image = _in_memory(where, content() if name in known.classes else b"")
                found.setdefault((archive, str(path.parents[2])), Classes()).add(part, name, path.name, image)
        whole = _together(found, known)
        if len(official) == len(known.file_names) or whole.complete(known):
            break
    if official:
        return official_files(official, known, ", ".join(map(str, archives)))
    if not whole.belong_to(known):
        return None
    sources = sorted({entry.where.partition(":")[0] for entry in whole.entries()})
    return class_images(whole, known, f"{', '.join(sources)}:", "tar archives")


def _together(found: dict[tuple[Path, str], Classes], known: ImageSet) -> Classes:
    """What is the set's in several archives, as in one folder; order lists may lie in an archive without images."""
    images = {key: each for key, each in found.items() if each.belong_to(known)}
    folders = {folder for _, folder in images}
    lists = [each for (_, folder), each in found.items() if folder in folders and each.may_order(known)]
    whole = Classes()
    for each in [*lists, *images.values()]:
        whole.order.update(each.order)
        for part, classes in each.images.items():
            for name, files in classes.items():
                for file, entry in files.items():
                    whole.add(part, name, file, entry)
    return whole


def _in_memory(where: str, data: bytes) -> Entry:
    return Entry(where, lambda: data)


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names and contents of the files in a tar; a content has to be asked for before the next name."""

    def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        with _named(archive):
            file = tar.extractfile(member)
            return file.read() if file else b""

    with _named(archive), tarfile.open(archive, "r|*") as tar:
        for member in tar:
            if _within(member).isfile():
                yield member.name, partial(content, tar, member)


class _OutsideError(tarfile.TarError):
    """A member that is no file or folder within the archive."""


_FILTER_ERROR: type[tarfile.TarError] = getattr(tarfile, "FilterError", _OutsideError)


def _within(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A member that lies within the archive, by `tarfile.data_filter`; Python before 3.11.4 has no such filter."""
    if hasattr(tarfile, "data_filter"):
        return tarfile.data_filter(member, ".")
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
        raise _OutsideError(f"{member.name!r} is no file within the archive")
    return member


@contextmanager
def _named(archive: Path) -> Iterator[None]:
    """What is wrong with an archive, in one line with its name."""
    try:
        yield
    except _FILTER_ERROR as error:
        raise ConfigError(f"{archive}: is refused: {_reason(error)}; expected files within the archive only") from None
    except _CUT_OFF as error:
        if isinstance(error, OSError) and error.errno is not None:  # of this machine: no permission, a broken disk
            raise ConfigError(f"{archive}: cannot be read: {error.strerror}") from None
        raise ConfigError(f"{archive}: is corrupt or cut off: {_reason(error)}") from None


def _class_folders(place: Path) -> Classes:
    found = Classes()
    for part in PARTS:
        for folder in _folders(place / part) if (place / part).is_dir() else ():
            for path in _files(folder):
                if path.name.lower().endswith(ENDINGS):
                    found.add(part, folder.name, path.name, Entry(str(path), path.read_bytes))
        if (listed := place / f"order-{part}.txt").is_file():
            found.order[part] = Entry(str(listed), listed.read_bytes)
    return found


def _either(path: Path) -> Path | None:
    """The file as it is, or compressed."""
    for each in (path, path.with_name(f"{path.name}.gz")):
        if each.is_file():
            return each
    return None


def _readable_folders(place: Path) -> list[Path]:
    """The folders in it, but for those that cannot be read, like a disk's lost+found."""
    return [each for each in _folders(place) if os.access(each, os.R_OK | os.X_OK)]


def _folders(place: Path) -> list[Path]:
    """A link to what may not be seen is left out, where the entry's own `is_dir` raises."""
    with os.scandir(place) as entries:
        return sorted(Path(entry.path) for entry in entries if os.path.isdir(entry) and not entry.name.startswith("."))


def _files(place: Path) -> list[Path]:
    """Like `_folders`."""
    with os.scandir(place) as entries:
        return sorted(Path(entry.path) for entry in entries if os.path.isfile(entry) and not entry.name.startswith("."))


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
