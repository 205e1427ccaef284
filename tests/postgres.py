"""A PostgreSQL server of the tests' own: a new cluster in a temporary folder, on loopback and a free port."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

DEBIAN = Path("/usr/lib/postgresql")
"""Where Debian keeps the programs, one folder a version, off the PATH."""

START_SECONDS = 60.0


@dataclass(frozen=True)
class Cluster:
    """A server that is running; `process` is the server itself."""

    process: subprocess.Popen[bytes]
    port: int
    password: str
    folder: Path
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://tests:{self.password}@127.0.0.1:{self.port}/{database}"

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a new, empty database, which is gone afterwards, whoever is still connected."""
        name = f"test_{next(self.numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            yield self.url(name)
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, statement: str) -> None:
        import psycopg

        address: dict[str, Any] = {"host": "127.0.0.1", "port": self.port, "dbname": "postgres"}
        with psycopg.connect(user="tests", password=self.password, autocommit=True, **address) as connection:
            connection.execute(statement.encode())


def programs() -> Path | None:
    """The folder of `initdb` and `postgres`: the newest of Debian's, or one on the PATH; None where there is none."""
    folders = sorted(DEBIAN.glob("*/bin"), key=lambda folder: int(folder.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    folders += [Path(on_path).parent] if on_path else []
    return next((each for each in folders if (each / "initdb").exists() and (each / "postgres").exists()), None)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Make and start a server; stop it by its process id and remove its folder at the end.

    Where there is no PostgreSQL the tests that need one are skipped, but fail where CI is set.
    """
    found = programs()
    if found is None:
        missing = "there is no PostgreSQL server here: apt-get install postgresql"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    folder, password, port = Path(tempfile.mkdtemp(prefix="rlhf-postgres-")), secrets.token_hex(16), _free_port()
    try:
        _make(found, folder, password)
        server = _start(found, folder, port)
        try:
            ready = Cluster(server, port, password, folder)
            _wait(ready)
            yield ready
        finally:
            server.send_signal(signal.SIGINT)  # ends sessions and leaves
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()
            server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def crashed(running: Cluster) -> Iterator[Callable[[], None]]:
    """Stop a server as a crash would (`pg_ctl stop -m immediate`); the call that is given starts it on the same files.

    It stays up until the end of the block.
    """
    started: list[subprocess.Popen[bytes]] = []
    running.process.send_signal(signal.SIGQUIT)
    running.process.wait(30)

    def again() -> None:
        found = programs()
        assert found is not None
        (running.folder / "data" / "postmaster.pid").unlink(missing_ok=True)
        started.append(_start(found, running.folder, running.port))
        _wait(replace(running, process=started[-1]))

    try:
        yield again
    finally:
        for server in started:
            server.send_signal(signal.SIGINT)
            server.wait(30)


def _unprivileged() -> dict[str, Any]:
    """As whom the server runs: it refuses to be root."""
    if os.geteuid() != 0:
        return {}
    name = next((each for each in ("postgres", "nobody") if _exists(each)), "nobody")
    return {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}


def _exists(user: str) -> bool:
    return any(each.pw_name == user for each in pwd.getpwall())


def _make(found: Path, folder: Path, password: str) -> None:
    secret = folder / "password"
    secret.write_text(password)
    user = _unprivileged()
    for path in (folder, secret) if user else ():
        shutil.chown(path, user["user"], user["group"])
    flags = ["-U", "tests", "-A", "scram-sha-256", "--pwfile", str(secret), "-E", "UTF8", "--locale=C", "--no-sync"]
    command = [str(found / "initdb"), "-D", str(folder / "data"), *flags]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)


def _start(found: Path, folder: Path, port: int) -> subprocess.Popen[Any]:
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "max_connections": 200,
        "fsync": "off",  # no test pulls this machine's plug
    }
    flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    command = [str(found / "postgres"), "-D", str(folder / "data"), *flags]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **_unprivileged())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(ready: Cluster) -> None:
    import psycopg

    end = time.monotonic() + START_SECONDS
    while True:
        try:
            return ready.execute("SELECT 1")
        except psycopg.OperationalError as error:
            if ready.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"PostgreSQL did not start ({error}):\n{(ready.folder / 'log').read_text()}"
                ) from error
            time.sleep(0.05)
