"""Where a prepared image set is kept: one tensor file, `raw/<set>-<checksum>.pt` of the main workspace, for all
benchmarks that use it and for temporary and queued experiments too.

The one idea: the name is the checksum of pixels and labels. Whoever holds a manifest knows which file he needs and
whether it is whole; if it is gone, it is made again from where it came from, and compared.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import imagefiles, store
from pipeline.checks import ConfigError
from pipeline.download import Unavailable, download
from pipeline.imagesets import PARTS, ImageSet

_DIGITS = 12  # of the checksum, in the file's name


@dataclass(frozen=True)
class Kept:
    """pixels: uint8 [N, C, H, W], labels: int64 [N], of the parts train and test.

    `facts` say how they were read, `origin` from what: the fingerprint of the files, or "download".
    """

    pixels: dict[str, Tensor]
    labels: dict[str, Tensor]
    facts: dict[str, Any]
    origin: str

    def checksum(self) -> str:
        """SHA-256 of all pixels and labels."""
        digest = hashlib.sha256()
        for part in PARTS:
            for tensor in (self.pixels[part], self.labels[part]):
                digest.update(f"{part} {list(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.numpy().data)
        return digest.hexdigest()


def obtain(known: ImageSet, folder: Path | None) -> tuple[Kept, str]:
    """The set and its checksum: from `folder` if it holds the set, else as it was kept before, else by download.

    What was read once from files that have not changed is not read again. Raises ConfigError, OSError.
    """
    with _turn(known):
        earlier = {path: kept for path in sorted(_raw().glob(f"{known.name}-*.pt")) if (kept := _open(path))}
        for form in imagefiles.forms(folder, known) if folder else ():
            origin = form.fingerprint()
            for path, kept in earlier.items():
                if kept.origin == origin and _is_named_by(path, checksum := kept.checksum()):
                    return kept, checksum
            start = time.monotonic()
            if (reading := form.read()) is not None:
                return _keep(known, reading, origin, time.monotonic() - start)
        for path, kept in sorted(earlier.items(), key=lambda each: _exactness(each[1]), reverse=True):
            if _is_named_by(path, checksum := kept.checksum()):
                return kept, checksum
        return _by_download(known, folder)


def kept_or_made_again(known: ImageSet, checksum: str, remedy: str) -> Kept:
    """The set of that checksum: as it is kept, else made again from where it came from. Raises ConfigError."""
    path = path_of(known, checksum)
    kept = _open(path)
    if kept is not None and kept.checksum() == checksum:
        return kept
    state = f"{path}: is {'damaged' if path.exists() else 'missing'}"
    try:
        made, found = obtain(known, imagefiles.image_folder())
    except ConfigError as error:
        raise ConfigError(f"{state}, and cannot be made again: {error}") from None
    if found != checksum:
        raise ConfigError(f"{state}, and the {known.title} that can be had now has other pixels or order; {remedy}")
    return made


def path_of(known: ImageSet, checksum: str) -> Path:
    return _raw() / f"{known.name}-{checksum[:_DIGITS]}.pt"


def replace(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _raw() -> Path:
    return store.workspace() / "raw"


def _exactness(kept: Kept) -> tuple[bool, bool]:
    return kept.facts["published_checksums"], kept.facts["lossless"]


def _is_named_by(path: Path, checksum: str) -> bool:
    return path.stem.rpartition("-")[2] == checksum[:_DIGITS]


@contextlib.contextmanager
def _turn(known: ImageSet) -> Iterator[None]:
    """Have the set for oneself: of two processes that need it at once, the second finds what the first has made."""
    _raw().mkdir(parents=True, exist_ok=True)
    with open(_raw() / f".{known.name}.lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in _raw().glob(f".{known.name}-*.pt.*"):  # by a process that was killed: who writes one has the lock
            left.unlink()
        yield


def _open(path: Path) -> Kept | None:
    """What a file holds, mapped into memory rather than read; None when it is missing or damaged."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return Kept(content["pixels"], content["labels"], content["facts"], content["origin"])
    except Exception:  # of a damaged file torch raises all sorts of errors
        return None


def _keep(known: ImageSet, reading: imagefiles.Reading, origin: str, seconds: float) -> tuple[Kept, str]:
    pixels = {part: torch.from_numpy(values) for part, values in reading.pixels.items()}
    labels = {part: torch.from_numpy(values) for part, values in reading.labels.items()}
    kept = Kept(pixels, labels, reading.facts, origin)
    checksum = kept.checksum()
    buffer = io.BytesIO()
    torch.save({"pixels": pixels, "labels": labels, "facts": reading.facts, "origin": origin}, buffer)
    replace(path_of(known, checksum), buffer.getvalue())
    images = sum(len(values) for values in pixels.values())
    print(f"{known.title}: {images} images read from {reading.facts['form']} in {seconds:.1f} s", flush=True)
    return kept, checksum


def _by_download(known: ImageSet, folder: Path | None) -> tuple[Kept, str]:
    """Fetched into a folder that is gone afterwards: what is kept is the tensor file."""
    place = _raw() / f".{known.name}.download"
    start = time.monotonic()
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    place.mkdir()
    try:
        download(known, place)
        form = next(imagefiles.forms(place, known))
        reading = form.read()
    except Unavailable as error:
        held = f"{folder} holds no {known.title}" if folder else "no image folder is named"
        raise ConfigError(
            f"{known.title}: {held} and {error}; put {known.accepted}, or class folders {{train,test}}/CLASS/NNNN.png, "
            f"or tar archives of either into a folder and name it by {imagefiles.VARIABLE} or params.yaml's "
            "image_folder (docs/data.md)"
        ) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
    assert reading is not None
    return _keep(known, reading, "download", time.monotonic() - start)
