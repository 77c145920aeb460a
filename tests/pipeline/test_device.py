"""Where and how a run computes: settings are made and recorded, change rounding only, and never make a GPU wait."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Listener, a_network, a_run, some_data
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pipeline import models
from pipeline.clocks import Stopwatch
from pipeline.config import ConfigError, RunConfig, load, resolve
from pipeline.data import Data, Split
from pipeline.device import describe_environment, placed, prepare_device
from pipeline.loop import Outcome, Training
from pipeline.records import is_measured

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["sgd", "adam", "kfac"])
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FIXED: dict[str, Any] = {"lr": 0.05, "damping": 0.1, "factor_interval": 4, "inverse_interval": 4}


@functools.cache
def digits() -> Data:
    """The images that scikit-learn ships."""
    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float()[:, None] / 16
    targets = torch.from_numpy(loaded.target)
    parts = [Split(images[a:b], targets[a:b]) for a, b in ((0, 1200), (1200, 1500), (1500, 1797))]
    return Data(*parts, population=None, teacher_loss=None, input_shape=(1, 8, 8), outputs=10, manifest={})


def digits_run(optimizer: str, **changes: Any) -> RunConfig:
    """The benchmark digits_cnn as it ships, for 120 steps."""
    shipped = resolve(load(ROOT / "params.yaml"), "digits_cnn", optimizer)
    short = {"steps": 120, "evaluate_every": 30, "diagnostics": "off", "threads": 1}
    return replace(shipped, **(short | changes))


def training(run: RunConfig, device: torch.device = CPU) -> Training:
    """Ready to start, as the stage makes it."""
    data = digits()
    parts = {
        name: Split(*(tensor.to(device) for tensor in (split.inputs, split.targets)))
        for name in ("train", "validation", "test")
        for split in [getattr(data, name)]
    }
    model = placed(models.build(run.model, data.input_shape, data.outputs, 0), run, device)
    return Training(run, replace(data, **parts), 0, model)


def outcome(run: RunConfig, device: torch.device = CPU) -> Outcome:
    return training(run, device).train(Listener())


def losses(of: Outcome) -> Tensor:
    assert of.summary["status"] == "finished", of.summary["message"]
    return torch.tensor([row["train_loss"] for row in of.history])


def assert_near(one: Tensor, other: Tensor, factor: float) -> None:
    """Losses may part by this factor: rounding grows over the steps."""
    assert float((one / other).log().abs().max().exp()) < factor, (one, other)


# Settings are made, recorded and refused.


@pytest.fixture
def switches() -> Iterator[None]:
    """The process's settings as they were."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn, False
        torch.use_deterministic_algorithms(False)


def test_device_and_threads_are_set_and_recorded() -> None:
    before = torch.get_num_threads()
    try:
        run = a_run(threads=2, device="auto")
        environment = describe_environment(run, prepare_device(run))
        assert torch.get_num_threads() == environment["threads"] == 2
    finally:
        torch.set_num_threads(before)
    assert environment["device"] == ("cuda" if torch.cuda.is_available() else "cpu") and environment["device_name"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"device": "cuda:1"}, "device: 'cuda:1' is not allowed; this machine has auto, cpu"),
        (
            {"device": "auto", "precision": "tf32"},
            "precision: 'tf32' is not allowed on a CPU; expected fp32 or bf16",
        ),
        (
            {"device": "cpu", "precision": "fp16"},
            "precision: 'fp16' is not allowed on a CPU; expected fp32 or bf16",
        ),
    ],
)
def test_what_this_machine_does_not_have_is_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        prepare_device(a_run(**settings))
    assert str(refusal.value) == line


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
@pytest.mark.usefixtures("switches")
def test_the_first_gpu_is_taken_or_the_one_that_is_named(
    name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to a GPU, also where there is none: torch's own check of the device, up to the driver."""
    taken: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run = a_run(device=name)
    assert prepare_device(run).type == "cuda" and taken == [index]


# Settings change how numbers are rounded, and nothing else.


@OPTIMIZERS
def test_a_run_in_bfloat16_is_near_the_one_in_single_precision(optimizer: str) -> None:
    seen: list[torch.dtype] = []
    single, half = (outcome(digits_run(optimizer)), training(digits_run(optimizer, precision="bf16")))
    half.model[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))  # type: ignore[index]
    of_half = losses(half.train(Listener()))
    assert half.evaluated is not half.model  # so the hook saw the training steps only
    assert set(seen) == {torch.bfloat16} and len(seen) == 120
    assert of_half[0] == losses(single)[0], "evaluated in another precision than float32"
    assert not torch.equal(of_half, losses(single))
    assert_near(of_half, losses(single), 2.5)  # near zero rounding parts them most
    assert of_half[-1] < 0.5 * of_half[0]


@pytest.mark.parametrize("optimizer", ["adam", "kfac"])
def test_float16_scales_the_loss_and_leaves_out_steps_that_overflow(optimizer: str) -> None:
    """The path of a GPU, on a CPU: the stage would refuse it for being slow there."""
    half = training(digits_run(optimizer, precision="fp16", steps=60))
    half.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
    before = [parameter.detach().clone() for parameter in half.model.parameters()]
    half.model.train()
    half._step()
    assert half.scaler.get_scale() == 2.0**10
    assert all(map(torch.equal, before, half.model.parameters())), "a step with an overflow was taken"
    result = half.train(Listener())
    assert result.summary["steps"] == 60 and half.scaler.get_scale() >= 2.0**10
    assert result.summary["train_loss"] < 0.8 * result.history[0]["train_loss"]


@pytest.mark.parametrize("optimizer", ["sgd", "kfac"])
def test_channels_last_is_a_matter_of_memory_only(optimizer: str) -> None:
    layouts: list[bool] = []
    plain, last = (
        outcome(digits_run(optimizer, steps=60)),
        training(digits_run(optimizer, steps=60, channels_last=True)),
    )
    last.model[0].register_forward_hook(  # type: ignore[index]
        lambda module, inputs, output: layouts.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    of_last = losses(last.train(Listener()))
    assert layouts and all(layouts)
    assert_near(of_last, losses(plain), 1.1)


def test_channels_last_leaves_a_network_without_convolutions_as_it_is() -> None:
    rows = [Training(run, some_data(), 0, placed(a_network(), run, CPU)).train(Listener()).history for run in both()]
    assert unmeasured(rows[0]) == unmeasured(rows[1])


def both() -> tuple[RunConfig, RunConfig]:
    return a_run(), a_run(channels_last=True)


def unmeasured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not is_measured(name)} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "options"), [("sgd", {}), ("kfac", FIXED), ("kfac", {})])
def test_a_compiled_run_is_that_of_the_eager_one_and_compiles_before_its_clock_starts(
    optimizer: str, options: dict[str, Any]
) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    run = digits_run(optimizer)
    run = replace(run, options=run.options | options)
    compiled = training(replace(run, compile=True))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == (0 if optimizer == "kfac" and not options else 1)  # a self-tuning step is always eager
    of_compiled = losses(compiled.train(Listener()))
    assert counters["stats"]["unique_graphs"] == graphs, "compiled on the training clock, or for an evaluation"
    assert_near(of_compiled, losses(outcome(run)), 1.1)


# On a GPU.


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@needs_gpu
@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("sgd", {}), ("adam", {}), ("kfac", {}), ("kfac", {"lr": 0.05, "damping": 0.1})],
    ids=["sgd", "adam", "kfac", "kfac-fixed"],
)
def test_no_step_waits_for_the_device(optimizer: str, options: dict[str, Any], precision: str) -> None:
    """Averaging, schedule and clock included; more steps than an epoch has, since a new order must not wait either."""
    run = digits_run(optimizer, device="cuda", precision=precision)
    run = replace(run, options=run.options | options)
    ready = training(run, prepare_device(run))
    ready.model.train()
    for _ in range(7):  # these allocate
        ready._step()
    with no_waiting():
        for _ in range(23):
            ready._step()
    assert ready._finite()
    assert ready.averaged is not None and ready.progress.examples > 2 * len(ready.data.train)


@gpu
@needs_gpu
@pytest.mark.usefixtures("switches")
@OPTIMIZERS
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_a_precision_of_the_gpu_is_near_single_precision(optimizer: str, precision: str) -> None:
    curves = []
    for chosen in ("fp32", precision):
        run = digits_run(optimizer, device="cuda", precision=chosen)
        curves.append(losses(outcome(run, prepare_device(run))))
    assert_near(curves[1], curves[0], 2.5)  # after 120 steps rounding alone parts losses near zero by up to 2
    assert curves[1][-1] < 0.5 * curves[1][0]


@gpu
@needs_gpu
@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "channels_last": True}], ids=["plain", "bf16"])
@OPTIMIZERS
def test_a_deterministic_run_repeats_to_the_bit(optimizer: str, settings: dict[str, Any]) -> None:
    run = digits_run(optimizer, device="cuda", diagnostics="light", **settings)
    device = prepare_device(run)
    first, second = outcome(run, device), outcome(run, device)
    assert unmeasured(first.history) == unmeasured(second.history)
    assert first.curvature == second.curvature


@gpu
@needs_gpu
def test_seconds_of_phases_on_the_stream_add_up_and_events_are_used_again() -> None:
    device = torch.device("cuda")
    watch, value = Stopwatch(device), torch.randn(2000, 2000, device=device)
    whole = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    most = 0
    whole[0].record()
    for step in range(3000):
        with watch("forward_backward"):
            value = nn.functional.normalize(value @ value)
            with watch("statistics"):
                value = nn.functional.normalize(value @ value)
        with watch("update"):
            value = value + 0.01
        most = max(most, len(watch._events))
        if step % 200 == 199:
            torch.cuda.synchronize()
    whole[1].record()
    seconds = watch.seconds()
    assert most <= 1000 and len(watch._events) == 0
    assert sum(seconds.values()) == pytest.approx(whole[0].elapsed_time(whole[1]) / 1000, rel=0.3)
    assert seconds["statistics"] == pytest.approx(seconds["forward_backward"], rel=0.3)
    assert seconds["inverses"] == 0 < seconds["update"]
