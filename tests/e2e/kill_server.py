"""Kill the labeling service at random moments, and look whether what it acknowledged is in the store, exactly once.

`python -m tests.e2e.kill_server --rounds 200 --page-rounds 20 [--store postgres]` kills the service alone, in a process
that submits as fast as it can, and the whole page under HTTP requests. After each kill the store is opened: every
acknowledged submit is there once, what stands there was said by someone, and the log's chain and the tables agree. Then
the work goes on: submits that got no answer are sent again under the same key, as the page does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from experiments.benchmarks.labeling_client import RequestFailed, Visitor
from experiments.benchmarks.labeling_site import enter, fill, free_port, invitations, start
from labeling_ui.places import Policy
from labeling_ui.service import LabelService
from rlhf.schema import assignments, rankings
from rlhf.store import Store
from rlhf.verification import verify
from tests import own_loop, postgres

PEOPLE = 4
"""Who submit at the same time, each in a thread of the service, or as a client of the page."""

TIERS = [[1], [0, 2], [3]]
ITEMS = 60
"""New ones in each round; each is ranked twice."""

LONGEST = 0.6
"""Seconds after the round's first submit within which the service dies."""

Submit = tuple[str, int, str]
"""Annotator, task and idempotency key."""


@dataclass
class Ledger:
    """What the clients know: what they have sent, and what was acknowledged as which ranking."""

    sent: dict[str, Submit] = field(default_factory=dict)
    acknowledged: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def open(self) -> list[Submit]:
        """Submits that got no answer."""
        return [submit for key, submit in self.sent.items() if key not in self.acknowledged]

    def take(self, kind: str, submit: Submit, ranking: int | None) -> None:
        """Note a submit that begins, or one that was answered."""
        key = submit[2]
        if kind == "sent":
            self.sent[key] = submit
        elif self.acknowledged.setdefault(key, ranking or 0) != ranking:
            self.problems.append(f"{key} was acknowledged as ranking {self.acknowledged[key]}, then as {ranking}")

    def check(self, store: Store) -> list[str]:
        """What is wrong with the store; nothing, if the promise was kept."""
        with store.read() as connection:
            query = sa.select(rankings.c.idempotency_key, rankings.c.id, rankings.c.active)
            saved = connection.execute(query).all()
            twice = sa.select(assignments.c.item_id, assignments.c.annotator).group_by(
                assignments.c.item_id, assignments.c.annotator
            )
            doubled = connection.execute(twice.having(sa.func.count() > 1)).all()
            found = list(verify(connection).faults)
        ids = {row.idempotency_key: row.id for row in saved if row.active}
        found += [f"{key} is lost" for key, ranking in self.acknowledged.items() if ids.get(key) != ranking]
        found += [f"{key} was never sent" for key in ids if key not in self.sent]
        found += ["a ranking is there twice"] * (len(ids) != len(saved)) + ["a task is given twice"] * bool(doubled)
        return found


@dataclass
class Tally:
    """What the rounds came to."""

    what: str
    rounds: int = 0
    acknowledged: int = 0
    unanswered: int = 0
    """Submits under way when the kill fell."""
    saved_unanswered: int = 0
    """Those of them that were on disk all the same, and were answered as repeated later."""
    problems: list[str] = field(default_factory=list)


# --------------------------------------------------------------------------------------------- the service alone


def work(url: str, pipe: Any, again: Sequence[Submit]) -> None:
    """Submit until killed; tell the parent before and after each one. First `again`, which got no answer before."""
    service, turn = LabelService(Store(url), Policy(overlap=2)), threading.Lock()

    def submit(said: Submit) -> None:
        with turn:
            pipe.send(("sent", said, None))
        ranking = service.submit(*said, TIERS, seconds=9.0).ranking_id
        with turn:
            pipe.send(("acknowledged", said, ranking))

    def annotate(name: str) -> None:
        for said in again:
            if said[0] == name:
                submit(said)
        while (task := service.next_task(name)) is not None:
            service.save_draft(name, task.id, {"tiers": TIERS[:1]})
            submit((name, task.id, task.key))

    threads = [threading.Thread(target=annotate, args=(name,)) for name in people()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def people() -> list[str]:
    return [f"annotator-{number}" for number in range(PEOPLE)]


def kill_service(url: str, rounds: int, seed: int = 0) -> Tally:
    """Start the service, kill it, look; so often. The store at `url` must be new."""
    tally, ledger, chance = Tally("service"), Ledger(), random.Random(seed)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["labeling_ui.service"])
    with closing(Store(url)) as store:
        for number in range(2 * rounds):
            if tally.rounds == rounds:
                break
            fill(store, ITEMS, words=10, seed=number)
            before = ledger.open()
            receiver, sender = processes.Pipe(duplex=False)
            child = processes.Process(target=work, args=(url, sender, before), daemon=True)
            child.start()
            sender.close()
            listen(receiver, ledger, chance.uniform(0, LONGEST), child.kill)
            child.join()
            tally.rounds += child.exitcode == -signal.SIGKILL  # else it was through before
            conclude(tally, ledger, store, f"round {number}")
    return tally


def listen(receiver: Any, ledger: Ledger, delay: float, kill: Any) -> None:
    """Write down what the child says, and kill it so many seconds after its first word; read on to the pipe's end."""
    timer = threading.Timer(delay, kill)
    with suppress(EOFError):
        while True:
            ledger.take(*receiver.recv())
            if not timer.ident:
                timer.start()
    timer.cancel()


def conclude(tally: Tally, ledger: Ledger, store: Store, name: str) -> None:
    """Look at the store after a kill, and count."""
    tally.problems += [f"{name}: {each}" for each in (*ledger.check(store), *ledger.problems)]
    ledger.problems.clear()
    tally.acknowledged = len(ledger.acknowledged)
    waiting = {key for _, _, key in ledger.open()}
    tally.unanswered += len(waiting)
    with store.read() as connection:
        keys = sa.select(rankings.c.idempotency_key).where(rankings.c.idempotency_key.in_(waiting))
        tally.saved_unanswered += len(connection.scalars(keys).all())


# ------------------------------------------------------------------------------------------------ the whole page


def kill_page(url: str, folder: Path, rounds: int, seed: int = 0) -> Tally:
    """The same with `rlhf label` under HTTP requests; people log in once, in the first round."""
    tally, ledger, chance, port = Tally("page"), Ledger(), random.Random(seed), free_port()
    with closing(Store(url)) as store:
        tokens, visitors = invitations(store, people()), []
        for number in range(rounds):
            fill(store, ITEMS, words=10, seed=number)
            page = start(url, folder, port, "--overlap", "2")
            try:
                if not visitors:
                    visitors = own_loop.run(log_in(port, tokens))
                own_loop.run(visit(visitors, ledger, page.process.kill, chance.uniform(0.1, 1.5)))
            finally:
                page.stop()
            tally.rounds += 1
            conclude(tally, ledger, store, f"page {number}")
    return tally


async def log_in(port: int, tokens: Sequence[str]) -> list[Visitor]:
    """Everybody, once: they stay logged in while pages die."""
    visitors = await enter(port, people(), tokens)
    for visitor in visitors:
        visitor.close()
    return visitors


async def visit(visitors: Sequence[Visitor], ledger: Ledger, kill: Any, delay: float) -> None:
    """Everybody submits until the page is killed."""
    waiting = ledger.open()

    async def submit(visitor: Visitor, said: Submit) -> None:
        ledger.take("sent", said, None)
        ledger.take("acknowledged", said, await visitor.submit(said[1], said[2], TIERS, 9.0))

    async def annotate(name: str, visitor: Visitor) -> None:
        try:
            for said in waiting:
                if said[0] == name:
                    await submit(visitor, said)
            while (state := await visitor.next_task()) is not None:
                await visitor.save_draft(state["id"], TIERS[:1])
                await submit(visitor, (name, state["id"], state["key"]))
        except RequestFailed as error:
            if error.answered:
                ledger.problems.append(str(error))
        finally:
            visitor.close()

    everybody = [asyncio.create_task(annotate(*each)) for each in zip(people(), visitors, strict=True)]
    known = len(ledger.acknowledged)
    while len(ledger.acknowledged) == known and not all(task.done() for task in everybody):
        await asyncio.sleep(0.01)
    await asyncio.sleep(delay)
    kill()
    await asyncio.gather(*everybody)


# ------------------------------------------------------------------------------------------------ the command


@contextmanager
def stores(kind: str, folder: Path) -> Iterator[Iterator[str]]:
    """URLs of new stores, one after the other."""
    with postgres.cluster() if kind == "postgres" else nullcontext() as cluster:

        def new() -> Iterator[str]:
            for number in range(1000):
                if cluster is None:
                    yield str(folder / f"labels-{number}.db")
                else:
                    cluster.execute(f"CREATE DATABASE killed_{number} TEMPLATE template0")
                    yield cluster.url(f"killed_{number}")

        yield new()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, kill, print; the exit status is 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description="Kill the labeling service and page at random moments.")
    parser.add_argument("--rounds", type=int, default=200, help="of the service alone")
    parser.add_argument("--page-rounds", type=int, default=20, help="of the whole page")
    parser.add_argument("--store", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where SQLite files go; else the temporary folder")
    chosen = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    began, tallies = time.monotonic(), []
    with (
        tempfile.TemporaryDirectory(prefix="kill-server-", dir=chosen.folder) as name,
        stores(chosen.store, Path(name)) as new,
    ):
        if chosen.rounds:
            tallies.append(kill_service(next(new), chosen.rounds, chosen.seed))
        if chosen.page_rounds:
            tallies.append(kill_page(next(new), Path(name), chosen.page_rounds, chosen.seed))
    found = {"store": chosen.store, "seconds": round(time.monotonic() - began), "kills": [asdict(t) for t in tallies]}
    print(json.dumps(found, indent=2))
    return 1 if any(tally.problems for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
