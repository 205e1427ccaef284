"""Guidelines keep to their version, and the quiz stands before the first item."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from labeling_ui import guidelines
from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService
from rlhf.schema import quiz_results
from rlhf.store import Store
from rlhf.types import Completion, ConfigError, DataError

QUIZ = """
- question: Two completions are equally good. What do you do?
  options: [Put them on one rank, Toss a coin]
  answer: Put them on one rank
  explanation: A tie is an answer, too.
- question: Does the order on the page mean anything?
  options: ["yes", "no"]
  answer: "no"
  explanation: It is drawn anew for each of you.
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "labels.db")
    store.add_completions("p", [Completion(text, "m", 0) for text in "ab"])
    return store


def files(folder: Path, text: str = "Be fair.", quiz: str = QUIZ) -> tuple[str, str]:
    for name, content in (("guide.md", text), ("quiz.yaml", quiz)):
        (folder / name).write_text(content, encoding="utf-8")
    return str(folder / "guide.md"), str(folder / "quiz.yaml")


def test_the_quiz_comes_first(store: Store, tmp_path: Path) -> None:
    guidelines.publish(store, 1, *files(tmp_path))
    service = LabelService(store, Policy())
    told = service.onboarding("me")
    assert (told.guidelines, told.version, told.passed) == ("Be fair.", 1, False)
    assert told.questions[1].options == ("yes", "no")
    assert "explanation" not in repr(told)
    for call in (lambda: service.next_task("me"), lambda: service.undo("me")):
        with pytest.raises(DataError, match=r"answer the quiz on the guidelines \(version 1\) first"):
            call()
    failed = service.answer_quiz("me", [0, 0])
    assert (failed.passed, [each.right for each in failed.answers]) == (False, [True, False])
    assert failed.answers[1].explanation == "It is drawn anew for each of you."
    assert not service.onboarding("me").passed
    assert service.answer_quiz("me", [0, 1]).passed
    assert service.next_task("me") is not None
    assert not service.onboarding("you").passed, "each for themselves"
    with store.read() as connection:
        rows = connection.execute(sa.select(quiz_results).order_by(quiz_results.c.id)).all()
    assert [(row.annotator, row.answers, row.passed, row.guideline_version) for row in rows] == [
        ("me", [0, 0], False, 1),
        ("me", [0, 1], True, 1),
    ]


def test_a_new_version_asks_again_and_stands_on_the_rankings(store: Store, tmp_path: Path) -> None:
    guidelines.publish(store, 1, *files(tmp_path))
    LabelService(store, Policy()).answer_quiz("me", [0, 1])
    guidelines.publish(store, 2, *files(tmp_path, "Be fair and quick."))
    service = LabelService(store, Policy(), guideline_version=2)
    with pytest.raises(DataError, match="version 2"):
        service.next_task("me")
    service.answer_quiz("me", [0, 1])
    task = service.next_task("me")
    assert task is not None
    service.submit("me", task.id, task.key, [[0], [1]])
    assert [ranking.guideline_version for ranking in store.rankings()] == [2]
    assert LabelService(store, Policy()).onboarding("me").guidelines == "Be fair.", "the old text stays"


def test_a_version_says_one_thing_for_ever(store: Store, tmp_path: Path) -> None:
    for _ in range(2):
        guidelines.publish(store, 3, *files(tmp_path))
    with pytest.raises(
        ConfigError, match=r"guide.md', which says something else than version 3 .*to 4, or take the old"
    ):
        guidelines.publish(store, 3, *files(tmp_path, "Be quick."))
    with pytest.raises(ConfigError, match=r"quiz is .*raise guideline_version to 4"):
        guidelines.publish(store, 3, *files(tmp_path, quiz=QUIZ.replace("Toss", "Throw")))
    assert LabelService(store, Policy(), guideline_version=3).onboarding("me").guidelines == "Be fair."


def test_without_files_there_is_nothing_to_pass(store: Store, tmp_path: Path) -> None:
    guidelines.publish(store, 1, None, None)
    service = LabelService(store, Policy())
    assert service.onboarding("me") == guidelines.Onboarding(None, 1, (), passed=True)
    with pytest.raises(DataError, match="there is no quiz"):
        service.answer_quiz("me", [])
    guidelines.publish(store, 1, files(tmp_path)[0], None)
    assert service.onboarding("me").passed
    assert service.next_task("me") is not None


def test_simulated_annotators_take_no_quiz(store: Store, tmp_path: Path) -> None:
    guidelines.publish(store, 1, *files(tmp_path))
    assert LabelService(store, Policy(), quiz=False).next_task("simulated-1") is not None


@pytest.mark.parametrize("answers", [[0], [0, 1, 1], [0, 2], [0, -1], [0, True], [0, "no"]])
def test_answers_that_fit_no_question(store: Store, tmp_path: Path, answers: list[int]) -> None:
    guidelines.publish(store, 1, *files(tmp_path))
    with pytest.raises(DataError, match=r"answers were given to 2 questions|answer to question 2 is not one of its 2"):
        LabelService(store, Policy()).answer_quiz("me", answers)
    with store.read() as connection:
        assert connection.execute(sa.select(quiz_results)).all() == []


@pytest.mark.parametrize(
    ("quiz", "problem"),
    [
        ("[", "is not YAML"),
        ("", "must be a list of questions"),
        ("question: x", "must be a list of questions"),
        (QUIZ.replace("answer: Put", "antwort: Put"), "question 1 must have question, options, answer, explanation"),
        (QUIZ.replace('["yes", "no"]', "[yes, no]"), "question 2: option True is no text.*quote it"),
        (QUIZ.replace('["yes", "no"]', '["no"]'), "question 2: options must be a list of two or more"),
        (QUIZ.replace('["yes", "no"]', '["no", "no"]'), "question 2: two options are the same"),
        (QUIZ.replace('answer: "no"', 'answer: "never"'), "question 2: answer 'never' is not one of the options"),
        (QUIZ.replace("A tie is an answer, too.", "''"), "question 1: explanation '' is no text"),
        ("- 3", "question 1 must have .* it has 3"),
    ],
)
def test_a_quiz_with_mistakes(store: Store, tmp_path: Path, quiz: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        guidelines.publish(store, 1, *files(tmp_path, quiz=quiz))
    assert LabelService(store, Policy()).onboarding("me").passed, "nothing was stored"


def test_files_that_are_not_there(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"guidelines is .*cannot be read"):
        guidelines.publish(store, 1, str(tmp_path / "none.md"), None)
    with pytest.raises(ConfigError, match=r"quiz is .*cannot be read"):
        guidelines.publish(store, 1, None, str(tmp_path / "none.yaml"))
