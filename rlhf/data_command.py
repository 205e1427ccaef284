"""`rlhf data`: backup, restore, verify, export, import, erase and look at what a label store holds.

What each command found or did is one line on stdout; exit status 1 where a store does not verify or rows were left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from rlhf import backup, erasure, label_exports, label_imports
from rlhf.database import shown
from rlhf.store import Store
from rlhf.verification import Verdict, verify

SHOWN_FAULTS = 20


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands and return the exit status. Raises UserError; bad flags end in status 2."""
    parser = _parser()
    chosen = parser.parse_args(list(arguments))
    if chosen.command is None:
        parser.print_help()
        return 0
    run: Callable[[argparse.Namespace], int] = chosen.run
    return run(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf data",
        description="Backups, exports and checks of a label store. `rlhf data COMMAND --help` says more.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], what: str, more: str = ""
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=f"{what}. {more}".strip(), allow_abbrev=False)
        made.add_argument("--store", default="runs/default/labels.db", help="SQLite file or URL (default: %(default)s)")
        made.set_defaults(run=run)
        return made

    made = command("backup", _backup, "copy the store into one file, while people go on working", BACKUP)
    made.add_argument("--out", metavar="FILE", help="a new file (default: beside the store, with date and time)")
    made = command("restore", _restore, "make the store what a backup holds", RESTORE)
    made.add_argument("backup", metavar="FILE", help="what `rlhf data backup` wrote")
    made.add_argument("--force", action="store_true", help="move a store that is there aside first")
    made = command("verify", _verify, "check that nothing was changed behind the store's back", VERIFY)
    made.add_argument(
        "--head", metavar="NUMBER:HASH", help="the end of the log as an earlier verify or card printed it"
    )
    made = command("export", _export, "write what was collected, with a data set card (README.md)", EXPORT)
    made.add_argument("--format", choices=("rankings", "preferences", "events"), default="rankings")
    made.add_argument("--out", metavar="PATH", required=True, help="FILE.jsonl; for preferences also a new folder")
    made.add_argument(
        "--ties",
        choices=("half", "drop"),
        default="half",
        help="preferences: list a tie both ways with weight 0.5, or not",
    )
    made = command("import", _import, "take rankings, or completions that other models wrote", IMPORT)
    made.add_argument("file", metavar="FILE", help="JSON lines, JSON, CSV or parquet")
    made.add_argument("--round", type=int, default=0, help="to which completions belong (default: %(default)s)")
    made = command("erase", _erase, "remove a person's name and texts; rankings stay under a pseudonym", ERASE)
    made.add_argument("annotator", metavar="NAME")
    made = command("events", _events, "print the log as JSON lines, oldest first")
    made.add_argument("--last", type=int, metavar="N", help="only the last N")
    made.add_argument("--kind", help="only events of this kind")
    made.add_argument("--annotator", metavar="NAME", help="only events by this person")
    made = command("migrate", _migrate, "bring a store of an older version to the present schema", MIGRATE)
    made.add_argument("--i-have-a-backup", action="store_true", dest="backed_up", help="for PostgreSQL: a copy is kept")
    command("clean", _clean, "rewrite the store's files without what was erased, where `erase` could not")
    return parser


BACKUP = "The copy is checked, and is a label store itself. It holds everything, password hashes and names too."
RESTORE = "The backup may come from the other database: this is also the way from SQLite to PostgreSQL and back."
VERIFY = "Exit status 1 where something was. Keep the head that is printed elsewhere: a rewritten log shows against it."
EXPORT = (
    "Items that were adjudicated yield that ranking alone; gold items, repeats and late rankings are left out. "
    "preferences have the columns prompt, chosen, rejected, weight, ranking, annotator and tie."
)
IMPORT = (
    "A row is a ranking (prompt, completions, ranks, annotator ...) or {prompt, completions} with completions as texts "
    "or {text, model}. Bad rows are listed by line, good ones kept (exit status 1); a second time nothing changes."
)
ERASE = "The log still verifies afterwards. Backups and exports made before still hold the name: remove them yourself."
MIGRATE = "SQLite stores are brought forward whenever they are opened, with a copy kept beside them."


def _open(chosen: argparse.Namespace) -> Store:
    return Store(chosen.store, create=False)


def _backup(chosen: argparse.Namespace) -> int:
    out = chosen.out or _default_backup(chosen.store)
    with closing(_open(chosen)) as store:
        verdict = backup.backup(store, out)
    print(f"{out}: {_told(verdict)}")
    return 0


def _default_backup(store: str) -> str:
    moment = f"{datetime.now(UTC):%Y-%m-%d-%H%M%S}"
    return f"labels.{moment}.db" if "://" in store else str(Path(store).with_suffix(f".{moment}.db"))


def _restore(chosen: argparse.Namespace) -> int:
    verdict, kept = backup.restore(chosen.backup, chosen.store, force=chosen.force)
    print(f"{shown(chosen.store)}: {_told(verdict)}" + (f"; what was there is now {kept}" if kept else ""))
    return 0


def _verify(chosen: argparse.Namespace) -> int:
    with closing(_open(chosen)) as store, store.read() as connection:
        verdict = verify(connection, chosen.head)
    print(f"{shown(chosen.store)}: {_told(verdict)}")
    for fault in verdict.faults[:SHOWN_FAULTS]:
        print(f"  {fault}")
    if len(verdict.faults) > SHOWN_FAULTS:
        print(f"  and {len(verdict.faults) - SHOWN_FAULTS} more")
    return 0 if verdict.holds else 1


def _told(verdict: Verdict) -> str:
    """A verdict in a sentence."""
    erased = f" ({verdict.erased} of people who were erased)" if verdict.erased else ""
    found = "all as it was written" if verdict.holds else f"{len(verdict.faults)} faults"
    return f"{verdict.events} events{erased}, {verdict.rankings} rankings, {found}; head {verdict.head}"


def _export(chosen: argparse.Namespace) -> int:
    path = Path(chosen.out)
    with closing(_open(chosen)) as store:
        figures = agreement_figures(store)
        if chosen.format == "preferences":
            done = label_exports.export_preferences(store, path, figures, chosen.ties)
        elif chosen.format == "events":
            done = label_exports.export_events(store, path, figures)
        else:
            done = label_exports.export_rankings(store, path, figures)
    print(f"{done.path}: {done.rows} {chosen.format}; card {done.card}")
    return 0


def agreement_figures(store: Store) -> Mapping[str, str]:
    """The lines of a card about agreement; it is measured before adjudication."""
    from labeling_ui.agreement import Rate, agreement, tie_share

    rankings = store.rankings()
    found, ties = agreement(rankings), tie_share(rankings)

    def told(rate: Rate) -> str:
        if rate.value is None:
            return "unknown: no item was ranked twice"
        return f"{rate.value:.3f} (95 % interval {rate.low:.3f} to {rate.high:.3f}; {rate.pairs} pairs)"

    return {
        "Items ranked by more than one annotator": str(found.items),
        "Pairwise agreement, ties left out": told(found.without_ties),
        "Pairwise agreement, a tie as half": told(found.ties_as_half),
        "Share of compared pairs that are ties": "unknown" if ties is None else f"{ties:.3f}",
    }


def _import(chosen: argparse.Namespace) -> int:
    with closing(Store(chosen.store)) as store:
        found = label_imports.import_file(store, chosen.file, chosen.round)
    for row in found.bad:
        print(f"{chosen.file}:{row.line}: left out: {row.reason}")
    print(
        f"{shown(chosen.store)}: {found.rankings} new rankings, {found.items} new prompts with completions, "
        f"{found.known} rows known already, {len(found.bad)} rows left out"
    )
    return 1 if found.bad else 0


def _erase(chosen: argparse.Namespace) -> int:
    with closing(_open(chosen)) as store:
        pseudonym = erasure.erase(store, chosen.annotator)
    print(
        f"{shown(chosen.store)}: erased; the rankings stay under {pseudonym}. "
        f"Older backups and exports are yours to remove"
    )
    return 0


def _events(chosen: argparse.Namespace) -> int:
    with closing(_open(chosen)) as store:
        rows = list(label_exports.read_events(store))
    for name in ("kind", "annotator"):
        wanted = getattr(chosen, name)
        rows = [row for row in rows if wanted in (None, row[name])]
    for row in rows if chosen.last is None else rows[len(rows) - min(chosen.last, len(rows)) :]:
        print(json.dumps(row, ensure_ascii=False))
    return 0


def _migrate(chosen: argparse.Namespace) -> int:
    with closing(Store(chosen.store, create=False, backed_up=chosen.backed_up)):
        print(f"{shown(chosen.store)}: has the present schema")
    return 0


def _clean(chosen: argparse.Namespace) -> int:
    with closing(_open(chosen)) as store:
        erasure.clean(store)
    print(f"{shown(chosen.store)}: rewritten without what was deleted")
    return 0
