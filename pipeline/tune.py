"""Tunes every optimizer with the same number of trials: `python -m pipeline.tune`, `make tune`.

The one idea: asking twice costs nothing. Trials are a function of what is asked (pipeline.search), their records are
found by what they are records of (pipeline.trials), so the command that was interrupted, or that found trials missing,
is given again and goes on. When all trials of a pair have records, the best is chosen (pipeline.selection) and the
evidence written (tuning/, docs/tuning.md); `--write` puts the chosen values into the optimizers' yaml files.

Exit status: 0 when every pair was judged, 1 when trials have no record, 2 for a refusal and for a file that may not be
read or written.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.checks import COUNT, NATURAL, Choice, ConfigError, ListOf, Number, check, describe, unknown
from pipeline.validation import ARGUMENTS, CONF, available

if TYPE_CHECKING:
    from pipeline.records import Run
    from pipeline.trials import Pair, Trial
    from pipeline.tuning_evidence import Evidence

    Asked = Mapping[Pair, Sequence[Trial]]

SEEDS = "1000,1001,1002"  # of tuning; the comparison's are 0, 1, 2, ...
TRIALS = {"cpu": 8, "cuda": 16}
COLUMNS = ("benchmark", "optimizer", "asked", "found", "queued", "again", "missing", "chosen", "won by trial 1", "edge")
NOT_SET = ("benchmark", "optimizer", "study", "seeds", "diagnostics")  # by --set: they have options, or are given


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `python -m pipeline.tune --help` lists the options")


def main(arguments: Sequence[str] | None = None) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: DVC has Git to put in order before it ends
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(tune(_arguments(arguments)))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:
        sys.stderr.write(f"error: {describe(error)}; the same command goes on\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(
            "interrupted; what DVC has queued goes on (`dvc queue stop` ends it), the same command waits for it\n"
        )
        sys.exit(130)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m pipeline.tune", description="The same number of trials for every optimizer.")
    add = parser.add_argument
    add("--study", help="benchmarks, optimizers and values of a study")
    add("--benchmarks", default="", metavar="A,B", help="default: those of the study, or the default study's")
    add("--optimizers", default="", metavar="A,B", help="likewise")
    add(
        "--trials", metavar="N", help="of each pair, trial 1 being the shipped setting; default 8 on a CPU, 16 on a GPU"
    )
    add("--seeds", default=SEEDS, metavar="K,L", help=f"none of the comparison's; default {SEEDS}")
    add("--grid", action="store_true", help="a grid in place of a Sobol sequence")
    add("--workers", default="1", metavar="N", help="trials at a time; side by side they share the machine; default 1")
    add("--engine", default="dvc", help="dvc (its queue, on this machine) or ray (RAY_ADDRESS names a cluster)")
    add("--gpu-share", default="1", metavar="X", help="of a GPU, for each trial on Ray; default 1")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="for all trials, as -S of dvc: device=cpu")
    add("--widen", action="store_true", help="first widen ranges at whose edge the last tuning ended")
    add("--write", action="store_true", help="put chosen values into pipeline/conf/optimizer, and compose params.yaml")
    add("--accept-missing", action="store_true", help="count trials that have no record after all as misses")
    add("--dry-run", action="store_true", help="show the trials and an estimate of the time; nothing is done")
    given = parser.parse_args(words)
    given.benchmarks, given.optimizers = (
        _names(kind, text) for kind, text in (("benchmark", given.benchmarks), ("optimizer", given.optimizers))
    )
    if given.study is not None and given.study not in available("study"):
        raise unknown("study", given.study, available("study"), "study")
    given.trials = None if given.trials is None else _checked("trials", given.trials, COUNT)
    given.workers = _checked("workers", given.workers, COUNT)
    given.gpu_share = _checked("gpu-share", given.gpu_share, Number(0, open_low=True))
    given.seeds = [_number(word) for word in given.seeds.split(",")]
    check("seeds", given.seeds, ListOf(NATURAL, distinct=True))
    compared = _compared_seeds(given.study)
    if common := set(given.seeds) & set(compared):
        raise ConfigError(f"seeds: {min(common)} is one of the comparison's, {compared}; expected others")
    check("engine", given.engine, Choice(("dvc", "ray")))
    for setting in given.set:
        key, equals, _ = setting.lstrip("+").partition("=")
        if not equals or key in NOT_SET:
            raise ConfigError(f"set: {setting!r} is not allowed; expected KEY=VALUE, KEY none of {', '.join(NOT_SET)}")
    return given


def _names(group: str, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(","))) if text else ()
    for name in names:
        if name not in available(group):
            raise unknown(f"{group}s", name, available(group), group)
    return names


def _checked(field: str, word: str, rule: Number) -> Any:
    value = _number(word)
    check(field, value, rule)
    return value


def _number(word: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _compared_seeds(study: str | None) -> list[int]:
    """The seeds of the comparison that this tuning is for."""
    from ruamel.yaml import YAML

    files = [CONF / "config.yaml"] if study is None else [CONF / "config.yaml", CONF / "study" / f"{study}.yaml"]
    found = [YAML(typ="safe", pure=True).load(file).get("seeds") for file in files]
    return [seeds for seeds in found if seeds][-1]


# ---------------------------------------------------------------- the command


def tune(given: argparse.Namespace) -> int:
    """Do what the command line says; the exit status."""
    from pipeline import trials as plan
    from pipeline import tuning_evidence as book
    from pipeline.composition import ROOT
    from pipeline.recover import Recovery

    if (ROOT / ".git").exists() and Recovery(ROOT).needed():
        raise ConfigError(
            "HEAD and files are as a dvc that was killed left them; `make recover`, then this command again"
        )
    trials = given.trials if given.trials is not None else _default_trials(given.set)
    choice = plan.Choice(
        given.benchmarks, given.optimizers, trials, tuple(given.seeds), given.study, given.grid, tuple(given.set)
    )
    before = book.read()
    asked = plan.all_trials(choice, before)
    if given.widen and widen(asked, before, dry=given.dry_run) and not given.dry_run:
        asked = plan.all_trials(choice, before)
    if given.dry_run:
        _show_plan(asked, given.engine, given.workers)
        return 0
    found = _records(asked)
    queued = _train(asked, found, given)
    runs = _records(asked)
    _check_comparable(asked, runs)
    complete = {}
    for pair, of in asked.items():
        if given.accept_missing or all(runs[trial.name] for trial in of):
            complete[pair] = book.evidence(choice, of, [runs[trial.name] for trial in of], before.get(pair))
            book.write(complete[pair])
    book.publish(book.read())
    missing = [trial for of in asked.values() for trial in of if not runs[trial.name]]
    lines = []
    for of in asked.values():
        at_start, at_end = (sum(bool(kept[trial.name]) for trial in of) for kept in (found, runs))
        lines.append((len(of), at_start, at_end, [queued[trial.name] for trial in of]))
    print("\n".join(["", *_table(lines, dict.fromkeys(asked) | complete)]))
    if given.write:
        _write(asked, complete)
    for trial in missing:
        why = f"`dvc queue logs {trial.name}` says why; " if given.engine == "dvc" else ""
        sys.stderr.write(
            f"{trial.title} ({book.text(trial.values)}): has no record; {why}the same command tries again\n"
        )
    return int(bool(missing) and not given.accept_missing)


def _records(asked: Asked) -> dict[str, list[Run]]:
    """The records of every trial, by its name; none where one of its seeds has none."""
    return {trial.name: trial.records() or [] for of in asked.values() for trial in of}


def _default_trials(settings: Sequence[str]) -> int:
    import torch

    device = next((s.partition("=")[2] for s in settings if s.startswith("device=")), "auto")
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return TRIALS["cuda" if on_gpu else "cpu"]


def _train(asked: Asked, found: Mapping[str, list[Run]], given: argparse.Namespace) -> Counter[str]:
    """Train what has no records; how often each trial was queued, by name."""
    from pipeline import dvc_engine, ray_engine

    trials = [trial for of in asked.values() for trial in of]
    missing = [trial for trial in trials if not found[trial.name]]
    print(f"{len(trials)} trials, {len(trials) - len(missing)} have records", flush=True)
    count = [0]

    def over(trial: Trial) -> None:
        count[0] += 1
        print(f"[{count[0]}/{len(missing)}] {_outcome(trial)}", flush=True)

    if not missing:
        return Counter()
    if given.engine == "ray":
        return ray_engine.train(missing, given.workers, over, given.gpu_share)
    return dvc_engine.train(missing, given.workers, over, {trial.name for trial in trials})


def _outcome(trial: Trial) -> str:
    from pipeline.selection import judged, target
    from pipeline.tuning_evidence import text

    result = judged(trial.values, trial.records() or [])
    reached = target([result])
    came = (
        f"{reached} target after {result.seconds[reached]:.2f} s"
        if reached
        else "diverged"
        if result.diverged
        else "no target"
    )
    return f"{trial.title} ({text(trial.values)}): {came}, best validation loss {result.best_loss:.4g}"


def _check_comparable(asked: Asked, runs: Mapping[str, list[Run]]) -> None:
    """Refuse to choose by seconds of several machines."""
    from pipeline import comparability

    for benchmark in dict.fromkeys(benchmark for benchmark, _ in asked):
        pairs = {o: [run for t in of for run in runs[t.name]] for (b, o), of in asked.items() if b == benchmark}
        try:
            comparability.check(benchmark, {name: of for name, of in pairs.items() if of})
        except ConfigError as error:
            differ = str(error).rpartition("; ")[0]
            raise ConfigError(f"{differ}; `rm -r trials/{benchmark}` and tune again on one machine") from None


# ---------------------------------------------------------------- what is shown


def _show_plan(asked: Asked, engine: str, workers: int) -> None:
    from pipeline import dvc_engine, ray_engine
    from pipeline.tuning_evidence import text

    beside = (ray_engine if engine == "ray" else dvc_engine).SECONDS
    total, left, untold = 0.0, 0, 0
    for (benchmark, _), of in asked.items():
        seconds = _seconds(benchmark, of)
        for trial in of:
            there = trial.records() is not None
            print(f"{trial.title}: {text(trial.values)}{'  (has a record)' if there else ''}")
            if not there:
                left, untold = left + 1, untold + (seconds is None)
                total += beside + (seconds or 0.0)
    print(f"{sum(map(len, asked.values()))} trials of {len(asked)} pairs, {left} to train")
    without = f"; training of {untold} is not in it, no record or budget tells how long it takes" if untold else ""
    print(f"about {total / workers / 60:.1f} min with {workers} at a time, {beside:g} s each beside training{without}")


def _seconds(benchmark: str, trials: Sequence[Trial]) -> float | None:
    """What a trial of a pair takes, all its seeds: by its own records, others' on the benchmark, or the budget."""
    from pipeline.composition import ROOT
    from pipeline.records import read_run

    optimizer, seeds = trials[0].optimizer, len(trials[0].run.seeds)
    for place in (f"trials/{benchmark}/{optimizer}/*", f"results/{benchmark}/{optimizer}",
                  f"trials/{benchmark}/*/*", f"results/{benchmark}/*"):  # fmt: skip
        taken = []
        for path in ROOT.glob(f"{place}/seed-*/summary.json"):
            summary = read_run(path.parent).summary
            if summary["status"] == "finished" and summary["steps"] == trials[0].run.steps:
                taken.append(sum(summary[f"{part}_seconds"] or 0.0 for part in ("training", "evaluation")))
        if taken:
            return seeds * statistics.median(taken)
    budget = trials[0].run.seconds
    return None if budget is None else seeds * budget


def _table(counts: Sequence[tuple[int, int, int, list[int]]], complete: Mapping[Pair, Evidence | None]) -> list[str]:
    """A line a pair: trials asked, found at the start and at the end, how often each was queued; what was chosen."""
    from pipeline.evidence import winner
    from pipeline.tuning_evidence import text

    rows: list[tuple[str, ...]] = [COLUMNS]
    for (asked, found, there, times), (pair, evidence) in zip(counts, complete.items(), strict=True):
        again = sum(max(0, n - 1) for n in times)
        judged = ("-", "-", "-")
        if evidence is not None:
            won = "yes" if evidence["won_by_first"] else "no"
            judged = (text(evidence["chosen"]), won, ", ".join(winner(evidence)["edge"]) or "no")
        rows.append((*pair, *map(str, (asked, found, sum(map(bool, times)), again, asked - there)), *judged))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# ---------------------------------------------------------------- what is changed


def _write(asked: Asked, complete: Mapping[Pair, Evidence]) -> None:
    """Put what was chosen into the optimizers' files, and compose params.yaml."""
    from pipeline import settings
    from pipeline.composition import ROOT, compose

    for (benchmark, optimizer), evidence in complete.items():
        trial = asked[benchmark, optimizer][0]
        changed = {
            (optimizer, *field.split(".")): (value, trial.shipped[field])
            for field, value in evidence["chosen"].items()
            if value != trial.shipped[field]
        }
        file = CONF / "optimizer" / f"{optimizer}.yaml"
        if changed and settings.write(file, benchmark, changed):
            print(f"{file.relative_to(ROOT)}: {', '.join('.'.join(path[1:]) for path in changed)} of {benchmark}")
    compose(ROOT / "params.yaml")


def widen(asked: Asked, before: Mapping[Pair, Evidence], *, dry: bool) -> bool:
    """Widen the ranges at whose edge the last tuning of these pairs ended; whether there was any."""
    from pipeline import settings
    from pipeline.evidence import winner

    any_changed = False
    for (benchmark, optimizer), of in asked.items():
        evidence = before.get((benchmark, optimizer))
        if evidence is None:
            continue
        for edge in winner(evidence)["edge"]:
            field, _, side = edge.partition(": ")
            dimension = next((d for d in of[0].space if d.field == field), None)
            if dimension is None or evidence["ranges"].get(field) != list(dimension.ends):
                continue  # it was widened before, or is closed with so few trials
            ends = _allowed(field, dimension.ends, dimension.widened(side))
            file = CONF / "search" / f"{optimizer}.yaml"
            what = f"search.{optimizer}.{field} of {benchmark}"
            if ends == dimension.ends or not file.exists():
                print(
                    f"{what}: cannot be wider than {list(dimension.ends)}" if file.exists() else f"{what}: needs {file}"
                )
                continue
            print(f"{what}: {list(dimension.ends)} {'would become' if dry else 'is now'} {list(ends)}")
            if not dry:
                settings.write(file, benchmark, {(field, dimension.kind): (list(ends), list(dimension.ends))})
            any_changed = True
    return any_changed


def _allowed(field: str, now: tuple[float, float], wider: tuple[float, float]) -> tuple[float, float]:
    """The wider range as far as the field's rule goes; halfway to a bound that the rule leaves out."""
    rule = ARGUMENTS.get(field.rpartition(".")[2])
    if not isinstance(rule, Number):
        return wider
    low, high = wider
    if high >= rule.high:
        high = (now[1] + rule.high) / 2 if rule.open_high else rule.high
    if low <= rule.low:
        low = (now[0] + rule.low) / 2 if rule.open_low else rule.low
    return low, high


if __name__ == "__main__":
    main()
