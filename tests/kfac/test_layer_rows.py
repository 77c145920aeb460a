"""The rows of every layer and geometry are each example's gradient by autograd, and what is computed from rows."""

from __future__ import annotations

import copy
from collections.abc import Callable

import ground_truth as truth
import pytest
import torch
from cases import CONVOLUTIONS, Problem
from layer_rows import check_rows_are_example_gradients, dense
from torch import Tensor, nn
from torch.nn import functional as F

from kfac import EKFAC, rows
from kfac.find import find_blocks

DAMPING = 0.03


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        layer.get_parameter(name).requires_grad_(False)
    return layer


class WithSize(nn.Module):
    """A transposed convolution called with an output size that its arguments do not say."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(4, 6, 3, stride=3)

    def forward(self, value: Tensor) -> Tensor:
        return self.layer(value, output_size=(value.shape[2] * 3 + 1, value.shape[3] * 3))


def used(norm: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """A norm in evaluation, with running statistics of its own."""
    norm = norm.double()
    norm(3 + 2 * torch.randn(shape, dtype=torch.float64))
    return norm.eval()


IMAGE = (2, 4, 5, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"conv2d-{name}": (build, IMAGE) for name, build in CONVOLUTIONS.items()},
    "conv2d-unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), IMAGE[1:]),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, stride=2, dilation=2, groups=2), (3, 4, 9)),
    "conv1d-same": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (3, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 1, 3), padding=(1, 0, 1), stride=(1, 2, 1), groups=2), (2, 2, 3, 4, 3)),
    "conv3d-reflect": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="reflect", dilation=2), (2, 2, 3, 4, 3)),
    "transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 5)),
    "transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), IMAGE),
    "transpose2d-no-bias": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 1), bias=False), IMAGE),
    "transpose2d-all": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=3, padding=2, output_padding=1, groups=2, dilation=2),
        IMAGE,
    ),
    "transpose2d-cropped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, padding=3), IMAGE),
    "transpose2d-output-size": (WithSize, IMAGE),
    "transpose2d-unbatched": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), IMAGE[1:]),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2), (2, 2, 2, 3, 2)),
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear-4d": (lambda: nn.Linear(4, 3), (2, 3, 2, 4)),
    "linear-unbatched": (lambda: nn.Linear(4, 3), (4,)),
    "linear-bias-only": (lambda: frozen(nn.Linear(4, 3), "weight"), (2, 3, 4)),
    "linear-weight-only": (lambda: frozen(nn.Linear(4, 3), "bias"), (2, 3, 4)),
    "conv2d-bias-only": (lambda: frozen(nn.Conv2d(4, 6, 3, groups=2), "weight"), IMAGE),
    "transpose1d-bias-only": (lambda: frozen(nn.ConvTranspose1d(4, 6, 3), "weight"), (4, 7)),
    "batch1d": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "batch1d-sequence": (lambda: nn.BatchNorm1d(4), (5, 4, 3)),
    "batch2d": (lambda: nn.BatchNorm2d(4, eps=0.1), IMAGE),
    "batch2d-evaluated": (lambda: used(nn.BatchNorm2d(4), IMAGE), IMAGE),
    "batch2d-no-statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(), IMAGE),
    "batch2d-scale-frozen": (lambda: frozen(nn.BatchNorm2d(4), "weight"), IMAGE),
    "batch2d-shift-frozen": (lambda: frozen(nn.BatchNorm2d(4), "bias"), IMAGE),
    "batch3d": (lambda: nn.BatchNorm3d(2), (2, 2, 3, 2, 2)),
    "instance1d": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 6)),
    "instance2d": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "instance2d-unbatched": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE[1:]),
    "instance2d-evaluated": (
        lambda: used(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), IMAGE),
        IMAGE,
    ),
    "group": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "layer": (lambda: nn.LayerNorm(6), IMAGE),
    "layer-2d": (lambda: nn.LayerNorm((5, 6)), IMAGE),
    "layer-unbatched": (lambda: nn.LayerNorm(6), (6,)),
    "layer-no-bias": (lambda: nn.LayerNorm(6, bias=False), (3, 4, 6)),
    "rms": (lambda: nn.RMSNorm(6), (3, 4, 6)),
    "rms-eps": (lambda: nn.RMSNorm((4, 6), eps=0.3), (3, 4, 6)),
    "embedding": (lambda: nn.Embedding(7, 3), (4, 5)),
    "embedding-categories": (lambda: nn.Embedding(7, 3), (6,)),
    "embedding-padding": (lambda: nn.Embedding(4, 3, padding_idx=2), (4, 5)),
    "embedding-one": (lambda: nn.Embedding(7, 3), ()),
}  # fmt: skip
UNBATCHED = {"embedding-one", *(name for name in LAYERS if "unbatched" in name), "transpose1d-bias-only"}
EVERY = pytest.mark.parametrize("name", list(LAYERS))


def make(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = build().double()
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        if name.startswith("embedding"):
            return model, torch.randint(model.num_embeddings, shape)  # type: ignore[arg-type]
        return model, torch.randn(shape, dtype=torch.float64)


def problem(name: str) -> Problem:
    """The layer alone under squared error, where the Kronecker form is exact."""
    model, inputs = make(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        target = torch.randn(copy.deepcopy(model)(inputs).shape, dtype=torch.float64)
    return Problem(model, nn.MSELoss(), inputs, target)


@EVERY
def test_rows_are_each_examples_gradient(name: str) -> None:
    model, inputs = make(name)
    check_rows_are_example_gradients(model, inputs, 1 if name in UNBATCHED else inputs.shape[0])


@EVERY
def test_matrix_and_tensors_are_inverse(name: str) -> None:
    model, _ = make(name)
    (block,) = find_blocks(model)
    given = [torch.randn_like(p) for p in block.parameters]
    matrix = block.matrix(given)
    assert matrix.shape == block.shape
    for back, tensor in zip(block.tensors(matrix), given, strict=True):
        assert torch.equal(back, tensor)
    assert not block.matrix([None] * len(given)).any()


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in UNBATCHED])
def test_ekfac_scales_have_the_exact_trace_of_a_layer_inside_a_net(name: str) -> None:
    layer, inputs = make(name)
    width = copy.deepcopy(layer)(inputs).flatten(1).shape[1]
    torch.manual_seed(13)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 3).double())
    case = Problem(model, nn.CrossEntropyLoss(), inputs, torch.randint(3, inputs.shape[:1]))
    optimizer = truth.start(EKFAC, case, damping=DAMPING)
    exact = truth.ggn(case, [p for p in layer.parameters() if p.requires_grad]).trace()
    truth.step(optimizer, case)
    torch.testing.assert_close(optimizer._curvature.states[optimizer.blocks[0]].solver["scales"].sum(), exact)


# Sums over rows


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_indices_compute_what_their_one_hot_rows_do(reduce: bool, masked: bool) -> None:
    torch.manual_seed(10)
    block = find_blocks(nn.Embedding(5, 3, padding_idx=1).double(), sharing="reduce" if reduce else "expand")[0]
    index = torch.randint(-1, 5, (1, 4, 6))
    index[0, 0] = -1
    g = torch.randn(1, 2, 4, 6, 3).double() * (index >= 0)[:, None, ..., None]
    a = dense(block, index)
    directions = torch.randn(4, *block.shape).double()
    s = torch.randn(8).double()
    torch.testing.assert_close(rows.row_products(index, g, directions), rows.row_products(a, g, directions))
    torch.testing.assert_close(rows.row_times(index, g, s, 5), rows.row_times(a, g, s, 5))
    torch.testing.assert_close(rows.squared_gradients(index, g, 5), rows.squared_gradients(a, g, 5))
    one = index[:, :, :1], g[:, :, :, :1]
    torch.testing.assert_close(rows.squared_gradients(*one, 5), rows.squared_gradients(a[:, :, :1], one[1], 5))
    for x, y in zip(rows.row_sums(index, g), rows.row_sums(a, g), strict=True):
        torch.testing.assert_close(x, y)
    mask = torch.rand(24) < 0.5 if masked else torch.ones(24, dtype=torch.bool)
    outer_a, count, outer_g = *rows.moment_a(block, index, g, mask if masked else None), rows.moment_g(block, index, g)
    counted = (index >= 0).flatten() & mask
    if reduce:
        share = counted.reshape(4, 6) / counted.reshape(4, 6).sum(1, keepdim=True).clamp_min(1)
        mean = (a[0] * share[..., None]).sum(1)
        expected_a, expected_g = mean.square().sum(0), g.sum(3)[0].flatten(0, 1)
        assert count == counted.reshape(4, 6).any(1).sum()
    else:
        expected_a, expected_g = a.reshape(24, 5)[counted].sum(0), g.reshape(-1, 3)
        assert count == counted.sum()
    torch.testing.assert_close(outer_a, expected_a[None])
    torch.testing.assert_close(outer_g, (expected_g.T @ expected_g)[None])


# What is no layer


class Standardised(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


def test_a_convolution_that_changes_its_weight_is_no_layer() -> None:
    assert find_blocks(nn.Sequential(Standardised(2, 2, 1))) == []


def test_a_patched_forward_is_no_layer() -> None:
    layer = nn.Linear(3, 3)
    layer.forward = lambda value: F.linear(value, layer.weight) ** 2  # type: ignore[method-assign]
    assert find_blocks(nn.Sequential(layer)) == []
