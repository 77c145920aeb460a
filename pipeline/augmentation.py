"""Random crops and flips of a whole batch at once, on the device, from numbers drawn beforehand.

The one idea: what happens to the example at a position of an epoch is drawn for the whole epoch, as the order of
examples is (`pipeline.batches.Order`). A batch then takes its rows of both, so nothing depends on the batch size, on
the device or on where a run was resumed, and a step waits for no random number.
"""

import torch
from torch import Tensor

PADDING = 4  # black pixels on each side, of which a crop may show as many


def draw(examples: int, generator: torch.Generator) -> Tensor:
    """[examples, 3] int64: how far down and to the right the crop starts (0 to 2 * PADDING), and flipped or not."""
    corners = torch.randint(2 * PADDING + 1, (examples, 2), generator=generator)
    flips = torch.randint(2, (examples, 1), generator=generator)
    return torch.cat((corners, flips), dim=1)


def crop_flip(images: Tensor, draws: Tensor) -> Tensor:
    """[B, C, H, W] -> the same shape and type: a window of each padded image, mirrored left to right or not."""
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, C, down, right, H, W]
    each = torch.arange(len(images), device=images.device)
    cropped = windows[each, :, draws[:, 0], draws[:, 1]]
    return torch.where(draws[:, 2, None, None, None].bool(), cropped.flip(3), cropped)
