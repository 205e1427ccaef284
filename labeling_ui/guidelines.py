"""What annotators are told to look for, and the quiz that shows whether they have read it.

A version of the guidelines is one text and one quiz for ever: each ranking names the version under which it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from rlhf.event_log import add_event, now
from rlhf.judgements import insert
from rlhf.schema import guidelines, quiz_results
from rlhf.store import Store
from rlhf.types import ConfigError, DataError


@dataclass(frozen=True)
class Question:
    """One question of a quiz as an annotator sees it."""

    text: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What belongs to a question once it has been answered."""

    right: bool
    explanation: str


@dataclass(frozen=True)
class Onboarding:
    """What an annotator reads, and answers, before the first item."""

    guidelines: str | None
    """Markdown; None where the round has no guidelines of its own."""
    version: int
    questions: tuple[Question, ...]
    passed: bool
    """True where there is nothing to answer."""


@dataclass(frozen=True)
class QuizResult:
    """How a quiz went; it can be taken again."""

    passed: bool
    answers: tuple[Answer, ...]


# ---------------------------------------------------------------------------------------------------- from the files


def publish(store: Store, version: int, text_file: str | None, quiz_file: str | None) -> None:
    """Store the guidelines and the quiz as this version; nothing happens where there are none.

    Raises ConfigError where a file cannot be read, or says something else than this version has said before.
    """
    if text_file is None and quiz_file is None:
        return
    text = "" if text_file is None else _read(text_file, "guidelines")
    quiz = [] if quiz_file is None else read_quiz(quiz_file)
    with store.write() as connection:
        known = connection.execute(sa.select(guidelines).where(guidelines.c.version == version)).one_or_none()
        if known is None:
            row = {"version": version, "text": text, "quiz": quiz, "created_at": now()}
            connection.execute(sa.insert(guidelines).values(row))
            add_event(connection, "guidelines", version=version, text=text, quiz=quiz)
            return
    for name, file, same in (("guidelines", text_file, known.text == text), ("quiz", quiz_file, known.quiz == quiz)):
        if file is not None and not same:
            raise ConfigError(
                f"{name} is {file!r}, which says something else than version {version} has said so far: "
                f"raise guideline_version to {version + 1}, or take the old {name} again"
            )


def read_quiz(path: str) -> list[dict[str, Any]]:
    """The questions of a YAML file, checked. Raises ConfigError naming the file and the question."""
    import yaml

    try:
        found = yaml.safe_load(_read(path, "quiz"))
    except yaml.YAMLError as error:
        raise ConfigError(f"quiz is {path!r}, which is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{path} must be a list of questions, each with question, options, answer and explanation")
    return [_question(each, f"{path}, question {number}") for number, each in enumerate(found, start=1)]


def _question(found: Any, where: str) -> dict[str, Any]:
    names = ("question", "options", "answer", "explanation")
    if not isinstance(found, Mapping) or set(found) != set(names):
        given = ", ".join(map(str, found)) if isinstance(found, Mapping) else repr(found)
        raise ConfigError(f"{where} must have {', '.join(names)}; it has {given}")
    options = found["options"]
    if not isinstance(options, list) or len(options) < 2:
        raise ConfigError(f"{where}: options must be a list of two or more")
    for what, value in (
        *((name, found[name]) for name in ("question", "explanation")),
        *(("option", o) for o in options),
    ):
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(
                f"{where}: {what} {value!r} is no text (YAML reads a bare yes, no or 3 as another thing: quote it)"
            )
    if len(set(options)) < len(options):
        raise ConfigError(f"{where}: two options are the same")
    if found["answer"] not in options:
        raise ConfigError(
            f"{where}: answer {found['answer']!r} is not one of the options; write it just as it stands there"
        )
    return {name: found[name] for name in names}


def _read(path: str, name: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is {path!r}, which cannot be read: {error}") from error


# ---------------------------------------------------------------------------------------------------- for annotators


def onboarding(connection: sa.Connection, annotator: str, version: int) -> Onboarding:
    """What this version tells and asks an annotator."""
    row = _row(connection, version)
    if row is None:
        return Onboarding(None, version, (), passed=True)
    questions = tuple(Question(each["question"], tuple(each["options"])) for each in row.quiz)
    return Onboarding(row.text or None, version, questions, passed(connection, annotator, version))


def passed(connection: sa.Connection, annotator: str, version: int) -> bool:
    """Whether the annotator may begin: the quiz of this version is passed, or there is none."""
    row = _row(connection, version)
    if row is None or not row.quiz:
        return True
    theirs = (
        quiz_results.c.annotator == annotator,
        quiz_results.c.guideline_version == version,
        quiz_results.c.passed,
    )
    return connection.scalar(sa.select(quiz_results.c.id).where(*theirs).limit(1)) is not None


def answer_quiz(connection: sa.Connection, annotator: str, version: int, answers: Sequence[int]) -> QuizResult:
    """Store the answers (for each question the number of an option, from 0) and say which are right.

    All must be. Raises DataError where there is no quiz, or the answers do not fit its questions.
    """
    row = _row(connection, version)
    if row is None or not row.quiz:
        raise DataError("there is no quiz to answer")
    if len(answers) != len(row.quiz):
        raise DataError(f"{len(answers)} answers were given to {len(row.quiz)} questions: answer each of them")
    for number, (chosen, each) in enumerate(zip(answers, row.quiz, strict=True), start=1):
        if type(chosen) is not int or not 0 <= chosen < len(each["options"]):
            raise DataError(f"the answer to question {number} is not one of its {len(each['options'])} options")
    right = [each["options"][chosen] == each["answer"] for chosen, each in zip(answers, row.quiz, strict=True)]
    result = {"guideline_version": version, "answers": list(answers), "passed": all(right)}
    insert(connection, quiz_results, {"annotator": annotator, "created_at": now(), **result})
    add_event(connection, "quiz", annotator, **result)
    explained = zip(right, row.quiz, strict=True)
    return QuizResult(all(right), tuple(Answer(good, each["explanation"]) for good, each in explained))


def _row(connection: sa.Connection, version: int) -> sa.Row[Any] | None:
    return connection.execute(sa.select(guidelines).where(guidelines.c.version == version)).one_or_none()
