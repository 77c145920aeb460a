"""Small stand-ins of MNIST and CIFAR-10 in every form they are found in: few images, the real names and layouts."""

import gzip
import hashlib
import io
import pickle
import shutil
import struct
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.imagesets import CIFAR10, CIFAR100, MNIST, ImageSet

CIFAR = replace(CIFAR10, counts={"train": (4,) * 10, "test": (2,) * 10})
CIFAR_100 = replace(CIFAR100, counts={"train": (2,) * 100, "test": (1,) * 100})
DIGITS = replace(MNIST, counts={"train": (3,) * 10, "test": (1,) * 10})


def arrays(known: ImageSet) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Pixels [N, C, H, W] and labels [N] by part, in a mixed order of classes."""
    stream = np.random.default_rng(0)
    pixels, labels = {}, {}
    for part, counts in known.counts.items():
        labels[part] = stream.permutation(np.repeat(np.arange(len(counts)), counts))
        pixels[part] = stream.integers(0, 256, (len(labels[part]), *known.shape), dtype=np.uint8)
    return pixels, labels


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An image [C, H, W] as a file's content."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(buffer, kind)
    return buffer.getvalue()


def class_folders(known: ImageSet, folder: Path, *, ordered: bool = True) -> Path:
    """folder/{train,test}/CLASS/NNNN.png, numbered within the class, and the lists of the original order."""
    pixels, labels = arrays(known)
    for part in known.counts:
        lines, seen = [], [0] * len(known.classes)
        for image, label in zip(pixels[part], labels[part], strict=True):
            path = f"{part}/{known.classes[label]}/{seen[label]:04d}.png"
            seen[label] += 1
            lines.append(path)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(encoded(image))
        if ordered:
            (folder / f"order-{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def packed(folder: Path, archive: Path, members: Iterable[str] | None = None, *, at_top: bool = False) -> None:
    """A tar of `folder` under its name or at the top, or of some paths in it; compressed as the name says."""
    with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as tar:
        for member in sorted(members) if members is not None else [""]:
            tar.add(folder / member, f"{'.' if at_top else folder.name}/{member}".rstrip("/"))


def halves(known: ImageSet, folder: Path, temporary: Path) -> None:
    """Class folders in two archives, the first with the order lists."""
    whole = class_folders(known, temporary / known.name)
    for k, classes in enumerate((known.classes[:5], known.classes[5:])):
        members = [f"{part}/{name}" for part in known.counts for name in classes]
        lists = [f"order-{part}.txt" for part in known.counts] if k == 0 else []
        packed(whole, folder / f"half-{k}.tar.gz", members + lists)
    shutil.rmtree(whole)


def official(known: ImageSet, folder: Path, *, compressed: bool = False) -> ImageSet:
    """The official files in torchvision's layout; the set with their checksums."""
    pixels, labels = arrays(known)
    place = folder / known.home
    place.mkdir(parents=True)
    files: dict[str, dict[str, str]] = {}
    for part, names in known.files.items():
        if known.label_key:
            rows = np.array_split(np.arange(len(labels[part])), len(names))
            batches = [
                {"data": pixels[part][each].reshape(len(each), -1), known.label_key: labels[part][each].tolist()}
                for each in rows
            ]
            contents = [pickle.dumps(batch, protocol=2) for batch in batches]
        else:
            images, classes = pixels[part][:, 0], labels[part].astype(np.uint8)
            contents = [
                struct.pack(">IIII", 0x803, *images.shape) + images.tobytes(),
                struct.pack(">II", 0x801, len(classes)) + classes.tobytes(),
            ]
        files[part] = {}
        for name, content in zip(names, contents, strict=True):
            files[part][name] = hashlib.md5(content).hexdigest()
            if compressed and not known.label_key:
                (place / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (place / name).write_bytes(content)
    if compressed and known.label_key:
        packed(place, folder / "cifar-10-python.tar.gz")
        shutil.rmtree(place)
    return replace(known, files=files)
