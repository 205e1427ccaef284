"""Who reaches what, asked of the running application itself: every route, Gradio's own too, and every Gradio event.

What may be reached is written down here. A new route or event that somebody can reach fails until it is added, and is
thereby thought about.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from fastapi import FastAPI
from starlette.testclient import TestClient

from labeling_ui import app
from labeling_ui.admin import Admin
from labeling_ui.auth import IDLE_SECONDS, Accounts
from labeling_ui.gate import Gate
from labeling_ui.limits import Limits, RateLimit
from labeling_ui.passwords import Hashes
from labeling_ui.places import Policy
from labeling_ui.service import LabelService
from rlhf.config import LabelConfig
from rlhf.store import Store
from rlhf.types import Completion
from tests.labeling_ui.raw_requests import Behind, ask

URL = "https://label.example.org"
PASSWORD = "correct horse battery"

EVERYBODY = {
    *("GET /healthz", "GET /login", "POST /login", "GET /join", "POST /join"),
    *("GET /page/{file}", "GET /assets/{path:path}", "GET /static/{path:path}", "GET /theme.css", "GET /favicon.ico"),
}
GRADIO = {
    *("GET /", "HEAD /", "GET /config", "GET /gradio_api/info", "GET /gradio_api/heartbeat/{session_hash}"),
    *("GET /gradio_api/startup-events", "POST /gradio_api/run/{api_name}"),
}
PEOPLE = GRADIO | {
    *("POST /logout", "GET /password", "POST /password", "GET /api/v1/me", "GET /api/v1/recent"),
    *(f"POST /api/v1/{name}" for name in ("submit", "draft", "skip", "undo", "reopen", "quiz", "diff")),
}
FILES = {"GET /assets/{path:path}", "GET /static/{path:path}", "GET /theme.css", "GET /favicon.ico"}
ADMINS = {
    *("GET /admin", "GET /api/v1/admin/export/{name}"),
    *(each.replace(" ", " /admin", 1) for each in GRADIO | FILES),
}

OWN_TOKEN = {"POST /login", "POST /join", "POST /password", "POST /logout"}
"""Before a login there is no token; the other forms carry it as a field, which `test_app.py` looks at."""

EVENTS = {
    "": {"load": 1, "next": 1},
    "/admin": {"load": 1, "tick": 1, "select": 4, "click": 14, "change": 1, "submit": 2, "pick": 1, "then": 1},
}
"""What starts the Gradio events of each page, and how many: every one is a door of its own."""

EXAMPLES = {"api_name": "predict", "session_hash": "abc"}
"""Values of a path's parameters; of all others it is `x`."""


@dataclass
class World:
    """An application, and headers for each kind of visitor."""

    app: FastAPI
    visitors: dict[str, dict[str, str]]

    def reached(self, visitor: str, **changes: str | None) -> set[str]:
        """The routes whose requests get past the gate."""
        headers = self.visitors[visitor] | {"origin": URL}
        headers |= {name.replace("_", "-"): value for name, value in changes.items() if value is not None}
        for name in (name.replace("_", "-") for name, value in changes.items() if value is None):
            headers.pop(name, None)
        return {route for route in routes(self.app) if self._passes(route, headers)}

    def _passes(self, route: str, headers: dict[str, str]) -> bool:
        method, _, template = route.partition(" ")
        path = re.sub(r"\{(\w+)[^}]*\}", lambda part: EXAMPLES.get(part[1], "x"), template)
        ask(Gate(behind := Behind(), **gate_of(self.app)), method, path, headers)
        return bool(behind.scopes)


def gate_of(served: FastAPI) -> dict[str, Any]:
    """The settings of the gate that stands in front, which must be the outermost layer."""
    assert served.user_middleware[0].cls is Gate
    return served.user_middleware[0].kwargs


def routes(served: Any, before: str = "") -> Iterator[str]:
    """`METHOD /template` of every route, those of mounted applications and included routers too."""
    for route in served.routes:
        if hasattr(route, "original_router"):
            yield from routes(route.original_router, before)
        elif getattr(route, "methods", None):
            yield from (f"{method} {before}{route.path}" for method in route.methods)
        elif hasattr(route.app, "routes"):
            yield from routes(route.app, before + route.path)
        else:  # files
            yield f"GET {before}{route.path}/{{file}}"


def pages(served: Any) -> dict[str, Any]:
    """The Gradio pages, by the path at which they are mounted."""
    mounted = [route for route in served.routes if hasattr(getattr(route, "app", None), "get_blocks")]
    return {route.path: route.app.get_blocks() for route in mounted}


def events(served: FastAPI) -> dict[str, dict[str, int]]:
    return {
        path: dict(Counter(name for fn in page.fns.values() for _, name in fn.targets))
        for path, page in pages(served).items()
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    store = Store(tmp_path_factory.mktemp("world") / "labels.db")
    store.add_completions("p", [Completion(text, "m", 0) for text in ("x", "y")])
    now = [1e9]
    accounts = Accounts(store, lambda: now[0], Hashes(PasswordHasher(1, 8, 1)))
    visitors: dict[str, dict[str, str]] = {"anonymous": {}}
    for name, role in (("expired", "admin"), ("annotator", "annotator"), ("admin", "admin")):
        login = accounts.join(accounts.invite(role, name), "", PASSWORD)  # pyright: ignore
        token = str(login.session.csrf)
        visitors[name] = {"cookie": f"__Host-rlhf-session={login.token}", "x-csrf-token": token}
        now[0] += IDLE_SECONDS + 1 if name == "expired" else 0
    config = LabelConfig(store=store.name, accounts=True, public_url=URL)
    many = RateLimit(10**9, 1)
    return World(create(accounts, config, limits=Limits(many, many, many)), visitors)


def create(accounts: Accounts, config: LabelConfig, **more: Any) -> FastAPI:
    service = LabelService(accounts.store, Policy())
    admin = Admin(accounts.store, service.policy, accounts=accounts)
    return app.create(service, config, accounts, slots=2, admin=admin, **more)


def test_each_person_reaches_what_is_written_here_and_nothing_else(world: World) -> None:
    assert world.reached("anonymous") == EVERYBODY
    assert world.reached("expired") == EVERYBODY
    assert world.reached("annotator") == EVERYBODY | PEOPLE
    assert world.reached("admin") == EVERYBODY | PEOPLE | ADMINS


def test_the_routes_are_really_all_there(world: World) -> None:
    """The list would be short if routes were not found: these are ones that must be refused."""
    found = set(routes(world.app))
    assert found >= EVERYBODY | PEOPLE | ADMINS
    refused = {"POST /gradio_api/upload", "GET /gradio_api/file={path_or_url:path}", "GET /monitoring/summary"}
    refused |= {"POST /gradio_api/queue/join", "POST /gradio_api/cancel", "POST /gradio_api/call/{api_name}"}
    refused |= {
        "POST /gradio_api/component_server",
        "GET /logout",
        "GET /gradio_api/deep_link",
        "GET /admin/monitoring",
    }
    assert found >= refused
    assert len(found) > 150


@pytest.mark.parametrize(
    "origin", [None, "null", "https://evil.example", "http://label.example.org", "https://example.org"]
)
def test_no_write_from_elsewhere_reaches_anything(world: World, origin: str | None) -> None:
    for visitor in ("anonymous", "admin"):
        assert {route for route in world.reached(visitor, origin=origin) if route.startswith("POST")} == set()


@pytest.mark.parametrize("token", [None, "", "wrong", "annotator's"])
def test_no_write_without_the_token_reaches_anything_but_forms(world: World, token: str | None) -> None:
    token = world.visitors["annotator"]["x-csrf-token"] if token == "annotator's" else token
    reached = {route for route in world.reached("admin", x_csrf_token=token) if route.startswith("POST")}
    assert reached == OWN_TOKEN


def test_the_events_are_those_written_here(world: World) -> None:
    assert events(world.app) == EVENTS


def test_every_event_is_for_those_whose_page_it_is(world: World) -> None:
    with TestClient(world.app, base_url=URL, headers={"Origin": URL}) as client:
        for path, page in pages(world.app).items():
            for index in page.fns:
                for endpoint in ("run/predict", "queue/join", "call/predict", "api/predict", "call/v2/predict"):
                    for visitor, headers in world.visitors.items():
                        status = _call(client, f"{path}/gradio_api/{endpoint}", index, headers)
                        allowed = visitor == "admin" or (visitor == "annotator" and path == "")
                        opened = allowed and endpoint == "run/predict"
                        assert (status in (401, 403, 404)) != opened, (path, index, endpoint, visitor)
                wrong = world.visitors["admin"] | {"x-csrf-token": "x"}
                assert _call(client, f"{path}/gradio_api/run/predict", index, wrong) == 403


def _call(client: TestClient, url: str, index: int, headers: dict[str, str]) -> int:
    body = {"fn_index": index, "data": [], "session_hash": "abc"}
    return client.post(url, json=body, headers=headers).status_code


def test_what_is_added_makes_this_fail(tmp_path: Path) -> None:
    """A route of ours, a route and an event of Gradio's: each is found, and is not in the lists."""
    store = Store(tmp_path / "labels.db")
    store.add_completions("p", [Completion(text, "m", 0) for text in ("x", "y")])
    accounts = Accounts(store, hashes=Hashes(PasswordHasher(1, 8, 1)))
    login = accounts.join(accounts.invite("annotator", "anna"), "", PASSWORD)
    config = LabelConfig(store=store.name, accounts=True, public_url=URL)
    served = create(accounts, config)
    before = events(served)["/admin"]
    with pages(served)["/admin"] as page:
        page.load(lambda: None)
    served.add_api_route("/api/v1/forgotten", lambda: "", methods=["POST"])
    gradio: Any = next(route.app for route in served.routes if hasattr(getattr(route, "app", None), "get_blocks"))  # pyright: ignore
    gradio.add_api_route("/assets/forgotten", lambda: "")
    visitor = {"cookie": f"__Host-rlhf-session={login.token}", "x-csrf-token": str(login.session.csrf)}
    world = World(served, {"annotator": visitor})
    assert world.reached("annotator") - EVERYBODY - PEOPLE == {"POST /api/v1/forgotten"}
    assert "GET /admin/assets/forgotten" in set(routes(served))
    assert events(served)["/admin"] == before | {"load": before["load"] + 1} != EVENTS["/admin"]
