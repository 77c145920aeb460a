"""The same curvature in front of any optimizer: gradients become natural gradients, nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .curvature import Curvature, all_finite
from .ekfac import KroneckerEigenMethod
from .gkfac import TwoLevelMethod
from .kfac import KroneckerMethod
from .later import seen_broken
from .layers import Block
from .method import Method
from .options import check_options, gradual
from .state import LayerCurvature

_METHODS: dict[str, Callable[..., Method]] = {
    "kfac": KroneckerMethod,
    "ekfac": KroneckerEigenMethod,
    "gkfac": TwoLevelMethod,
}


class Preconditioner:
    """Turns `.grad` into (F + damping I)^-1 grad, block by block; parameters without a block keep their gradient.

    Args:
        model, loss, damping, relative_damping, fisher, fisher_samples, stat_decay, factor_interval, inverse_interval,
            preconditioning_dtype, generator, sharing, max_factor_size: as in `KroneckerOptimizer`, with the defaults of
            its fixed rule.
        method: "kfac", "ekfac" or "gkfac".
        **options: of the method: `solver` (kfac, gkfac), `scale_interval` (ekfac), `coarse_space`, `combination`,
            `coarse_fisher` (gkfac).

    Attributes:
        stats: what the last step measured, 0-dimensional tensors on the device.

    Example:
        >>> preconditioner = Preconditioner(model, loss=criterion)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> loss = criterion(model(x), y); loss.backward(); preconditioner.step(); optimizer.step()

    Raises:
        ValueError: for an argument that is out of range, naming it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: nn.Module,
        method: str = "kfac",
        damping: float | Callable[[int], float] | None = None,
        relative_damping: float | Callable[[int], float] = 0.5,
        fisher: str = "auto",
        fisher_samples: int = 1,
        stat_decay: float | None = None,
        factor_interval: int | Callable[[int], int] | None = None,
        inverse_interval: int | Callable[[int], int] | None = None,
        preconditioning_dtype: torch.dtype | str | None = None,
        generator: torch.Generator | None = None,
        sharing: str | Mapping[str, str] = "expand",
        max_factor_size: int = 8192,
        **options: Any,
    ):
        given = dict(locals())
        check_options({name: given[name] for name in given if name not in ("self", "loss", "options")})
        try:
            made = _METHODS[method](preconditioning_dtype=preconditioning_dtype, **options)
        except TypeError:
            raise ValueError(f"method={method!r} does not have all of {', '.join(options)}") from None
        self._curvature = Curvature(
            model,
            loss,
            made,
            damping=damping,
            relative_damping=relative_damping,
            fisher=fisher,
            fisher_samples=fisher_samples,
            stat_decay=stat_decay if stat_decay is not None else 0.95,
            factor_interval=factor_interval if factor_interval is not None else partial(gradual, 10),
            inverse_interval=inverse_interval if inverse_interval is not None else partial(gradual, 100),
            generator=generator,
            sharing=sharing,
            max_factor_size=max_factor_size,
            instead="their gradients stay as they are",
            owner=type(self).__name__,
        )
        self._curvature.arm(model_due=False)

    @property
    def blocks(self) -> list[Block]:
        """The layers that have a curvature block."""
        return self._curvature.blocks

    @property
    def stats(self) -> dict[str, Tensor]:
        """What the last step measured, 0-dimensional tensors on the device."""
        return self._curvature.stats

    @torch.no_grad()
    def step(self) -> None:
        """Replace the gradients; call it between `backward()` and the optimizer's `step()`.

        Where a gradient, a statistic or a direction is not finite, all gradients stay as they are.
        """
        with self._curvature.unmixed():
            self._step()

    def _step(self) -> None:
        curvature = self._curvature
        curvature.gather(needs_loss=False)
        blocks = [block for block in self.blocks if block.has_gradient()]
        gradients = [block.matrix([p.grad for p in block.parameters]) for block in blocks]
        finite = curvature.finite(gradients)
        if seen_broken(finite):
            curvature.stats = {"skipped": 1.0 - finite.float()}
        else:
            curvature.update(finite)
            ready = [i for i, block in enumerate(blocks) if curvature.ready(block)]
            solved = curvature.directions([blocks[i] for i in ready], [gradients[i] for i in ready])
            whole = finite & all_finite(solved) if solved else finite
            curvature.stats["skipped"] = 1.0 - whole.float()
            for i, direction in zip(ready, solved, strict=True):
                for parameter, new in zip(blocks[i].parameters, blocks[i].tensors(direction), strict=True):
                    if parameter.grad is not None:
                        parameter.grad.copy_(torch.where(whole, new, parameter.grad))
            curvature.finish(finite)
        curvature.arm(model_due=False)

    def curvature(self) -> dict[str, LayerCurvature]:
        """The running factors of every layer that has statistics, by the layer's name in the model."""
        return self._curvature.layers()

    def summary(self) -> str:
        """A table of the layers with their blocks."""
        return "\n".join(self._curvature.summary())

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, keyed by layer names."""
        return self._curvature.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`, to the very same numbers.

        Raises:
            ValueError: when the saved layers are not those of this model, or were saved by another method or solver;
                nothing is changed then.
        """
        self._curvature.load_state_dict(state_dict)
        self._curvature.arm(model_due=False)
