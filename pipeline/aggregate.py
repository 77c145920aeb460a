"""Stage ``aggregate``: the comparison of all optimizers, from the records of the pairs that params.yaml names.

``python -m pipeline.aggregate`` reads results/, writes report/ and prints the tables; ``--show`` prints them again.

| file | holds |
|---|---|
| ``index.html`` | the report as one page that loads nothing; ``report.md`` and ``figures/``: as a text |
| ``table.csv``, ``table.tex`` | one row a pair of benchmark and optimizer |
| ``runs.csv``, ``curves.csv`` | one row a run; the curves over seeds |
| ``outcomes.csv``, ``comparisons.csv`` | one row a pair, target and clock; one row a comparison of two optimizers |
| ``profiles.csv``, ``curvature.csv`` | one row a point of a performance profile; one row a diagnostic |
| ``tuning.csv`` | one row a trial of the tuning |
| ``verdicts.json`` | who wins, by how much, how sure: every figure that a sentence of the report has |
| ``metrics.json`` | one figure a pair, for DVC |

The one idea: records are read and compared with params.yaml here, and all files are written together or not at all.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline import comparability, evidence, records, statistics, tables, verdicts
from pipeline.config import TARGETS, ConfigError, Params, load, resolve, run_stage
from pipeline.curves import Study
from pipeline.tables import Table

RESULTS, REPORT = Path("results"), Path("report")
REFERENCE = "sgd"
Links = Mapping[tuple[str, str, int], str]
_SAME_RUN = ("seeds", "device", "threads", "diagnostics")  # settings that do not change what is trained


def main() -> None:
    """The stage, on the workspace; the page has links to the runs in MLflow, and the means over seeds go there, too."""
    from pipeline import tracking

    params = load()
    aggregate(params, RESULTS, REPORT, lambda study: {run: link.address for run, link in tracking.links(study).items()})
    tracking.show_means(collect(params, RESULTS))


def aggregate(params: Params, results: Path, report: Path, links: Callable[[Study], Links] = lambda _: {}) -> Table:
    """Compare the chosen pairs: write everything below ``report`` and print the table.

    ``links`` gives the addresses of runs in MLflow by benchmark, optimizer and seed.

    Raises:
        ConfigError: records of a chosen pair are missing, cut off, of another configuration, or not comparable with
            those beside them. Nothing is written.
    """
    study = collect(params, results)
    rows = tabulate(study)
    found = evidence.read(results.parent, params.benchmarks, params.optimizers)
    judged = verdicts.judge(study, params)
    from pipeline import curves, figures, page  # matplotlib is slow to import and of no use to the checks above

    report.mkdir(parents=True, exist_ok=True)
    partial = report / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pictures = figures.draw(study, partial / "figures", judged, found)
        whole = page.Report(study, rows, judged, found, links(study))
        texts = {
            "index.html": page.html(whole),
            "report.md": page.markdown(whole, [picture.stem for picture in pictures]),
            "table.tex": tables.latex(rows),
            "metrics.json": json.dumps(metrics(rows), indent=2) + "\n",
        }
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        verdicts.write(judged, partial / verdicts.FILE)
        tables.write(rows, partial / tables.TABLE)
        tables.write(page.run_rows(study), partial / "runs.csv")
        tables.write(curves.rows(study), partial / "curves.csv")
        tables.write(verdicts.outcome_rows(judged), partial / "outcomes.csv", verdicts.OUTCOME_COLUMNS)
        tables.write(verdicts.comparison_rows(judged), partial / "comparisons.csv", verdicts.COMPARISON_COLUMNS)
        tables.write(verdicts.profile_rows(judged), partial / "profiles.csv", verdicts.PROFILE_COLUMNS)
        tables.write(evidence.trial_rows(found), partial / "tuning.csv", evidence.TRIAL_COLUMNS)
        tables.write(page.curvature_rows(study), partial / "curvature.csv", page.CURVATURE_COLUMNS)
        shutil.rmtree(report / "figures", ignore_errors=True)
        for made in sorted(partial.iterdir()):
            os.replace(made, report / made.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    tables.show(report)
    return rows


# ---------------------------------------------------------------- reading


def collect(params: Params, results: Path) -> dict[str, dict[str, list[records.Run]]]:
    """Benchmark -> optimizer -> runs in the order of the seeds, for the pairs that ``params`` names and no others."""
    study: dict[str, dict[str, list[records.Run]]] = {}
    for benchmark in params.benchmarks:
        study[benchmark] = {}
        for optimizer in statistics.ordered(params.optimizers):
            command = f"`dvc repro train@{benchmark}-{optimizer}` makes it"
            expected = resolve(params, benchmark, optimizer).as_dict()
            runs = []
            for seed in params.seeds:
                folder = records.seed_folder(results, benchmark, optimizer, seed)
                if not all((folder / name).is_file() for name in records.FILES):
                    raise ConfigError(f"{folder}: no complete record of a training run; {command}")
                run = records.read_run(folder)
                _check_same(run, expected, command)
                runs.append(run)
            study[benchmark][optimizer] = runs
        comparability.check(benchmark, study[benchmark])
    return study


def _check_same(run: records.Run, expected: Mapping[str, Any], command: str) -> None:
    """Refuse a record of other settings than params.yaml has now: one left behind by an earlier study."""
    for key, value in expected.items():
        if key not in _SAME_RUN and run.config.get(key) != value:
            raise ConfigError(
                f"{run.folder}: trained with {key} {run.config.get(key)!r}, now it is {value!r}; {command} again"
            )


def tabulate(study: Study) -> Table:
    """The rows of ``table.csv``: see ``statistics.pair``, and the cost of a step relative to SGD."""
    rows = []
    for pairs in study.values():
        block = []
        for runs in pairs.values():
            config = runs[0].config
            block.append(statistics.pair([_with_examples(run) for run in runs], config["steps"], config["seconds"]))
        ratios = statistics.relative_step_time(block, REFERENCE)
        for row in block:
            row["step_time_ratio_to_sgd"] = ratios[row["optimizer"]]
        rows += block
    return rows


def _with_examples(run: records.Run) -> dict[str, Any]:
    """The summary, with the number of training examples that each target took."""
    seen = {row["step"]: row["examples"] for row in run.history}
    return {**run.summary, **{f"{target}_examples": seen.get(run.summary[f"{target}_step"]) for target in TARGETS}}


def metrics(rows: Table) -> dict[str, dict[str, float | str]]:
    """Benchmark -> optimizer -> median steps to the hard target.

    Where the median seed did not get there: the steps that were made as text, ``>400``, or how the runs ended. DVC
    leaves out a null, which would look like a pair that was never trained; a text it shows as it is.
    """
    found: dict[str, dict[str, float | str]] = {}
    for row in rows:
        steps = row["steps_to_hard_median"]
        figure = (int(steps) if steps == int(steps) else steps) if math.isfinite(steps) else tables.missed(row)
        found.setdefault(row["benchmark"], {})[row["optimizer"]] = figure
    return found


if __name__ == "__main__":
    if "--show" in sys.argv[1:]:
        run_stage(lambda _: tables.show(REPORT), "--show")
    else:
        run_stage(main)
