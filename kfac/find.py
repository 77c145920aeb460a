"""Which layers of a model have a curvature block, and why a parameter has none."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from . import compiling
from .affine import BiasBlock, NormBlock
from .convolution import ConvBlock, TransposedConvBlock
from .layers import Block, EmbeddingBlock, LinearBlock, TiedEmbeddingBlock

_KINDS: tuple[tuple[type[nn.Module], type[Block]], ...] = (
    (nn.Linear, LinearBlock),
    (nn.Conv1d, ConvBlock),
    (nn.Conv2d, ConvBlock),
    (nn.Conv3d, ConvBlock),
    (nn.ConvTranspose1d, TransposedConvBlock),
    (nn.ConvTranspose2d, TransposedConvBlock),
    (nn.ConvTranspose3d, TransposedConvBlock),
    (nn.Embedding, EmbeddingBlock),
    (nn.modules.batchnorm._BatchNorm, NormBlock),
    (nn.modules.instancenorm._InstanceNorm, NormBlock),
    (nn.LayerNorm, NormBlock),
    (nn.GroupNorm, NormBlock),
    (nn.RMSNorm, NormBlock),
)
_BLIND = (nn.MultiheadAttention, nn.modules.rnn.RNNBase, nn.modules.rnn.RNNCellBase)


def find_blocks(
    model: nn.Module,
    *,
    sharing: str | Mapping[str, str] = "expand",
    max_factor_size: int = 8192,
    first_order: frozenset[int] = frozenset(),
) -> list[Block]:
    """The blocks of a model, in the order of its layers.

    A layer has one if it computes what its class says (subclasses that override `forward` do not) and its weight is a
    parameter of its own, or shared with layers of the same class, or between an embedding and a Linear decoder. A bias
    is part of its weight's block, and a block of its own where that has none or is shared without it.

    Args:
        sharing: "expand" or "reduce", or a dict from globs of layer names to these; the first that fits decides.
        max_factor_size: see `Block`.
        first_order: ids of parameters that are to have no block.

    Raises:
        ValueError: for a glob in `sharing` that matches no layer.
    """
    owners = _owners(model)
    hidden = _hidden(model)
    kinds = {
        id(module): kind
        for module in model.modules()
        if id(module) not in hidden and (kind := _kind_of(module)) is not None
    }

    def trainable(parameter: nn.Parameter | None) -> bool:
        if parameter is None or parameter.dtype.is_complex:
            return False
        return parameter.requires_grad and id(parameter) not in first_order

    blocks: list[Block] = []
    taken: set[int] = set()
    names: set[str] = set()

    def add(kind: type[Block], name: str, modules: list[nn.Module], parameters: list[Any]) -> None:
        name = compiling.plain_name(name)
        name = name if name not in names else f"{name}.bias"
        names.add(name)
        taken.update(id(p) for p in parameters)
        reduce = _reduces(name, sharing) and kind is not TiedEmbeddingBlock
        blocks.append(kind(name, modules, parameters, reduce, max_factor_size))

    for name, module in model.named_modules():
        if id(module) not in kinds:
            continue
        kind = kinds[id(module)]
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if issubclass(kind, NormBlock):
            own = [p for p in (weight, bias) if trainable(p) and id(p) not in taken]
            sharers = owners[id(own[0])] if own else []
            alike = all(
                _base_of(m) is _base_of(module)
                and id(m) in kinds
                and m._parameters.get("weight") is weight
                and m._parameters.get("bias") is bias
                for m in sharers
            )
            if own and alike and all(owners[id(p)] == sharers for p in own):
                add(kind, name, sharers, own)
            continue
        if weight is not None and trainable(weight) and id(weight) not in taken:
            sharers = owners[id(weight)]
            shared_kind = _kind_of_tied([kinds.get(id(m)) for m in sharers])
            whole = shared_kind is not None and all(m._parameters.get("weight") is weight for m in sharers)
            if shared_kind is not None and whole:
                same = [m._parameters.get("bias") is bias for m in sharers]
                with_bias = trainable(bias) and all(same) and len(owners[id(bias)]) == len(sharers)
                add(shared_kind, name, sharers, [weight, bias] if with_bias else [weight])
        if bias is not None and trainable(bias) and id(bias) not in taken and len(owners[id(bias)]) == 1:
            add(BiasBlock, name, [module], [bias])
    _check_globs(sharing, [block.name for block in blocks])
    return blocks


def without_block(model: nn.Module, blocks: Iterable[Block]) -> dict[str, str]:
    """Trainable parameters that have no block, by name, each with a short reason."""
    owned = {id(p) for block in blocks for p in block.parameters}
    owners, hidden = _owners(model), _hidden(model)
    reasons = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in owned:
            continue
        owner = owners[id(parameter)][0]
        kind = type(owner).__name__
        if id(owner) in hidden or isinstance(owner, _BLIND):
            reasons[name] = f"no hook sees where {kind} uses it"
        elif parameter.dtype.is_complex:
            reasons[name] = "it is complex"
        elif isinstance(owner, ParametrizationList):
            reasons[name] = "it is the parametrization of another tensor"
        elif len(owners[id(parameter)]) > 1:
            reasons[name] = "layers of different kinds share it"
        else:
            reasons[name] = f"no block for {kind}"
    return reasons


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    owners: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in {id(p): p for p in module._parameters.values() if p is not None}.values():
            owners[id(parameter)].append(module)
    return owners


def _hidden(model: nn.Module) -> set[int]:
    """Layers inside modules that call them as functions, which no hook sees."""
    attention = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return {id(child) for module in attention for child in module.modules()}


def _base_of(module: nn.Module) -> type[nn.Module] | None:
    return next((base for base, _ in _KINDS if isinstance(module, base)), None)


def _kind_of(module: nn.Module) -> type[Block] | None:
    for base, kind in _KINDS:
        if isinstance(module, base) and _computes_as(module, base):
            if isinstance(module, nn.Embedding) and (
                module.sparse or module.scale_grad_by_freq or module.max_norm is not None
            ):
                return None
            return kind
    return None


def _computes_as(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether nothing that says what a layer computes is overridden, in its class or on itself."""
    methods = ("forward", "_conv_forward", "_apply_instance_norm")
    return all(
        getattr(type(module), name, None) is getattr(base, name, None) and name not in vars(module) for name in methods
    )


def _kind_of_tied(kinds: list[type[Block] | None]) -> type[Block] | None:
    """The block of layers that share a weight, by the blocks that each would have."""
    distinct = set(kinds)
    if distinct == {LinearBlock, EmbeddingBlock}:
        return TiedEmbeddingBlock
    return next(iter(distinct)) if len(distinct) == 1 else None


def _reduces(name: str, sharing: str | Mapping[str, str]) -> bool:
    if isinstance(sharing, str):
        return sharing == "reduce"
    fitting = (value for pattern, value in sharing.items() if fnmatch.fnmatchcase(name, pattern))
    return next(fitting, "expand") == "reduce"


def _check_globs(sharing: str | Mapping[str, str], names: list[str]) -> None:
    for pattern in () if isinstance(sharing, str) else sharing:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"sharing: {pattern!r} matches no layer; allowed: globs of {', '.join(names)}")
