"""The one place that knows which database stands behind a label store, SQLite or PostgreSQL, and how each one fails."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc

from rlhf.types import ConfigError, DataError, StoreError, UserError

BUSY_SECONDS = 15.0
"""How long a writer waits for another one, and a request for a connection, before it gives up."""

POOLS = {"sqlite": {"pool_size": 20, "max_overflow": 80}, "postgresql": {"pool_size": 10, "max_overflow": 20}}
"""Connections of one process. Writers take turns before they ask for one, so that 50 annotators need but a few; a
PostgreSQL server admits 100 in all unless told otherwise."""


def connect(name: str, *, create: bool) -> sa.Engine:
    """An engine for an SQLite file or an SQLAlchemy URL. Raises ConfigError or DataError where there can be none."""
    path = sqlite_path(name)
    if path is None:
        url = _server(name)
    else:
        _check_place(path, name, create=create)
        url = sa.URL.create("sqlite", database=str(path))
    pool: dict[str, Any] = POOLS.get(url.get_backend_name(), {})
    try:
        engine = sa.create_engine(url, pool_timeout=BUSY_SECONDS, pool_pre_ping=path is None, **pool)
    except (exc.ArgumentError, ModuleNotFoundError) as error:
        advice = ": install it with `pip install 'rlhf[postgres]'`" if "psycopg" in str(error) else ""
        raise ConfigError(f"store is {shown(name)!r}, which cannot be used: {error}{advice}") from error
    (_prepare_server if path is None else _prepare_sqlite)(engine)
    return engine


def sqlite_path(name: str) -> Path | None:
    """The file behind a store's name; None where a server stands behind it. Raises ConfigError for what is neither."""
    if "://" not in name:
        return Path(name)
    url = _url(name)
    if url.get_backend_name() != "sqlite":
        return None
    if url.database in (None, "", ":memory:"):
        raise ConfigError(f"store is {name!r}, which would be lost when the program ends: name a file")
    return Path(str(url.database))


def shown(name: str) -> str:
    """A store's name as it may be printed: without a password."""
    return _url(name).render_as_string(hide_password=True) if "://" in name else name


def _url(name: str) -> sa.URL:
    try:
        return sa.make_url(name)
    except (exc.ArgumentError, ValueError) as error:
        raise ConfigError("store looks like a URL and is none: write dialect://user:password@host/database") from error


def _server(name: str) -> sa.URL:
    url = _url(name)
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    return url


def _check_place(path: Path, name: str, *, create: bool) -> None:
    if not create and not path.is_file():
        raise DataError(f"there is no label store at {name}: `rlhf sample` makes one")
    if path.is_dir():
        raise DataError(f"{name} is a folder: name the label store's file, such as {path / 'labels.db'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path.parent} cannot be made ({error.strerror}): choose another --store") from error


def _prepare_sqlite(engine: sa.Engine) -> None:
    """Durable commits, readers beside one writer, and transactions that begin when we say so."""

    @event.listens_for(engine, "connect")
    def configure(connection, _record) -> None:
        connection.isolation_level = None  # the driver would begin transactions of its own, and late
        connection.execute(f"PRAGMA busy_timeout={round(1000 * BUSY_SECONDS)}")
        _log_ahead(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):  # zeros over what was erased
            connection.execute(f"PRAGMA {pragma}")
        check_durable(connection, str(engine.url.database))

    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A writer that begins as a reader fails, rather than waits, when another writer is quicker.
        writes = connection.get_execution_options().get("writes", True)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _log_ahead(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log. Of a new file only one connection can, and SQLite lets none of the others wait."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def check_durable(connection: Any, name: str) -> None:
    """Raise DataError unless a commit on this SQLite connection is on disk when it returns, readers or not."""
    found = {each: connection.execute(f"PRAGMA {each}").fetchone()[0] for each in ("journal_mode", "synchronous")}
    if found["journal_mode"] != "wal":
        raise DataError(
            f"the label store {name} lies on a file system without a write-ahead log for SQLite (journal_mode is "
            f"{found['journal_mode']!r}), such as a network folder: choose another --store, or PostgreSQL"
        )
    if found["synchronous"] != 2:
        raise DataError(
            f"the label store {name} does not wait for the disk (synchronous is {found['synchronous']}, not 2, FULL): "
            f"nothing would be safe; use an SQLite that was built without that change"
        )


def _prepare_server(engine: sa.Engine) -> None:
    """On PostgreSQL: commits that wait for the disk, and no wait without end."""
    if engine.dialect.name != "postgresql":
        return

    @event.listens_for(engine, "connect")
    def configure(connection, _record) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit = on")
            cursor.execute(f"SET lock_timeout = {round(1000 * BUSY_SECONDS)}")
        connection.commit()


@contextmanager
def begin(engine: sa.Engine, *, write: bool) -> Iterator[sa.Connection]:
    """One transaction; one that only reads sees the store as it was when it began."""
    options: dict[str, Any] = {"writes": write}
    if not write and engine.dialect.name == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    with engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


SIGNS: dict[str, tuple[str, ...]] = {
    "nothing was saved; make room on that disk and repeat the command": (
        "disk is full",
        "disk I/O error",
        "No space left",
    ),
    "nothing was saved; another process holds it, wait until that is done and repeat the command": (
        "database is locked",
        "lock timeout",
        "QueuePool limit",
        "deadlock detected",
    ),
    "make it writable for your user, or choose another --store": ("readonly database", "permission denied"),
}
"""What a database says of troubles that are not ours, by what to do about them."""


@contextmanager
def refusing(name: str, verb: str) -> Iterator[None]:
    """Make DataErrors that say what to do of a database's own troubles; what is our mistake keeps its traceback."""
    try:
        yield
    except (exc.IntegrityError, exc.ProgrammingError):
        raise
    except (exc.DBAPIError, exc.TimeoutError) as error:
        raise _told(error, name, verb) from error


def _told(error: exc.DBAPIError | exc.TimeoutError, name: str, verb: str) -> UserError:
    said = " ".join(str(getattr(error, "orig", None) or error).split())
    advice = next((each for each, signs in SIGNS.items() if any(sign in said for sign in signs)), None)
    if advice is None and getattr(error, "connection_invalidated", False):
        advice = "the connection was lost; what was not acknowledged may not be saved: look at the server and repeat it"
    if advice is None:
        advice = "look at the server and at --store" if "://" in name else "choose another --store"
    return StoreError(f"the label store {shown(name)} cannot be {verb} ({said}): {advice}")
