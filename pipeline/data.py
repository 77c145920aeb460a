"""Data sets on disk and on the device: what a stage leaves in `data/<benchmark>`, and how training reads it.

Small sets (planted, digits) are one tensor file and its manifest there. Of the image sets only manifest and split are
there, kilobytes; the images are one file for all benchmarks (`pipeline.imagestore`), stay bytes on the device and
become numbers a batch at a time. The same examples always make the same bytes, a file is there whole or not at all,
and `load` compares it with the manifest's checksum.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import augmentation, imagestore
from pipeline.checks import ConfigError
from pipeline.imagesets import SETS, ImageSet


@dataclass(frozen=True)
class Split:
    """inputs: [N, *input_shape] float32; targets: [N] int64 classes, or [N, outputs] float32.

    `augmented` says whether training batches want `draws`.
    """

    inputs: Tensor
    targets: Tensor
    augmented: bool = False

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, rows: Tensor | slice, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some rows, on the device of `inputs`, ready for a network.

        `draws` [rows, 3] are what `pipeline.augmentation.draw` drew for them.
        """
        return self.inputs[rows], self.targets[rows]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All examples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size))

    def subset(self, rows: Tensor) -> "Split":
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows])


@dataclass(frozen=True, kw_only=True)
class Images(Split):
    """inputs: [N, C, H, W] uint8; targets: [N] int64 classes; a batch has float32 inputs.

    Of a classifier these are images, normalised by `mean` and `std` [C] (of pixels in [0, 1]); of an autoencoder
    [N, C * H * W] pixels in [0, 1], which are the targets as well.
    """

    mean: Tensor
    std: Tensor
    task: str

    def batch(self, rows: Tensor | slice, draws: Tensor | None = None) -> tuple[Tensor, Tensor]:
        images = self.inputs[rows]
        if draws is not None:
            images = augmentation.crop_flip(images, draws)
        if self.task == "autoencoder":
            pixels = images.flatten(1).float().div_(255)
            return pixels, pixels
        offset, scale = (255 * value[:, None, None] for value in (self.mean, self.std))
        return images.float().sub_(offset).div_(scale), self.targets[rows]

    def to(self, device: str | torch.device) -> "Images":
        tensors = {name: getattr(self, name).to(device) for name in ("inputs", "targets", "mean", "std")}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Data:
    """A benchmark's examples on one device.

    `population` are noiseless examples on which a model's loss minus `teacher_loss` is the excess over the
    best possible loss (planted targets only). `outputs` is the number of output numbers of a fitting network.
    """

    train: Split
    validation: Split
    test: Split
    population: Split | None
    teacher_loss: float | None
    input_shape: tuple[int, ...]
    outputs: int
    manifest: dict[str, Any]


def write(
    folder: str | Path,
    splits: dict[str, Split],
    outputs: int,
    source: dict[str, Any],
    teacher_loss: float | None = None,
) -> None:
    """Write `splits` (train, validation, test, maybe population) and their manifest into `folder`.

    `source` is the configuration that they were made from. Raises OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for part, split in splits.items():
        tensors[f"{part}.inputs"] = split.inputs.contiguous()
        tensors[f"{part}.targets"] = split.targets.contiguous()
    buffer = io.BytesIO()  # a file name would get into the bytes
    torch.save(tensors, buffer)
    content = buffer.getvalue()
    manifest = {
        "source": source,
        "input_shape": list(splits["train"].inputs.shape[1:]),
        "outputs": outputs,
        "examples": {part: len(split) for part, split in splits.items()},
        "teacher_loss": teacher_loss,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    imagestore.replace(folder / "tensors.pt", content)
    imagestore.replace(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def write_split(
    folder: str | Path,
    known: ImageSet,
    kept: imagestore.Kept,
    checksum: str,
    rows: dict[str, list[int]],
    source: dict[str, Any],
) -> None:
    """Write the manifest of an image set and the `rows` of its training part that train and validate.

    `checksum` is that of `kept`, `source` the configuration. Raises OSError.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    indices = {part: torch.tensor(numbers, dtype=torch.int32) for part, numbers in rows.items()}
    buffer = io.BytesIO()
    torch.save(indices, buffer)
    labels = {**{part: kept.labels["train"][chosen] for part, chosen in indices.items()}, "test": kept.labels["test"]}
    mean, std = pixel_statistics(kept.pixels["train"][indices["train"]])
    flat = source["task"] == "autoencoder"
    pixels = known.shape[0] * known.shape[1] * known.shape[2]
    manifest = {
        "source": source,
        "set": {"name": known.name, "title": known.title, "made_by": known.made_by, "licence": known.licence},
        "read": kept.facts,
        "sha256": checksum,
        "split_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "input_shape": [pixels] if flat else list(known.shape),
        "outputs": pixels if flat else len(known.classes),
        "examples": {part: len(values) for part, values in labels.items()},
        "examples_by_class": {
            part: dict(zip(known.classes, values.bincount(minlength=len(known.classes)).tolist(), strict=True))
            for part, values in labels.items()
        },
        "mean": mean,  # of the training split, by channel, pixels in [0, 1]
        "std": std,
        "teacher_loss": None,
    }
    imagestore.replace(folder / "split.pt", buffer.getvalue())
    imagestore.replace(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def pixel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel of uint8 [N, C, H, W], pixels in [0, 1]: exact, from counts of values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        shares = channel.reshape(-1).bincount(minlength=256).double() / channel.numel()
        mean = float((shares * values).sum())
        means.append(mean)
        deviations.append(float((shares * (values - mean).square()).sum().sqrt()))
    return means, deviations


def load(benchmark: str, folder: str | Path = "data", device: str | torch.device = "cpu") -> Data:
    """The data of `benchmark`, moved to `device`. Raises ConfigError when a file is missing or altered."""
    place = Path(folder) / benchmark
    remedy = f"`dvc repro` or `dvc checkout` makes data/{benchmark} again"
    try:
        manifest = json.loads(_read(place / "manifest.json", remedy))
        shape, outputs, teacher_loss = tuple(manifest["input_shape"]), manifest["outputs"], manifest["teacher_loss"]
        parts, sha256 = list(manifest["examples"]), manifest["sha256"]
        split_sha256 = manifest["split_sha256"] if "set" in manifest else None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{place / 'manifest.json'}: is not a manifest; {remedy}") from None
    if split_sha256 is None:
        tensors = _tensors(place / "tensors.pt", sha256, device, remedy)
        splits = {part: Split(tensors[f"{part}.inputs"], tensors[f"{part}.targets"]) for part in parts}
    else:
        rows = _tensors(place / "split.pt", split_sha256, "cpu", remedy)
        again = f"`dvc repro --force --single-item prepare@{benchmark}` prepares them anew"
        kept = imagestore.kept_or_made_again(SETS[manifest["set"]["name"]], sha256, again)
        splits = {part: images.to(device) for part, images in _images(manifest, rows, kept).items()}
    return Data(
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        population=splits.get("population"),
        teacher_loss=teacher_loss,
        input_shape=shape,
        outputs=outputs,
        manifest=manifest,
    )


def _images(manifest: dict[str, Any], rows: dict[str, Tensor], kept: imagestore.Kept) -> dict[str, Images]:
    source = manifest["source"]
    mean = torch.tensor(manifest["mean"])
    std = torch.tensor([value or 1.0 for value in manifest["std"]])  # of a channel that never varies

    def images(pixels: Tensor, labels: Tensor, augmented: bool = False) -> Images:
        return Images(pixels, labels, augmented, mean=mean, std=std, task=source["task"])

    pixels, labels = kept.pixels["train"], kept.labels["train"]
    return {
        "train": images(pixels[rows["train"]], labels[rows["train"]], source["augmentation"] == "crop_flip"),
        "validation": images(pixels[rows["validation"]], labels[rows["validation"]]),
        "test": images(kept.pixels["test"], kept.labels["test"]),
    }


def _tensors(path: Path, sha256: str, device: str | torch.device, remedy: str) -> dict[str, Tensor]:
    content = _read(path, remedy)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConfigError(f"{path}: is truncated or altered, its checksum is not the manifest's; {remedy}")
    tensors: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    return tensors


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing; {remedy}") from None
