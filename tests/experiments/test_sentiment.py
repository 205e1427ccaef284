"""The demo's data and taste: readable text, a fixed split into prompt and completion, and a truth no training sees."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.sentiment import data, utility
from rlhf import pipeline, settings
from rlhf.config import RunConfig

FOLDER = Path(data.__file__).parent


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("nicole kidman makes it a party worth attending .", "Nicole kidman makes it a party worth attending."),
        ("eight legged freaks ? no big hairy deal .", "Eight legged freaks? No big hairy deal."),
        ("boisterous , heartfelt comedy .", "Boisterous, heartfelt comedy."),
        ("[u]nrelentingly stupid .", "Unrelentingly stupid."),
        (". . . a fine , focused piece of work .", "A fine, focused piece of work."),
        ("mordantly funny and intimately knowing . . .", "Mordantly funny and intimately knowing..."),
        ('if you like " the isle " you win .', 'If you like "the isle" you win.'),
        ('" extreme ops " exceeds ( all ) expectations .', '"Extreme ops" exceeds (all) expectations.'),
        ("the mix-and- match metaphors work .", "The mix-and-match metaphors work."),
        ("i know i'm late \x96 but i liked it !", "I know I'm late -- but I liked it!"),
        ("j . r . r . tolkien's middle-earth .", "J. r. r. tolkien's middle-earth."),
        ("a clich\u00e9 .", "A clich\u00e9."),
        ("oscar caliber cast doesn't live up to material", None),  # no end
        ("a delicate director , petter n\u00c3\u00a6ss .", None),  # badly encoded
        ("apesar de seus problemas , o filme consegue entreter .", None),  # not English
    ],
)
def test_corpus_form_becomes_ordinary_text(raw: str, text: str | None) -> None:
    assert data.detokenise(raw) == text


def test_demonstrations_join_into_clean_reviews_of_moderate_length() -> None:
    rows = data.demonstrations()
    assert 5000 < len(rows) < 8530
    for row in rows:
        prompt, completion = row["prompt"].split(" "), row["completion"].split(" ")
        assert len(prompt) in data.PROMPT_WORDS
        assert completion[0] == ""  # the space belongs to the completion: a prompt that ends in one tokenises badly
        assert len(completion) - 1 in data.COMPLETION_WORDS
        review = row["prompt"] + row["completion"]
        assert review == review.strip()
        assert not re.search(r" [,.;:?!)]|\s\s|\( |[\[\]\n]", review), review
        assert review[-1] in '.!?")'
    lengths = Counter(len(row["prompt"].split()) for row in rows)
    assert min(lengths.values()) > len(rows) / 4  # 4, 5 and 6 words about equally often


def test_prompts_are_the_demonstrations_beginnings_once_each() -> None:
    prompts = [row["prompt"] for row in data.prompts()]
    assert len(prompts) == len(set(prompts))
    assert set(prompts) == {row["prompt"] for row in data.demonstrations()}


def test_rows_are_the_same_every_time() -> None:
    first = data.demonstrations()
    data._cut_reviews.cache_clear()
    assert data.demonstrations() == first


def test_taste_reads_the_whole_review() -> None:
    assert utility.vader("The film is", " wonderful.") > 0.5 > 0 > utility.vader("The film is", " horrible.")
    assert utility.vader("The film is not", " good.") < 0 < utility.vader("", " good.")
    conversation: Any = [{"role": "user", "content": "I hate it."}]
    assert utility.vader(conversation, "") < 0
    assert utility.judge(["It is", "It is"], [" great.", " bad."]) == [
        utility.vader("It is", " great."),
        utility.vader("It is", " bad."),
    ]


@pytest.mark.parametrize("name", ["config.yaml", "tiny.yaml"])
def test_nothing_that_trains_is_told_the_taste(name: str) -> None:
    config, _ = settings.parse(RunConfig, ["--config", str(FOLDER / name)], command="run")
    stages = pipeline.resolve(config)
    for stage in ("sft", "sample", "reward", "ppo"):
        assert "utility" not in repr(stages[stage]), stage
    assert stages["ppo"].reward == f"{stages['reward'].output}/model"
    assert stages["label"].simulate.utility == "experiments.sentiment.utility:vader"
    assert stages["evaluate"].judge == "experiments.sentiment.utility:judge"
    assert "utility" in yaml.safe_dump(yaml.safe_load((FOLDER / name).read_text()))
