"""Downloads for admins, by routes of our own: Gradio's cache of files would be open to everybody who is logged in."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from labeling_ui.admin import Admin
from labeling_ui.downloads import DOWNLOADS, write
from labeling_ui.person import person_of

EXPORT = "/api/v1/admin/export"
"""Where the downloads are, by name of the file."""


def add_routes(app: FastAPI, admin: Admin) -> None:
    """`GET /api/v1/admin/export/NAME` for each of `DOWNLOADS`."""

    @app.get(f"{EXPORT}/{{name}}")
    def export(name: str, request: Request) -> FileResponse:
        person = person_of(request.scope)
        if name not in DOWNLOADS:
            raise HTTPException(404, "there is no such download")
        folder = Path(tempfile.mkdtemp(prefix="rlhf-export-"))
        try:
            write(admin, person, name, folder / name)
        except PermissionError as error:
            shutil.rmtree(folder)
            raise HTTPException(403, "this is for admins") from error
        except BaseException:
            shutil.rmtree(folder)
            raise
        done = BackgroundTask(shutil.rmtree, folder)
        return FileResponse(folder / name, media_type="application/jsonl", filename=name, background=done)
