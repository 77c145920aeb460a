"""What a step of each optimizer costs, in steps of SGD with momentum on the same network and batch.

Optimizers take turns, one step each, so that whatever slows the machine slows all of them. A step is of one of a few
kinds (plain, one that updates statistics, one that renews inverses too); a cycle here has one of each kind, and its
cost is their mean, weighted by how often each kind occurs in the cycle of the intervals. Reported is the median over
cycles, and the most expensive kind.

On a machine that is busy with other work `--threads 1 --clock cpu` counts processor time, which waiting does not enter.

    python -m benchmarks.step_cost                        # the table, and benchmarks/results/step_cost.json
    python -m benchmarks.step_cost --only resnet --quick
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac import EKFAC, GKFAC, KFAC
from kfac.optimizer import EARLY_STEPS

HERE = Path(__file__).resolve().parent
NEVER = 10**9
PLAIN, STATISTICS, REFRESH = "plain", "statistics", "refresh"


# Workloads.


def autoencoder() -> nn.Sequential:
    """The deep autoencoder of Hinton & Salakhutdinov (2006) for 28x28 images, tanh."""
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()] if i not in (3, 7) else [nn.Linear(d_in, d_out)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut that pads with zeros (He et al. 2016, option A)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.stride = c_out // c_in
        self.conv1 = nn.Conv2d(c_in, c_out, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            more = y.shape[1] - x.shape[1]
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, more // 2, more - more // 2))
        return F.relu(x + y)


def resnet20() -> nn.Sequential:
    """ResNet-20 for 32x32 images, ten classes (He et al. 2016, arXiv 1512.03385, section 4.2)."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Residual(c_in, c_out) for c_in, c_out in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.rand(1000, 784, generator=generator).pow(4)
    return x, x


def classes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(128, 3, 32, 32, generator=generator), torch.randint(0, 10, (128,), generator=generator)


WORKLOADS: dict[str, tuple[Callable, Callable, Callable]] = {
    "autoencoder": (autoencoder, images, nn.BCEWithLogitsLoss),
    "resnet20": (resnet20, classes, nn.CrossEntropyLoss),
}


# Variants.


class Schedule:
    """Intervals that make the coming step one of the wanted kind."""

    kind = REFRESH

    def factor_interval(self, step: int) -> int:
        return NEVER if self.kind == PLAIN else 1

    def inverse_interval(self, step: int) -> int:
        return 1 if self.kind == REFRESH else NEVER


@dataclass
class Variant:
    """A row of the table.

    Args:
        name, workload: what is measured, and on what.
        make: an optimizer class of kfac.
        every: intervals of statistics and of inverses.
        options: of the optimizer.
        goal: what its cost shall be, in steps of SGD.
        extra_over: name of a variant; then the cost is what a statistics step has more than that one's.
    """

    name: str
    workload: str
    make: Callable
    every: tuple[int, int]
    options: dict = field(default_factory=dict)
    goal: float | None = None
    extra_over: str = ""

    @property
    def kinds(self) -> dict[str, float]:
        """How often each kind of step occurs."""
        statistics_every, inverses_every = self.every
        refresh = 1 / inverses_every
        kinds = {PLAIN: 1 - 1 / statistics_every, STATISTICS: 1 / statistics_every - refresh, REFRESH: refresh}
        return {kind: share for kind, share in kinds.items() if share > 1e-9}


FIXED = {"lr": 1e-3}
BF16 = {"preconditioning_dtype": "bfloat16"}
SAMPLED = {"lr": 1e-3, "fisher": "sampled"}
VARIANTS = [
    Variant("K-FAC 1/5", "autoencoder", KFAC, (1, 5), FIXED, 2.5),
    Variant("K-FAC 10/20", "autoencoder", KFAC, (10, 20), FIXED, 1.70),
    Variant("K-FAC 10/100", "autoencoder", KFAC, (10, 100), FIXED, 1.65),
    Variant("K-FAC 1/5 bf16", "autoencoder", KFAC, (1, 5), FIXED | BF16, 1.9),
    Variant("K-FAC 10/20 bf16", "autoencoder", KFAC, (10, 20), FIXED | BF16, 1.4),
    Variant("K-FAC self-tuning", "autoencoder", KFAC, (5, 10), {}, 2.3),
    Variant("K-FAC self-tuning bf16", "autoencoder", KFAC, (5, 10), BF16, 2.0),
    Variant("E-KFAC 1/20", "autoencoder", EKFAC, (1, 20), FIXED, 3.8),
    Variant("GKFAC 10/20", "autoencoder", GKFAC, (10, 20), FIXED, 1.9),
    Variant(
        "GKFAC constant, extra per statistics",
        "autoencoder",
        GKFAC,
        (10, 20),
        FIXED | {"coarse_space": "constant"},
        0.3,
        "K-FAC 10/20",
    ),
    Variant("K-FAC sampled 1/10", "resnet20", KFAC, (1, 10), SAMPLED, 2.8),
    Variant("K-FAC sampled 10/100", "resnet20", KFAC, (10, 100), SAMPLED, 1.25),
]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
MEMORY = ("peak memory, K-FAC sampled 1/10", "resnet20", 1.5)


# Measuring.


class Run:
    """A network in training by one optimizer."""

    def __init__(
        self,
        workload: str,
        device: torch.device,
        variant: Variant | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        network, batch, criterion = WORKLOADS[workload]
        torch.manual_seed(0)
        self.model = network().to(device)
        self.x, self.y = (t.to(device) for t in batch(torch.Generator().manual_seed(0)))
        self.criterion = criterion()
        self.device, self.variant, self.schedule, self.clock = device, variant, Schedule(), clock
        self.kinds = list(variant.kinds) if variant else [PLAIN]
        self.times: dict[str, list[float]] = {kind: [] for kind in self.kinds}
        if variant is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        else:
            self.optimizer = variant.make(
                self.model,
                loss=self.criterion,
                factor_interval=self.schedule.factor_interval,
                inverse_interval=self.schedule.inverse_interval,
                **variant.options,
            )

    def step(self, coming: str = REFRESH) -> float:
        """Seconds of one training step; `coming` is the kind of the next, which is settled at the end of this one."""
        self._wait()
        start = self.clock()
        self.criterion(self.model(self.x), self.y).backward()
        self.schedule.kind = coming
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return self.clock() - start

    def turn(self, number: int) -> None:
        """The step of a turn: kinds follow one another."""
        kind = self.kinds[number % len(self.kinds)]
        self.times[kind].append(self.step(self.kinds[(number + 1) % len(self.kinds)]))

    def warm_up(self) -> None:
        early = EARLY_STEPS if self.variant and "lr" not in self.variant.options else 0
        for _ in range(early + 1):
            self.step()
        self.step(self.kinds[0])

    def cycles(self) -> list[float]:
        """The mean cost of a step, for each cycle."""
        shares = self.variant.kinds if self.variant else {PLAIN: 1.0}
        columns = zip(*(self.times[kind] for kind in shares), strict=True)
        return [sum(share * t for share, t in zip(shares.values(), times, strict=True)) for times in columns]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    workload: str, variants: list[Variant], cycles: int, device: torch.device, clock: Callable[[], float]
) -> list[dict]:
    """The rows of a workload: all its optimizers take turns."""
    base = Run(workload, device, clock=clock)
    runs = [Run(workload, device, variant, clock) for variant in variants]
    for run in [base, *runs]:
        run.warm_up()
    for number in range(cycles * 6):  # 6 is a multiple of one, two and three kinds
        base.turn(number)
        for run in runs:
            run.turn(number)
    sgd = statistics.median(base.times[PLAIN])
    return [row(run, runs, sgd) for run in runs]


def row(run: Run, runs: list[Run], sgd: float) -> dict:
    assert run.variant is not None
    variant = run.variant
    kinds = {kind: statistics.median(times) / sgd for kind, times in run.times.items()}
    cost = statistics.median(run.cycles()) / sgd
    result = {
        "workload": variant.workload,
        "name": variant.name,
        "cost": cost,
        "goal": variant.goal,
        "largest": max(kinds.values()),
        "kinds": kinds,
        "sgd_ms": 1e3 * sgd,
        "cycles": len(run.cycles()),
    }
    if variant.extra_over:
        other = next(r for r in runs if r.variant and r.variant.name == variant.extra_over)
        over = {kind: statistics.median(times) / sgd for kind, times in other.times.items()}
        result |= {"cost": kinds[STATISTICS] - over[STATISTICS], "extra": {k: kinds[k] - over[k] for k in kinds}}
    return result


def peak_memory(optimizer: str, device: torch.device) -> float:
    """MiB that training steps of the memory row's network add, at their peak, to a process that has its modules."""
    before = resident("VmRSS")
    variant = Variant("", MEMORY[1], KFAC, (1, 10), SAMPLED) if optimizer == "kfac" else None
    run = Run(MEMORY[1], device, variant)
    for _ in range(4):
        run.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Resident memory of this process in MiB: "VmRSS" now, "VmHWM" at its peak (getrusage's is the parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field + ":"))


def memory_row(options: argparse.Namespace) -> dict:
    """The ratio of peaks of processes, medians of three: an allocator's pages vary by a tenth."""

    def peak(optimizer: str) -> float:
        command = [sys.executable, "-m", "benchmarks.step_cost", "--peak", optimizer, "--threads", str(options.threads)]
        output = subprocess.run([*command, "--device", options.device], capture_output=True, text=True, check=True)
        return float(output.stdout)

    peaks = {optimizer: statistics.median(peak(optimizer) for _ in range(3)) for optimizer in ("sgd", "kfac")}
    name, workload, goal = MEMORY
    return {
        "workload": workload,
        "name": name,
        "cost": peaks["kfac"] / peaks["sgd"],
        "goal": goal,
        "largest": None,
        "kinds": {},
        "mib": peaks,
    }


# Reporting.


def circumstances(options: argparse.Namespace) -> dict:
    """Where, when and of what code these numbers are."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model")]
        cpu = next((line for line in lines if not line.isdigit()), cpu)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    device = torch.device(options.device)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": options.threads,
        "clock": options.clock,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def table(rows: list[dict]) -> str:
    """All rows as text, costs in steps of SGD."""
    lines = [
        f"{'work':12} {'optimizer, intervals of statistics/inverses':44} {'cost':>6} {'goal':>6} {'largest':>8}  kinds"
    ]
    for r in rows:
        kinds = ", ".join(f"{kind} {cost:.2f}" for kind, cost in r["kinds"].items())
        largest = f"{r['largest']:8.2f}" if r["largest"] else " " * 8
        lines.append(f"{r['workload']:12} {r['name']:44} {r['cost']:6.2f} {r['goal']:6.2f} {largest}  {kinds}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="rows whose 'work name' contains or matches it")
    parser.add_argument("--cycles", type=int, default=4, help="times six steps of each optimizer (default 4)")
    parser.add_argument("--quick", action="store_true", help="a single cycle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: processor time of all threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="step_cost", help="of the file in benchmarks/results")
    parser.add_argument("--peak", choices=("sgd", "kfac"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.peak:
        print(peak_memory(options.peak, device))
        return

    def wanted(workload: str, name: str) -> bool:
        label = f"{workload} {name}"
        return options.only in label or fnmatch.fnmatch(label, options.only)

    chosen = [v for v in VARIANTS if wanted(v.workload, v.name)]
    needed = {v.extra_over for v in chosen}
    chosen = [v for v in VARIANTS if v in chosen or v.name in needed]
    rows = []
    for workload in WORKLOADS:
        variants = [v for v in chosen if v.workload == workload]
        if variants:
            rows += measure(workload, variants, 1 if options.quick else options.cycles, device, CLOCKS[options.clock])
    if wanted(MEMORY[1], MEMORY[0]):
        rows.append(memory_row(options))
    if not rows:
        parser.error(f"--only: {options.only!r} matches no row")
    print(table(rows))
    (HERE / "results").mkdir(exist_ok=True)
    report = {"circumstances": circumstances(options), "rows": rows}
    (HERE / "results" / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
