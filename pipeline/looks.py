"""What tables, figures and charts have in common: colours, words, limits and ticks of log axes.

The one idea: an optimizer has one colour, that which the MLflow UI gives it; the same hue is darker or lighter
where the ground asks for it.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence

from pipeline.views import colour

PHASES = {  # of a step: name -> (words, colour on a light ground, colour on a dark one)
    "forward_backward": ("forward and backward", "#C9CED6", "#4A525E"),
    "statistics": ("statistics", "#8FA9C4", "#5F83A8"),
    "inverses": ("inverses", "#46698C", "#8DB8E2"),
    "update": ("update", "#1B2E45", "#DCEBFA"),
}
METRICS = {
    "train_loss": "training loss",
    "validation_loss": "validation loss",
    "validation_error": "validation error",
    "excess_loss": "excess loss",
}
CLOCKS = {"steps": "optimizer steps", "seconds": "training seconds"}
CURVATURE = {  # of the whole model: quantity -> (words, scale of its axis)
    "cosine_natural": ("cosine of the update with the exact natural gradient", "linear"),
    "top_eigenvalue": ("largest eigenvalue of the Gauss-Newton matrix", "log"),
    "trace": ("trace of the Gauss-Newton matrix", "log"),
    "damping": ("damping", "log"),
    "reduction_ratio": ("reduction ratio, actual over predicted", "linear"),
    "condition_a": ("condition number of the input factors, median over layers", "log"),
}


def on_light(name: str) -> str:
    """The colour of an optimizer on a light ground, as `#rrggbb`."""
    return _within(colour(name), 0.0, 0.5)


def on_dark(name: str) -> str:
    return _within(colour(name), 0.64, 1.0)


def _within(shade: str, darkest: float, lightest: float) -> str:
    hue, lightness, saturation = colorsys.rgb_to_hls(*(int(shade[at : at + 2], 16) / 255 for at in (1, 3, 5)))
    channels = colorsys.hls_to_rgb(hue, min(max(lightness, darkest), lightest), saturation)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def limits(curves: Iterable[Sequence[float]], targets: Iterable[float]) -> tuple[float, float] | None:
    """Limits of a log axis that show curves and targets whole, but of one that explodes not more than 3 times the
    largest first value; None where there is nothing to show."""
    known = [[value for value in curve if math.isfinite(value) and value > 0] for curve in curves]
    values, starts = [value for curve in known for value in curve], [curve[0] for curve in known if curve]
    if not values:
        return None
    return min(*values, *targets) / 1.15, max(min(max(values), 3 * max(starts)), *targets) * 1.15


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within the limits, evenly spread on a log scale as far as round numbers are."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = max(1, round(len(decades) / 6))
    for leading in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        coarse = decades[::stride] if len(leading) == 1 else decades
        found = [float(f"{digit}e{decade}") for decade in coarse for digit in leading]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 3:
            return found
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(size * step for size in (5, 2, 1) if (high - low) / (size * step) >= 2)
    return [float(f"{step * place:.12g}") for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
