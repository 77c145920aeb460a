"""What stands in words above the experiments and runs of the MLflow store: Markdown, from a run's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import TARGETS
from pipeline.means import LEVEL

MEANS = " mean"  # what the name of the experiment of a benchmark's means ends in, and the names of its runs
REPORT = "report/index.html"


def of_benchmark(config: Mapping[str, Any]) -> str:
    """Question, targets and protocol in the first paragraph, which the UI shows unfolded, and raw in lists."""
    return (
        f"{_question(config)}\n\nA run is a seed; a group is one setting of an optimizer, its line the mean over seeds,"
        " its band their spread. Bars of steps and seconds are means over the seeds that reached the target: read them"
        f" beside *target/hard_reached*. {_CLOCK} Where no charts are below: *comparison*, under *Views*. Means with"
        f" intervals are in *{config['benchmark']}{MEANS}*, verdicts in `{REPORT}`."
    )


def of_means(config: Mapping[str, Any]) -> str:
    """The same for the experiment of a benchmark's means."""
    return (
        f"Means over seeds. {_question(config)}\n\nA run is the mean of an optimizer, as `aggregate` found it; *_low*"
        f" and *_high*, broken lines, are the limits of its {LEVEL:.0%} interval (t distribution over seeds; losses on"
        f" the logarithmic scale). A curve ends where the first of its seeds does. {_CLOCK} The runs themselves are in"
        f" *{config['benchmark']}*, verdicts in `{REPORT}`."
    )


def of_run(record: str, experiment: str) -> str:
    """Where the record of a run is, and the report that uses it; `experiment` is DVC's name of a temporary one."""
    where = f"; `dvc exp apply {experiment}` brings it into the workspace" if experiment else ""
    return f"Record: `{record}`{where}. Report: `{REPORT}`."


def of_mean(benchmark: str, optimizer: str, seeds: Sequence[int]) -> str:
    """The same for the mean of several."""
    return f"Mean over the seeds {', '.join(map(str, seeds))} in `results/{benchmark}/{optimizer}`. Report: `{REPORT}`."


_CLOCK = (
    "The time axis is training time: gradient and step, without evaluation, logging, diagnostics. All rules:"
    " `docs/protocol.md`."
)


def _question(config: Mapping[str, Any]) -> str:
    metric = config["target_metric"].replace("_", " ").replace("train ", "training ")
    targets = ", ".join(f"{config['targets'][name]:g} ({name})" for name in reversed(TARGETS))
    version = f" {config['protocol']}" if "protocol" in config else ""
    seconds = "" if config["seconds"] is None else f" or {config['seconds']:g} s"
    return (
        f"Which optimizer brings the {metric} of {config['benchmark']} to the target first, in steps and in seconds?"
        f" **Targets:** {targets}. **Protocol{version}:** at a seed the same weights and batches for all,"
        f" {config['steps']} steps{seconds}, evaluated every {config['evaluate_every']}."
    )
