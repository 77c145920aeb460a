"""Which runs may stand in one table: those of a benchmark that agree on machine, versions, settings of speed and rules.

The one idea: a run's key is read from its own record, so whoever compares runs compares the keys first and never has
to know how they came about. `check` refuses what differs and says in which field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.checks import ConfigError, show
from pipeline.records import Run

FROM_ENVIRONMENT = ("device_name", "cores", "torch", "cuda", "pytorch-optimizer")  # the last: SOAP and Shampoo
FROM_CONFIG = ("precision", "threads", "compile", "channels_last", "deterministic", "protocol")


def key(config: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """The comparability key of a run, from its ``config.yaml`` and ``environment.json``; None: not recorded."""
    return {
        **{name: environment.get(name) for name in FROM_ENVIRONMENT},
        **{name: config.get(name) for name in FROM_CONFIG},
    }


def text(found: Mapping[str, Any]) -> str:
    """A key as one line, such as ``device_name: NVIDIA H100, …, precision: bf16, …``."""
    return ", ".join(f"{name}: {value if isinstance(value, str) else show(value)}" for name, value in found.items())


def check(benchmark: str, pairs: Mapping[str, Sequence[Run]]) -> None:
    """Refuse to compare the runs of a benchmark (by optimizer) unless all of them have one key.

    Raises ConfigError that names every field in which they differ, who has which value, and what to train again.
    """
    keys = {name: [key(run.config, run.environment) for run in runs] for name, runs in pairs.items()}
    counted = Counter(text(each) for of_pair in keys.values() for each in of_pair)
    if len(counted) < 2:
        return
    usual = counted.most_common(1)[0][0]
    odd = [name for name, of_pair in keys.items() if any(text(each) != usual for each in of_pair)]
    differences = [
        f"{field} is {_who_has_what(field, pairs, keys)}"
        for field in (*FROM_ENVIRONMENT, *FROM_CONFIG)
        if len({show(each[field]) for of_pair in keys.values() for each in of_pair}) > 1
    ]
    again = " ".join(f"train@{benchmark}-{name}" for name in odd)
    raise ConfigError(
        f"{benchmark}: runs that cannot stand in one table: {', '.join(differences)}; "
        f"`dvc repro -f -s {again}` trains again what differs"
    )


def _who_has_what(field: str, pairs: Mapping[str, Sequence[Run]], keys: Mapping[str, Sequence[Mapping]]) -> str:
    """``2 (sgd, adam) and 1 (kfac seed 1)``; an optimizer without a seed stands for all of its seeds."""
    owners: dict[str, list[str]] = {}
    for name, of_pair in keys.items():
        whole = len({show(each[field]) for each in of_pair}) == 1
        for run, each in zip(pairs[name], of_pair, strict=True):
            having = owners.setdefault(show(each[field]), [])
            label = name if whole else f"{name} seed {run.summary['seed']}"
            if label not in having:
                having.append(label)
    return " and ".join(f"{value} ({', '.join(names)})" for value, names in owners.items())
