"""How the labeling page carries many annotators at once: latency over its own HTTP routes, and what is on disk after.

The load is open: when an annotator submits is decided before it is known how fast the server is, and latency counts
from the moment that was meant, so that a server that stalls cannot hide it by being asked less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import sqlalchemy as sa

from experiments.benchmarks.labeling_client import RequestFailed, Visitor
from experiments.benchmarks.labeling_site import Page, enter, fill, invitations, serving
from rlhf.schema import drafts, rankings
from rlhf.store import Store
from rlhf.verification import verify

THINK_SECONDS = 3.0
DRAFT_SHARE = 0.3
"""Items at which the page saves a draft while the annotator thinks."""

PACKAGES = ("gradio", "fastapi", "starlette", "uvicorn", "sqlalchemy")


@dataclass
class Seen:
    """What the annotators saw together; times in seconds."""

    submits: list[float] = field(default_factory=list)
    nexts: list[float] = field(default_factory=list)
    drafts: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    keys: dict[str, int] = field(default_factory=dict)
    """Idempotency key of each acknowledged submit -> the ranking that the server named."""


@dataclass(frozen=True)
class Result:
    """What is printed. Latencies in milliseconds; `faults` is what was wrong with the store afterwards."""

    annotators: int
    seconds: float
    errors: int
    submits: int
    submit_p50_ms: float | None
    submit_p95_ms: float | None
    submit_p99_ms: float | None
    next_p50_ms: float | None
    next_p95_ms: float | None
    next_p99_ms: float | None
    draft_p95_ms: float | None
    server_cpu_ms_per_submit: float | None
    """Processor time of the server by submits: each with its next item, and the drafts."""
    server_cpu_share: float
    """Of one core."""
    client_cpu_share: float
    items: int
    faults: list[str]
    first_errors: list[str]
    database: str
    machine: dict[str, Any]
    versions: dict[str, str]


async def annotate(visitor: Visitor, seen: Seen, chance: random.Random, begin: float, seconds: float) -> None:
    """Rank items for so long; times are those of the loop's clock."""
    due = begin + chance.expovariate(1 / THINK_SECONDS)
    await _sleep_until(due - THINK_SECONDS * chance.random())
    state = await _next(visitor, seen, time.monotonic())
    while state is not None and due < begin + seconds:
        shown = time.monotonic()
        tiers = [[place] for place in range(state["count"])]
        chance.shuffle(tiers)
        if chance.random() < DRAFT_SHARE:
            await _sleep_until((shown + due) / 2)
            await _timed(seen, seen.drafts, time.monotonic(), visitor.save_draft(state["id"], tiers[:2]))
        await _sleep_until(due)
        spent = time.monotonic() - shown
        ranking = await _timed(seen, seen.submits, due, visitor.submit(state["id"], state["key"], tiers, spent))
        if ranking is not None:
            seen.keys[state["key"]] = ranking
        due += chance.expovariate(1 / THINK_SECONDS)
        state = await _next(visitor, seen, time.monotonic())


async def _next(visitor: Visitor, seen: Seen, meant: float) -> dict[str, Any] | None:
    """The page asks as soon as a submit is acknowledged: that is the moment meant."""
    state = await _timed(seen, seen.nexts, meant, visitor.next_task())
    if state is None and not seen.errors:
        seen.errors.append("nothing was left to rank: give more --items")
    return state


async def _timed(seen: Seen, into: list[float], meant: float, request: Any) -> Any:
    try:
        answer = await request
    except RequestFailed as error:
        seen.errors.append(str(error))
        return None
    into.append(time.monotonic() - meant)
    return answer


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.monotonic()))


async def drive(page: Page, names: Sequence[str], tokens: Sequence[str], seconds: float, seed: int) -> tuple[Any, ...]:
    """Let everybody in, then rank; returns what they saw and the processor time of the server and of this process."""
    people = await enter(page.port, names, tokens)
    pulses = [asyncio.create_task(visitor.hold_heartbeat()) for visitor in people]
    seen, before, here, begin = Seen(), page.cpu_seconds(), time.process_time(), time.monotonic()
    chances = [random.Random(f"{seed} {name}") for name in names]
    await asyncio.gather(
        *(annotate(who, seen, chance, begin, seconds) for who, chance in zip(people, chances, strict=True))
    )
    spent = page.cpu_seconds() - before, time.process_time() - here, time.monotonic() - begin
    for pulse in pulses:
        pulse.cancel()
    for visitor in people:
        visitor.close()
    return seen, *spent


def faults_of(store: Store, keys: dict[str, int]) -> list[str]:
    """What is wrong with the store, after these keys were acknowledged; nothing, if the promise was kept."""
    with store.read() as connection:
        saved = connection.execute(sa.select(rankings.c.idempotency_key, rankings.c.id)).all()
        left = connection.scalars(
            sa.select(sa.func.count()).select_from(
                drafts.join(rankings, rankings.c.assignment_id == drafts.c.assignment_id)
            )
        ).one()
        faults = list(verify(connection).faults)
    by_key = dict(map(tuple, saved))
    missing = [key for key, ranking in keys.items() if by_key.get(key) != ranking]
    if missing:
        faults.append(f"{len(missing)} acknowledged submits are not in the store, such as {missing[0]}")
    if len(saved) != len(by_key):
        faults.append(f"{len(saved) - len(by_key)} submits are in the store twice")
    if left:
        faults.append(f"{left} drafts of what was submitted were left behind")
    return faults


def measure(folder: Path, url: str, annotators: int, seconds: float, items: int, overlap: int, seed: int) -> Result:
    """Fill the store, start the page, load it, and look at the store. The store must be new."""
    names = [f"annotator-{number:03}" for number in range(annotators)]
    with closing(Store(url)) as store:
        fill(store, items, seed=seed)
        tokens = invitations(store, names)
        with serving(url, folder, "--overlap", str(overlap)) as page:
            seen, server, client, took = asyncio.run(drive(page, names, tokens, seconds, seed))
        faults = faults_of(store, seen.keys)
        database = _database(store)
    submits, nexts, drafted = (_percentiles(each) for each in (seen.submits, seen.nexts, seen.drafts))
    return Result(
        annotators, seconds, len(seen.errors), len(seen.keys), *submits, *nexts, drafted[1],
        server_cpu_ms_per_submit=round(1000 * server / len(seen.keys), 2) if seen.keys else None,
        server_cpu_share=round(server / took, 3), client_cpu_share=round(client / took, 3),
        items=items, faults=faults, first_errors=seen.errors[:5], database=database,
        machine=_machine(), versions={each: version(each) for each in PACKAGES} | {"python": platform.python_version()},
    )  # fmt: skip


def _percentiles(seconds: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """The 50th, 95th and 99th, in milliseconds."""
    if len(seconds) < 2:
        return None, None, None
    cuts = quantiles(seconds, n=100, method="inclusive")
    return round(1000 * cuts[49], 1), round(1000 * cuts[94], 1), round(1000 * cuts[98], 1)


def _database(store: Store) -> str:
    if store.engine.dialect.name == "sqlite":
        return f"SQLite {sqlite3.sqlite_version}"
    with store.read() as connection:
        return f"PostgreSQL {connection.scalar(sa.text('SHOW server_version'))}"


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"processor": name, "cores": len(os.sched_getaffinity(0)), "load_before": round(os.getloadavg()[2], 2)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print; the exit status is 1 where an answer or the store was wrong."""
    parser = argparse.ArgumentParser(description="Load the labeling page and print latencies.")
    parser.add_argument("--annotators", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--items", type=int, default=2000, help="with 4 completions of about 100 words each")
    parser.add_argument("--overlap", type=int, default=2, help="annotators by item")
    parser.add_argument("--store", help="SQLAlchemy URL of an empty database; else an SQLite file in a new folder")
    parser.add_argument("--folder", help="where the SQLite file and the server's log go; else the temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="labeling-load-", dir=chosen.folder) as name:
        store = chosen.store or str(Path(name) / "labels.db")
        result = measure(
            Path(name), store, chosen.annotators, chosen.seconds, chosen.items, chosen.overlap, chosen.seed
        )
    print(json.dumps(asdict(result), indent=None if chosen.json else 2))
    return 1 if result.errors or result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
