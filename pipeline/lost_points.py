"""Points of an experiment that were begun and never ended, by DVC's own objects: found, and queued again.

DVC keeps the commit that it stashed for a point, and notes what became of it; `recover.py` asks here.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checks import ConfigError

if TYPE_CHECKING:
    from dvc.repo.experiments.executor.base import ExecutorInfo
    from dvc.repo.experiments.queue.base import BaseStashQueue, QueueEntry
    from dvc.repo.experiments.queue.celery import LocalCeleryQueue

STASHED = re.compile(r"dvc-exp:([0-9a-f]+):([0-9a-f]+):([^~^:\\?\[\]*]*)(?::(.+))?$")  # the message of such a commit


def lost(queue: LocalCeleryQueue) -> list[QueueEntry]:
    """Points that a worker or a `dvc exp run --temp` had begun when it was killed: not queued, not failed, and in no
    experiment.
    """
    begun = [path.name for path in Path(queue.pid_dir).glob("*") if re.fullmatch("[0-9a-f]{40}", path.name)]
    taken = [rev for rev in begun if _was_cut_off(queue, rev)] + [e.stash_rev for _, e in queue._iter_processed()]
    failed = queue.failed_stash.stash_revs if queue.failed_stash else {}
    waiting = {entry.stash_rev for entry in queue.iter_queued()}
    revs = [rev for rev in dict.fromkeys(taken) if rev not in failed and rev not in waiting]
    entries = [entry_of(queue, rev) for rev in revs if not _is_over(queue, rev)]
    return [entry for entry in entries if not has_experiment(queue, entry)]


def _was_cut_off(queue: LocalCeleryQueue, rev: str) -> bool:
    """Whether the notes of the dvc that began a point do not tell its end.

    DVC makes a note for the queue of every point. That of one in the workspace is never altered, and recover.py sees
    to it; the end of one in a temporary folder is in a note of its own.
    """
    from dvc.repo.experiments.executor.base import TaskStatus

    begun = latest = _note(queue, rev)
    if begun is not None and begun.location == "workspace":
        return False
    if begun is not None and begun.location == "tempdir":
        latest = _note(queue.repo.experiments.tempdir_queue, rev)
    return latest is None or latest.status < TaskStatus.FAILED


def _note(queue: BaseStashQueue, rev: str) -> ExecutorInfo | None:
    """What DVC noted of a point that it began; None when it did not come so far or was cut off while it wrote."""
    from dvc.exceptions import DvcException
    from dvc.repo.experiments.executor.base import ExecutorInfo

    try:
        return ExecutorInfo.load_json(queue.get_infofile_path(rev))
    except (OSError, TypeError, DvcException):
        return None


def entry_of(queue: LocalCeleryQueue, stashed: str) -> QueueEntry:
    """The entry of a stashed experiment, as its commit's message tells it."""
    from dvc.repo.experiments.queue.base import QueueEntry

    message = queue.scm.resolve_commit(stashed).message.strip()
    found = STASHED.search(message)
    if found is None:
        raise ConfigError(f"{stashed[:7]}: is no experiment that dvc stashed")
    head, baseline, name, branch = found.groups()
    return QueueEntry(queue.repo.root_dir, queue.scm.root_dir, queue.ref, stashed, baseline, branch or None, name, head)


def _is_over(queue: LocalCeleryQueue, rev: str) -> bool:
    """Whether the point was run to its end and collected, even if its experiment was removed afterwards."""
    from dvc.repo.experiments.executor.base import TaskStatus

    note = _note(queue, rev)
    if note is None or note.status != TaskStatus.FINISHED or note.result is None:
        return False
    return note.result.ref_info is not None and note.result.exp_hash is not None


def has_experiment(queue: LocalCeleryQueue, entry: QueueEntry) -> bool:
    from dvc.repo.experiments.refs import ExpRefInfo

    return queue.scm.get_ref(str(ExpRefInfo(entry.baseline_rev, entry.name))) is not None


def queue_again(queue: LocalCeleryQueue, entry: QueueEntry) -> None:
    """Put a stashed experiment into the queue, and remove what its first start left."""
    from celery.result import AsyncResult
    from dvc.repo.experiments.queue.tasks import run_exp
    from dvc.repo.experiments.refs import CELERY_STASH
    from dvc.repo.experiments.utils import get_exp_rwlock

    with get_exp_rwlock(queue.repo, writes=["workspace", CELERY_STASH]):
        for taken, other in queue._iter_processed():
            if other.stash_rev == entry.stash_rev:
                with contextlib.suppress(FileNotFoundError):  # it has no result
                    AsyncResult(taken.headers["id"]).forget()
                queue.celery.purge(taken.delivery_tag)
        note = _note(queue, entry.stash_rev)
        if note is not None and Path(note.root_dir).is_relative_to(queue.repo.tmp_dir or ""):
            shutil.rmtree(note.root_dir, ignore_errors=True)
        for notes in (queue.pid_dir, queue.repo.experiments.tempdir_queue.pid_dir):
            shutil.rmtree(Path(notes) / entry.stash_rev, ignore_errors=True)
        message = queue.stash.format_message(
            entry.head_rev, baseline_rev=entry.baseline_rev, name=entry.name, branch=entry.branch
        )
        queue.scm.set_ref(queue.ref, entry.stash_rev, message=f"commit: {message}")
    queue.celery.signature(run_exp.s(entry.asdict(), copy_paths=None, message=None)).delay()
