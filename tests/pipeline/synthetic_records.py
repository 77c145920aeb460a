"""Records of a study that was never trained: curves with the look of real ones, made from seeds in milliseconds."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config import TARGETS, Params, resolve

BENCHMARKS: dict[str, dict[str, Any]] = {
    "toy_linear": {"metric": "excess_loss", "start": 12.0, "floor": 1e-4, "easy": 0.1, "hard": 0.01, "steps": 300},
    "toy_mlp": {"metric": "excess_loss", "start": 0.7, "floor": 2e-3, "easy": 0.05, "hard": 0.02, "steps": 300},
    "digits_autoencoder": {
        "metric": "train_loss",
        "start": 0.69,
        "floor": 0.26,
        "easy": 0.4,
        "hard": 0.3,
        "steps": 400,
    },
    "digits_cnn": {"metric": "train_loss", "start": 2.3, "floor": 3e-3, "easy": 0.2, "hard": 0.05, "steps": 200},
}
RATES = {"sgd": 0.8, "adam": 1.3, "kfac": 4.0, "ekfac": 5.0, "gkfac": 4.5}
PHASES_MS = {  # forward_backward, statistics, inverses, update
    "sgd": (2.0, 0.0, 0.0, 0.15),
    "adam": (2.0, 0.0, 0.0, 0.3),
    "kfac": (2.2, 1.4, 0.9, 0.8),
    "ekfac": (2.2, 1.9, 1.6, 1.1),
    "gkfac": (2.2, 1.9, 1.0, 1.7),
}
SEEDS = (0, 1, 2)


def params(
    benchmarks: tuple[str, ...] = tuple(BENCHMARKS),
    optimizers: tuple[str, ...] = tuple(RATES),
    seeds: tuple[int, ...] = SEEDS,
) -> Params:
    """The view of a params.yaml that would have asked for these runs."""
    tasks = {
        name: {
            "model": {"name": "mlp"},
            "loss": "cross_entropy",
            "batch_size": 128,
            "warmup": 0,
            "schedule": "constant",
            "steps": BENCHMARKS[name]["steps"],
            "seconds": None,
            "evaluate_every": 10,
            "target": {key: BENCHMARKS[name][key] for key in ("metric", *TARGETS)},
        }
        for name in benchmarks
    }
    return Params(
        benchmarks=tasks,
        optimizers={name: {"_target_": "torch.optim.SGD", "lr": 0.1} for name in optimizers},
        images={name: {"source": "digits"} for name in benchmarks},
        planted={},
        seeds=list(seeds),
        device="cpu",
        threads=2,
        precision="fp32",
        compile=False,
        channels_last=False,
        deterministic=True,
        image_folder=None,
        diagnostics="light",
        checkpoint_seconds=60,
    )


def write_study(
    results: Path, chosen: Params, diverged: tuple[tuple[str, str, int], ...] = (), curvature: bool = True
) -> Path:
    """Write the records of a whole study below ``results``; ``diverged`` names (benchmark, optimizer, seed)."""
    for benchmark in chosen.benchmarks:
        for optimizer in chosen.optimizers:
            for seed in chosen.seeds:
                blown = (benchmark, optimizer, seed) in diverged
                write_record(results, chosen, benchmark, optimizer, seed, diverged=blown, curvature=curvature)
    return results


def write_record(
    results: Path,
    chosen: Params,
    benchmark: str,
    optimizer: str,
    seed: int,
    *,
    diverged: bool = False,
    curvature: bool = True,
) -> Path:
    """One seed's folder; returns it."""
    random_numbers = random.Random(f"{benchmark} {optimizer} {seed}")
    spec = BENCHMARKS[benchmark]
    budget, every = spec["steps"], 10
    rate = RATES.get(optimizer, 1.0) * random_numbers.uniform(0.9, 1.1)
    phases = [1e-3 * value * random_numbers.uniform(0.95, 1.05) for value in PHASES_MS.get(optimizer, PHASES_MS["sgd"])]
    history: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    last = 40 if diverged else budget
    for step in range(0, last + 1, every):
        decay = math.exp(-3 * rate * (step / budget) ** 0.7)
        value = spec["floor"] + (spec["start"] - spec["floor"]) * decay
        value *= math.exp(0.05 * random_numbers.gauss(0, 1) * min(1, step / 50))
        if diverged and step == last:
            value = math.nan
        toy = spec["metric"] == "excess_loss"
        history.append(
            {
                "step": step,
                "epoch": step / 10,
                "examples": 128 * step,
                "training_seconds": step * sum(phases),
                "train_loss": value + 0.1 if toy else value,
                "train_score": 1 - value / 3,
                "validation_loss": value * 1.1 + 0.1 if toy else value * 1.2,
                "validation_score": 1 - value / 2.5,
                "validation_error": None if toy else value / 2.5,
                "excess_loss": value if toy else None,
                "lr": 0.1,
                "batch_size": 128,
                **{f"{name}_seconds": step * phase for name, phase in zip(_PHASES, phases, strict=True)},
                "peak_memory_mib": 210.0,
            }
        )
        if curvature and math.isfinite(value):
            cosine = {"sgd": 0.15, "adam": 0.3}.get(optimizer, 0.8) + random_numbers.uniform(-0.05, 0.05)
            rows.append({"step": step, "layer": "", "quantity": "cosine_natural", "value": cosine})
            top = 30 * (1 + step / 40) ** (0.6 if optimizer == "sgd" else 0.2) * random_numbers.uniform(0.9, 1.1)
            rows.append({"step": step, "layer": "", "quantity": "top_eigenvalue", "value": top})
            rows.append({"step": step, "layer": "0", "quantity": "gradient_norm", "value": 1.0})
    metric = spec["metric"]
    at = {name: next((row for row in history if row[metric] <= spec[name]), None) for name in TARGETS}
    end = history[-1]
    status = "diverged" if diverged else "finished"
    summary = {
        "benchmark": benchmark, "optimizer": optimizer, "seed": seed, "status": status,
        "message": "training loss is not finite" if diverged else "", "steps": end["step"],
        "examples": end["examples"], "parameters": 25_000, "training_seconds": end["training_seconds"],
        **{f"{name}_seconds": end[f"{name}_seconds"] for name in _PHASES}, "evaluation_seconds": 0.2,
        "diagnostics_seconds": 0.3, "peak_memory_mib": 210.0, "target_metric": metric,
        **{f"{name}_target": spec[name] for name in TARGETS},
        **{f"{name}_reached": row is not None for name, row in at.items()},
        **{f"{name}_step": row and row["step"] for name, row in at.items()},
        **{f"{name}_seconds": row and row["training_seconds"] for name, row in at.items()},
        **{f"train_{key}": end[f"train_{key}"] for key in ("loss", "score")},
        **{f"validation_{key}": end[f"validation_{key}"] for key in ("loss", "score", "error")},
        "test_loss": end["validation_loss"] * 1.02, "test_score": end["validation_score"] - 0.01,
        "best_validation_loss": min(row["validation_loss"] for row in history),
        "excess_loss": end["excess_loss"], "teacher_loss": 0.1 if end["excess_loss"] is not None else None,
    }  # fmt: skip
    folder = records.seed_folder(results, benchmark, optimizer, seed)
    records.write_run(
        folder,
        config={**resolve(chosen, benchmark, optimizer).as_dict(), "seed": seed},
        environment={"python": "3.11.9", "torch": "2.14.1", "device": "cpu", "threads": 2},
        history=history,
        curvature=rows,
        summary=summary,
    )
    return folder


_PHASES = ("forward_backward", "statistics", "inverses", "update")
