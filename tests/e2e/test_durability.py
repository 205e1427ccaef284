"""Saved means on disk, exactly once: after SIGKILL, on a full disk, behind a lock, and by the system calls it made."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from experiments.benchmarks.labeling_site import enter, fill, invitations, serving
from labeling_ui import app
from labeling_ui.places import Policy
from labeling_ui.service import LabelService
from labeling_ui.task import Task
from rlhf import database, schema
from rlhf.config import LabelConfig
from rlhf.store import Store
from rlhf.types import DataError
from rlhf.verification import verify
from tests import own_loop, postgres
from tests.e2e import kill_server, syscalls
from tests.e2e.kill_server import TIERS, Ledger

SUBMITTER = """
import os, sys
from labeling_ui.places import Policy
from labeling_ui.service import LabelService
from rlhf.store import Store

store = Store(sys.argv[1])
if sys.argv[2] == "careless":
    store.engine.dispose()
    @__import__("sqlalchemy").event.listens_for(store.engine, "connect")
    def forget(connection, _record):
        connection.execute("PRAGMA synchronous=NORMAL")
service = LabelService(store, Policy(overlap=5))
tasks = {name: service.next_task(name) for name in "abcde"}
os.write(1, b"acknowledged: ready")
for name, task in tasks.items():
    ranking = service.submit(name, task.id, task.key, [[1], [0, 2], [3]]).ranking_id
    os.write(1, f"acknowledged: {ranking}".encode())
"""


# ------------------------------------------------------------------------------------------------ kills


def test_what_was_acknowledged_survives_kills_of_the_service(store_url: str) -> None:
    tally = kill_server.kill_service(store_url, rounds=10)
    assert tally.problems == []
    assert tally.rounds == 10
    assert tally.acknowledged > 0


def test_what_was_acknowledged_survives_kills_of_the_page(store_url: str, tmp_path: Path) -> None:
    tally = kill_server.kill_page(store_url, tmp_path, rounds=3)
    assert tally.problems == []
    assert tally.acknowledged > 0


def test_a_ledger_finds_what_a_kill_might_do(tmp_path: Path) -> None:
    service, task = desk(tmp_path / "labels.db")
    ledger = Ledger(sent={"lost": ("a", 1, "lost")}, acknowledged={"lost": 7})
    service.submit("a", task.id, "other", TIERS)
    with service.store.write() as connection:
        connection.execute(sa.delete(schema.payloads).where(schema.payloads.c.event_id == 3))
    assert [each.partition(" ")[0] for each in ledger.check(service.store)][-2:] == ["lost", "other"]
    assert len(ledger.check(service.store)) > 2  # and the chain is broken


def test_work_goes_on_after_postgresql_crashed() -> None:
    with postgres.cluster() as cluster:
        cluster.execute("CREATE DATABASE crashed TEMPLATE template0")
        store = Store(cluster.url("crashed"))
        fill(store, 200, words=10)
        service, ledger = LabelService(store, Policy(overlap=2)), Ledger()
        begun, refused = threading.Event(), []

        def annotate(name: str) -> None:
            try:
                while (task := service.next_task(name)) is not None:
                    said = (name, task.id, task.key)
                    ledger.take("sent", said, None)
                    ledger.take("acknowledged", said, service.submit(*said, TIERS).ranking_id)
                    if len(ledger.acknowledged) > 5:
                        begun.set()
            except DataError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=annotate, args=(name,)) for name in kill_server.people()]
        for thread in threads:
            thread.start()
        assert begun.wait(60)
        with postgres.crashed(cluster) as again:
            for thread in threads:
                thread.join()
            assert len(refused) == len(threads), refused
            again()
            for name, task, key in ledger.open():
                ledger.take("acknowledged", (name, task, key), service.submit(name, task, key, TIERS).ranking_id)
            assert ledger.check(store) == []
            task = service.next_task("someone else")
            assert task is not None
            service.submit("someone else", task.id, task.key, TIERS)
            store.close()


# ------------------------------------------------------------------------------------------------ system calls


@pytest.fixture
def strace() -> None:
    """The program; where it is missing its tests are skipped, but fail where CI is set.

    Where the kernel lets nobody be traced, as in many a container, they are skipped in CI, too.
    """
    if shutil.which("strace") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no strace here: apt-get install strace")
    if subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow tracing (ptrace)")


def submitted(folder: Path, how: str) -> list[syscalls.Answer]:
    """What strace saw of a process that submits five rankings."""
    with closing(Store(folder / "labels.db")) as store:
        fill(store, 1, words=10)
    program = [sys.executable, "-c", SUBMITTER, str(folder / "labels.db"), how]
    lines = syscalls.traced(program, folder / "trace")
    return list(syscalls.answers(lines, "labels.db-wal", "acknowledged: "))[1:]


@pytest.mark.usefixtures("strace")
def test_each_submit_waits_for_the_disk_before_it_answers(tmp_path: Path) -> None:
    found = submitted(tmp_path, "as it is")
    assert len(found) == 5
    assert all(answer.writes and answer.waited for answer in found), found


@pytest.mark.usefixtures("strace")
def test_the_trace_shows_a_submit_that_does_not_wait(tmp_path: Path) -> None:
    found = submitted(tmp_path, "careless")
    assert len(found) == 5
    assert all(answer.writes for answer in found)
    assert not any(answer.waited for answer in found), found


@pytest.mark.usefixtures("strace")
def test_the_page_waits_for_the_disk_before_it_answers(tmp_path: Path) -> None:
    url, names = str(tmp_path / "labels.db"), kill_server.people()
    with closing(Store(url)) as store:
        fill(store, 10, words=10)
        tokens = invitations(store, names)
    with serving(url, tmp_path) as page:

        async def submit_once() -> None:
            visitors = await enter(page.port, names, tokens)
            tasks = [(visitor, await visitor.next_task()) for visitor in visitors]
            with syscalls.watching(page.process.pid, tmp_path / "trace"):
                for visitor, task in tasks:
                    assert task is not None
                    await visitor.submit(task["id"], task["key"], TIERS, 9.0)
            for visitor in visitors:
                visitor.close()

        own_loop.run(submit_once())
    lines = (tmp_path / "trace").read_text().splitlines()
    found = list(syscalls.answers(lines, "labels.db-wal", r"{\"saved\":true"))
    assert len(found) == len(names)
    assert all(answer.writes and answer.waited for answer in found), found


# ------------------------------------------------------------------------------------------------ troubles


def desk(url: Path | str) -> tuple[LabelService, Task]:
    """A service over a new store, and a task of which a draft is kept."""
    store = Store(url)
    fill(store, 3, words=10)
    service = LabelService(store, Policy())
    task = service.next_task("a")
    assert task is not None
    service.save_draft("a", task.id, {"tiers": TIERS[:1]})
    return service, task


def check_refused(service: LabelService, task: Task, *says: str) -> None:
    """A submit fails with this message, over HTTP too; nothing is saved, and the draft is there."""
    with pytest.raises(DataError) as raised:
        service.submit("a", task.id, task.key, TIERS)
    assert all(each in str(raised.value) for each in says), str(raised.value)
    config = LabelConfig(store=service.store.name, annotator="a")
    message = {"task": task.id, "key": task.key, "tiers": TIERS}
    with TestClient(app.create(service, config, slots=4), base_url="http://127.0.0.1:7860") as client:
        answer = client.post("/api/v1/submit", json=message)
    assert answer.status_code == 503
    assert all(each in answer.json()["error"] for each in says), answer.text
    assert service.store.rankings() == []
    with service.store.read() as connection:
        assert connection.scalars(sa.select(schema.drafts.c.body)).one() == {"tiers": TIERS[:1]}


def check_goes_on(service: LabelService, task: Task) -> None:
    """The same submit under the same key is saved, once, and the log is whole."""
    assert not service.submit("a", task.id, task.key, TIERS).repeated
    assert service.submit("a", task.id, task.key, TIERS).repeated
    assert len(service.store.rankings()) == 1
    with service.store.read() as connection:
        assert verify(connection).holds
    service.store.close()


class SmallDisk:
    """A disk of 2 MB in memory; where nothing can be mounted, a limit on the size of files does as well."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._limit = folder, resource.getrlimit(resource.RLIMIT_FSIZE)
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
        self.mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self) -> None:
        if not self.mounted:
            log = self.folder / "labels.db-wal"
            return resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, self._limit[1]))
        with (self.folder / "ballast").open("wb", buffering=0) as ballast:
            for size in (65536, 4096, 1):
                self._write_on(ballast.fileno(), bytes(size))

    def _write_on(self, file: int, block: bytes) -> None:
        try:
            while os.write(file, block):
                pass
        except OSError:
            return

    def make_room(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limit)
        (self.folder / "ballast").unlink(missing_ok=True)

    def remove(self) -> None:
        self.make_room()
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk")
    yield made
    made.remove()


def test_a_full_disk_is_told_and_the_draft_stays(disk: SmallDisk) -> None:
    service, task = desk(disk.folder / "labels.db")
    disk.fill()
    check_refused(service, task, "nothing was saved", "make room")
    disk.make_room()
    check_goes_on(service, task)


def test_a_locked_store_is_told_and_the_draft_stays(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.3)
    service, task = desk(store_url)
    with closing(Store(store_url)) as other, other.write():
        check_refused(service, task, "nothing was saved", "another process holds it")
    check_goes_on(service, task)


def test_a_store_that_a_backup_tool_holds_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.3)
    service, task = desk(tmp_path / "labels.db")
    with closing(sqlite3.connect(tmp_path / "labels.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        check_refused(service, task, "nothing was saved", "another process holds it")
    check_goes_on(service, task)
