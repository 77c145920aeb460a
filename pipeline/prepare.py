"""Stage `prepare`: an image data set, split into training, validation and test examples.

The digits have no official test examples: these are set aside first, so that they stay the same when the validation
fraction changes. MNIST and CIFAR keep their official ones, and validation is split from the training examples. Every
class is in every part in its share.
"""

from typing import TYPE_CHECKING, Any

from pipeline.checks import ConfigError
from pipeline.config import load, run_stage
from pipeline.imagesets import SETS, ImageSet

if TYPE_CHECKING:
    from pathlib import Path


def prepare(benchmark: str) -> None:
    """Write data/<benchmark> as `images.<benchmark>` says."""
    images = load().images
    if benchmark not in images:
        raise ConfigError(f"images: has no {benchmark!r}; it has {', '.join(images) or 'nothing'}")
    source, folder = images[benchmark], f"data/{benchmark}"
    if source["source"] == "digits":
        make(source, folder)
    else:
        from pipeline.imagefiles import image_folder

        make_split(source, folder, SETS[source["source"]], image_folder())


def make(source: dict[str, Any], folder: str) -> None:
    """Write the data set that `source` (the fields of `images.<benchmark>`) describes into `folder`.

    Images are [N, 1, 8, 8] with values in [0, 1], targets [N] classes; an autoencoder's inputs and targets
    are both the [N, 64] pixels.
    """
    import torch
    from sklearn.datasets import load_digits

    from pipeline.data import Split, write

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)
    classes = torch.tensor(digits.target, dtype=torch.int64)
    inputs, targets, outputs = images, classes, 10
    if source["task"] == "autoencoder":
        inputs = targets = images.flatten(1)
        outputs = inputs.shape[1]
    parts = split(digits.target.tolist(), source["validation"], source["test"], source["split_seed"])
    splits = {part: Split(inputs[rows], targets[rows]) for part, rows in parts.items()}
    write(folder, splits, outputs, source)


def make_split(source: dict[str, Any], folder: str, known: ImageSet, images: "Path | None") -> None:
    """Write the split of the set `known` that `source` describes into `folder`; `images` is where the user has them.

    The images themselves are kept once for all benchmarks. Raises ConfigError when there are none to be had.
    """
    from pipeline.data import write_split
    from pipeline.imagestore import obtain

    kept, checksum = obtain(known, images)
    classes = kept.labels["train"].tolist()
    chosen = list(range(len(classes)))
    if source["examples"] is not None:
        chosen = subset(classes, source["examples"], source["split_seed"])
    parts = split([classes[row] for row in chosen], source["validation"], 0.0, source["split_seed"])
    rows = {part: sorted(chosen[k] for k in parts[part]) for part in ("train", "validation")}
    write_split(folder, known, kept, checksum, rows, source)


def subset(classes: list[int], count: int, seed: int) -> list[int]:
    """`count` row numbers, every class in its share to the nearest example."""
    import random

    stream = random.Random(seed)
    rows = list(range(len(classes)))
    stream.shuffle(rows)
    # of each class the k-th of n stands at (k + 1/2) / n: the first `count` of all have every class in its share
    sizes = {label: classes.count(label) for label in set(classes)}
    seen = dict.fromkeys(sizes, 0)
    places = []
    for row in rows:
        label = classes[row]
        places.append(((seen[label] + 0.5) / sizes[label], row))
        seen[label] += 1
    return sorted(row for _, row in sorted(places)[:count])


def split(classes: list[int], validation: float, test: float, seed: int) -> dict[str, list[int]]:
    """Row numbers of the parts train, validation and test, each in random order, every class in its share.

    `validation` and `test` are fractions of all examples.
    """
    import random

    stream = random.Random(seed)
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    members: dict[int, list[int]] = {label: [] for label in sorted(set(classes))}
    for row, label in enumerate(classes):
        members[label].append(row)
    sizes = [len(rows) for rows in members.values()]
    for rows, tested, validating in zip(members.values(), shares(sizes, test), shares(sizes, validation), strict=True):
        stream.shuffle(rows)
        validated = tested + validating
        parts["test"] += rows[:tested]
        parts["validation"] += rows[tested:validated]
        parts["train"] += rows[validated:]
    for rows in parts.values():
        stream.shuffle(rows)
    return parts


def shares(sizes: list[int], fraction: float) -> list[int]:
    """`fraction` of each of `sizes` in whole numbers that add up to that of their sum: by the largest remainders."""
    exact = [round(fraction * size, 9) for size in sizes]
    counts = [int(count) for count in exact]
    most_left = sorted(range(len(sizes)), key=lambda k: counts[k] - exact[k])  # equal remainders in their order
    for k in most_left[: round(fraction * sum(sizes)) - sum(counts)]:
        counts[k] += 1
    return counts


if __name__ == "__main__":
    run_stage(prepare, "benchmark")
