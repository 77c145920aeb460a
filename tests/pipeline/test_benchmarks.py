"""Claims about what can be chosen: every benchmark is whole, every study names what it promises, every optimizer
trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Listener, a_run, some_data

from pipeline import models
from pipeline.composition import compose
from pipeline.config import Params, RunConfig, load, resolve
from pipeline.data import Data, Split
from pipeline.loop import Training, learning_rate_factor
from pipeline.validation import available

OPTIMIZERS = ["sgd", "adam", "kfac", "ekfac", "gkfac"]
SEVEN = ["sgd", "adam", "muon", "soap", "kfac", "ekfac", "gkfac"]
DEPTHS = [f"toy_depth{depth}_{activation}" for depth in (8, 32) for activation in ("none", "relu", "tanh")]
NETWORKS = [
    *("alexnet", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
    *("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "preresnet110", "resnext29_8x64d"),
    *("resnext29_16x64d", "wrn28_10", "densenet100_12", "densenet190_40"),
]
CIFAR = [f"{data}_{network}" for data in ("cifar10", "cifar100") for network in NETWORKS]
SMALL = [f"{data}_{network}" for data in ("cifar10", "cifar100") for network in ("cnn", "mlp")]
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100}
MILLIONS = {"alexnet": 2.47, "vgg19_bn": 20.04, "resnet20": 0.27, "resnet110": 1.7, "wrn28_10": 36.48}


def composed(folder: Path, *overrides: str) -> Params:
    compose(folder / "params.yaml", list(overrides))
    return load(folder / "params.yaml")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Params:
    """All benchmarks, all optimizers."""
    names = {group: f"{group}=[{','.join(available(group))}]" for group in ("benchmark", "optimizer")}
    return composed(tmp_path_factory.mktemp("everything"), *names.values())


def shape_and_outputs(data: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """Of an example and of a fitting network, from the fields of `images` or `planted`."""
    if "inputs" in data:
        return (data["inputs"],), data["outputs"]
    shape = SHAPES[data["source"]]
    pixels = shape[0] * shape[1] * shape[2]
    return ((pixels,), pixels) if data["task"] == "autoencoder" else (shape, CLASSES[data["source"]])


def test_the_benchmarks_are_those_of_the_mission() -> None:
    others = ["toy_linear", "toy_mlp", "digits_autoencoder", "digits_cnn", "mnist_autoencoder"]
    assert set(available("benchmark")) == {*others, *DEPTHS, *CIFAR, *SMALL}


@pytest.mark.parametrize("benchmark", available("benchmark"))
def test_every_benchmark_resolves_with_every_optimizer_and_its_network_fits_its_data(
    everything: Params, benchmark: str
) -> None:
    runs = [resolve(everything, benchmark, optimizer) for optimizer in everything.optimizers]
    run = runs[0]
    shape, outputs = shape_and_outputs(run.data)
    assert 0 < run.targets["hard"] < run.targets["easy"]
    assert run.steps > 0 and run.seconds is not None
    assert all(each.warmup < run.steps and run.evaluate_every <= run.steps for each in runs)
    with torch.device("meta"):
        network = models.build(run.model, shape, outputs, 0)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    network_name = benchmark.partition("_")[2]
    if benchmark.startswith("cifar10_") and network_name in MILLIONS:
        assert parameters / 1e6 == pytest.approx(MILLIONS[network_name], rel=0.02)
    if run.data.get("source") in ("mnist", "cifar10"):  # a CIFAR-100 network differs in its last layer only
        examples = torch.zeros(2, *shape, device="meta")
        assert network(examples).shape == (2, outputs)


@pytest.mark.parametrize("benchmark", CIFAR)
def test_published_networks_get_200_epochs_with_a_cosine_after_5_of_warm_up(everything: Params, benchmark: str) -> None:
    run = resolve(everything, benchmark, "sgd")
    epoch = run.evaluate_every
    assert epoch == -(-45_000 // 128) and (run.batch_size, run.steps, run.warmup) == (128, 200 * epoch, 5 * epoch)
    assert (run.schedule, run.options["weight_decay"], run.averaging) == ("cosine", 5e-4, None)
    factor = learning_rate_factor(run)
    assert factor(5 * epoch) == 1.0 and factor(run.steps) == 0.0
    assert run.targets["hard"] - run.targets["easy"] == pytest.approx(
        (0.9 - 0.98) * (1 - run.targets["easy"]) / 0.9, abs=1e-3
    )
    tuned = resolve(everything, benchmark, "kfac")
    assert (tuned.warmup, tuned.schedule) == (0, "cosine")
    assert (tuned.options["factor_interval"], tuned.options["inverse_interval"]) == (10, 100)


@pytest.mark.parametrize(
    ("study", "benchmarks", "optimizers"),
    [
        ("toy", ["toy_linear", "toy_mlp", *DEPTHS], OPTIMIZERS),
        ("autoencoder", ["mnist_autoencoder"], OPTIMIZERS),
        ("cifar", [*SMALL, *CIFAR], OPTIMIZERS),
        ("paper", ["toy_linear", "toy_mlp", *DEPTHS, "mnist_autoencoder", *SMALL, *CIFAR], OPTIMIZERS),
        ("smoke", ["toy_mlp", "mnist_autoencoder", "cifar10_cnn", "cifar100_cnn"], available("optimizer")),
        ("tiny", ["toy_linear", "digits_cnn"], ["sgd", "kfac", "gkfac"]),
        ("verdict", ["toy_linear", "toy_mlp", "digits_autoencoder", "digits_cnn"], SEVEN),
        ("verdict_images", ["mnist_autoencoder", "cifar10_cnn"], SEVEN),
    ],
)
def test_a_study_names_what_it_promises(
    tmp_path: Path, study: str, benchmarks: list[str], optimizers: list[str]
) -> None:
    params = composed(tmp_path, f"study={study}")
    assert set(params.benchmarks) == set(benchmarks) and set(params.optimizers) == set(optimizers)


def test_the_smoke_study_is_short(tmp_path: Path) -> None:
    params = composed(tmp_path, "study=smoke")
    assert all(fields["steps"] <= 50 for fields in params.benchmarks.values()) and len(params.seeds) == 1


# ---------------------------------------------------------------- optimizers


def images(classes: int = 4, examples: int = 48) -> Data:
    """Small pictures in one colour channel, of a few classes."""
    stream = torch.Generator().manual_seed(3)

    def split(count: int) -> Split:
        targets = torch.randint(classes, (count,), generator=stream)
        inputs = torch.randn(count, 1, 8, 8, generator=stream) + targets[:, None, None, None]
        return Split(inputs, targets)

    return Data(split(examples), split(16), split(16), None, None, (1, 8, 8), classes, {})


def trained(run: RunConfig, data: Data) -> tuple[dict[str, torch.Tensor], Training, dict[str, Any]]:
    """The initial weights, the run after its end, and its summary."""
    model = models.build(run.model, data.input_shape, data.outputs, 0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    training = Training(run, data, 0, model)
    return before, training, training.train(Listener()).summary


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("optimizer", available("optimizer"))
def test_every_optimizer_moves_every_parameter_of_a_small_network_in_three_steps(
    everything: Params, optimizer: str, network: str
) -> None:
    chosen = resolve(everything, "toy_mlp" if network == "mlp" else "cifar10_cnn", optimizer)
    common = {"init": "default", "gain": 1.0, "activation": "tanh", "batch_norm": True}
    shapes = {"mlp": {"depth": 3, "width": 6, "bias": True}, "cnn": {"channels": [3, 4]}}
    loss = "binary_cross_entropy" if network == "mlp" else "cross_entropy"
    run = a_run(
        optimizer=optimizer,
        model={"name": network, **shapes[network], **common},
        loss=loss,
        steps=3,
        target_class=chosen.target_class,
        options=chosen.options,
        rest=chosen.rest,
    )
    before, training, summary = trained(run, some_data(loss) if network == "mlp" else images())
    assert summary["status"] == "finished", summary["message"]
    assert summary["train_loss"] < 10
    for name, parameter in training.model.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name


def muon(**changes: Any) -> RunConfig:
    rest = {"_target_": "torch.optim.SGD", "lr": 0.01}
    return a_run(
        model={
            "name": "cnn",
            "channels": [3, 4],
            "init": "default",
            "gain": 1.0,
            "activation": "relu",
            "batch_norm": True,
        },
        loss="cross_entropy",
        target_class="torch.optim.Muon",
        options={"lr": 0.1, "weight_decay": 0.0},
        rest=rest,
        **changes,
    )


def test_weights_go_to_the_first_optimizer_as_matrices_and_all_else_to_the_rest() -> None:
    data = images()
    _, training, summary = trained(muon(steps=4, schedule="linear"), data)
    assert summary["status"] == "finished"
    first, rest = training.optimizer.param_groups
    assert [tuple(p.shape) for p in first["params"]] == [(3, 9), (4, 27), (4, 4 * 16)]
    assert all(p.ndim == 1 for p in rest["params"])
    assert (first["lr"], rest["lr"]) == (0.0, 0.0)  # the schedule reaches both


def test_a_step_of_a_convolution_is_the_step_of_its_matrix_whatever_its_memory_format() -> None:
    found = []
    for memory in (torch.contiguous_format, torch.channels_last):
        data = images()
        run = muon(steps=1)
        model = models.build(run.model, data.input_shape, data.outputs, 0).to(memory_format=memory)
        weight = model.get_parameter("0.weight")
        before = weight.detach().clone()
        training = Training(run, data, 0, model)
        training.train(Listener())
        update = (weight.detach() - before).flatten(1)
        assert torch.linalg.svdvals(update).max() / torch.linalg.svdvals(update).min() < 2  # orthogonalised
        found.append(update)
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_two_optimizers_as_one_go_on_from_their_state(tmp_path: Path) -> None:
    """Three steps, state saved to a file, three more; and the same in another process's objects."""
    data = images()

    def steps(training: Training, count: int) -> None:
        for _ in range(count):
            training._step()

    def fresh() -> Training:
        run = muon()
        return Training(run, data, 0, models.build(run.model, data.input_shape, data.outputs, 0))

    one = fresh()
    steps(one, 3)
    torch.save({"model": one.model.state_dict(), "optimizer": one.optimizer.state_dict()}, tmp_path / "state.pt")
    steps(one, 3)
    other = fresh()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.model.load_state_dict(state["model"])
    other.optimizer.load_state_dict(state["optimizer"])
    other.progress.step, other.progress.examples = 3, 30
    steps(other, 3)
    for mine, its in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
