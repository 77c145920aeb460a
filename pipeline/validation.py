"""What params.yaml may say: the fields of every part, the rule of each, and the agreements between parts.

All of it is checked at once and without torch: in the first second of every stage and, through
pipeline/hydra_plugins, while DVC composes the configuration.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import filter as filter_names
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pipeline import models
from pipeline.checks import (
    COUNT,
    FRACTION,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    Choice,
    ConfigError,
    Flag,
    ListOf,
    Number,
    Optional,
    Rule,
    Text,
    check,
    check_fields,
    check_mapping,
    unknown,
)
from pipeline.imagesets import SETS
from pipeline.signatures import CONNECTED, REQUIRED, UNREADABLE, Signature, signature

CONF = Path(__file__).parent / "conf"
SCHEDULE_KEYS = {"from", "to", "over_epochs"}
TARGETS = ("easy", "hard")
"""The targets of every benchmark; the last is the one of the headline."""


@dataclass(frozen=True)
class Anything:
    allowed: str = "any value"

    def accepts(self, value: Any) -> bool:
        return True


@dataclass(frozen=True)
class Device:
    allowed: str = "one of auto, cpu, cuda, cuda:N"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None


@dataclass(frozen=True)
class BatchSize:
    """A number of examples, or exponential growth `from` one number `to` another within `over_epochs`."""

    allowed: str = "an integer >= 1, or {from: an integer >= 1, to: an integer >= 1, over_epochs: a number > 0}"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, dict):
            return COUNT.accepts(value)
        return (
            value.keys() == SCHEDULE_KEYS
            and COUNT.accepts(value["from"])
            and COUNT.accepts(value["to"])
            and POSITIVE.accepts(value["over_epochs"])
        )


TARGET_CLASS = Text("the dotted name of a class, such as torch.optim.SGD")
DECAY = Number(0, 1, open_high=True)

SOURCE = Choice(("digits", *SETS))
TASK = Choice(("classification", "autoencoder"))
DIGITS: dict[str, Rule] = {
    "source": SOURCE,
    "task": TASK,
    "validation": FRACTION,
    "test": FRACTION,
    "split_seed": NATURAL,
}
IMAGES: dict[str, Rule] = {
    "source": SOURCE,
    "task": TASK,
    "validation": FRACTION,
    "examples": Optional(COUNT),
    "augmentation": Choice(("none", "crop_flip")),
    "split_seed": NATURAL,
}
PLANTED: dict[str, Any] = {
    "task": Choice(("regression", "binary", "classification")),
    "inputs": COUNT,
    "outputs": COUNT,
    "condition": Number(1),
    "teacher": {
        "depth": COUNT,
        "width": COUNT,
        "activation": Choice(("none", "relu", "tanh")),
        "batch_norm": Flag(),
        "scale": POSITIVE,
    },
    "noise": NOT_NEGATIVE,
    "train": COUNT,
    "validation": COUNT,
    "test": COUNT,
    "population": COUNT,
    "seed": NATURAL,
}
LOSSES = ("squared_error", "binary_cross_entropy", "summed_binary_cross_entropy", "cross_entropy")
SCHEDULE = Choice(("constant", "linear", "cosine"))
TARGET_METRICS = ("train_loss", "validation_loss", "validation_error", "excess_loss")
BENCHMARK: dict[str, Any] = {
    "loss": Choice(LOSSES),
    "batch_size": BatchSize(),
    "warmup": NATURAL,
    "schedule": SCHEDULE,
    "steps": COUNT,
    "seconds": Optional(POSITIVE),
    "evaluate_every": COUNT,
    "target": {"metric": Choice(TARGET_METRICS), **dict.fromkeys(TARGETS, POSITIVE)},
}
BENCHMARK_MAY_HAVE: dict[str, Rule] = {"threads": COUNT}
TRAINING: dict[str, Rule] = {
    "batch_size": Optional(BatchSize()),
    "averaging": Optional(FRACTION),
    "warmup": Optional(NATURAL),
    "schedule": Optional(SCHEDULE),
    "evaluate_every": Optional(COUNT),
}
TOP: dict[str, Rule] = {
    "study": Text("the name of a study"),
    "seeds": ListOf(NATURAL, distinct=True),
    "device": Device(),
    "threads": Optional(COUNT),
    "precision": Choice(("fp32", "tf32", "bf16", "fp16")),
    "compile": Flag(),
    "channels_last": Flag(),
    "deterministic": Flag(),
    "diagnostics": Choice(("off", "light", "full")),
    "checkpoint_seconds": NOT_NEGATIVE,
    "image_folder": Optional(Text("the path of a folder")),
}
ON_CPU = ("fp32", "bf16")
TASKS_OF_LOSS = {
    "squared_error": ("regression", "autoencoder"),
    "binary_cross_entropy": ("binary", "autoencoder"),
    "summed_binary_cross_entropy": ("binary", "autoencoder"),
    "cross_entropy": ("classification",),
}

# Constructor arguments whose meaning is the same everywhere; others are compared with the type of their default.
ARGUMENTS: dict[str, Rule] = {
    "lr": POSITIVE,
    "momentum": DECAY,
    "dampening": Number(0, 1),
    "betas": ListOf(DECAY),
    "alpha": DECAY,
    "rho": DECAY,
    "eps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "damping": POSITIVE,
    "relative_damping": POSITIVE,
    "kl_clip": POSITIVE,
    "max_decrease": Number(0, 1, open_low=True),
    "max_growth": Number(1, open_low=True),
    "warmup": NATURAL,
    "fisher": Choice(("auto", "exact", "sampled", "empirical")),
    "fisher_samples": COUNT,
    "stat_decay": DECAY,
    "factor_interval": COUNT,
    "inverse_interval": COUNT,
    "scale_interval": COUNT,
    "max_factor_size": COUNT,
    "solver": Choice(("cholesky", "eigh")),
    "preconditioning_dtype": Choice(("bfloat16", "float16", "float32", "float64")),
    "coarse_space": Choice(("krylov", "constant")),
    "combination": Choice(("deflated", "additive")),
    "coarse_fisher": Choice(("exact", "kronecker")),
}
NULL_MEANS_OFF = {"kl_clip"}


def validate(values: Any) -> dict[str, Any]:
    """The composed configuration when every stage would accept it; ConfigError at the first value that is wrong."""
    groups = ("benchmark", "optimizer", "images", "planted")
    values = check_mapping("params.yaml", values)
    values.pop("checked", None)
    if values.get("diagnostics") is False:  # what YAML 1.1 makes of a bare off
        values["diagnostics"] = "off"
    for name in values:
        if name not in (*groups, *TOP):
            raise unknown(name, name, (*groups, *TOP))
    for name in groups:
        if name not in values:
            raise ConfigError(f"{name}: is missing; expected a mapping of names to values")
        values[name] = check_mapping(name, values[name])
    check_fields("", {name: value for name, value in values.items() if name not in groups}, TOP)
    check_precision(values["precision"], values["device"])
    for group in ("benchmark", "optimizer"):
        if not values[group]:
            raise ConfigError(f"{group}: nothing is chosen; valid: {', '.join(available(group))}")
    for name, fields in values["benchmark"].items():
        _check_benchmark(name, fields, values)
    for group in ("images", "planted"):
        for name in values[group]:
            if name not in values["benchmark"]:
                chosen = ", ".join(values["benchmark"])
                raise ConfigError(f"{group}.{name}: no benchmark {name!r} is chosen; chosen: {chosen}")
    for name, fields in values["optimizer"].items():
        _check_optimizer(f"optimizer.{name}", fields, list(values["benchmark"]))
        if values["precision"] == "fp16" and "rest" in fields:  # its matrices' gradients come after the unscaling
            raise ConfigError(f"precision: 'fp16' is not allowed with optimizer.{name}.rest; expected bf16 or fp32")
    return values


def check_precision(precision: str, device: str) -> None:
    """Refuse a precision that only a GPU has; ``auto`` is known no earlier than where the run takes place."""
    if device == "cpu" and precision not in ON_CPU:
        raise ConfigError(f"precision: {precision!r} is not allowed on a CPU; expected {' or '.join(ON_CPU)}")


def available(group: str) -> list[str]:
    """The names that pipeline/conf offers in a group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def maps_benchmarks(value: Any) -> bool:
    """Whether a value of an optimizer is a mapping by benchmark (and not the growth of a batch size)."""
    return isinstance(value, Mapping) and value.keys() != SCHEDULE_KEYS


def by_benchmark(value: Any, benchmark: str) -> Any:
    """The chosen benchmark's entry of a mapping by benchmark; any other value as it is.

    The entry is that of the name itself, else of the first pattern that fits, such as cifar*, else the default.
    """
    if not maps_benchmarks(value):
        return value
    return value[_entry(value, benchmark) or "default"]


def _entry(mapping: Mapping[str, Any], benchmark: str) -> str | None:
    fitting = (key for key in mapping if fnmatchcase(benchmark, key))
    return benchmark if benchmark in mapping else next(fitting, None)


def _check_benchmark(name: str, fields: Any, values: Mapping[str, Any]) -> None:
    field = f"benchmark.{name}"
    if name not in available("benchmark"):
        raise unknown(field, name, available("benchmark"), "benchmark")
    fields = check_mapping(field, fields)
    if "model" not in fields:  # what a study's value leaves behind when another benchmark is chosen
        raise ConfigError(
            f"{field}.model: is missing; other values of {name} are set, but is it among the chosen benchmarks?"
        )
    model = check_mapping(f"{field}.model", fields["model"])
    known = Choice(tuple(models.FIELDS))
    check(f"{field}.model.name", model.get("name"), known)
    extra = {name: rule for name, rule in BENCHMARK_MAY_HAVE.items() if name in fields}
    check_fields(field, fields, {"model": {"name": known, **models.FIELDS[model["name"]]}, **BENCHMARK, **extra})
    if fields["evaluate_every"] > fields["steps"]:
        raise ConfigError(
            f"{field}.evaluate_every: {fields['evaluate_every']} is not allowed; "
            f"expected at most benchmark.{name}.steps, {fields['steps']}"
        )
    groups = [group for group in ("images", "planted") if name in values[group]]
    if len(groups) != 1:
        raise ConfigError(f"{field}: has its data in {' and '.join(groups) or 'neither'}; expected images or planted")
    data = _check_data(f"{groups[0]}.{name}", values[groups[0]][name])
    if data["task"] not in TASKS_OF_LOSS[fields["loss"]]:
        fitting = [loss for loss in LOSSES if data["task"] in TASKS_OF_LOSS[loss]]
        raise ConfigError(
            f"{field}.loss: {fields['loss']!r} does not fit the task {data['task']!r} of {groups[0]}.{name}; "
            f"expected {' or '.join(fitting)}"
        )
    _check_target(f"{field}.target", fields["target"], data["task"], planted=groups[0] == "planted")
    pictures = groups[0] == "images" and data["task"] == "classification"  # an autoencoder's are rows of pixels
    models.check_agreement(f"{field}.model", model, images=pictures)


def _check_target(field: str, target: Mapping[str, Any], task: str, *, planted: bool) -> None:
    metric = target["metric"]
    if metric == "excess_loss" and not planted:
        raise ConfigError(f"{field}.metric: {metric!r} needs planted targets; expected train_loss or validation_loss")
    if metric == "validation_error" and task != "classification":
        raise ConfigError(f"{field}.metric: {metric!r} needs classes; expected train_loss or validation_loss")
    if not target["easy"] > target["hard"]:
        raise ConfigError(
            f"{field}.easy: {target['easy']} is not allowed; expected a number above {field}.hard, {target['hard']}"
        )


def _check_data(field: str, fields: Any) -> dict[str, Any]:
    if field.startswith("planted."):
        fields = check_fields(field, fields, PLANTED)
        if fields["task"] != "regression" and fields["noise"] > 1:
            raise ConfigError(
                f"{field}.noise: {fields['noise']} is not allowed; expected a share of the labels, at most 1"
            )
        return fields
    fields = check_mapping(field, fields)
    check(f"{field}.source", fields.get("source"), SOURCE)
    source = fields["source"]
    check_fields(field, fields, DIGITS if source == "digits" else IMAGES)
    if source == "digits":
        if fields["validation"] + fields["test"] >= 1:
            raise ConfigError(
                f"{field}.validation: {fields['validation']} and test {fields['test']} leave no training examples; "
                "expected a sum < 1"
            )
        return fields
    counts = SETS[source].counts["train"]
    examples = sum(counts) if fields["examples"] is None else fields["examples"]
    least = math.ceil(len(counts) / min(fields["validation"], 1 - fields["validation"]))
    if not least <= examples <= sum(counts):
        raise ConfigError(
            f"{field}.examples: {examples} is not allowed; expected {least} to {sum(counts)}, so that every class has "
            "one to train and one to validate, or null"
        )
    return fields


def _check_optimizer(field: str, fields: Any, chosen: list[str]) -> None:
    fields = check_mapping(field, fields)
    if "rest" in fields:
        _check_class(f"{field}.rest", check_mapping(f"{field}.rest", fields.pop("rest")), chosen)
    training = check_mapping(f"{field}.training", fields.pop("training", {}))
    for name, value in training.items():
        if name not in TRAINING:
            raise unknown(f"{field}.training.{name}", name, TRAINING)
        _check_value(f"{field}.training.{name}", value, TRAINING[name], chosen)
    _check_class(field, fields, chosen)


def _check_class(field: str, fields: dict[str, Any], chosen: list[str]) -> None:
    """Check the class that `_target_` names and the arguments beside it."""
    check(f"{field}._target_", fields.get("_target_"), TARGET_CLASS)
    try:
        known = signature(fields.pop("_target_"))
    except ConfigError as error:
        raise ConfigError(f"{field}._target_: {error}") from None
    for name, value in fields.items():
        if name in CONNECTED:
            raise ConfigError(f"{field}.{name}: is passed by the training loop; remove it")
        if name not in known.arguments and not known.open:
            raise unknown(f"{field}.{name}", name, known.arguments, "hyper-parameter")
        _check_value(f"{field}.{name}", value, _rule(name, known), chosen)
    for name, default in known.arguments.items():
        if default is REQUIRED and name not in fields:
            raise ConfigError(f"{field}.{name}: is missing; the constructor has no default for it")
    for benchmark in chosen:
        _check_agreement(field, {name: by_benchmark(value, benchmark) for name, value in fields.items()})


def _check_agreement(field: str, options: Mapping[str, Any]) -> None:
    """Refuse options that are allowed one by one but not together, mappings by benchmark resolved."""
    if options.get("nesterov") and options.get("momentum") == 0:
        raise ConfigError(f"{field}.momentum: 0 is not allowed with nesterov; expected a number > 0 and < 1")
    if options.get("coarse_fisher") == "kronecker" and options.get("coarse_space", "constant") != "constant":
        space = options["coarse_space"]
        raise ConfigError(
            f"{field}.coarse_space: {space!r} is not allowed with coarse_fisher 'kronecker'; expected constant"
        )


def _check_value(field: str, value: Any, rule: Rule, chosen: Iterable[str]) -> None:
    """Check a value that may be a mapping by benchmark."""
    if not maps_benchmarks(value):
        check(field, value, rule)
        return
    mapping = check_mapping(field, value)
    for name, entry in mapping.items():
        if name != "default" and not filter_names(available("benchmark"), name):
            names = [*available("benchmark"), "default"]
            raise unknown(f"{field}.{name}", name, names, "benchmark")
        check(f"{field}.{name}", entry, rule)
    for name in chosen:
        if _entry(mapping, name) is None and "default" not in mapping:
            raise ConfigError(
                f"{field}: has no value for benchmark {name} and no default; it has {', '.join(mapping) or 'none'}"
            )


def _rule(name: str, known: Signature) -> Rule:
    """The rule of a constructor argument: that of its name, else that of its default's type."""
    default = known.arguments.get(name, UNREADABLE)
    rule: Rule
    if name in ARGUMENTS:
        rule = ARGUMENTS[name]
        if isinstance(rule, ListOf) and isinstance(default, tuple | list):
            rule = replace(rule, length=len(default))
    elif isinstance(default, bool):
        rule = Flag()
    elif isinstance(default, int | float):
        rule = Number()
    elif isinstance(default, str):
        rule = Text()
    elif isinstance(default, tuple | list):
        rule = ListOf(Number(), len(default))
    else:
        return Anything()
    nullable = default is None or default is UNREADABLE or name in NULL_MEANS_OFF
    return Optional(rule) if nullable else rule
