"""Trains the trials of a tuning through DVC's queue: `dvc exp run --queue -S …`, then `dvc queue start -j N`.

The one idea: experiments are only the road. Each trial is one, by a name that says what it is; its records are taken
into trials/ as soon as it is over, and then the experiment is removed, so that `dvc exp show` stays readable. What
counts is whether the records are there: what has none when no worker is left is queued again.

Points are queued in this process, by the function behind the command: a third of a second each instead of three.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checks import ConfigError
from pipeline.composition import ROOT
from pipeline.lost_points import lost
from pipeline.recover import Recovery
from pipeline.trials import Trial

if TYPE_CHECKING:
    from dvc.repo import Repo

SECONDS = 10.5  # that a trial takes besides its training: starting processes, copies of commit and data
TIMES = 3  # that a trial is queued at most
LOT = 50  # trials that are queued before the next ones wait: every entry makes queueing another a little slower
LOOK_EVERY = 1.0  # seconds
GRACE = 30.0  # seconds without a worker after which what was queued is taken to be left


def train(
    trials: Sequence[Trial], workers: int, over: Callable[[Trial], None], ours: Collection[str] = ()
) -> Counter[str]:
    """Train these, and tell `over` of each that has records; how often each was queued, by name.

    Experiments whose names are `ours` are left of an earlier tuning, and removed. A trial that fails again and again is
    left without records. Raises ConfigError when DVC refuses.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.ERROR)
    try:
        with Repo(str(ROOT)) as repo:
            queue = Queue(repo, trials, over, {*ours, *(trial.name for trial in trials)})
            # One round may find a queue that others filled, the last finds nothing to do.
            for _ in range(TIMES * math.ceil(len(trials) / LOT) + 2):
                if not queue.round(workers):
                    break
            return queue.queued
    except DvcException as error:
        raise ConfigError(" ".join(str(error).split())) from None


class Queue:
    """The trials on their way; `queued` counts how often each was put there."""

    def __init__(
        self, repo: Repo, trials: Sequence[Trial], over: Callable[[Trial], None], ours: Collection[str]
    ) -> None:
        self.repo, self.over = repo, over
        self.queued: Counter[str] = Counter()
        self.missing = {trial.name: trial for trial in trials}
        self._ours = ours
        self._celery = repo.experiments.celery_queue

    def round(self, workers: int) -> bool:
        """Queue some of what is missing and wait for it; False when there was nothing to wait for."""
        self._collect()
        self._clear()
        self._recover()
        under_way = {entry.name for entry in [*self._celery.iter_queued(), *self._celery.iter_active()]}
        under_way &= self.missing.keys()
        again = [trial for name, trial in self.missing.items() if self.queued[name] < TIMES and name not in under_way]
        again = sorted(again, key=lambda trial: self.queued[trial.name])[: max(0, LOT - len(under_way))]
        if not again and not under_way:
            return False
        self.queued.update(name for name in under_way if not self.queued[name])  # by others
        failed = list(self._failed() & {trial.name for trial in again})
        if failed:  # else they would seem to have failed again
            self._patiently(lambda: self._celery.remove(failed))
        for trial in again:
            self._put(trial)
        start = [sys.executable, "-m", "dvc", "queue", "start", "-j", str(workers)]
        nothing = subprocess.DEVNULL  # to a pipe, the command would hold on until the workers end
        # Workers call dvc and python by name: this interpreter's, also where its environment is not activated.
        environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        if subprocess.run(
            start, cwd=ROOT, env=environment, stdin=nothing, stdout=nothing, stderr=nothing, check=False
        ).returncode:
            raise ConfigError(f"`dvc queue start -j {workers}` failed; it says why, the trials stay queued")
        self._wait()
        return True

    def _put(self, trial: Trial) -> None:
        stage = f"train@{trial.benchmark}-{trial.optimizer}"
        self._patiently(
            lambda: self.repo.experiments.run(
                targets=[stage], queue=True, name=trial.name, params=list(trial.overrides)
            )
        )
        self.queued[trial.name] += 1

    def _wait(self) -> None:
        """Until nothing that was asked is under way, collecting what is over."""
        seen = time.monotonic()
        while True:
            self._collect()
            if not {name for name in self.missing if self.queued[name]} - self._failed():
                return
            if Recovery(ROOT).dvc_processes()[0]:
                seen = time.monotonic()
            elif time.monotonic() - seen > GRACE:
                return
            time.sleep(LOOK_EVERY)

    def _collect(self) -> None:
        """Take the records of experiments that are over."""
        from dvc.fs.dvc import DVCFileSystem

        for name, revision in self._experiments().items():
            trial = self.missing.get(name)
            if trial is None:
                continue
            with tempfile.TemporaryDirectory() as folder, contextlib.suppress(FileNotFoundError, ConfigError):
                pair = f"results/{trial.benchmark}/{trial.optimizer}"
                files = DVCFileSystem(repo=str(ROOT), rev=revision)
                files.get(pair, str(Path(folder) / trial.benchmark / trial.optimizer), recursive=True)
                trial.keep(Path(folder))
                del self.missing[name]
                self.over(trial)

    def _failed(self) -> set[str]:
        return {done.entry.name for done in self._celery.iter_failed()}

    def _experiments(self) -> dict[str, str]:
        """Commits of those experiments that are trials of this tuning, by name."""
        from dvc.repo.experiments.utils import exp_refs

        found = {info.name: self.repo.scm.get_ref(str(info)) for info in exp_refs(self.repo.scm)}
        return {name: revision for name, revision in found.items() if name in self._ours and revision}

    def _clear(self) -> None:
        """Remove the experiments of trials: what they were for is in trials/."""
        if names := list(self._experiments()):
            self._patiently(lambda: self.repo.experiments.remove(exp_names=names))

    def _recover(self) -> None:
        """After the death of workers, see to what they had taken; not while another dvc has a point of its own here."""
        if any(Recovery(ROOT).dvc_processes()):
            return
        if names := [entry.name for entry in lost(self._celery)]:
            recovery = Recovery(ROOT)
            try:
                recovery.run()
            finally:
                print("\n".join(recovery.done + recovery.left), flush=True)
            self.queued.update(name for name in names if name in self.missing)

    def _patiently(self, call: Callable[[], Any]) -> None:
        """Workers lock the repository for moments."""
        from dvc.lock import LockError

        deadline = time.monotonic() + GRACE
        while True:
            try:
                call()
                return
            except LockError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK_EVERY)
