"""Data sets on disk and on the device: one tensor file and one manifest for each benchmark.

`write` is what the stages `prepare` and `toy` end with: the same tensors always make the same bytes, and a
file is there whole or not at all. `load` is what training starts with: it compares the file with the
manifest's checksum.
"""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checks import ConfigError


@dataclass(frozen=True)
class Split:
    """inputs: [N, *input_shape] float32; targets: [N] int64 classes, or [N, outputs] float32."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


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
    _replace(folder / "tensors.pt", content)
    _replace(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def load(benchmark: str, folder: str | Path = "data", device: str | torch.device = "cpu") -> Data:
    """The data of `benchmark`, moved to `device`. Raises ConfigError when a file is missing or altered."""
    place = Path(folder) / benchmark
    remedy = f"`dvc repro` or `dvc checkout` makes data/{benchmark} again"
    try:
        manifest = json.loads(_read(place / "manifest.json", remedy))
        shape, outputs, sha256 = tuple(manifest["input_shape"]), manifest["outputs"], manifest["sha256"]
        teacher_loss = manifest["teacher_loss"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{place / 'manifest.json'}: is not a manifest; {remedy}") from None
    content = _read(place / "tensors.pt", remedy)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConfigError(
            f"{place / 'tensors.pt'}: is truncated or altered, its checksum is not the manifest's; {remedy}"
        )
    tensors = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    splits = {part: Split(tensors[f"{part}.inputs"], tensors[f"{part}.targets"]) for part in manifest["examples"]}
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


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing; {remedy}") from None


def _replace(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
