"""Claims about a stage whose disk or store fails in mid-run: a full tmpfs, a read-only mount, a broken database."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from lives import CANNOT, a_stage, check_store, checkpoints, ended, fork, in_child, printed, without_clocks

from pipeline import tracking
from pipeline.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("small_world")


def own_mounts() -> None:
    """In this process and its children, mounts that nobody else sees; ends the process where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    new_namespaces = 0x00020000 | (0 if user == 0 else 0x10000000)
    if ctypes.CDLL(None, use_errno=True).unshare(new_namespaces) != 0:
        os._exit(CANNOT)
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")


def mount(*words: str) -> None:
    if subprocess.run(["mount", *words], check=False, capture_output=True).returncode != 0:
        os._exit(CANNOT)


def fill(folder: Path) -> None:
    """Write until the disk is full."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 4096, 512):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def later(root: Path, act: Callable[[], None]) -> Callable[[], None]:
    """Before a life: have `act` done when the first seed has two checkpoints."""
    save = Checkpoints.save

    def save_and_act(self: Checkpoints, step: int, state: Mapping[str, Any]) -> bool:
        kept = save(self, step, state)
        if len(checkpoints(root)) == 2:
            Checkpoints.save = save  # type: ignore[method-assign]
            act()
        return kept

    def arrange() -> None:
        Checkpoints.save = save_and_act  # type: ignore[method-assign]

    return arrange


def in_own_mounts(test: Callable[[], None]) -> None:
    """Run the rest of a test in a process with mounts of its own."""

    def life() -> None:
        own_mounts()
        try:
            test()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    process = fork.Process(target=life)
    process.start()
    assert ended(process) == 0


@pytest.mark.parametrize("tracked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_full_disk_costs_checkpoints_and_tracking_but_no_record(
    tracked: bool, root: Path, undisturbed: Callable[..., tuple[Any, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_stage("sgd", seeds=[0])
    expected, _ = undisturbed(run)

    def test() -> None:
        disk = root / "disk"
        disk.mkdir()
        mount("-t", "tmpfs", "-o", "size=8m", "none", str(disk))
        (disk / "mlflow.db").write_bytes((root / "mlflow.db").read_bytes())
        status = ended(in_child(disk, run, later(disk, lambda: fill(disk)), tracked=tracked))
        said = (disk / "printed").read_text()
        (disk / "filler").unlink()
        if status != 0:  # there was no room for the records either
            assert said.splitlines()[-1].endswith(
                "No space left on device; the same command goes on from its checkpoint"
            )
            assert ended(in_child(disk, run, tracked=tracked)) == 0
            assert "goes on from step" in (disk / "printed").read_text()
        assert without_clocks(disk, run) == expected
        assert said.count("no checkpoint could be written: No space left on device; training goes on") == 1, said
        if tracked:
            monkeypatch.setenv("DVC_ROOT", str(disk))
            tracking.rebuild(disk / "results")
            check_store(disk, run, monkeypatch)

    in_own_mounts(test)


def test_results_that_cannot_be_written_any_more_are_kept_and_brought_in(
    root: Path, undisturbed: Callable[..., tuple[Any, float]]
) -> None:
    run = a_stage("sgd")
    expected, _ = undisturbed(run)

    def test() -> None:
        results = root / "results"
        results.mkdir()
        mount("--bind", str(results), str(results))
        read_only = later(root, lambda: mount("-o", "remount,bind,ro", str(results)))
        assert ended(in_child(root, run, read_only, tracked=False)) == 1
        line = printed(root).splitlines()[-1]
        assert "2 of 2 seeds failed" in line and "Read-only file system" in line and "brings them in" in line
        mount("-o", "remount,bind,rw", str(results))
        assert ended(in_child(root, run, tracked=False)) == 0
        assert printed(root).count("was over before the stage was stopped") == 2
        assert without_clocks(root, run) == expected

    in_own_mounts(test)


def locked_by_another(database: Path) -> None:
    """Until this process ends, another holds the database."""
    code = (
        "import sqlite3, sys; held = sqlite3.connect(sys.argv[1], timeout=60); held.execute('BEGIN EXCLUSIVE');"
        " print(flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(database)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    _HOLDERS.append(holder)


_HOLDERS: list[subprocess.Popen[bytes]] = []
STORE_FAULTS: dict[str, Callable[[Path], None]] = {
    "gone": lambda database: database.unlink(),
    "corrupt": lambda database: database.write_bytes(b"broken" * 10_000) and None,
    "locked": locked_by_another,
}


@pytest.mark.parametrize("fault", ["gone", *(pytest.param(f, marks=pytest.mark.slow) for f in ("corrupt", "locked"))])
def test_a_store_that_fails_in_mid_run_is_one_warning_and_is_made_again_from_the_records(
    fault: str,
    root: Path,
    new_store: Path,
    undisturbed: Callable[..., tuple[Any, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = a_stage("sgd", seeds=[0])
    expected, _ = undisturbed(run)
    assert ended(in_child(root, run, later(root, lambda: STORE_FAULTS[fault](root / "mlflow.db")))) == 0
    assert without_clocks(root, run) == expected
    [line] = [line for line in printed(root).splitlines() if line.startswith("warning: ")]
    assert "was lost" in line and "python -m pipeline.tracking rebuild" in line
    if fault != "locked":
        (root / "mlflow.db").write_bytes(new_store.read_bytes())
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert tracking.rebuild(root / "results") == (1, 0)
    check_store(root, run, monkeypatch)
