"""Stage `prepare`: an image data set, split into training, validation and test examples.

Test examples are set aside first, so they stay the same when the validation fraction changes; both are drawn
with every class in its share.
"""

from typing import Any

from pipeline.checks import ConfigError
from pipeline.config import load, run_stage


def prepare(benchmark: str) -> None:
    """Write data/<benchmark> as `images.<benchmark>` says."""
    images = load().images
    if benchmark not in images:
        raise ConfigError(f"images: has no {benchmark!r}; it has {', '.join(images) or 'nothing'}")
    make(images[benchmark], f"data/{benchmark}")


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


def split(classes: list[int], validation: float, test: float, seed: int) -> dict[str, list[int]]:
    """Row numbers of the parts train, validation and test, each in random order, every class in its share.

    `validation` and `test` are fractions of all examples.
    """
    import random

    stream = random.Random(seed)
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for label in sorted(set(classes)):
        rows = [row for row, c in enumerate(classes) if c == label]
        stream.shuffle(rows)
        tested = round(test * len(rows))
        validated = tested + round(validation * len(rows))
        parts["test"] += rows[:tested]
        parts["validation"] += rows[tested:validated]
        parts["train"] += rows[validated:]
    for rows in parts.values():
        stream.shuffle(rows)
    return parts


if __name__ == "__main__":
    run_stage(prepare, "benchmark")
