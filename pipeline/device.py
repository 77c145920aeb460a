"""Where and how a run computes: device, threads, precision, compilation, memory layout, determinism.

The one idea: these settings decide how fast a run is and how its numbers are rounded, never what is trained. They are
made once, before data and network exist, and pipeline/comparability.py keeps runs apart that differ in one of them.

| precision | forward and backward pass | all else: statistics, preconditioning, update, evaluation |
|---|---|---|
| fp32 | float32 | float32 |
| tf32 (GPU) | float32, products in TF32 | the same |
| bf16 | bfloat16 by autocast | float32, on a GPU with products in TF32 |
| fp16 (GPU) | float16 by autocast, the loss scaled | float32 with products in TF32 |
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import warnings
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.checks import ConfigError
from pipeline.validation import check_precision

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TENSOR_CORES_FROM = (8, 0)  # the compute capability that multiplies in TF32 and bfloat16
_PACKAGES = ("torch", "numpy", "scipy", "pytorch-optimizer", "mlflow", "dvc", "hydra-core")
_DVC_VARIABLES = ("DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "DVC_STAGE")


class Settings(Protocol):
    """What of a run's configuration is read here; ``RunConfig`` has it."""

    @property
    def device(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def compile(self) -> bool: ...
    @property
    def channels_last(self) -> bool: ...
    @property
    def deterministic(self) -> bool: ...


def prepare_device(run: Settings) -> torch.device:
    """The device of the run, with the process set to its threads, precision of products and kernels.

    Raises ``ConfigError`` for a device that is not there, and for a precision that it does not have.
    """
    name = run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    check_precision(run.precision, name)
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            allowed = ", ".join(["auto", "cpu", *(f"cuda:{index}" for index in range(count))])
            raise ConfigError(f"device: {run.device!r} is not allowed; this machine has {allowed}")
        _prepare_gpu(run, device)
    torch.set_num_threads(run.threads)
    return device


def _prepare_gpu(run: Settings, device: torch.device) -> None:
    if run.precision in ("tf32", "bf16") and torch.cuda.get_device_capability(device) < _TENSOR_CORES_FROM:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"precision: {run.precision!r} is not allowed on {name}; expected fp32 or fp16")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product; repeatable ones need it
    torch.cuda.set_device(device.index or 0)  # a device without an index is refused
    # The older of torch's two sets of switches: compiled code reads it, and refuses where only the newer was used.
    torch.set_float32_matmul_precision("highest" if run.precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = run.precision != "fp32"
    # A warning, not an error, where torch has no repeatable kernel: it names the operation, and the run goes on.
    torch.use_deterministic_algorithms(run.deterministic, warn_only=True)
    # Filling memory before it is written costs time, and nothing here reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not run.deterministic  # tries the algorithms for a shape that is new


def placed(model: nn.Module, run: Settings, device: torch.device) -> nn.Module:
    """The network on the device, weights of convolutions channels last if asked; activations follow the weights."""
    if run.channels_last:
        return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


def compiled(model: nn.Module, run: Settings) -> nn.Module:
    """What the training step calls. Evaluation and diagnostics call ``model`` itself, which stays as it is."""
    return torch.compile(model) if run.compile else model  # type: ignore[return-value]


def autocast(run: Settings, device: torch.device) -> AbstractContextManager[Any]:
    """For the forward pass; may be entered again and again."""
    if run.precision not in _HALF:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_HALF[run.precision])


def loss_scaler(run: Settings, device: torch.device) -> torch.amp.GradScaler:
    """Keeps small gradients above float16's smallest number; with any other precision it does nothing."""
    scaled = run.precision == "fp16"
    if scaled:  # the first steps may be left out until the scale fits, and the schedule goes on all the same
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    return torch.amp.GradScaler(device.type, enabled=scaled)


# ---------------------------------------------------------------- what is recorded


def describe_environment(run: Settings, device: torch.device) -> dict[str, Any]:
    """Where the run took place: what ``environment.json`` holds, but for the time."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "machine": platform.node(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": run.threads,
        "git_commit": _git_commit(),
        **{name.lower(): os.environ.get(name) for name in _DVC_VARIABLES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
