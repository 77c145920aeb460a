"""The trust region of the fixed step rule: the KL clip."""

from __future__ import annotations

from torch import Tensor


def kl_factor(quadratic_form: Tensor, kl_clip: float) -> Tensor:
    """nu = min(1, sqrt(kl_clip / quadratic_form)), which bounds the step's quadratic form by `kl_clip`.

    Args:
        quadratic_form: lr^2 <direction, gradient> summed over all parameters (0-dimensional), about twice the
            Kullback-Leibler divergence between the network's distributions before and after the step.

    Source: Ba, Grosse & Martens 2017 (distributed K-FAC), section 5.1; the step is the one really taken.
    """
    return (kl_clip / quadratic_form.abs().clamp_min(1e-30)).sqrt().clamp_max(1.0)
