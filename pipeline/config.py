"""The typed view of params.yaml that every stage starts from: `load` it, `resolve` one pair, `run_stage`.

Nothing here imports torch or mlflow before the whole file has been validated. Any value of an optimizer may
be a mapping by benchmark; `resolve` picks the entry of the chosen one.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checks import ConfigError, describe, nearest, unknown
from pipeline.validation import TARGETS, TOP, by_benchmark, validate

if TYPE_CHECKING:
    import torch

__all__ = [
    "PROTOCOL",
    "TARGETS",
    "ConfigError",
    "Params",
    "RunConfig",
    "load",
    "optimizer_class",
    "resolve",
    "run_stage",
]

PROTOCOL = "3"  # the version of docs/protocol.md that runs are made by; another one is another configuration
THREADS = 2  # of a benchmark that does not say how many it can use
FROM_BENCHMARK = (
    "batch_size",
    "warmup",
    "schedule",
    "evaluate_every",
)  # options of the loop that an optimizer may leave to the benchmark


@dataclass(frozen=True)
class Params:
    """A validated params.yaml. Mappings keep the order of the file."""

    benchmarks: dict[str, dict[str, Any]]
    optimizers: dict[str, dict[str, Any]]
    images: dict[str, dict[str, Any]]
    planted: dict[str, dict[str, Any]]
    seeds: list[int]
    device: str
    threads: int | None  # None: the benchmark's
    precision: str
    compile: bool
    channels_last: bool
    deterministic: bool
    diagnostics: str
    image_folder: str | None
    checkpoint_seconds: float
    study: str = "default"


@dataclass(frozen=True)
class RunConfig:
    """One optimizer on one benchmark, all mappings by benchmark resolved."""

    benchmark: str
    optimizer: str
    model: dict[str, Any]
    loss: str
    batch_size: int | dict[str, Any]  # examples; or growth {from, to, over_epochs}
    steps: int
    seconds: float | None  # on the training clock; the run ends with the budget that is spent first
    evaluate_every: int
    target_metric: str
    targets: dict[str, float]  # easy, hard
    averaging: float | None
    warmup: int
    schedule: str
    target_class: str
    options: dict[str, Any]  # constructor arguments of target_class
    rest: dict[str, Any] | None  # _target_ and arguments of the optimizer of what is no matrix
    seeds: list[int]
    device: str
    threads: int
    precision: str
    compile: bool
    channels_last: bool
    deterministic: bool
    diagnostics: str
    data: dict[str, Any]
    protocol: str = PROTOCOL

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load(path: str | Path = "params.yaml") -> Params:
    """Read and validate a parameter file. Raises ConfigError."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(Path(path))  # as DVC reads it: 1e-3 is a number
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `python -m pipeline.composition` composes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    return view(values)


def view(values: Any) -> Params:
    """The typed view of a composed configuration. Raises ConfigError."""
    values = validate(values)
    return Params(
        benchmarks=values["benchmark"],
        optimizers=values["optimizer"],
        images=values["images"],
        planted=values["planted"],
        **{name: values[name] for name in TOP},
    )


def resolve(params: Params, benchmark: str, optimizer: str) -> RunConfig:
    """The chosen pair. Raises ConfigError when params.yaml does not have it."""
    for kind, name, chosen in (
        ("benchmark", benchmark, params.benchmarks),
        ("optimizer", optimizer, params.optimizers),
    ):
        if name not in chosen:
            raise ConfigError(
                f"{kind}: {name!r} is not among the chosen{nearest(name, chosen)}; chosen: {', '.join(chosen)}"
            )
    task = params.benchmarks[benchmark]
    fields = params.optimizers[optimizer]
    options = {k: by_benchmark(v, benchmark) for k, v in fields.items() if k not in ("_target_", "training", "rest")}
    rest = {k: by_benchmark(v, benchmark) for k, v in fields["rest"].items()} if "rest" in fields else None
    training = {k: by_benchmark(v, benchmark) for k, v in fields.get("training", {}).items()}
    loop = {k: task[k] if training.get(k) is None else training[k] for k in FROM_BENCHMARK}
    if loop["evaluate_every"] > task["steps"]:  # of an optimizer, and a study has made the run shorter
        loop["evaluate_every"] = task["evaluate_every"]
    return RunConfig(
        benchmark=benchmark,
        optimizer=optimizer,
        model=task["model"],
        loss=task["loss"],
        **loop,
        steps=task["steps"],
        seconds=task["seconds"],
        target_metric=task["target"]["metric"],
        targets={name: task["target"][name] for name in TARGETS},
        averaging=training.get("averaging"),
        target_class=fields["_target_"],
        options=options,
        rest=rest,
        seeds=params.seeds,
        device=params.device,
        threads=params.threads or task.get("threads", THREADS),
        precision=params.precision,
        compile=params.compile,
        channels_last=params.channels_last,
        deterministic=params.deterministic,
        diagnostics=params.diagnostics,
        data=params.planted[benchmark] if benchmark in params.planted else params.images[benchmark],
    )


def optimizer_class(field: str, target: str, options: Iterable[str] = ()) -> "type[torch.optim.Optimizer]":
    """The class that `target`, the `_target_` of the optimizer at `field`, names; it has to know the `options`.

    Imports torch and the class's package; raises ConfigError.
    """
    import torch

    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a broken package may raise anything while it is imported
        reason = " ".join(str(error).split())
        raise ConfigError(f"{field}._target_: {target!r} cannot be imported: {reason}") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"{field}._target_: {target!r} is not a subclass of torch.optim.Optimizer")
    parameters = inspect.signature(found).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for option in options:
            if option not in parameters:
                raise unknown(f"{field}.{option}", option, parameters, "hyper-parameter")
    return found


def run_stage(stage: Callable[..., None], *arguments: str) -> None:
    """Call `stage` with the command line's words, one for each name in `arguments`, and end the process on
    failure.

    A ConfigError, or a file that may not be read or written, is one line on stderr and exit status 2.
    """
    words = sys.argv[1:]
    try:
        if len(words) != len(arguments):
            usage = " ".join(["python -m", f"pipeline.{Path(sys.argv[0]).stem}", *(f"<{a}>" for a in arguments)])
            raise ConfigError(f"expected {len(arguments)} arguments, got {len(words)}; usage: {usage}")
        stage(*words)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except OSError as error:
        sys.stderr.write(f"error: {describe(error)}\n")
        sys.exit(2)
