"""What a trained autoencoder makes of images: a row of inputs, and below them their reconstructions.

Drawn when a run has ended, off its clocks, from the network that is judged and the first examples of the validation
split; the same network gives the same bytes.
"""

import io
import math

import torch
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data import Data

_SHOWN = 12


def of_run(run: RunConfig, data: Data, network: nn.Module) -> dict[str, bytes]:
    """The pictures of a run by file name: `reconstructions.png` where the task is to reconstruct images, else none."""
    if data.manifest.get("source", {}).get("task") != "autoencoder":
        return {}
    inputs, _ = data.validation.batch(slice(_SHOWN))
    shape = _image_shape(inputs[0].numel())
    if shape is None:
        return {}
    network.eval()
    with torch.no_grad():
        outputs = network(inputs)
    outputs = outputs.sigmoid() if run.loss.endswith("binary_cross_entropy") else outputs
    rows = torch.cat([inputs.reshape(-1, *shape), outputs.reshape(-1, *shape)]).float().clamp(0, 1).cpu()
    title = f"{run.benchmark}, {run.optimizer}: validation examples"
    return {"reconstructions.png": _png(rows, len(inputs), title)}


def _image_shape(pixels: int) -> tuple[int, int, int] | None:
    """Channels, height and width of square images with so many numbers, if there are such."""
    for channels in (1, 3):
        side = math.isqrt(pixels // channels)
        if channels * side * side == pixels:
            return channels, side, side
    return None


def _png(images: Tensor, columns: int, title: str) -> bytes:
    """Images [2 N, C, H, W] in two labelled rows."""
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    grid = make_grid(images, nrow=columns, padding=1, pad_value=1.0).permute(1, 2, 0)
    content = io.BytesIO()
    with rc_context(rcParamsDefault):
        figure = Figure(figsize=(1.2 + 0.7 * columns, 2.0), layout="constrained")
        axis = figure.subplots()
        axis.imshow(grid.numpy(), interpolation="nearest")
        axis.set_yticks([grid.shape[0] * share for share in (0.25, 0.75)], ["input", "reconstruction"])
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_title(title, fontsize=10, loc="left")
        figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()
