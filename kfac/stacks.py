"""Layers of one shape as one: their K add up, so that one batched product solves for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .layers import Block
from .state import BlockState


@dataclass
class Stack:
    """Some layers of one shape, and a state that has the tensors of all of theirs."""

    blocks: list[Block]
    state: BlockState

    @property
    def lengths(self) -> list[int]:
        """K of each layer."""
        return [block.shape[0] for block in self.blocks]


class Stacks:
    """Made again when a layer has new tensors; the layers' own are then views of the stack's, which hold no memory."""

    def __init__(self) -> None:
        self._stacks: list[Stack] = []
        self._held: list[object] = []

    def of(self, states: Mapping[Block, BlockState], names: Sequence[str]) -> list[Stack]:
        """The stacks of two layers and more, by the tensors of these names in their solvers."""
        if not self._hold(states, names):
            self._stacks = []  # frees what the layers have given up
            for blocks in _of_one_shape(states, names):
                self._stacks.append(Stack(blocks, _joined([states[block] for block in blocks], names)))
            self._held = _tensors(states, names)
        return self._stacks

    def _hold(self, states: Mapping[Block, BlockState], names: Sequence[str]) -> bool:
        now = _tensors(states, names)
        return len(now) == len(self._held) and all(a is b for a, b in zip(now, self._held, strict=True))


def _tensors(states: Mapping[Block, BlockState], names: Sequence[str]) -> list[object]:
    return [state.solver.get(name) for state in states.values() for name in names]


def _of_one_shape(states: Mapping[Block, BlockState], names: Sequence[str]) -> list[list[Block]]:
    groups: dict[object, list[Block]] = {}
    for block, state in states.items():
        kinds = tuple((name, x.shape[1:], x.dtype) for name in names if (x := state.solver.get(name)) is not None)
        if kinds:
            groups.setdefault((block.unit, block.shape[1:], state.A.dtype, state.A.device, kinds), []).append(block)
    return [blocks for blocks in groups.values() if len(blocks) > 1]


def _joined(states: list[BlockState], names: Sequence[str]) -> BlockState:
    solver = {}
    for name in names:
        if name in states[0].solver:
            own = [state.solver[name] for state in states]
            solver[name] = torch.cat(own)
            for state, view in zip(states, solver[name].split([len(x) for x in own]), strict=True):
                state.solver[name] = view
    return replace(states[0], damping_a=torch.cat([state.damping_a for state in states]), solver=solver)
