"""Exports say exactly what was ranked, and their cards count it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from rlhf.data import read_preferences, read_rankings
from rlhf.label_exports import MARK, export_events, export_preferences, export_rankings, preferences
from rlhf.schema import assignments
from rlhf.store import Judgement, Store, add_event, add_ranking, insert
from rlhf.types import DataError, Ranking

FIGURES = {"Agreement | of <two>": "0.75"}
A = Ranking("p", ("x", "y", "z"), (1, 2, 2), "ann", (2, 0, 1), {"unclear": True, "marks": ["too_fast"]}, "why", 3.5)
B = Ranking("q", ("x", "y"), (None, 1), "bob", created_at="2026-01-02", round=1)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with closing(Store(store_url)) as store:
        store.import_rankings([A, B])
        yield store


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def adjudicate(store: Store) -> None:
    with store.write() as connection:
        row = {"item_id": 1, "annotator": "boss", "kind": "adjudication", "presented_order": [0, 1, 2]}
        event = add_event(connection, "adjudicated")
        given = insert(connection, assignments, {**row, "state": "done", "leased_until": 0.0, "event": event})
        add_ranking(connection, given, "final", Judgement((3, 2, 1), created_at="2026-02-02"))


def test_rankings_keep_their_contract(store: Store, tmp_path: Path) -> None:
    done = export_rankings(store, tmp_path / "out" / "r.jsonl", FIGURES)
    assert done.rows == 2
    assert read_rankings(done.path).rankings == store.rankings()
    assert lines(done.path)[0]["flags"] == {"unclear": True, "marks": ["too_fast"]}


def test_an_adjudicated_item_yields_the_final_word_alone(store: Store, tmp_path: Path) -> None:
    adjudicate(store)
    rows = lines(export_rankings(store, tmp_path / "r.jsonl", FIGURES).path)
    assert [(row["annotator"], row["ranks"]) for row in rows] == [("boss", [3, 2, 1]), ("bob", [None, 1])]
    assert {each.annotator for each in store.rankings()} == {"ann", "bob"}, "agreement looks at what people said"


def test_pairs_with_ties_both_ways_or_not_at_all() -> None:
    def pairs(*arguments: str) -> list[tuple]:
        rows = preferences({7: A}, *arguments)
        return [(row["chosen"], row["rejected"], row["weight"], row["tie"], row["ranking"]) for row in rows]

    strict = [("x", "y", 1.0, False, 7), ("x", "z", 1.0, False, 7)]
    assert pairs() == [*strict, ("y", "z", 0.5, True, 7), ("z", "y", 0.5, True, 7)]
    assert pairs("drop") == strict
    assert list(preferences({1: B})) == [], "one completion that is ranked is no pair"
    worse_first = Ranking("p", ("bad", "good"), (2, 1), "ann")
    assert [(row["chosen"], row["rejected"]) for row in preferences({1: worse_first})] == [("good", "bad")]


def test_a_conversation_makes_all_conversations() -> None:
    chat = Ranking([{"role": "user", "content": "hi"}], ("a", "b"), (1, 2), "ann")
    first, second = preferences({1: chat, 2: Ranking("plain", ("a", "b"), (1, 2), "ann")})
    assert first["prompt"] == [{"role": "user", "content": "hi"}]
    assert second["prompt"] == [{"role": "user", "content": "plain"}]
    assert second["rejected"] == [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs"])
def test_preferences_can_be_read_back(store: Store, tmp_path: Path, name: str) -> None:
    done = export_preferences(store, tmp_path / name, FIGURES, "drop")
    assert done.rows == 2
    read = read_preferences(done.path)
    assert [(each.prompt, each.completions, each.ranks, each.annotator) for each in read] == [
        ("p", ("x", "y"), (1, 2), "ann"),
        ("p", ("x", "z"), (1, 2), "ann"),
    ]
    assert done.card.name == "README.md"
    assert done.card.parent == (tmp_path if name.endswith("l") else tmp_path / "pairs")


def test_a_folder_is_not_overwritten(store: Store, tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    with pytest.raises(DataError, match="pairs exists already"):
        export_preferences(store, tmp_path / "pairs", FIGURES)
    with pytest.raises(DataError, match="is a folder: name a file"):
        export_rankings(store, tmp_path / "pairs", FIGURES)


def test_nothing_to_pair_is_said(store_url: str, tmp_path: Path) -> None:
    with closing(Store(store_url)) as empty, pytest.raises(DataError, match="no pair to export"):
        export_preferences(empty, tmp_path / "pairs", FIGURES)


def test_events_are_the_raw_log(store: Store, tmp_path: Path) -> None:
    rows = lines(export_events(store, tmp_path / "e.jsonl", FIGURES).path)
    assert [row["id"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["kind"] for row in rows] == ["item", "import", "ranking", "item", "import", "ranking"]
    assert rows[2]["body"]["ranks"] == [1, 2, 2]
    assert [row["previous"] for row in rows[1:]] == [row["hash"] for row in rows[:-1]]


def test_the_card_counts_and_does_not_overwrite(store: Store, tmp_path: Path) -> None:
    done = export_rankings(store, tmp_path / "r.jsonl", FIGURES)
    card = done.card.read_text()
    for row in ("| Rankings | 2 |", "| Rankings by ann | 1 |", "| Flagged by annotators: unclear | 1 |"):
        assert row in card
    assert "| Marked by the server: too_fast | 1 |" in card
    assert "| Agreement \\| of &lt;two> | 0.75 |" in card
    assert "| Completions written by | imported |" in card
    with store.read() as connection:
        assert connection.exec_driver_sql("SELECT value FROM meta WHERE name = 'log_head'").scalar() in card
    assert export_rankings(store, tmp_path / "r.jsonl", {}).card == tmp_path / "README.md", "ours is written anew"
    (tmp_path / "README.md").write_text("somebody's own")
    again = export_rankings(store, tmp_path / "r.jsonl", FIGURES)
    assert again.card == tmp_path / "r.README.md"
    assert MARK in again.card.read_text()
    assert (tmp_path / "README.md").read_text() == "somebody's own"
