"""Soft labels as a file, and the one ranking that they amount to."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlhf.soft_labels import SoftLabel, consensus, read_soft_labels, write_soft_labels
from rlhf.types import DataError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hé \n"}]
    labels = [SoftLabel("p", "a", "", 0.8, 0.5), SoftLabel(chat, "a", "b", 0.5, 1.0)]  # pyright: ignore
    write_soft_labels(tmp_path / "new" / "soft.jsonl", labels)
    assert read_soft_labels(tmp_path / "new" / "soft.jsonl") == labels


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}', "there is no 'probability'"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "probability": 1.2}', "probability is 1.2"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.7, "weight": -1}', "weight is -1"),
        ("{", "2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "soft.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.7}\n' + line + "\n")
    with pytest.raises(DataError, match=problem) as caught:
        read_soft_labels(path)
    assert f"{path}:2" in str(caught.value)


def test_consensus_orders_by_expected_wins() -> None:
    labels = [
        SoftLabel("p", "a", "b", 0.6, 1.0),
        SoftLabel("p", "a", "c", 0.9, 1.0),
        SoftLabel("p", "c", "b", 0.6, 1.0),
    ]
    labels += [SoftLabel("q", "x", "y", 0.5, 0.1)]
    p, q = consensus(labels)
    # a: 0.1 + 0.4, b: -0.1 - 0.1, c: -0.4 + 0.1
    assert dict(zip(p.completions, p.ranks, strict=True)) == {"a": 1, "b": 2, "c": 3}
    assert q.ranks == (1, 1)


def test_entropy() -> None:
    assert SoftLabel("p", "a", "b", 0.5, 1).entropy == 1
    assert SoftLabel("p", "a", "b", 1.0, 1).entropy == 0
    assert SoftLabel("p", "a", "b", 0.75, 1).entropy == pytest.approx(2 - 0.75 * math.log2(3))
