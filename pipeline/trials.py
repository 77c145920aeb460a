"""The trials of a tuning: what each trains, and where its record is kept until it is judged.

The one idea: a record is found by what it is a record of. All that decides a trial (resolved configuration, code of
the stages that make its data and train it) makes one checksum, and its record lies in
`trials/<benchmark>/<optimizer>/<checksum>/seed-<k>/`, the same files as in results/. Whichever engine trained it, a
tuning that is given again finds it; changed code or settings find nothing old.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.checks import ConfigError
from pipeline.composition import ROOT, compose
from pipeline.config import Params, RunConfig, load, resolve, view
from pipeline.notes import TRIAL
from pipeline.records import FILES, Run, copy_run, read_run
from pipeline.search import Dimension, Values, declared, points, space
from pipeline.signatures import REQUIRED, UNREADABLE, signature
from pipeline.validation import maps_benchmarks

FOLDER = ROOT / "trials"
SEARCH = ROOT / "pipeline" / "conf" / "search"
Pair = tuple[str, str]  # benchmark, optimizer
_NOT_DECIDING = ("seeds", "diagnostics")


@dataclass(frozen=True)
class Choice:
    """What is tuned, and with how many trials. `settings` are overrides of Hydra for all, such as device=cpu."""

    benchmarks: tuple[str, ...]  # none: all that are composed
    optimizers: tuple[str, ...]
    trials: int
    seeds: tuple[int, ...]
    study: str | None = None
    grid: bool = False
    settings: tuple[str, ...] = ()

    def overrides(self, benchmarks: Sequence[str], optimizers: Sequence[str]) -> list[str]:
        """What composes params.yaml for these pairs. A study brings its own benchmarks, and values for them."""
        seeds = ",".join(map(str, self.seeds))
        chosen = (
            [f"study={self.study}"] if self.study else [f"benchmark=[{','.join(benchmarks)}]"] if benchmarks else []
        )
        chosen += [f"optimizer=[{','.join(optimizers)}]"] if optimizers else []
        return [*chosen, f"seeds=[{seeds}]", "diagnostics=off", *self.settings]


@dataclass(frozen=True)
class Trial:
    """One setting of one optimizer on one benchmark."""

    benchmark: str
    optimizer: str
    number: int  # from 1, the shipped setting
    values: Values
    run: RunConfig
    overrides: tuple[str, ...]  # of Hydra, that compose its params.yaml
    space: tuple[Dimension, ...]
    shipped: Values  # by field, what the optimizer's yaml says now

    @functools.cached_property
    def key(self) -> str:
        """Checksum of all that decides its record, but seed and machine."""
        run = {name: value for name, value in self.run.as_dict().items() if name not in _NOT_DECIDING}
        text = json.dumps({"run": run, "code": _code(self.data_stage)}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def data_stage(self) -> str:
        """The stage that makes its data."""
        return "prepare" if "source" in self.run.data else "toy"

    @property
    def name(self) -> str:
        """Of its experiment in DVC."""
        return f"{TRIAL}{self.benchmark}-{self.optimizer}-{self.key[:8]}".replace("_", "-")

    @property
    def title(self) -> str:
        return f"{self.benchmark} {self.optimizer} trial {self.number}"

    @property
    def folder(self) -> Path:
        return FOLDER / self.benchmark / self.optimizer / self.key

    def records(self) -> list[Run] | None:
        """The records of all its seeds; None when one is missing, cut off or of another configuration."""
        folders = [self.folder / f"seed-{seed}" for seed in self.run.seeds]
        if not all((folder / name).is_file() for folder in folders for name in FILES):
            return None
        try:
            runs = [read_run(folder) for folder in folders]
        except ConfigError:
            return None
        return runs if all(self._is_of_this(run) for run in runs) else None

    def keep(self, results: Path) -> None:
        """Take the records of its seeds from a folder like results/."""
        for seed in self.run.seeds:
            source = results / self.benchmark / self.optimizer / f"seed-{seed}"
            run = read_run(source)
            if not self._is_of_this(run):
                raise ConfigError(f"{source}: is the record of another configuration than {self.title}")
            copy_run(source, self.folder / f"seed-{seed}")

    def _is_of_this(self, run: Run) -> bool:
        expected = self.run.as_dict()
        same = all(run.config.get(name) == value for name, value in expected.items() if name not in _NOT_DECIDING)
        return same and run.summary["status"] != "failed"


@functools.cache
def _code(data_stage: str) -> dict[str, str]:
    return checkpoint.code(data_stage, "train")


def all_trials(choice: Choice, earlier: Mapping[Pair, Mapping[str, Any]]) -> dict[Pair, list[Trial]]:
    """The trials of each chosen pair; `earlier` has what came of the tuning of a pair before.

    Where the shipped setting is what that chose, the same choice has the same trials. Raises ConfigError for whatever
    no stage would accept.
    """
    composed = _composed(choice)
    params = view(copy.deepcopy(composed))
    unknown = [name for name in choice.benchmarks if name not in params.benchmarks]
    if unknown:
        valid = ", ".join(params.benchmarks)
        raise ConfigError(f"benchmarks: {unknown[0]!r} is not in study {choice.study}; it has {valid}")
    pairs = [(b, o) for b in choice.benchmarks or params.benchmarks for o in params.optimizers]
    return {pair: _of_pair(choice, composed, params, pair, earlier.get(pair)) for pair in pairs}


def _of_pair(
    choice: Choice, composed: dict[str, Any], params: Params, pair: Pair, earlier: Mapping[str, Any] | None
) -> list[Trial]:
    benchmark, optimizer = pair
    shipped = _shipped(params, benchmark, optimizer)
    found, settings = _settings(choice, pair, shipped, earlier)
    now = {dimension.field: shipped[dimension.field] for dimension in found}
    base = choice.overrides([benchmark], [optimizer])
    trials = []
    for number, values in enumerate(settings, 1):
        changed = copy.deepcopy({**composed, "optimizer": {optimizer: composed["optimizer"][optimizer]}})
        overrides = list(base)
        for field, value in values.items():
            place = _set(changed["optimizer"][optimizer], field, benchmark, value)
            overrides.append(f"++optimizer.{optimizer}.{place}={_word(value)}")
        run = resolve(view(changed), benchmark, optimizer)
        trials.append(Trial(benchmark, optimizer, number, values, run, tuple(overrides), tuple(found), now))
    return trials


def _settings(
    choice: Choice, pair: Pair, shipped: Values, earlier: Mapping[str, Any] | None
) -> tuple[list[Dimension], list[Values]]:
    """Space and values of the trials: those of the earlier tuning if what it chose is shipped now and is among them.

    Otherwise (other ranges, fewer trials, a grid) the setting shipped now is the first, so it is never left out.
    """
    benchmark, optimizer = pair
    lines = declared(SEARCH / f"{optimizer}.yaml")

    def make(first: Values) -> tuple[list[Dimension], list[Values]]:
        found = space(optimizer, benchmark, choice.trials, first, lines)
        return found, points(found, first, choice.trials, f"tune {benchmark} {optimizer}", grid=choice.grid)

    if earlier is not None and all(shipped.get(field) == value for field, value in earlier["chosen"].items()):
        as_before = make(shipped | earlier["trials"][0]["values"])
        if earlier["chosen"] in as_before[1]:
            return as_before
    return make(shipped)


def _composed(choice: Choice) -> dict[str, Any]:
    from ruamel.yaml import YAML

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        compose(path, choice.overrides(choice.benchmarks, choice.optimizers))
        load(path)
        return YAML(typ="safe", pure=True).load(path)


def _shipped(params: Params, benchmark: str, optimizer: str) -> Values:
    """Every field of an optimizer: as resolved, else the default of its constructor."""
    run = resolve(params, benchmark, optimizer)
    found: Values = dict(_defaults(run.target_class)) | run.options
    if run.rest is not None:
        rest = _defaults(run.rest["_target_"]) | run.rest
        found |= {f"rest.{name}": value for name, value in rest.items() if name != "_target_"}
    loop = {name: getattr(run, name) for name in ("batch_size", "averaging", "warmup", "schedule")}
    return found | {f"training.{name}": value for name, value in loop.items()}


def _defaults(target: str) -> Values:
    known = signature(target).arguments
    return {name: value for name, value in known.items() if value is not REQUIRED and value is not UNREADABLE}


def _set(fields: dict[str, Any], path: str, benchmark: str, value: Any) -> str:
    """Set a field, or the benchmark's entry where it is a mapping by benchmark; the path of what was set."""
    *outer, name = path.split(".")
    for part in outer:
        fields = fields.setdefault(part, {})
    if maps_benchmarks(fields.get(name)):
        fields, name, path = fields[name], benchmark, f"{path}.{benchmark}"
    fields[name] = copy.deepcopy(value)
    return path


def _word(value: Any) -> str:
    """A value as Hydra's command line has it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, str):
        return value
    return json.dumps(value)
