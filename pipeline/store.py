"""Where the MLflow store is and whether it can be used, found out without importing MLflow.

The default is one SQLite file in the main workspace, shared by temporary and queued experiments; MLFLOW_TRACKING_URI
wins. SQLite is asked directly: MLflow would try again for a minute and print a traceback each time.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checks import ConfigError

VARIABLE = "MLFLOW_TRACKING_URI"
ALLOWED = (
    "http(s)://host:port, a database such as sqlite:///mlflow.db or postgresql://user:password@host/name (with"
    " `pip install '.[postgres]'`), or unset (mlflow.db of this repository)"
)
SCHEMES = ("http", "https", "postgresql", "mysql", "mssql", "databricks")
BUSY_WITHIN = 5.0  # seconds that an SQLite file may be busy with something that is not ours
LOCK_WITHIN = 60.0  # seconds to wait for other processes that open or write the same local store


@dataclass(frozen=True)
class Place:
    """A store's address, and its file if it is an SQLite store. What is printed or kept is the place as a text."""

    address: str
    database: Path | None

    def __str__(self) -> str:
        return without_credentials(self.address)

    @property
    def is_server(self) -> bool:
        return self.address.startswith(("http://", "https://", "databricks"))

    def check(self) -> None:
        """Raises ConfigError when it cannot be a store, or is a file that cannot be used. Asks no server."""
        if self.database is not None:
            _check_database(self.database)
            return
        scheme, separator, _ = self.address.partition("://")
        if not (separator and scheme.partition("+")[0] in SCHEMES):
            raise ConfigError(f"{VARIABLE}: {str(self)!r} is no tracking store; allowed: {ALLOWED}")

    @property
    def folder(self) -> Path:
        """Where files of the store are that no server keeps."""
        return workspace() if self.database is None else self.database.parent

    def opening(self) -> AbstractContextManager[None]:
        """Have a store without a server for oneself: making its tables twice at once breaks it."""
        return contextlib.nullcontext() if self.is_server else self._lock()

    def turn(self) -> AbstractContextManager[None]:
        """Have an SQLite store for oneself: its own waiting starves writers."""
        return contextlib.nullcontext() if self.database is None else self._lock()

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(f"{self.database or self.folder / 'mlflow.db'}.lock", "a", encoding="utf-8") as lock:
            deadline = time.monotonic() + LOCK_WITHIN
            while not _locked(lock.fileno()):
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{lock.name}: held by another process for {LOCK_WITHIN:.0f} s; end it, or set {VARIABLE}"
                    )
                time.sleep(0.005)
            yield


def place() -> Place:
    """The store in use. A relative SQLite path is one below the main workspace, as the default is."""
    root = workspace()
    address = os.environ.get(VARIABLE) or "sqlite:///mlflow.db"
    if not address.startswith("sqlite:///"):
        return Place(_with_driver(address), None)
    path, mark, options = address.removeprefix("sqlite:///").partition("?")
    database = root / path
    return Place(f"sqlite:///{database}{mark}{options}", database)


def _with_driver(address: str) -> str:
    """SQLAlchemy takes psycopg for a PostgreSQL address that names no driver; the extra `postgres` brings psycopg2."""
    if importlib.util.find_spec("psycopg") is None:
        return re.sub(r"^postgresql://", "postgresql+psycopg2://", address)
    return address


def workspace() -> Path:
    """The main workspace, in temporary and queued experiments too."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Call in a thread that is given up after `seconds`: name look-ups and silent hosts obey no other limit."""
    outcome: dict[str, Any] = {}

    def call() -> None:
        try:
            outcome["value"] = function()
        except Exception as error:  # raised again in the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "value" not in outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return outcome["value"]


def without_credentials(text: str) -> str:
    """A text whose addresses have neither user and password nor, of databases and servers, options."""
    return re.sub(r"(\w+://)(?:[^\s/]*@)?([^\s/?]+[^\s?]*)(?:\?\S*)?", r"\1\2", text)


def reason(error: BaseException) -> str:
    """Why a store failed, in a few words; MLflow's own messages carry whole stacks and SQL statements."""
    text = without_credentials(" ".join(str(error).split())) or type(error).__name__
    known = re.search(
        r"Connection refused|Connection reset|Remote end closed connection|Name or service not known|No route to host"
        r"|[Rr]ead timed out|timed out|database is locked|attempt to write a readonly database|database or disk is full"
        r"|file is not a database|malformed|out-of-date database schema",
        text,
    )
    return known.group() if known else text[:100]


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_database(path: Path) -> None:
    new = not path.exists()
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_WITHIN)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except sqlite3.OperationalError as error:
        raise ConfigError(
            f"{path}: the MLflow store cannot be written: {error}; end the process that holds it, mend the permissions"
            f" of file and folder, or set {VARIABLE}"
        ) from None
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"{path}: is no MLflow store: {error}; move it away, then `python -m pipeline.tracking rebuild`"
        ) from None
    finally:
        if new and path.exists() and path.stat().st_size == 0:
            path.unlink()
