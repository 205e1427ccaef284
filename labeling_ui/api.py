"""The page's own routes: strict bodies in, `{"error": ...}` out, and always for the person whom the gate let in."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from labeling_ui.gate import SECURITY_HEADERS, TOKEN, store_trouble
from labeling_ui.person import PERSON, Person, person_of
from labeling_ui.refusals import Conflict, NotAllowed
from labeling_ui.service import LabelService
from rlhf.types import StoreError, UserError

STATUS = {NotAllowed: 403, Conflict: 409, StoreError: 503}
"""What is refused with another status than 400."""


class Body(BaseModel):
    """What the page sends; places on the page count from 0."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Flags(Body):
    """What an annotator may say of an item; ratings are by place on the page."""

    unclear: bool = False
    all_bad: bool = False
    cannot_judge: bool = False
    unsafe: bool = False
    note: str | None = None
    ratings: dict[str, list[int | None]] = {}


class Submission(Body):
    task: int
    key: str
    tiers: list[list[int]]
    aside: list[int] = []
    flags: Flags = Flags()
    rationale: str | None = None
    seconds: float | None = None


class Draft(Body):
    task: int
    body: dict[str, Any]


class Skip(Body):
    task: int
    reason: str | None = None


class TaskName(Body):
    task: int


class Pair(Body):
    """Two completions of a task."""

    task: int
    first: int
    second: int


class Answers(Body):
    answers: list[int]


class Undo(Body):
    task: int | None = None
    """What the page believes to be last, so that an undo that is sent again takes back nothing more."""


def _person(request: Request) -> Person:
    return person_of(request.scope)


ME: Any = Depends(_person)


def add_routes(app: FastAPI, service: LabelService) -> None:
    """`/healthz` and `/api/v1/...`, and how every refusal is worded."""
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(PermissionError, _unknown)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _answered)
    app.add_exception_handler(Exception, _broken)
    _add_state(app, service)
    _add_judging(app, service)
    _add_reading(app, service)


def _add_state(app: FastAPI, service: LabelService) -> None:
    @app.get("/healthz")
    def health() -> JSONResponse:
        try:
            service.store.counts()
        except UserError:
            return JSONResponse({"ok": False}, 503)
        return JSONResponse({"ok": True})

    @app.get("/api/v1/me")
    def me(request: Request, person: Person = ME) -> dict[str, Any]:
        return {"name": person.name, "role": person.role, "login": request.scope.get(TOKEN) is not None}


def _add_judging(app: FastAPI, service: LabelService) -> None:
    @app.post("/api/v1/submit")
    def submit(said: Submission, person: Person = ME) -> dict[str, Any]:
        flags = said.flags.model_dump(exclude_defaults=True)
        more = {"flags": flags, "rationale": said.rationale, "seconds": said.seconds}
        receipt = service.submit(person.name, said.task, said.key, said.tiers, said.aside, **more)
        return {"saved": True, "ranking": receipt.ranking_id, "repeated": receipt.repeated}

    @app.post("/api/v1/draft")
    def draft(said: Draft, person: Person = ME) -> dict[str, Any]:
        return {"saved_at": service.save_draft(person.name, said.task, said.body)}

    @app.post("/api/v1/skip")
    def skip(said: Skip, person: Person = ME) -> dict[str, Any]:
        service.skip(person.name, said.task, said.reason)
        return {"skipped": said.task}

    @app.post("/api/v1/undo")
    def undo(said: Undo | None = None, person: Person = ME) -> dict[str, Any]:
        return {"task": service.undo(person.name, None if said is None else said.task)}

    @app.post("/api/v1/reopen")
    def reopen(said: TaskName, person: Person = ME) -> dict[str, Any]:
        service.reopen(person.name, said.task)
        return {"task": said.task}

    @app.post("/api/v1/quiz")
    def quiz(said: Answers, person: Person = ME) -> dict[str, Any]:
        return asdict(service.answer_quiz(person.name, said.answers))


def _add_reading(app: FastAPI, service: LabelService) -> None:
    @app.post("/api/v1/diff")
    def diff(said: Pair, person: Person = ME) -> dict[str, Any]:
        return {"parts": service.diff(person.name, said.task, said.first, said.second)}

    @app.get("/api/v1/recent")
    def recent(person: Person = ME) -> dict[str, Any]:
        return {"tasks": [asdict(past) for past in service.recent(person.name)]}


def _refused(request: Request, error: Exception) -> JSONResponse:
    status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 400)
    if status < 500:
        return JSONResponse({"error": str(error)}, status)
    return JSONResponse({"error": store_trouble(error, request.scope.get(PERSON))}, status)


def _unknown(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 401)


def _malformed(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
    return JSONResponse({"error": f"{where}: {first['msg']}"}, 400)


def _answered(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


def _broken(_request: Request, _error: Exception) -> JSONResponse:
    """A bug; its traceback is in the terminal. Starlette answers it outside of the gate, so the headers go here."""
    return JSONResponse({"error": "the server made a mistake: its terminal says which"}, 500, SECURITY_HEADERS)
