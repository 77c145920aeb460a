"""After `dvc` was killed: put the repository in order and say what was done (`make recover`).

The one idea: only what DVC left behind is touched, and what cannot be told from the user's own work is named and left.
A killed `dvc exp run` leaves HEAD detached, files staged and params.yaml composed for the experiment; killed queue
workers leave points that are in no queue and in no list of experiments. Both are queued again, as the very commits
that DVC had stashed for them; `dvc queue start` then runs them, and training goes on from its checkpoints. A tuning, or
`dvc exp run --queue`, that was killed while it queued leaves the same HEAD and files, and the user's changes in Git's
stash: they come back, and what was not queued yet is not.

Where all is well, it says so and changes nothing. Exit status: 1 when something is left for the user to decide.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from pipeline import checkpoint
from pipeline.checks import ConfigError, describe
from pipeline.lost_points import STASHED, entry_of, has_experiment, lost, queue_again

if TYPE_CHECKING:
    from dvc.repo.experiments.queue.celery import LocalCeleryQueue

UNFINISHED = "refs/exps/exec/EXEC_MERGE"  # what a `dvc exp run` in the workspace is about to run; gone when it is over
ASSEMBLING = ".dvc/tmp/exps/rwlock"  # names who puts an experiment together in the workspace, before it runs or waits
WRITTEN_BY_DVC = ("dvc.lock", "report/metrics.json")
PACKED_ARGUMENTS = ".dvc/tmp/repro.dat"
END_WITHIN = 60.0  # seconds that a trainer has to write its checkpoint


def main() -> None:
    from dvc.exceptions import DvcException

    try:
        recovery = Recovery(Path.cwd())
    except ConfigError as error:
        sys.exit(f"error: {error}")
    left = recovery.left
    try:
        recovery.run()
        recovery.done = recovery.done or ["all is well: nothing was changed"]
    except OSError as error:
        left.append(f"error: {describe(error)}")
    except (ConfigError, DvcException) as error:
        left.append(f"error: {' '.join(str(error).split())}")
    finally:
        print("".join(f"{line}\n" for line in recovery.done), end="", flush=True)
    if left:
        sys.exit("\n".join(left))


class Recovery:
    """`done` and `left` are lines for the user: what was put in order, and what is for them to decide."""

    def __init__(self, root: Path) -> None:
        if not (root / ".dvc").is_dir() or not (root / ".git").exists():
            raise ConfigError(f"{root}: is not the root of this repository; run it there")
        self.root = root
        self.done: list[str] = []
        self.left: list[str] = []

    def run(self) -> None:
        from dvc.repo import Repo

        workers, others = self.dvc_processes()
        if others:
            what = "; ".join(f"process {process.pid}: {' '.join(_words(process)[-3:])}" for process in others)
            raise ConfigError(f"dvc is running here ({what}); wait for it or end it; nothing was changed")
        if (holder := self._assembler()) is not None and self._lives(holder):
            raise ConfigError(f"process {holder} is queueing experiments here; wait for it; nothing was changed")
        self._end_orphans(bool(workers))
        self._remove_stale_locks()
        with Repo(str(self.root)) as repo:
            queue = repo.experiments.celery_queue
            self._workspace(queue)
            if workers:
                listed = ", ".join(str(process.pid) for process in workers)
                self.done.append(f"queue workers are running (process {listed}); the points of the queue are theirs")
            else:
                for entry in lost(queue):
                    queue_again(queue, entry)
                    self.done.append(f"experiment {entry.name}, lost when its dvc was killed, is queued again")
        if any("queued again" in line for line in self.done):
            self.done.append("`dvc queue start -j 1` runs what is queued; training goes on from its checkpoints")
        self._bury()
        self._name_checkpoints()

    def needed(self) -> bool:
        """Whether a dvc that was killed left branch, index and files as they were in the middle of its work."""
        if self.dvc_processes()[1]:
            return False
        return self._cut_off() or bool(self._git("rev-parse", "--verify", "--quiet", UNFINISHED))

    # ------------------------------------------------------------ processes and locks

    def dvc_processes(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """Queue workers of this repository, and other commands of DVC that run in it or in a temporary copy.

        The experiments of workers are not among them, nor is DVC's look for a newer version of itself.
        """
        workers, others = [], []
        for process, words in _processes():
            if not any(Path(word).name == "dvc" for word in words[:3]):
                continue
            if "queue-worker" in words and _folder(process).is_relative_to(self.root):
                workers.append(process)
            elif not {"exec-run", "daemon"} & set(words) and _folder(process).is_relative_to(self.root):
                others.append(process)
        return workers, others

    def _end_orphans(self, with_workers: bool) -> None:
        """End trainers whose dvc is gone, and experiments whose queue worker is gone."""
        for process, words in _processes():
            experiment = "exec-run" in words and any(word.startswith(f"{self.root}/.dvc/tmp/") for word in words)
            if experiment and not with_workers:
                with contextlib.suppress(psutil.Error):
                    process.kill()  # its trainer sees that, writes a checkpoint and ends
        for process, words in _processes():
            if "pipeline.train" in words and _environment(process).get("DVC_ROOT") == str(self.root):
                with contextlib.suppress(psutil.NoSuchProcess):  # it ends at this moment
                    self._end_orphan(process, " ".join(words[words.index("pipeline.train") + 1 :]))

    def _end_orphan(self, process: psutil.Process, pair: str) -> None:
        if any("dvc" in word for parent in process.parents() for word in _words(parent)[:3]):
            return
        try:
            process.terminate()
            process.wait(END_WITHIN)
            self.done.append(f"trainer of {pair} (process {process.pid}), whose dvc is gone, was ended")
        except (psutil.TimeoutExpired, psutil.AccessDenied):
            self.left.append(f"trainer of {pair} (process {process.pid}) does not end; `kill -9 {process.pid}`")

    def _remove_stale_locks(self) -> None:
        path = self.root / ".dvc" / "tmp" / "rwlock"
        if path.exists() and (holders := _holders(path)) is not None and not any(map(psutil.pid_exists, holders)):
            path.unlink()
            self.done.append(".dvc/tmp/rwlock: the locks of a dvc that is gone were removed")
        for name in ("index.lock", "HEAD.lock"):
            lock = self.root / ".git" / name
            if lock.exists():
                if any(Path(words[0]).name == "git" and _folder(p) == self.root for p, words in _processes() if words):
                    self.left.append(f".git/{name}: git is running here; wait for it")
                else:
                    lock.unlink()
                    self.done.append(f".git/{name}: the lock of a git that is gone was removed")

    def _assembler(self) -> int | None:
        """The process that DVC's lock says is putting an experiment together, dead or alive."""
        try:
            return int(json.loads((self.root / ASSEMBLING).read_text(encoding="utf-8"))["write"]["workspace"]["pid"])
        except (OSError, ValueError, KeyError):
            return None

    def _lives(self, process: int) -> bool:
        """Whether it is a process of this repository; elsewhere its number was given away again."""
        try:
            return _folder(psutil.Process(process)).is_relative_to(self.root)
        except psutil.Error:
            return False

    def _forget_assembler(self, queue: LocalCeleryQueue) -> None:
        from dvc.rwlock import RWLockFileCorruptedError, _edit_rwlock

        path = self.root / ASSEMBLING
        try:
            with _edit_rwlock(
                str(path.parent), queue.repo.fs, queue.repo.config["core"].get("hardlink_lock", False)
            ) as lock:
                lock["write"] = {name: info for name, info in lock["write"].items() if self._lives(info["pid"])}
        except RWLockFileCorruptedError:
            path.unlink()

    # ------------------------------------------------------------ the workspace

    def _workspace(self, queue: LocalCeleryQueue) -> None:
        """Undo what a killed `dvc exp run` did to branch, index, params.yaml and dvc.lock, and queue its experiment."""
        if self._cut_off():
            self._undo_assembly()
            self._forget_assembler(queue)
        stashed = self._git("rev-parse", "--verify", "--quiet", UNFINISHED)
        if not stashed:
            if self._detached():
                self.left.append("HEAD is detached, and not by a dvc that was killed; `git checkout BRANCH` returns")
            return
        start = self._git("rev-parse", "--verify", "--quiet", "refs/exps/exec/EXEC_HEAD") or "HEAD"
        if self._detached() and not self._return_to_branch(start):
            return
        self._git("reset", "--quiet")
        (self.root / PACKED_ARGUMENTS).unlink(missing_ok=True)
        self._restore_parameters(stashed)
        for name in WRITTEN_BY_DVC:
            self._restore(name, stashed)
        entry = entry_of(queue, stashed)
        if has_experiment(queue, entry):
            self.done.append(f"experiment {entry.name} was over when its dvc was killed; it is in `dvc exp show`")
        else:
            queue_again(queue, entry)
            self.done.append(f"experiment {entry.name}, whose `dvc exp run` was killed, is queued again")
        for name in ("EXEC_BASELINE", "EXEC_BRANCH", "EXEC_MERGE"):
            self._git("update-ref", "-d", f"refs/exps/exec/{name}")
        shutil.rmtree(Path(queue.pid_dir) / "workspace", ignore_errors=True)
        self.done.append("`dvc repro` or `dvc checkout` brings results/ of the study back")

    def _cut_off(self) -> bool:
        """Whether a dvc was killed while it put an experiment together."""
        holder = self._assembler()
        return not self._lives(holder) if holder is not None else bool(self._git("ls-files", "--", PACKED_ARGUMENTS))

    def _undo_assembly(self) -> None:
        """Undo what dvc did to branch, index and files until it was killed while it put an experiment together.

        Before that it stashes the user's changes, so whatever else is changed was changed afterwards.
        """
        if STASHED.search(self._git("log", "-1", "--format=%s", "refs/stash", "--")):
            self._git("stash", "drop", "--quiet")  # the experiment itself, on its way to DVC's own stash
        mine, moved = self._stashed_by_dvc(), self._detached() and self._by_dvc(self._moved())
        if not (mine or moved or self._git("ls-files", "--", PACKED_ARGUMENTS)):
            return  # it had not begun, or was through
        if moved and not self._return_to_branch("HEAD"):
            return
        changed = self._git("diff", "--name-only", "HEAD").splitlines()
        dvcs = {name for name in ("params.yaml", *WRITTEN_BY_DVC) if not self._edited_after_staging(name)}
        later = [
            name
            for name in changed
            if name not in {*dvcs, PACKED_ARGUMENTS}
            and (self.root / name).exists()  # else it was being written
            and not (mine and not self._git("diff", "--name-only", mine, "--", name))
        ]
        if later:
            self._git("reset", "--quiet")
            for name in dvcs.intersection(changed):
                self._git("checkout", "HEAD", "--", name)
        else:
            self._git("reset", "--hard", "--quiet")
        (self.root / PACKED_ARGUMENTS).unlink(missing_ok=True)
        if "params.yaml" in dvcs.intersection(changed):
            self.done.append("params.yaml: as committed, without the experiment's choices")
        elif "params.yaml" in later:
            self.left.append("params.yaml: was changed after dvc had composed it, and is left; `git diff params.yaml`")
        if not mine:
            return
        back = ", ".join(self._git("diff", "--name-only", f"{mine}^1", mine).splitlines())
        if later:
            self.left.append(
                f"{', '.join(later)}: changed since dvc was killed; `git stash show -p` has earlier changes"
            )
        elif self._git("rev-parse", f"{mine}^1") != self._git("rev-parse", "HEAD"):
            self.left.append(f"{back}: your changes are in Git's stash; `git stash pop` brings them to this commit")
        else:
            self._git("stash", "pop", "--index", "--quiet")
            self.done.append(f"{back}: your changes are back from Git's stash, where dvc had put them")

    def _edited_after_staging(self, name: str) -> bool:
        return re.match(r"\w\w ", self._git("status", "--porcelain", "--", name)) is not None

    def _stashed_by_dvc(self) -> str:
        """The last entry of Git's stash, if dvc made it: after it had taken its lock, and before it detached HEAD."""
        made, moved, since = self._git("log", "-1", "--format=%ct", "refs/stash", "--"), self._moved(), self._since()
        if not made or since is None or int(made) < since:
            return ""
        if self._detached() and moved is not None and since <= moved[0] < int(made):
            return ""
        return self._git("rev-parse", "refs/stash")

    def _since(self) -> int | None:
        """When dvc took the lock to put an experiment together; None if the lock is lost."""
        return int((self.root / ASSEMBLING).stat().st_mtime) if self._assembler() is not None else None

    def _by_dvc(self, moved: tuple[int, str] | None) -> bool:
        """Whether it was dvc that moved HEAD away from a branch."""
        since = self._since()
        return moved is not None and (since is None or moved[0] >= since) and not re.fullmatch("[0-9a-f]{40}", moved[1])

    def _moved(self) -> tuple[int, str] | None:
        """When HEAD was last moved, and from where."""
        log = self._git("reflog", "--date=unix", "--format=%gd %gs", "HEAD")
        found = re.search(r"^HEAD@\{(\d+)\} checkout: moving from (\S+) to", log, re.MULTILINE)
        return (int(found.group(1)), found.group(2)) if found else None

    def _detached(self) -> bool:
        return not self._git("symbolic-ref", "--quiet", "HEAD")

    def _return_to_branch(self, start: str) -> bool:
        """To the branch that HEAD was on: the only one at this commit, or that which the reflog names."""
        here = self._git("for-each-ref", "--format=%(refname:short)", f"--points-at={start}", "refs/heads").split()
        if len(here) > 1:
            moved = self._moved()
            here = [name for name in here if moved is not None and name == moved[1]]
        if len(here) != 1:
            self.left.append(
                "HEAD is detached, from which branch is unknown; `git checkout BRANCH`, then recover again"
            )
            return False
        self._git("symbolic-ref", "-m", "recover", "HEAD", f"refs/heads/{here[0]}")
        self.done.append(f"HEAD, which dvc had detached, is on branch {here[0]} again")
        return True

    def _restore_parameters(self, stashed: str) -> None:
        """params.yaml as composed for the experiment becomes the committed one again, or that of a changed conf/."""
        name = "params.yaml"
        if not self._git("diff", "--name-only", "HEAD", "--", name):
            return
        if self._git("diff", "--name-only", stashed, "--", name):
            self.left.append(f"{name}: was changed after dvc had composed it, and is left; `git diff {name}`")
            return
        if self._git("diff", "--name-only", "HEAD", "--", "pipeline/conf"):
            words = [sys.executable, "-m", "pipeline.composition"]
            composed = subprocess.run(words, cwd=self.root, capture_output=True, text=True, check=False)
            if composed.returncode:
                why = composed.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
                self.left.append(
                    f"{name}: has the experiment's choices, for pipeline/conf cannot be composed: {why}; mend it, then"
                    " `python -m pipeline.composition`"
                )
                return
            self.done.append(f"{name}: composed again from pipeline/conf, without the experiment's choices")
        else:
            self._git("checkout", "HEAD", "--", name)
            self.done.append(f"{name}: as committed, without the experiment's choices")

    def _restore(self, name: str, stashed: str) -> None:
        """A file that only DVC writes, as it was when the experiment started."""
        if self._git("cat-file", "-t", f"{stashed}:{name}") and self._git("diff", "--name-only", stashed, "--", name):
            self._git("restore", f"--source={stashed}", "--worktree", "--", name)
            self.done.append(f"{name}: as it was before the experiment")

    def _git(self, *words: str) -> str:
        """What git prints; nothing when it fails."""
        return subprocess.run(
            ["git", *words], cwd=self.root, capture_output=True, text=True, check=False
        ).stdout.strip()

    # ------------------------------------------------------------ tracking and checkpoints

    def _bury(self) -> None:
        from pipeline.store import place

        database = place().database
        if database is None or not database.exists():
            return
        from pipeline.mlflow_store import Store

        store = Store()
        buried = sum(store.bury(experiment.experiment_id) for experiment in store.client.search_experiments())
        if buried:
            self.done.append(f"MLflow: {buried} runs whose process is gone are marked as killed")

    def _name_checkpoints(self) -> None:
        """Say what waits to go on; it is no disorder, so only where something was done."""
        kept = sorted(checkpoint.root().glob("*/*/*/seed-*/step-*.pt"))
        if self.done and kept:
            pairs = sorted({f"{path.parts[-5]} {path.parts[-4]}" for path in kept})
            size = sum(path.stat().st_size for path in kept) / 2**20
            self.done.append(f"checkpoints of {', '.join(pairs)} are kept ({size:.1f} MiB in {checkpoint.root()})")


# ---------------------------------------------------------------- processes


def _processes() -> Iterator[tuple[psutil.Process, list[str]]]:
    for process in psutil.process_iter():
        yield process, _words(process)


def _words(process: psutil.Process) -> list[str]:
    """Its command line; nothing when it is gone or not ours to ask."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _folder(process: psutil.Process) -> Path:
    try:
        return Path(process.cwd())
    except psutil.Error:
        return Path("/")


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _holders(path: Path) -> list[int] | None:
    """The processes that DVC's lock file names: none in a file that was cut off, None where nothing is locked."""
    try:
        lock: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return []
    readers = [info for infos in lock.get("read", {}).values() for info in infos]
    infos = [*readers, *lock.get("write", {}).values()]
    return [int(info["pid"]) for info in infos] or None


if __name__ == "__main__":
    main()
