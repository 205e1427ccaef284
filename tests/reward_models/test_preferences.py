"""Rankings from every source reach the model as the same token ids; what cannot be used is counted."""

from __future__ import annotations

import json

import pytest

from reward_models.preferences import distinct_rows, encode_ranking, load_rankings, prepare, tie_strength
from rlhf.data import is_held_out
from rlhf.judgements import Judgement, add_ranking, insert
from rlhf.models import load_tokenizer
from rlhf.rankings import write_rankings
from rlhf.schema import assignments
from rlhf.store import Store
from rlhf.text import encode_prompt
from rlhf.types import DataError, Ranking


def ranking(prompt="the film is", texts=(" good", " bad", " dull"), ranks=(1, 2, 2), annotator="ann", **more):
    ranks = ranks[: len(texts)]
    return Ranking(prompt, tuple(texts), tuple(ranks), annotator, **more)


@pytest.fixture
def tokenizer(tiny_model_folder):
    return load_tokenizer(str(tiny_model_folder))


def prepared(rankings, tokenizer, **changes):
    settings = {"held_out": 0.0, "max_prompt_tokens": 64, "max_completion_tokens": 64, "ties_teach": False}
    return prepare(rankings, tokenizer, **(settings | changes))


def test_store_and_file_give_the_same_rankings(tmp_path):
    given = [ranking(), ranking("it was", annotator="bob", ranks=(None, 1, 2))]
    store = Store(tmp_path / "labels.db")
    store.import_rankings(given)
    store.export(tmp_path / "rankings.jsonl")
    from_store, _ = load_rankings(str(tmp_path / "labels.db"))
    from_url, _ = load_rankings(f"sqlite:///{tmp_path / 'labels.db'}")
    from_file, left_out = load_rankings(str(tmp_path / "rankings.jsonl"))
    assert from_store == from_file == from_url
    assert {(r.prompt, r.completions, r.ranks) for r in from_file} == {
        (r.prompt, r.completions, r.ranks) for r in given
    }
    assert left_out == {}


def test_preference_pairs_are_rankings_of_two(tmp_path):
    rows = [{"prompt": "it was", "chosen": " good", "rejected": " bad"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (found,), _ = load_rankings(str(path))
    assert (found.completions, found.ranks) == ((" good", " bad"), (1, 2))
    renamed = [{"question": "it was", "better": " good", "worse": " bad"}]
    path.write_text("\n".join(map(json.dumps, renamed)))
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert load_rankings(str(path), columns=columns)[0][0].completions == found.completions


def test_bad_rows_are_named(tmp_path):
    path = tmp_path / "rankings.jsonl"
    write_rankings(path, [ranking()])
    path.write_text('{"prompt": "p"}\n' + path.read_text())
    found, left_out = load_rankings(str(path))
    assert len(found) == 1
    assert "line 1 of rankings.jsonl" in next(iter(left_out))


def test_only_mine(tmp_path):
    path = str(tmp_path / "rankings.jsonl")
    write_rankings(path, [ranking(annotator="me"), ranking("it was", annotator="you"), ranking("so", annotator="you")])
    mine, _ = load_rankings(path, annotators=["me"])
    assert [r.annotator for r in mine] == ["me"]
    with pytest.raises(DataError, match=r"no ranking by nobody-here, but by you \(2\), me \(1\)"):
        load_rankings(path, annotators=["nobody-here"])


def test_nothing_to_read_is_said_plainly(tmp_path):
    Store(tmp_path / "labels.db")
    with pytest.raises(DataError, match=r"labels\.db holds no rankings yet"):
        load_rankings(str(tmp_path / "labels.db"))
    with pytest.raises(DataError, match="there is no label store"):
        load_rankings(str(tmp_path / "elsewhere.db"))
    with pytest.raises(DataError, match="no such file"):
        load_rankings(str(tmp_path / "elsewhere.jsonl"))


def test_the_last_word_on_an_item_stands_alone(tmp_path):
    """What an admin adjudicated; those who ask for one annotator's rankings get what that annotator said."""
    store = Store(tmp_path / "labels.db")
    store.import_rankings([ranking(), ranking(annotator="bob"), ranking("it was", annotator="bob")])
    with store.write() as connection:
        row = {"item_id": 1, "annotator": "boss", "kind": "adjudication", "presented_order": [0, 1, 2]}
        place = insert(connection, assignments, {**row, "state": "done", "leased_until": 0.0, "event": 1})
        add_ranking(connection, place, "final", Judgement((3, 2, 1)))
    found, _ = load_rankings(str(tmp_path / "labels.db"))
    assert sorted((each.annotator, each.ranks) for each in found) == [("bob", (1, 2, 2)), ("boss", (3, 2, 1))]
    found, _ = load_rankings(str(tmp_path / "labels.db"), annotators=["ann"])
    assert [(each.annotator, each.ranks) for each in found] == [("ann", (1, 2, 2))]


def test_no_prompt_is_on_both_sides(tokenizer):
    rankings = [ranking(f"film {i % 40} is", annotator=f"a{i % 3}") for i in range(120)]
    found = prepared(rankings, tokenizer, held_out=0.3)
    assert len(found.train) + len(found.held_out) == 120
    assert found.held_out
    for encoded in found.train:
        assert not is_held_out(encoded.ranking.prompt, 0.3)
    trained = {encoded.ranking.prompt for encoded in found.train}
    assert trained.isdisjoint(encoded.ranking.prompt for encoded in found.held_out)


def test_row_is_prompt_completion_eos_and_truncation_keeps_eos(tokenizer):
    encoded = encode_ranking(
        ranking(texts=(" good", " a very long and boring story")), tokenizer, max_completion_tokens=4
    )
    prompt = encode_prompt(tokenizer, "the film is")
    for row, length in zip(encoded.rows, encoded.lengths, strict=True):
        assert list(row[: len(prompt)]) == prompt
        assert row[-1] == tokenizer.eos_token_id
        assert row.count(tokenizer.eos_token_id) == 1
        assert length == len(row) - len(prompt) <= 4
    assert list(encoded.rows[1][len(prompt) : -1]) == tokenizer(" a very long and boring story").input_ids[:3]


def test_copies_become_one(tokenizer):
    same_rank = encode_ranking(ranking(texts=(" a", " b", " a"), ranks=(1, 3, 1)), tokenizer, max_completion_tokens=9)
    assert (same_rank.ranking.completions, same_rank.ranking.ranks) == ((" a", " b"), (1, 2))
    other = ranking(texts=(" a", " b", " a", " c"), ranks=(1, 2, 3, 4))
    contradiction = encode_ranking(other, tokenizer, max_completion_tokens=9)
    assert (contradiction.ranking.completions, contradiction.ranking.ranks) == ((" a", " b", " c"), (None, 1, 2))
    assert contradiction.ranked == [1, 2]
    assert encode_ranking(ranking(texts=(" a", " a"), ranks=(1, 2)), tokenizer, max_completion_tokens=9) is None


def test_texts_that_differ_beyond_the_limit_cannot_be_told_apart(tokenizer):
    texts = (" the film is good", " the film is bad", " no")
    encoded = encode_ranking(ranking(texts=texts, ranks=(1, 3, 2)), tokenizer, max_completion_tokens=4)
    assert encoded is None  # two of the three are one text, ranked at two places
    encoded = encode_ranking(ranking(texts=texts, ranks=(1, 3, 2)), tokenizer, max_completion_tokens=9)
    assert encoded.ranked == [0, 1, 2]


def test_what_is_left_out_is_counted(tokenizer):
    rankings = [
        ranking("the film is " * 30),
        ranking("one", ranks=(1, 1, 1)),
        ranking("two", texts=(" a", " a"), ranks=(1, 2)),
        ranking("three", ranks=(None, None, 1)),
        ranking("four"),
    ]
    found = prepared(rankings, tokenizer)
    assert [encoded.ranking.prompt for encoded in found.train] == ["four"]
    assert found.left_out == {
        "prompt longer than max_prompt_tokens = 64": 1,
        "one tie of all, from which Plackett-Luce learns nothing": 1,
        "fewer than two different completions are ranked": 2,
    }
    assert len(prepared(rankings, tokenizer, ties_teach=True).train) == 2
    with pytest.raises(DataError, match=r"nothing is left to train on: of 1 rankings .* 1 left out: one tie of all"):
        prepared(rankings[1:2], tokenizer)


def test_tie_strength_is_the_share_of_ties(tokenizer):
    rankings = [ranking(f"p {i}", ranks=(1, 1, 2)) for i in range(500)]  # 1 tie in 3 pairs
    nu = tie_strength(prepared(rankings, tokenizer).train)
    assert nu / (2 + nu) == pytest.approx(1 / 3, abs=1e-3)
    none = tie_strength(prepared([ranking(ranks=(1, 2, 3))], tokenizer).train)
    assert 0 < none / (2 + none) < 0.15


def test_each_completion_is_calibrated_on_once(tokenizer):
    found = prepared([ranking(), ranking(annotator="bob"), ranking(ranks=(None, 1, 2), annotator="eve")], tokenizer)
    assert len(distinct_rows(found.train)) == 3
