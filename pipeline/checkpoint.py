"""Checkpoints: what a killed training run needs to go on to the very same numbers.

The one idea: the address says what it is good for. All that decides a pair's numbers (resolved configuration, data,
code, libraries, processor) makes one checksum, and what lies below `checkpoints/<benchmark>/<optimizer>/<checksum>/` in
the main workspace belongs to exactly that: of another configuration nothing is ever found.

| in that folder | is |
|---|---|
| `seed-<k>/step-<n>.pt` | the state after n steps, the latest and the one before; its own checksum are the last bytes |
| `seed-<k>/records/` | the records of a seed that is over, while other seeds of the stage are not |
| `seed-<k>.lock` | locked by the process that trains this seed, and says which |

Files are written under a temporary name and renamed. What a seed has there goes when its stage succeeds; stages that
differ in their seeds alone share the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.checks import ConfigError
from pipeline.config import RunConfig
from pipeline.interruption import described_process, is_orphan
from pipeline.records import settle
from pipeline.store import workspace

KEPT = 2
SHARE = 0.05  # of the time at most goes into writing checkpoints
_DIGEST = 32  # bytes at the end of a checkpoint
_LIBRARIES = ("torch", "numpy", "scipy", "pytorch-optimizer", "device", "device_name", "cuda", "threads")


# ---------------------------------------------------------------- the address


def home(run: RunConfig, manifest: Mapping[str, Any], environment: Mapping[str, Any], target: type) -> Path:
    """The folder of a pair's checkpoints; `manifest` describes its data, `target` is the class of its optimizer."""
    deciding = {
        "run": {name: value for name, value in run.as_dict().items() if name != "seeds"},
        "data": manifest,
        "libraries": {name: environment.get(name) for name in _LIBRARIES},
        "code": _code(target),
    }
    text = json.dumps(deciding, sort_keys=True, default=str)
    return root() / run.benchmark / run.optimizer / hashlib.sha256(text.encode()).hexdigest()[:16]


def root() -> Path:
    """Where all checkpoints are, those of temporary and queued runs too."""
    return workspace() / "checkpoints"


def code(*stages: str) -> dict[str, str]:
    """Checksums of the code that these stages depend on (without a dvc.yaml: of all code)."""
    from ruamel.yaml import YAML

    tree = Path(__file__).parents[1]
    named = [tree / "kfac", tree / "pipeline"]
    if (tree / "dvc.yaml").is_file():
        declared = YAML(typ="safe", pure=True).load(tree / "dvc.yaml")["stages"]
        named = [tree / name for stage in stages for name in declared[stage]["deps"] if not name.startswith("data/")]
    files = {file for path in named for file in ([path] if path.is_file() else path.rglob("*.py"))}
    return {str(file.relative_to(tree)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _code(target: type) -> dict[str, str]:
    """The same of the stage `train`, and of the file that defines the optimizer."""
    checksums = code("train")
    defined = getattr(sys.modules[target.__module__], "__file__", None)
    if defined is not None:
        checksums[target.__module__] = hashlib.sha256(Path(defined).read_bytes()).hexdigest()
    return checksums


# ---------------------------------------------------------------- one seed


class Checkpoints:
    """The checkpoints of one seed in `home`: `due` when the last is `every` seconds ago (and cost little enough)."""

    def __init__(self, home: Path, seed: int, every: float) -> None:
        self.folder = home / f"seed-{seed}"
        self.records = self.folder / "records"
        self._every = every
        self._wrote_at = time.monotonic()
        self._cost = 0.0
        self._warned = False

    @property
    def due(self) -> bool:
        return time.monotonic() - self._wrote_at >= max(self._every, self._cost / SHARE)

    def save(self, step: int, state: Mapping[str, Any]) -> bool:
        """Write the state after `step` steps. A disk that refuses is one warning, and training goes on without."""
        begin = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / f"step-{step:012d}.pt", state)
            for old in self._files()[KEPT:]:
                old.unlink()
        except OSError as error:
            if not self._warned:
                reason = error.strerror or error
                say(f"warning: {self.folder}: no checkpoint could be written: {reason}; training goes on", sys.stderr)
            self._warned = True
            return False
        finally:
            self._wrote_at = time.monotonic()
            self._cost = self._wrote_at - begin
        return True

    def load(self) -> dict[str, Any] | None:
        """The latest state that is whole; a damaged one is named and passed over. Tensors are on the CPU."""
        for file in self._files():
            try:
                return _read(file)
            except Exception as error:  # torch raises whatever the damaged bytes lead to
                reason = " ".join(str(error).split())[:200]
                say(f"warning: {file}: is damaged and not used: {reason}", sys.stderr)
        return None

    def make_room(self) -> None:
        """Give up the state before the latest, on a disk that is full."""
        for old in self._files()[1:]:
            old.unlink()

    def finish(self) -> None:
        """Keep the records alone."""
        for old in self._files():
            old.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"), reverse=True)


class _Hashing:
    """A file that knows the checksum of what is written to it: a large state is in memory once."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def _write(path: Path, state: Mapping[str, Any]) -> None:
    import torch

    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            hashing = _Hashing(file)
            torch.save(dict(state), hashing)  # type: ignore[arg-type]  # it only writes
            file.write(hashing.digest.digest())
        settle(partial)
        os.replace(partial, path)
        settle(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    import torch

    content = memoryview(path.read_bytes())
    if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
        raise ValueError("its checksum is another")
    return torch.load(io.BytesIO(content[:-_DIGEST]), map_location="cpu", weights_only=True)


def remove(home: Path, seeds: Iterable[int]) -> None:
    """What `home` keeps of these seeds, whose locks this process holds, and the folders above that this empties."""
    for seed in seeds:
        folder, leaving = home / f"seed-{seed}", home / f".seed-{seed}.leaving"
        shutil.rmtree(leaving, ignore_errors=True)  # of a process that was killed
        with contextlib.suppress(OSError):
            os.replace(folder, leaving)  # at once: half of its records would be taken for the whole
        shutil.rmtree(leaving, ignore_errors=True)
        with contextlib.suppress(OSError):
            _lock_path(home, seed).unlink()  # who waits for it sees that it is another file
    for empty in (home, home.parent, home.parent.parent, root()):
        with contextlib.suppress(OSError):  # in use by others
            empty.rmdir()


# ---------------------------------------------------------------- one trainer at a time


@contextlib.contextmanager
def locked(home: Path, seeds: Iterable[int]) -> Iterator[None]:
    """Have the checkpoints of these seeds for oneself.

    Raises ConfigError in one line when another process trains one of them; two cases wait for it instead. A temporary
    or queued run, for it would be lost; and everyone for a process whose `dvc` was killed, for it is about to end.
    """
    with contextlib.ExitStack() as stack:
        for seed in sorted(seeds):
            file = stack.enter_context(contextlib.closing(_lock(_lock_path(home, seed))))
            file.write(json.dumps(described_process()))
            file.flush()
        yield


def _lock_path(home: Path, seed: int) -> Path:
    return home / f"seed-{seed}.lock"


def _lock(path: Path) -> Any:
    """The file, locked and empty."""
    told = False
    while True:
        file = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:  # else another removed it when it was done
                file.truncate(0)
                return file
            file.close()
        except FileNotFoundError:  # removed at this moment
            if file is not None:
                file.close()
        except BlockingIOError:
            assert file is not None
            file.seek(0)
            holder = _holder(file.read())
            file.close()
            if holder is None:
                time.sleep(0.05)
                continue
            what = f"process {holder['pid']} trains the same configuration and seed"
            queued = Path.cwd().resolve() != workspace()
            if not queued and not is_orphan(holder):
                raise ConfigError(f"{path}: {what}; wait for it, or end it") from None
            if not told:
                say(f"{path}: {what}; waiting for it to end")
            told = True
            time.sleep(0.2)
        except OSError as error:
            raise ConfigError(f"{path}: checkpoints cannot be written: {error.strerror or error}") from None


def _holder(text: str) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except ValueError:  # it locked the file a moment ago and has not signed yet
        return None


def say(line: str, where: Any = None) -> None:
    """Print a line; that nobody reads any more, as after the death of `dvc`, ends no training."""
    with contextlib.suppress(OSError):
        print(line, file=where or sys.stdout, flush=True)
