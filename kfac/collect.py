"""From a captured batch to curvature: which vectors are sent back, the rows they leave, and the sums for the factors.

One collector serves one optimizer. Between two steps it receives any number of batches (gradient accumulation); their
weights are what the backward put on each criterion's value, so k micro-batches equal one batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import distributed, losses, rows
from .batch import Batch
from .later import seen_one
from .layers import Block
from .precision import rounded_products
from .rows import Rows

Sums = dict[Block, tuple[Tensor, Tensor, Tensor]]  # of a a^T, how many rows that is, of g g^T times weights
EXACT_OUTPUTS = 16  # fisher="auto": exact curvature vectors up to this many output numbers of an example
AT_ONCE = 2**24  # numbers that exact vectors may leave at the outputs of all layers before the next ones are sent
SMALL_PART = 2  # one of so many examples, or fewer, are sent back by themselves (chain.py)
KEPT = 2**27  # numbers of such rows that are kept for later; beyond, one vector with random signs stands for them


class Collector:
    """Receives batches inside the backward; the optimizer reads the rest at its step.

    Args:
        criterion: the loss (see losses.py).
        fisher, fisher_samples: as in `KroneckerOptimizer`.
        generator: source of sampled vectors on its device; on others it gives its seed to an own one, None is seed 0.
        keeps_rows: whether rows of a statistics step are to be kept in `factor_rows`: of the vectors of the factors, or
            where those are too many of one vector, their sum with random signs.
        enough: where vectors are sampled, from so many examples on the factors are made of a part of the batch.
        rounds: where vectors are sampled, products of statistics may round to bfloat16.
    """

    def __init__(
        self,
        criterion: object,
        fisher: str,
        fisher_samples: int,
        generator: torch.Generator | None,
        keeps_rows: bool,
        enough: int,
        rounds: bool,
    ):
        self.curvature = losses.curvature_of(criterion)
        if fisher == "empirical" and not hasattr(self.curvature, "empirical"):
            raise ValueError(
                "fisher='empirical': the loss has no empirical(output, target); allowed: 'auto', 'exact', 'sampled'"
            )
        self.mean = getattr(criterion, "reduction", "mean") != "sum"
        self.fisher, self.samples, self.keeps_rows, self.enough = fisher, fisher_samples, keeps_rows, enough
        self.rounds, self.rounding = rounds, False
        self.generators = {generator.device: generator} if generator is not None else {}
        self.seed = 0 if generator is None else generator.initial_seed()
        self.factors_due = self.model_due = self.exact_model = False
        self.ends: set[Block] = set()  # layers that no other layer has before it (see `Batch.pass_back`)
        self.clear()

    def clear(self) -> None:
        self.sums: Sums = {}
        self.model_rows: list[Rows] = []
        self.factor_rows: list[Rows] = []
        self.weights: list[Tensor] = []
        self.shares: dict[int, Tensor] = {}  # what each forward pass has in the loss; auxiliary terms have none
        self.losses: list[Tensor] = []
        self.floors: list[Tensor] = []  # the smallest value that each loss could have taken
        # Over all ranks: of the shares, how many there are, of weights times losses, of weights times floors.
        self._totals: Tensor | None = None

    def norm(self) -> Tensor:
        """What weights are divided by, so that 1/k and an AMP scale drop out: their sum, or their mean for "sum"."""
        return self._norm_of(self._sums_of_weights() if self._totals is None else self._totals)

    def factor(self) -> Tensor:
        """What the loop multiplied the criterion's values by, as one number: 1 for a mean over micro-batches too."""
        return self._norm_of(self._sums_of_weights())

    def _norm_of(self, sums: Tensor) -> Tensor:
        return sums[0] if self.mean else sums[0] / sums[1]

    def loss(self) -> Tensor:
        """The criterion's value over all batches."""
        return (self._sums_of_weights() if self._totals is None else self._totals)[2] / self.norm()

    def room(self) -> Tensor | None:
        """How far the loss is above the smallest value that it can take, where it has one."""
        if not losses.has_floor(self.curvature):
            return None
        sums = self._sums_of_weights() if self._totals is None else self._totals
        return ((sums[2] - sums[3]) / self.norm()).clamp_min(0)

    def _sums_of_weights(self) -> Tensor:
        shares = torch.stack(list(self.shares.values()) or self.weights)
        zero = torch.zeros_like(shares[0])
        value = sum((weight * value for weight, value in zip(self.weights, self.losses, strict=False)), zero)
        floor = sum((weight * floor for weight, floor in zip(self.weights, self.floors, strict=False)), zero)
        return torch.stack([shares.sum(), torch.full_like(zero, len(shares)), value, floor])

    def values(self) -> list[Tensor]:
        """What has to be finite beside the statistics."""
        return self.losses if self._totals is None else [self._totals[:3]]  # a floor may be -inf

    def share(self, group: Any) -> None:
        """Sum over the ranks of a process group, each of which has called the same layers; alone without a group."""
        if group is None or not self.weights:
            return
        tensors = [x for entry in self.sums.values() for x in entry]
        *tensors, self._totals = distributed.sum_over_ranks([*tensors, self._sums_of_weights()], group)
        triples = zip(*[iter(tensors)] * 3, strict=True)
        self.sums = dict(zip(self.sums, triples, strict=True))

    def kept_rows(self) -> list[Rows]:
        """`factor_rows`, with weights that let rows of several batches add up."""
        return [replace(part, weight=part.weight / self.norm()) for part in self.factor_rows]

    def generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]

    def load_generators(self, states: Mapping[str, Tensor]) -> None:
        """Go on from the saved states, by device; one of a device that is not here is left out."""
        for name, state in states.items():
            if _here(torch.device(name)):
                self.generator(torch.device(name)).set_state(state.cpu())

    def receive(self, batch: Batch) -> bool:
        """Take a batch's curvature; False where its output does not depend on the layers that were called."""
        if not batch.calls:
            return False
        many = self.curvature.outputs(batch.output) > EXACT_OUTPUTS
        fisher = ("sampled" if many else "exact") if self.fisher == "auto" else self.fisher
        self.rounding = self.rounds and fisher == "sampled"
        with rounded_products(self.rounding):
            return self._receive(batch, fisher, many)

    def _receive(self, batch: Batch, fisher: str, many: bool) -> bool:
        dtype, device = batch.calls[0].block.dtype, batch.calls[0].input.device
        output, target = batch.output_in(dtype), batch.target
        weight = torch.ones((), device=device, dtype=dtype) if batch.weight is None else batch.weight.to(dtype)
        mask = self.curvature.mask(output, target) if self.factors_due and hasattr(self.curvature, "mask") else None
        sampled, sums = fisher == "sampled", Sums()
        factor_rows = chosen_rows = model_rows = mixed = None
        waiting: list[list[Any]] = []
        if self.factors_due:
            vectors = self._vectors(fisher, batch, output)
            index = rows.places(batch.size, self.enough, device) if sampled else None
            passed = None
            if not self.keeps_rows or index is not None:
                passed = self._passed(batch, vectors, weight, many, self.model_due and sampled, factors=(mask, index))
            if passed is not None:
                sums, model_rows, chosen_rows = passed
            else:
                size = sum(call.size for call in batch.calls)
                if fisher == "exact" and len(vectors) > 1:
                    few = max(1, AT_ONCE // max(size, 1))
                    if self.keeps_rows and len(vectors) * size > KEPT:
                        mixed = rows.send_back(batch, [self._mixed(batch, vectors)], weight)
                    apart = not any(call.block.together for call in batch.calls)
                    if apart and (mixed is not None or not self.keeps_rows):
                        vectors, *waiting = [vectors[i : i + few] for i in range(0, len(vectors), few)]
                factor_rows = rows.send_back(batch, vectors, weight)
        if self.model_due and model_rows is None:
            exactly = self.exact_model and fisher == "exact"
            shared = mixed if mixed is not None else factor_rows
            if exactly or shared is None or (not sampled and mixed is None):
                vectors = (
                    self._vectors(fisher, batch, output)
                    if exactly
                    else list(self.curvature.sampled(output, target, 1, self.generator(device)))
                )
                passed = self._passed(batch, vectors, weight, many)
                if passed is not None:
                    model_rows = passed[1]
                else:
                    model_rows = _for_model(rows.send_back(batch, vectors, weight), batch, many)
            else:
                model_rows = _for_model(shared, batch, many)
        if not (sums or any(taken is not None and taken.layers for taken in (factor_rows, model_rows))):
            return False

        if batch.fresh or (batch.loss is not None and not self.losses):
            self.clear()  # what came before belongs to gradients that were dropped, or to somebody else's backward
        self.weights.append(weight)
        if batch.main:
            self.shares[batch.forward] = self.shares.get(batch.forward, 0) + weight
        if batch.loss is not None:
            self.losses.append(batch.loss.to(dtype))
            floor = losses.floor_of(self.curvature, output, target)
            self.floors.append(
                floor.to(dtype) if isinstance(floor, Tensor) else weight.new_full((), 0.0 if floor is None else floor)
            )
        self._add(sums)
        if chosen_rows is not None:
            self.factor_rows.append(chosen_rows.kept(batch))
        if factor_rows is not None:
            stands_for = 1.0
            if sampled and factor_rows.layers and factor_rows.vectors == 1:
                n = next(iter(factor_rows.layers.values()))[1].shape[2]
                index = rows.places(n, self.enough, device)
                mask = rows.thinned_mask(mask, n, index)
                thin = {block: rows.thinned(a, g, index) for block, (a, g) in factor_rows.layers.items()}
                factor_rows = replace(factor_rows, layers=thin)
                stands_for = rows.stands_for(n, index)
            self._accumulate(factor_rows, mask, stands_for)
            if self.keeps_rows:
                self.factor_rows.append((factor_rows if mixed is None else mixed).kept(batch))
            del factor_rows  # before the next vectors are sent
            for some in waiting:
                self._accumulate(rows.send_back(batch, some, weight), mask, 1.0, again=True)
        if model_rows is not None:
            self.model_rows.append(model_rows)
        return True

    def _passed(
        self,
        batch: Batch,
        vectors: list[Any],
        weight: Tensor,
        many: bool,
        model: bool = True,
        factors: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> tuple[Sums, Rows | None, Rows | None] | None:
        """What a single vector leaves, made while it passes the layers: sums for the factors, rows for the model, and
        where `keeps_rows` those of the factors.

        So the gradients of one layer are there at a time, not those of all; and where a small part of the examples is
        enough and the graph allows it, those of that part alone. `factors` are a mask and the places of the examples
        that serve, None where no sums are needed. None is returned for several vectors, and where the rows of a layer
        depend on other calls.
        """
        if len(vectors) != 1:
            return None
        mask, index = factors if factors is not None else (None, None)
        n, device = batch.size, batch.calls[0].input.device
        mask, stands_for = rows.thinned_mask(mask, n, index), rows.stands_for(n, index)
        first = rows.an_eighth(n) if many else n  # the examples that the model keeps
        sums, kept, own_rows = Sums(), {}, {}

        def take(block: Block, a: Any, g_first: Tensor, g_chosen: Tensor) -> None:
            if model:
                own = rows.first(a, first), rows.scaled(g_first, n / first)
                kept.update(Rows({block: own}, weight).kept(batch).layers)
            if factors is not None:
                own = rows.chosen(a, index), rows.scaled(g_chosen, stands_for)
                sums[block] = _moments(block, *own, mask, weight, stands_for=stands_for)
                if self.keeps_rows:
                    own_rows[block] = own

        split = first if model else 0

        def arrived_some(block: Block, a: Any, g: Tensor) -> None:
            take(block, a, g[:, :, :split], g[:, :, split:])

        def arrived(block: Block, a: Any, g: Tensor) -> None:
            take(block, a, g[:, :, :first], g if index is None else g[:, :, index])

        sent, needed = False, split + (0 if factors is None else n if index is None else len(index))
        if SMALL_PART * needed <= n:
            some = torch.arange(split, device=device)
            some = some if index is None else torch.cat([some, index])
            sent = rows.pass_back_some(batch, vectors[0], some, arrived_some)
        if not (sent or rows.pass_back(batch, vectors[0], self.ends, arrived)):
            return None
        called = [call.block for call in batch.calls]  # a vector passes them in another order
        taken = Rows({block: kept[block] for block in called if block in kept}, weight) if model else None
        chosen = Rows({block: own_rows[block] for block in called if block in own_rows}, weight)
        return {block: sums[block] for block in called if block in sums}, taken, chosen if self.keeps_rows else None

    def _vectors(self, fisher: str, batch: Batch, output: Any) -> list[Tensor]:
        if fisher == "exact":
            return self._signed(batch, list(self.curvature.exact(output, batch.target)))
        if fisher == "sampled":
            device = batch.calls[0].input.device
            return list(self.curvature.sampled(output, batch.target, self.samples, self.generator(device)))
        if batch.target is not None:
            return list(self.curvature.empirical(output, batch.target))
        # Only c dl/df, the gradient at the output, is known; a vector is sqrt(c) dl/df.
        assert batch.gradient is not None
        return [batch.gradient.to(output.dtype) * math.sqrt(self.curvature.terms(output) if self.mean else 1)]

    def _signed(self, batch: Batch, vectors: list[Any]) -> list[Any]:
        """Exact vectors with a random sign for each entry of the batch, where one vector serves entries that mix.

        That is where positions were flattened into the output's batch, or a layer saw no batch. The signs make the
        products between entries vanish in expectation and leave the others as they are.
        """
        n = batch.size
        if all(call.input.dim() > 0 and call.input.shape[0] == n for call in batch.calls):
            return vectors
        return [self._flipped(batch, vector) for vector in vectors]

    def _mixed(self, batch: Batch, vectors: list[Any]) -> Any:
        """The sum of exact vectors with random signs: one vector of the same curvature in expectation."""
        several = [v if isinstance(v, tuple) else (v,) for v in (self._flipped(batch, vector) for vector in vectors)]
        parts = [[x for x in column if x is not None] for column in zip(*several, strict=True)]
        mixed = tuple(sum(part[1:], part[0]) if part else None for part in parts)
        return mixed if isinstance(vectors[0], tuple) else mixed[0]

    def _flipped(self, batch: Batch, vector: Any) -> Any:
        """A vector times a random sign for each entry of the batch."""
        n, generator = batch.size, self.generator(batch.calls[0].input.device)

        def signs(count: int) -> Tensor:
            return torch.rand(count, generator=generator, device=generator.device).round() * 2 - 1

        sign = signs(n)

        def flip(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            own = sign if part.shape[0] == n else signs(1)  # a variance for all entries alike has one of its own
            return part * own.to(part.dtype).reshape(-1, *[1] * (part.dim() - 1))

        return tuple(flip(part) for part in vector) if isinstance(vector, tuple) else flip(vector)

    def _accumulate(self, taken: Rows, mask: Tensor | None, stands_for: float, again: bool = False) -> None:
        """Add rows to the sums for the factors; `again` if they are further vectors of a batch that is in them."""
        for block, (a, g) in taken.layers.items():
            if again and block in self.sums:
                old = self.sums[block]
                self.sums[block] = *old[:2], old[2] + rows.moment_g(block, a, g).mul_(taken.weight)
            else:
                self._add({block: _moments(block, a, g, mask, taken.weight, taken.vectors, stands_for)})

    def _add(self, sums: Sums) -> None:
        for block, new in sums.items():
            old = self.sums.get(block)
            self.sums[block] = new if old is None else tuple(x + y for x, y in zip(old, new, strict=True))  # type: ignore[assignment]


def _moments(
    block: Block,
    a: Any,
    g: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    vectors: int = 1,
    stands_for: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of a a^T, how many rows that is, each of which stands for some, and the weighted sum of g g^T."""
    new_g = rows.moment_g(block, a, g)
    if not seen_one(weight):
        new_g.mul_(weight)
    new_a, count = rows.moment_a(block, a, g, mask, vectors)
    return (new_a, count, new_g) if stands_for == 1 else (new_a.mul_(stands_for), count * stands_for, new_g)


def _for_model(taken: Rows, batch: Batch, many: bool) -> Rows:
    """What the quadratic model keeps."""
    return (rows.eighth(taken) if many else taken).kept(batch)


def _here(device: torch.device) -> bool:
    """Whether this machine has a device."""
    if device.type == "cpu":
        return True
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type == device.type and (device.index or 0) < torch.accelerator.device_count()
