"""Copies of a label store while people go on working in it, and the way back.

A backup is an SQLite file, whatever database stands behind the store: it opens as a label store itself, and can be
restored into either database.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from rlhf.database import refusing, shown, sqlite_path
from rlhf.migrations import beside, renumber, version
from rlhf.schema import SCHEMA_VERSION, tables
from rlhf.store import Store
from rlhf.types import DataError
from rlhf.verification import Verdict, verify

ROWS_AT_ONCE = 500


def backup(store: Store, path: str | Path) -> Verdict:
    """Write the store as it is at this moment into a new file, checked and on disk; writers are not held up.

    Raises DataError where there is a file already, where the disk is full, and where the copy does not verify: the
    file is then not made.
    """
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists already: name a new file, such as {beside(path, _today())}")
    with _new_file(path) as temporary:
        source = sqlite_path(store.name)
        if source is None:
            _copy_server(store, temporary)
        else:
            _copy_file(source, temporary)
        verdict = check(temporary, name=str(path))
    return verdict


def restore(path: str | Path, store: str, *, force: bool = False) -> tuple[Verdict, str | None]:
    """Make `store` what a backup holds. Returns the verdict on it, and where the old store is kept, if there was one.

    Raises DataError where the backup does not verify, before anything is touched; where there is a store already,
    unless `force` moves it aside; and while another process has that one open.
    """
    path = Path(path)
    check(path, name=str(path))
    target = sqlite_path(store)
    kept = _restore_server(path, store, force=force) if target is None else _restore_file(path, target, force=force)
    with closing(Store(store)) as restored, restored.read() as connection:
        return _sound(verify(connection), f"the restored {shown(store)}"), kept


def check(path: Path, *, name: str) -> Verdict:
    """Verify a backup without changing it. Raises DataError where it is none, or its log does not hold."""
    if not path.is_file():
        raise DataError(f"there is no backup at {name}")
    with refusing(name, "read"), _reading(path) as connection:
        known = version(connection)
        if known != SCHEMA_VERSION:
            what = "no label store" if known is None else f"a label store of schema {known}, not {SCHEMA_VERSION}"
            raise DataError(f"{name} is {what}: it cannot be restored by this version of rlhf")
        return _sound(verify(connection), name)


def _sound(verdict: Verdict, name: str) -> Verdict:
    if not verdict.holds:
        first, *others = verdict.faults
        more = f" (and {len(others)} more)" if others else ""
        raise DataError(f"{name} does not verify: {first}{more}; use another backup")
    return verdict


@contextmanager
def _reading(path: Path) -> Iterator[sa.Connection]:
    """A connection that cannot write, so that not even a journal appears beside the file."""
    alone = "" if Path(f"{path}-wal").exists() else "&immutable=1"
    address = f"{path.resolve().as_uri()}?mode=ro{alone}"
    engine = sa.create_engine(
        "sqlite://", creator=lambda: sqlite3.connect(address, uri=True), poolclass=sa.pool.NullPool
    )
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name once it is complete and on disk."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): choose another place") from error
    os.close(handle)
    temporary = Path(name)
    try:
        with _full_disk(path):
            yield temporary
            _to_disk(temporary)
            os.replace(temporary, path)
            _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise DataError(f"{path} cannot be written ({error}): nothing is left there; make room and repeat") from error


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy_file(source: Path, target: Path) -> None:
    """Page by page, in one go: a copy in several steps would begin anew at each write of another connection."""
    with closing(sqlite3.connect(source)) as origin, closing(sqlite3.connect(target)) as copy:
        origin.execute("PRAGMA busy_timeout=15000")
        origin.backup(copy, pages=-1)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, with nothing beside it


def _copy_server(store: Store, target: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{target}", poolclass=sa.pool.NullPool)
    with store.read() as source, engine.begin() as copy:
        tables.create_all(copy)
        _copy_rows(source, copy)
    engine.dispose()


def _copy_rows(source: sa.Connection, target: sa.Connection) -> None:
    for table in tables.sorted_tables:
        for rows in source.execute(sa.select(table)).mappings().partitions(ROWS_AT_ONCE):
            target.execute(sa.insert(table), [dict(row) for row in rows])


def _restore_file(path: Path, target: Path, *, force: bool) -> str | None:
    if target.exists() and not force:
        raise DataError(f"there is a label store at {target}: --force moves it aside first, or name another --store")
    with _new_file(target) as temporary:
        _copy_file(path, temporary)
        _to_disk(temporary)  # what may fail comes before the old store loses its name
        kept = _move_aside(target) if target.exists() else None
    return kept


def _move_aside(target: Path) -> str:
    """Give the old store another name. Raises DataError while a process has it open, which would write on in it."""
    with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(target, timeout=0)) as connection:
        # leaving the write-ahead log takes being alone with the file, and leaves one file
        try:
            connection.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.OperationalError as error:
            raise DataError(f"{target} is open in another process ({error}): end `rlhf label` first") from error
    kept = beside(target, f"replaced-{_today()}")
    os.rename(target, kept)
    for ending in ("-wal", "-shm"):  # of a file that could not be opened; the new one must not find them
        with suppress(FileNotFoundError):
            os.rename(f"{target}{ending}", f"{kept}{ending}")
    return str(kept)


def _restore_server(path: Path, store: str, *, force: bool) -> str | None:
    """The old tables go into a schema of their own: all in one transaction."""
    with closing(Store(store)) as target:
        with _reading(path) as source, target.write() as connection:  # others wait until it is done
            kept = None
            if any(connection.execute(sa.select(sa.literal(1)).select_from(each).limit(1)).first() for each in CONTENT):
                if not force:
                    raise DataError(f"{shown(store)} is not empty: --force moves what is there aside first")
                kept = f"replaced_{datetime.now(UTC):%Y%m%d_%H%M%S}"
                connection.exec_driver_sql(f"CREATE SCHEMA {kept}")
                for table in tables.sorted_tables:
                    connection.exec_driver_sql(f'ALTER TABLE "{table.name}" SET SCHEMA {kept}')
            else:
                tables.drop_all(connection)
            tables.create_all(connection)
            _copy_rows(source, connection)
            renumber(connection)
        return kept and f"schema {kept} of {shown(store)}"


CONTENT = (tables.tables["events"], tables.tables["items"], tables.tables["users"])
"""A store with nothing in these is as good as new."""


def _today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"
