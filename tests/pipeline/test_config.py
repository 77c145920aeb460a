"""Claims about the validated configuration: good files load, every bad value is one clear line, mappings resolve."""

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.checks import ConfigError
from pipeline.config import load, optimizer_class, resolve, view
from pipeline.signatures import signature

ROOT = Path(__file__).parents[2]
RESNET = {"name": "resnet", "depth": 20, "shortcut": "pad", "init": "default", "gain": 1.0}


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(ROOT / "params.yaml")


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the value at a dotted path set, or removed by `...`."""
    values = copy.deepcopy(values)
    *parents, last = path.split(".")
    place = values
    for name in parents:
        place = place.setdefault(name, {})
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


def test_validation_of_the_whole_file_imports_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys; from pipeline.config import load; load(); print({'torch', 'mlflow', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout == "set()\n"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("optimizer.sgd.lr", "abc", ["optimizer.sgd.lr", "'abc'", "a number > 0"]),
        ("optimizer.sgd.lr", -0.1, ["-0.1", "> 0"]),
        ("optimizer.sgd.lr", True, ["true", "a number > 0"]),
        ("optimizer.sgd.lr", None, ["null", "a number > 0"]),
        ("optimizer.sgd.lr", float("nan"), ["nan"]),
        ("optimizer.sgd.lr", {"default": 0.1, "toy_mpl": 0.2}, ["optimizer.sgd.lr.toy_mpl", "nearest: toy_mlp"]),
        ("optimizer.sgd.lr", {"default": 0.1, "cifar_*": 0.2}, ["optimizer.sgd.lr.cifar_*", "unknown benchmark"]),
        ("optimizer.sgd.rest", {"lr": 1}, ["optimizer.sgd.rest._target_", "dotted name"]),
        (
            "optimizer.sgd.rest",
            {"_target_": "torch.optim.AdamW", "training": {}},
            ["optimizer.sgd.rest.training: unknown hyper-parameter"],
        ),
        ("optimizer.sgd.rest", {"_target_": "torch.optim.AdamW", "lr": 0}, ["optimizer.sgd.rest.lr", "> 0"]),
        ("benchmark.toy_mlp.schedule", "step", ["benchmark.toy_mlp.schedule", "constant, linear, cosine"]),
        ("optimizer.sgd.lr", {"default": 0.1, "toy_mlp": "fast"}, ["optimizer.sgd.lr.toy_mlp", "'fast'"]),
        ("optimizer.sgd.lr", {"toy_mlp": 0.1}, ["optimizer.sgd.lr", "no value for benchmark toy_linear", "default"]),
        ("optimizer.sgd.lr", {}, ["optimizer.sgd.lr", "no default"]),
        ("optimizer.sgd.momentum", 1.0, ["optimizer.sgd.momentum", "1.0", ">= 0 and < 1"]),
        ("optimizer.sgd.momentum", 0, ["optimizer.sgd.momentum", "nesterov"]),
        ("optimizer.sgd.nesterov", "yes", ["optimizer.sgd.nesterov", "true or false"]),
        ("optimizer.sgd.momentun", 0.9, ["optimizer.sgd.momentun", "nearest: momentum"]),
        ("optimizer.sgd.params", 1, ["optimizer.sgd.params", "training loop"]),
        (
            "optimizer.sgd._target_",
            "torch.optim.SGDD",
            ["optimizer.sgd._target_", "'torch.optim.SGDD'", "nearest: SGD"],
        ),
        ("optimizer.sgd._target_", "torch.optin.SGD", ["optimizer.sgd._target_", "no module 'torch.optin'"]),
        ("optimizer.sgd._target_", "tortch.optim.SGD", ["optimizer.sgd._target_", "no package 'tortch'"]),
        ("optimizer.sgd._target_", "SGD", ["optimizer.sgd._target_", "dotted name"]),
        ("optimizer.sgd._target_", ..., ["optimizer.sgd._target_", "null", "dotted name"]),
        ("optimizer.sgd.training.batch_size", 0, ["optimizer.sgd.training.batch_size", "integer >= 1"]),
        ("optimizer.sgd.training.batch_size", {"from": 10, "to": 0, "over_epochs": 1.0}, ["over_epochs"]),
        ("optimizer.sgd.training.averaging", 1.5, ["optimizer.sgd.training.averaging", "1.5", "> 0 and < 1"]),
        ("optimizer.sgd.training.schedule", "cosin", ["optimizer.sgd.training.schedule", "nearest: cosine"]),
        ("optimizer.sgd.training.warm", 3, ["optimizer.sgd.training.warm", "nearest: warmup"]),
        ("optimizer.adam.betas", [0.9, 1.0], ["optimizer.adam.betas", "[0.9, 1.0]", "< 1"]),
        ("optimizer.adam.betas", [0.9], ["optimizer.adam.betas", "2 values"]),
        ("optimizer.kfac.damping", 0, ["optimizer.kfac.damping", "> 0", "null"]),
        ("optimizer.kfac.factor_interval", 1.5, ["optimizer.kfac.factor_interval", "integer >= 1"]),
        ("optimizer.kfac.fisher", "sample", ["optimizer.kfac.fisher", "nearest: sampled"]),
        ("optimizer.ekfac.scale_intervall", 2, ["optimizer.ekfac.scale_intervall", "nearest: scale_interval"]),
        ("optimizer.ekfac.dampin", 2, ["nearest: damping"]),
        ("optimizer.gkfac.coarse_fisher", "kronecker", ["optimizer.gkfac.coarse_space", "'krylov'", "constant"]),
        ("optimizer", {}, ["optimizer", "nothing is chosen", "kfac"]),
        ("optimizer", ..., ["optimizer: is missing"]),
        ("optimizer", ["sgd"], ["optimizer", "mapping"]),
        ("benchmark.toy_mlpp", {}, ["benchmark.toy_mlpp", "nearest: toy_mlp"]),
        ("benchmark.toy_mlp.steps", 0, ["benchmark.toy_mlp.steps", "integer >= 1"]),
        ("benchmark.toy_mlp.step", 5, ["benchmark.toy_mlp.step", "nearest: steps"]),
        ("benchmark.toy_mlp.evaluate_every", 10**6, ["benchmark.toy_mlp.evaluate_every", "at most"]),
        ("benchmark.toy_mlp.loss", "cross_entropi", ["benchmark.toy_mlp.loss", "nearest: cross_entropy"]),
        (
            "benchmark.toy_mlp.loss",
            "cross_entropy",
            ["benchmark.toy_mlp.loss", "task 'binary'", "binary_cross_entropy"],
        ),
        ("benchmark.toy_mlp.target.metric", "train", ["benchmark.toy_mlp.target.metric", "train_loss"]),
        ("benchmark.toy_mlp.target.value", 1, ["benchmark.toy_mlp.target.value", "valid: easy, hard, metric"]),
        ("benchmark.toy_mlp.target.easy", 0.001, ["benchmark.toy_mlp.target.easy", "0.001", "above", "hard, 0.025"]),
        ("benchmark.toy_mlp.target.metric", "validation_error", ["benchmark.toy_mlp.target.metric", "needs classes"]),
        ("benchmark.toy_mlp.seconds", 0, ["benchmark.toy_mlp.seconds", "a number > 0", "null"]),
        ("benchmark.toy_mlp.target", ..., ["benchmark.toy_mlp.target", "missing"]),
        ("benchmark.digits_cnn.target.metric", "excess_loss", ["benchmark.digits_cnn.target.metric", "planted"]),
        ("benchmark.toy_mlp.model.name", "mpl", ["benchmark.toy_mlp.model.name", "nearest: mlp"]),
        ("benchmark.toy_mlp.model.name", "cnn", ["benchmark.toy_mlp.model"]),
        ("benchmark.toy_mlp.model.dept", 3, ["benchmark.toy_mlp.model.dept", "nearest: depth"]),
        ("benchmark.toy_mlp.model.width", 0, ["benchmark.toy_mlp.model.width", "integer >= 1"]),
        ("benchmark.digits_autoencoder.model.widths", [], ["benchmark.digits_autoencoder.model.widths", "one or more"]),
        ("benchmark.toy_mlp.model", ..., ["benchmark.toy_mlp.model", "chosen"]),
        ("benchmark.toy_mlp.model.width", [5, 5], ["benchmark.toy_mlp.model.width", "[5, 5]", "a list of 7"]),
        (
            "benchmark.digits_cnn.model",
            {**RESNET, "depth": 21},
            ["benchmark.digits_cnn.model.depth", "21", "8, 14, 20"],
        ),
        ("benchmark.toy_mlp.model", RESNET, ["benchmark.toy_mlp.model.name", "'resnet' needs images"]),
        (
            "benchmark.digits_autoencoder.model",
            RESNET,
            ["benchmark.digits_autoencoder.model.name", "mlp or autoencoder"],
        ),
        ("images.digits_cnn.validation", 0.9, ["images.digits_cnn.validation", "sum < 1"]),
        ("images.digits_cnn.source", "digit", ["images.digits_cnn.source", "nearest: digits"]),
        ("images.digits_cnn", ..., ["benchmark.digits_cnn", "images or planted"]),
        ("images.toy_mlp", {"source": "digits"}, ["benchmark.toy_mlp", "images and planted"]),
        ("planted.mine", {}, ["planted.mine", "no benchmark 'mine' is chosen"]),
        ("planted.toy_mlp.condition", 0.5, ["planted.toy_mlp.condition", ">= 1"]),
        ("planted.toy_mlp.noise", 1.5, ["planted.toy_mlp.noise", "1.5", "share of the labels"]),
        ("planted.toy_mlp.teacher.batch_norm", 1, ["planted.toy_mlp.teacher.batch_norm", "true or false"]),
        ("planted.toy_mlp.teacher.depth", 0, ["planted.toy_mlp.teacher.depth", "integer >= 1"]),
        ("planted.toy_mlp.teacher", ..., ["planted.toy_mlp.teacher", "missing"]),
        ("seeds", 3, ["seeds", "3", "a list"]),
        ("seeds", [], ["seeds", "one or more"]),
        ("seeds", [0, 0], ["seeds", "different"]),
        ("seeds", [-1], ["seeds", ">= 0"]),
        ("seed", [0], ["seed", "nearest: seeds"]),
        ("device", "gpu", ["device", "'gpu'", "cuda:N"]),
        ("threads", 0, ["threads", "integer >= 1", "null"]),
        ("benchmark.toy_mlp.threads", 0, ["benchmark.toy_mlp.threads", "integer >= 1"]),
        ("precision", "bf61", ["precision", "fp32, tf32, bf16, fp16", "nearest: bf16"]),
        ("compile", "yes", ["compile", "'yes'", "true or false"]),
        ("channels_last", 1, ["channels_last", "1", "true or false"]),
        ("deterministic", None, ["deterministic", "null", "true or false"]),
        ("diagnostics", "lite", ["diagnostics", "light"]),
        ("image_folder", 3, ["image_folder", "the path of a folder, or null"]),
        ("image_folder", ..., ["image_folder: is missing"]),
    ],
)
def test_a_bad_value_is_refused_in_one_line(committed: dict[str, Any], path: str, value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        view(changed(committed, path, value))
    line = str(refusal.value)
    assert "\n" not in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "cifar"}, ["images.digits_cnn.source: 'cifar'", "nearest: cifar10"]),
        ({"test": 0.1}, ["images.digits_cnn.test: unknown", "valid: augmentation, examples,"]),
        ({"augmentation": "crop"}, ["images.digits_cnn.augmentation", "nearest: crop_flip"]),
        ({"examples": 0}, ["images.digits_cnn.examples", "an integer >= 1, or null"]),
        ({"examples": 99}, ["images.digits_cnn.examples: 99", "expected 100 to 50000"]),
        ({"examples": 60_000}, ["images.digits_cnn.examples: 60000", "expected 100 to 50000"]),
        ({"source": "cifar100", "examples": 500}, ["expected 1000 to 50000"]),
        ({"validation": 1.0}, ["images.digits_cnn.validation", "> 0 and < 1"]),
    ],
)
def test_a_bad_value_of_an_image_set_is_refused_in_one_line(
    committed: dict[str, Any], change: dict[str, Any], words: list[str]
) -> None:
    good = {"source": "cifar10", "task": "classification", "validation": 0.1, "examples": 100, "augmentation": "none"}
    view(changed(committed, "images.digits_cnn", {**good, "split_seed": 0}))
    with pytest.raises(ConfigError) as refusal:
        view(changed(committed, "images.digits_cnn", {**good, "split_seed": 0, **change}))
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("image_folder", "~/images"),
        ("optimizer.sgd.lr", 0.03),
        ("optimizer.sgd.lr", {name: 0.1 for name in ("toy_linear", "toy_mlp", "digits_autoencoder", "digits_cnn")}),
        ("optimizer.sgd.training", ...),
        ("optimizer.sgd.training.batch_size", {"from": 32, "to": 128, "over_epochs": 0.5}),
        ("optimizer.sgd.training.batch_size", {"default": None, "toy_mlp": {"from": 8, "to": 64, "over_epochs": 2}}),
        ("optimizer.kfac.kl_clip", None),
        ("optimizer.ekfac.scale_interval", 3),
        ("optimizer.adam.fused", True),
        ("optimizer.mine", {"_target_": "torch.optim.RMSprop", "lr": 0.01, "alpha": 0.9}),
        ("benchmark.digits_cnn.model", RESNET),
        ("benchmark.toy_mlp.model.width", [32, 16, 8, 8, 8, 16, 32]),
        ("benchmark.digits_cnn.target", {"metric": "validation_error", "easy": 0.1, "hard": 0.02}),
        ("benchmark.digits_cnn.seconds", 1.5),
        ("diagnostics", False),
        ("device", "cuda:1"),
        ("precision", "bf16"),
        ("threads", 4),
    ],
)
def test_values_that_mean_something_are_accepted(committed: dict[str, Any], path: str, value: Any) -> None:
    view(changed(committed, path, value))


def test_a_mapping_by_benchmark_resolves_to_the_benchmarks_entry_or_the_default(committed: dict[str, Any]) -> None:
    values = changed(committed, "optimizer.sgd.lr", {"default": 0.1, "toy_mlp": 0.2})
    values = changed(values, "optimizer.sgd.training.averaging", {"default": None, "toy_mlp": 0.9})
    growth = {"from": 8, "to": 64, "over_epochs": 2}
    values = changed(values, "optimizer.sgd.training.batch_size", {"default": None, "toy_mlp": growth})
    values = changed(values, "optimizer.sgd.training.evaluate_every", {"default": None, "toy_mlp": 20})
    params = view(values)
    toy, digits = resolve(params, "toy_mlp", "sgd"), resolve(params, "digits_cnn", "sgd")
    assert (toy.options["lr"], toy.averaging, toy.batch_size) == (0.2, 0.9, growth)
    assert (digits.options["lr"], digits.averaging) == (0.1, None)
    assert digits.batch_size == params.benchmarks["digits_cnn"]["batch_size"]
    assert (toy.evaluate_every, digits.evaluate_every) == (20, params.benchmarks["digits_cnn"]["evaluate_every"])
    short = changed(values, "benchmark.toy_mlp.steps", 15)  # an optimizer's interval does not outlast a short run
    benchmarks = changed(short, "benchmark.toy_mlp.evaluate_every", 3)
    assert resolve(view(benchmarks), "toy_mlp", "sgd").evaluate_every == 3
    assert toy.as_dict()["options"]["lr"] == 0.2
    assert "_target_" not in toy.options
    assert "training" not in toy.options


def test_threads_are_the_benchmarks_unless_all_are_set_at_once(committed: dict[str, Any]) -> None:
    values = changed(changed(committed, "benchmark.toy_mlp.threads", 3), "benchmark.digits_cnn.threads", ...)
    given = {name: resolve(view(values), name, "sgd").threads for name in ("toy_mlp", "digits_cnn")}
    assert given == {"toy_mlp": 3, "digits_cnn": 2}
    assert resolve(view(changed(values, "threads", 5)), "toy_mlp", "sgd").threads == 5


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_a_precision_of_gpus_is_refused_for_a_cpu_at_composition(committed: dict[str, Any], precision: str) -> None:
    values = changed(committed, "precision", precision)
    view(values)  # auto may find a GPU
    with pytest.raises(ConfigError, match=f"precision: '{precision}' is not allowed on a CPU; expected fp32 or bf16"):
        view(changed(values, "device", "cpu"))


def test_a_pattern_stands_for_the_benchmarks_that_it_fits_and_a_name_goes_before_it(committed: dict[str, Any]) -> None:
    mapping = {"default": 0.1, "digits_*": 0.2, "*_cnn": 0.3, "digits_autoencoder": 0.4}
    params = view(changed(committed, "optimizer.sgd.lr", mapping))
    found = {name: resolve(params, name, "sgd").options["lr"] for name in params.benchmarks}
    assert found == {"toy_linear": 0.1, "toy_mlp": 0.1, "digits_autoencoder": 0.4, "digits_cnn": 0.2}


def test_the_loop_is_the_benchmarks_unless_the_optimizer_says_otherwise(committed: dict[str, Any]) -> None:
    values = changed(committed, "benchmark.toy_mlp.schedule", "cosine")
    values = changed(values, "benchmark.toy_mlp.warmup", 7)
    run = resolve(view(values), "toy_mlp", "sgd")
    assert (run.schedule, run.warmup, run.batch_size) == ("cosine", 7, 512)
    run = resolve(
        view(changed(values, "optimizer.sgd.training", {"schedule": "linear", "warmup": 0})), "toy_mlp", "sgd"
    )
    assert (run.schedule, run.warmup, run.averaging) == ("linear", 0, None)


def test_float16_is_refused_with_an_optimizer_whose_gradients_the_scaler_does_not_see(
    committed: dict[str, Any],
) -> None:
    rest = {"_target_": "torch.optim.AdamW", "lr": 0.01}
    values = changed(committed, "optimizer.mine", {"_target_": "torch.optim.Muon", "lr": 0.02, "rest": rest})
    view(changed(values, "precision", "bf16"))
    with pytest.raises(ConfigError, match=r"precision: 'fp16' is not allowed with optimizer\.mine\.rest"):
        view(changed(values, "precision", "fp16"))


def test_a_pair_that_is_not_chosen_is_refused_by_name(committed: dict[str, Any]) -> None:
    params = view(committed)
    with pytest.raises(ConfigError, match=r"optimizer: 'ekfacc' .*nearest: ekfac"):
        resolve(params, "toy_mlp", "ekfacc")
    with pytest.raises(ConfigError, match="benchmark: 'toy' "):
        resolve(params, "toy", "sgd")


def test_a_target_that_is_no_optimizer_is_refused_after_import(committed: dict[str, Any]) -> None:
    run = resolve(view(changed(committed, "optimizer.mine", {"_target_": "torch.nn.Linear"})), "toy_mlp", "mine")
    with pytest.raises(ConfigError, match=r"optimizer\.mine\._target_: 'torch\.nn\.Linear' is not a subclass"):
        optimizer_class("optimizer.mine", run.target_class)


def test_every_optimizer_of_the_default_study_is_an_importable_optimizer(committed: dict[str, Any]) -> None:
    params = view(committed)
    for name in params.optimizers:
        run = resolve(params, "toy_mlp", name)
        optimizer_class(f"optimizer.{name}", run.target_class, run.options)


def test_scientific_notation_is_a_number_in_params_yaml(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    path.write_text(re.sub(r"^    seconds: .*$", "    seconds: 1e-8", text, count=1, flags=re.MULTILINE))
    assert 1e-8 in [run["seconds"] for run in load(path).benchmarks.values()]


@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), ("a: [", "is not YAML"), ("3", "mapping")])
def test_an_unreadable_params_yaml_is_one_line(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words) as refusal:
        load(path)
    assert "\n" not in str(refusal.value)


SOAP = "pytorch_optimizer.optimizer.soap.SOAP"
SHAMPOO = "pytorch_optimizer.optimizer.shampoo.ScalableShampoo"


@pytest.mark.parametrize(
    "target", ["torch.optim.SGD", "torch.optim.AdamW", "torch.optim.Muon", "kfac.KFAC", "kfac.EKFAC", SOAP, SHAMPOO]
)
def test_a_signature_read_from_source_is_that_of_the_imported_class(target: str) -> None:
    import importlib
    import inspect

    module, _, name = target.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    known = signature(target)
    assert not known.open
    own = inspect.signature(cls).parameters
    for parameter in own.values():
        if parameter.kind is parameter.VAR_KEYWORD or parameter.name in (
            "self",
            "params",
            "model",
            "loss",
            "generator",
        ):
            continue
        assert parameter.name in known.arguments
    assert "lr" in known.arguments


def test_a_misspelt_argument_of_a_class_that_would_swallow_it_is_refused(committed: dict[str, Any]) -> None:
    fields = {"_target_": SOAP, "lr": 0.003, "precondition_frequenzy": 1}
    with pytest.raises(ConfigError, match=r"optimizer\.soap\.precondition_frequenzy.*nearest: precondition_frequency"):
        view(changed(committed, "optimizer.soap", fields))


def test_an_optimizer_whose_package_is_not_installed_names_the_extra_that_has_it(
    committed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)  # Python's own way to say that it cannot be imported
    signature.cache_clear()
    with pytest.raises(ConfigError) as refusal:
        view(changed(committed, "optimizer.soap", {"_target_": SOAP, "lr": 0.003}))
    line = str(refusal.value)
    assert line.startswith("optimizer.soap._target_: ") and "\n" not in line
    assert "no package 'pytorch_optimizer'" in line and "pip install '.[peers]'" in line


def test_arguments_of_bases_in_the_same_package_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "somewhere"
    package.mkdir()
    (package / "__init__.py").write_text("from .deep import Third as Renamed\nfrom os import *\n")
    (package / "deep.py").write_text(
        "from somewhere.base import Second\n"
        "class Third(Second):\n    def __init__(self, model, *, third=3, **options): ...\n"
    )
    (package / "base.py").write_text(
        "class First:\n    def __init__(self, model, *, loss, first, flag=True): ...\nclass Second(First):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(signature("somewhere.Renamed").arguments) == {"first", "flag", "third"}
    assert signature("somewhere.path").open  # from a star import: left to the training stage


@pytest.mark.parametrize(
    ("stage", "words", "line"),
    [
        ("toy", [], "usage: python -m pipeline.toy <benchmark>"),
        ("toy", ["digits_cnn"], "planted: has no 'digits_cnn'"),
        ("prepare", ["toy_mlp"], "images: has no 'toy_mlp'"),
    ],
)
def test_a_stage_refuses_in_one_line_with_status_two(stage: str, words: list[str], line: str) -> None:
    command = [sys.executable, "-m", f"pipeline.{stage}", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert line in result.stderr
