"""What stands in words above the experiments and runs of the MLflow store: Markdown, from a run's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config import TARGETS
from pipeline.means import LEVEL

MEANS = " mean"  # what the name of the experiment of a benchmark's means ends in, and the names of its runs
TUNING = " tuning"  # and that of its tuning's trials
TRIAL = "tune-"  # what the names of the trials' experiments in DVC begin with
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


def of_tuning(config: Mapping[str, Any]) -> str:
    """The same for the experiment of a benchmark's trials."""
    return (
        f"Trials of a tuning, as many for every optimizer. {_question(config)}\n\nA group is one setting of an"
        f" optimizer. {_CLOCK} Trials are in no comparison: that is in *{config['benchmark']}*. What was chosen, and"
        " from what: `docs/tuning.md`."
    )


def is_trial(environment: Mapping[str, Any]) -> bool:
    """Whether a run is a trial of a tuning, by the name of its experiment in DVC."""
    return str(environment.get("dvc_exp_name") or "").startswith(TRIAL)


def of_run(record: str, environment: Mapping[str, Any]) -> str:
    """Where the record of a run is, and what uses it."""
    if is_trial(environment):
        return f"A trial of a tuning. Record: in a folder of `{record}`. What was chosen: `docs/tuning.md`."
    experiment = environment.get("dvc_exp_name")
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
        f" {config['steps']} steps{seconds}."
    )
