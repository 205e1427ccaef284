"""The web server of the ranking page: our own routes in front, the Gradio page behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from labeling_ui import loopback, rank_view
from labeling_ui.service import LabelService
from rlhf.config import LabelConfig
from rlhf.types import ConfigError, DataError, UserError


def create(
    service: LabelService, annotator: str, *, slots: int, guidelines: str | None = None, data: Path | None = None
) -> FastAPI:
    """The whole application for one annotator; `data` is a folder that the page must never serve."""
    app = loopback.application()
    app.add_exception_handler(UserError, _refused)
    _add_routes(app, service, annotator)
    page = rank_view.build(service, annotator, slots=slots, guidelines=guidelines or rank_view.WELCOME)
    style = (rank_view.STATIC / "rank.css").read_text(encoding="utf-8")
    return loopback.mount(app, page, head=f"<style>{style}</style>", data=data)


def serve(service: LabelService, config: LabelConfig, opened: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted; `opened` is told its address. Raises ConfigError or DataError."""
    loopback.check_host(config.host)
    slots = max(len(item.completions) for item in service.store.items(config.round))
    if slots > len(rank_view.LETTERS):
        raise DataError(f"an item has {slots} completions; the page can show {len(rank_view.LETTERS)}")
    app = create(service, config.annotator, slots=slots, guidelines=_guidelines(config), data=Path(config.store).parent)
    with loopback.listen(config.host, config.port) as listener:
        opened(loopback.address(listener))
        loopback.serve(app, listener)


def _guidelines(config: LabelConfig) -> str | None:
    try:
        return Path(config.guidelines).read_text(encoding="utf-8") if config.guidelines else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"guidelines is {config.guidelines!r}, which cannot be read: {error}") from error


class Submission(BaseModel):
    """What the page sends; places on the page count from 0."""

    model_config = ConfigDict(strict=True, extra="forbid")

    task: int
    key: str
    tiers: list[list[int]]
    aside: list[int] = []
    flags: dict[str, bool] = {}
    rationale: str | None = None
    seconds: float | None = None


class TaskName(BaseModel):
    """Which task a request is about."""

    model_config = ConfigDict(strict=True, extra="forbid")

    task: int


def _add_routes(app: FastAPI, service: LabelService, annotator: str) -> None:
    @app.get("/healthz")
    def health() -> dict[str, Any]:
        return {"ok": True}

    @app.post("/api/v1/submit")
    def submit(said: Submission) -> dict[str, Any]:
        more = {"flags": said.flags, "rationale": said.rationale, "seconds": said.seconds}
        receipt = service.submit(annotator, said.task, said.key, said.tiers, said.aside, **more)
        return {"saved": True, "ranking": receipt.ranking_id, "repeated": receipt.repeated}

    @app.post("/api/v1/skip")
    def skip(about: TaskName) -> dict[str, Any]:
        service.skip(annotator, about.task)
        return {"skipped": about.task}

    @app.post("/api/v1/undo")
    def undo() -> dict[str, Any]:
        return {"task": service.undo(annotator)}


def _refused(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=400)
