"""What a step of each optimizer costs on a GPU, where its time goes and what it holds, on published networks.

All optimizers of a network take turns, a whole cycle of the intervals each, so that a device that slows down slows
all of them. The time of a step is that of the host over a cycle, which ends by waiting for the device; the phases are
those of the pipeline's training clock, by events on the stream. Batches have CIFAR-10's shape and live on the device.
Memory is the peak of an optimizer's own training: network, gradients, activations and its state.

    python -m benchmarks.gpu_steps                    # the table, and benchmarks/results/gpu_steps.json
    python -m benchmarks.gpu_steps --precision bf16 --channels-last --compile --name gpu_steps_bf16
    python -m benchmarks.gpu_steps --networks wrn28_10 --optimizers kfac --profile
    python -m benchmarks.gpu_steps --device cpu --networks resnet8 --batch 4 --intervals 1 2 --cycles 1
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kfac import EKFAC, GKFAC, KFAC
from pipeline import models
from pipeline.checks import ConfigError
from pipeline.clocks import PHASES, PeakMemory, Stopwatch
from pipeline.device import autocast, compiled, describe_environment, loss_scaler, placed, prepare_device

RESULTS = Path(__file__).resolve().parent / "results"
KRONECKER = {"kfac": KFAC, "ekfac": EKFAC, "gkfac": GKFAC}
CLASSES = 10
FAMILIES = {
    r"resnet(\d+)": {"name": "resnet", "shortcut": "pad"},
    r"wrn(\d+)_(\d+)": {"name": "wide_resnet", "dropout": 0.3},
}


def model_fields(network: str) -> dict[str, Any]:
    """The pipeline's description of `resnet20`, `wrn28_10` and the like."""
    for pattern, fields in FAMILIES.items():
        if found := re.fullmatch(pattern, network):
            sizes = zip(("depth", "widen"), map(int, found.groups()), strict=False)
            model = {**fields, **dict(sizes), "init": "default", "gain": 1.0}
            if all(rule.accepts(model[name]) for name, rule in models.FIELDS[fields["name"]].items()):
                return model
    raise ConfigError(f"networks: {network!r} is not known; expected such as resnet20, resnet32, wrn28_10")


class Run:
    """A network in training by one optimizer, warmed up by one cycle."""

    def __init__(self, network: str, optimizer: str, options: argparse.Namespace, device: torch.device) -> None:
        held = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
        memory = PeakMemory(device)
        memory.resume()
        self.length = options.intervals[1]
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(options.batch, 3, 32, 32, generator=generator).to(device)
        self.targets = torch.randint(0, CLASSES, (options.batch,), generator=generator).to(device)
        model = placed(models.build(model_fields(network), (3, 32, 32), CLASSES, seed=0), options, device).train()
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.network, self.criterion = compiled(model, options), nn.CrossEntropyLoss()
        self.autocast, self.scaler = autocast(options, device), loss_scaler(options, device)
        self.stopwatch, self.device = Stopwatch(device), device
        self.optimizer: torch.optim.Optimizer
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        else:
            self.optimizer = KRONECKER[optimizer](
                model,
                loss=self.criterion,
                lr=1e-3,
                fisher=options.fisher,
                factor_interval=options.intervals[0],
                inverse_interval=options.intervals[1],
            )
            self.optimizer.phase = self.stopwatch
        self.milliseconds: list[float] = []
        self.phases: list[dict[str, float]] = []
        self._steps(self.length)
        memory.pause()
        self.mib = memory.mib - held

    def turn(self) -> None:
        """One cycle, measured."""
        before = self.stopwatch.seconds()
        start = time.perf_counter()
        self._steps(self.length)
        spent = time.perf_counter() - start
        after = self.stopwatch.seconds()
        self.milliseconds.append(1e3 * spent / self.length)
        self.phases.append({name: 1e3 * (after[name] - before[name]) / self.length for name in PHASES})

    def _steps(self, count: int) -> None:
        """So many of the training loop's own steps."""
        for _ in range(count):
            with self.stopwatch("forward_backward"):
                self.optimizer.zero_grad()
                with self.autocast:
                    loss = self.criterion(self.network(self.inputs), self.targets)
                self.scaler.scale(loss).backward()
            with self.stopwatch("update"):
                self.scaler.step(self.optimizer)
                self.scaler.update()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def profile(self, count: int) -> str:
        """The dearest operations of the first steps of a cycle: with new statistics and new inverses once."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profiled:
            self._steps(count)
        key = f"self_{self.device.type}_time_total"
        return profiled.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60)


def measure(network: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows of a network, SGD first; an optimizer that does not fit into memory has a row that says so."""
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for optimizer in dict.fromkeys(["sgd", *options.optimizers]):
        try:
            runs[optimizer] = Run(network, optimizer, options, device)
        except torch.OutOfMemoryError:
            failed[optimizer] = "out of memory"
            torch.cuda.empty_cache()
    for _ in range(options.cycles):
        for run in runs.values():
            run.turn()
    if options.profile:
        for optimizer, run in runs.items():
            print(f"{network} {optimizer}\n{run.profile(options.intervals[0])}", flush=True)
    rows = [row(network, optimizer, run, runs.get("sgd"), options) for optimizer, run in runs.items()]
    return rows + [{"network": network, "optimizer": optimizer, "failed": why} for optimizer, why in failed.items()]


def row(network: str, optimizer: str, run: Run, sgd: Run | None, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over cycles; the ratio is that of cycles that followed each other."""
    milliseconds = statistics.median(run.milliseconds)
    ratios = [own / other for own, other in zip(run.milliseconds, sgd.milliseconds, strict=True)] if sgd else []
    phases = {name: statistics.median(each[name] for each in run.phases) for name in PHASES}
    total = sum(phases.values())
    return {
        "network": network,
        "parameters": run.parameters,
        "optimizer": optimizer,
        "milliseconds": milliseconds,
        "ratio_to_sgd": statistics.median(ratios) if ratios else None,
        "images_per_second": 1e3 * options.batch / milliseconds,
        **{f"{name}_milliseconds": value for name, value in phases.items()},
        **{f"{name}_share": value / total for name, value in phases.items()},
        "peak_memory_mib": run.mib,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as text; phases in percent of their sum."""
    head = ("network", "optimizer", "ms/step", "x sgd", "images/s", "fwd+bwd", "statist.", "inverses", "update", "MiB")
    lines = ["{:10} {:9} {:>8} {:>6} {:>9} {:>8} {:>8} {:>8} {:>7} {:>7}".format(*head)]
    for each in rows:
        start = f"{each['network']:10} {each['optimizer']:9} "
        if "failed" in each:
            lines.append(f"{start}{each['failed']}")
            continue
        ratio = "-" if each["ratio_to_sgd"] is None else f"{each['ratio_to_sgd']:.2f}"
        shares = [f"{each[f'{name}_share']:.1%}" for name in PHASES]
        lines.append(
            f"{start}{each['milliseconds']:8.2f} {ratio:>6} {each['images_per_second']:9.0f} "
            f"{shares[0]:>8} {shares[1]:>8} {shares[2]:>8} {shares[3]:>7} {each['peak_memory_mib']:7.0f}"
        )
    return "\n".join(lines)


def options_of(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet32", "wrn28_10"], metavar="NAME")
    parser.add_argument("--optimizers", nargs="+", default=list(KRONECKER), choices=list(KRONECKER), help="beside SGD")
    parser.add_argument("--batch", type=int, default=128, help="images (default 128)")
    parser.add_argument("--intervals", nargs=2, type=int, default=[10, 100], metavar=("STATISTICS", "INVERSES"))
    parser.add_argument("--cycles", type=int, default=3, help="of INVERSES steps, measured (default 3)")
    parser.add_argument("--fisher", choices=("sampled", "exact", "empirical"), default="sampled")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16", "fp16"), default="fp32")
    for flag, meaning in {
        "compile": "torch.compile the network",
        "channels-last": "memory layout of images",
        "deterministic": "kernels that repeat to the bit",
        "profile": "print the dearest operations of the steps up to the second statistics",
    }.items():
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    parser.add_argument("--name", default="gpu_steps", help="of the file of results (default gpu_steps)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default benchmarks/results)")
    options = parser.parse_args(words)
    first, second = options.intervals
    if min(options.batch, options.cycles, options.threads, first, second) < 1 or second % first:
        parser.error("expected numbers >= 1, and INVERSES a multiple of STATISTICS")
    return options


def main(words: Sequence[str] | None = None) -> None:
    options = options_of(words)
    try:
        for network in options.networks:
            model_fields(network)
        device = prepare_device(options)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    environment = describe_environment(options, device)
    where = ("python", "torch", "platform", "cpu", "cores", "device", "device_name", "cuda", "git_commit")
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        **{name: environment[name] for name in where},
        **{name: value for name, value in vars(options).items() if name not in ("device", "name", "results")},
        "rows": [],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    for network in options.networks:
        report["rows"] += measure(network, options, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        # After each network, so that a run that is cut off leaves what it has.
        (options.results / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['device_name']}, torch {report['torch']}, {options.precision}, batch {options.batch}")
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
