"""The server's own rules: routes, headers, who may ask, and how it refuses to start."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from labeling_ui import app, loopback
from labeling_ui.assignment import Policy
from labeling_ui.service import LabelService, Task
from rlhf.config import LabelConfig
from rlhf.store import Store
from rlhf.types import Completion, ConfigError, DataError

ORIGIN = "http://localhost:7860"


def make_service(folder: Path) -> LabelService:
    store = Store(folder / "labels.db")
    store.add_completions("p", [Completion(text, "m", 0) for text in ("x", "y", "z")])
    return LabelService(store, Policy())


@pytest.fixture
def service(tmp_path: Path) -> LabelService:
    return make_service(tmp_path)


@pytest.fixture
def client(service: LabelService, tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(app.create(service, "me", slots=3, data=tmp_path), base_url=ORIGIN) as client:
        yield client


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client that only looks, or is turned away."""
    folder = tmp_path_factory.mktemp("visitor")
    with TestClient(app.create(make_service(folder), "me", slots=3, data=folder), base_url=ORIGIN) as client:
        yield client


@pytest.fixture
def task(service: LabelService) -> Task:
    found = service.next_task("me")
    assert found is not None
    return found


def message(given: Task, **changes: Any) -> dict[str, Any]:
    return {"task": given.id, "key": given.key, "tiers": [[0], [1, 2]]} | changes


def test_submit_skip_and_undo(client: TestClient, service: LabelService, task: Task) -> None:
    first = client.post("/api/v1/submit", json=message(task, seconds=1.5, rationale="r", flags={"unsafe": True}))
    assert (first.status_code, first.json()) == (200, {"saved": True, "ranking": 1, "repeated": False})
    again = client.post("/api/v1/submit", json=message(task, rationale="r", flags={"unsafe": True}))
    assert again.json() == {"saved": True, "ranking": 1, "repeated": True}
    assert service.store.rankings()[0].seconds == 1.5
    assert client.post("/api/v1/undo").json() == {"task": task.id}
    assert client.post("/api/v1/undo").json() == {"task": None}
    assert client.post("/api/v1/skip", json={"task": task.id}).json() == {"skipped": task.id}
    assert service.progress("me").skipped == 1


def test_what_is_wrong_is_told_in_words(client: TestClient, service: LabelService, task: Task) -> None:
    incomplete = client.post("/api/v1/submit", json=message(task, tiers=[[0], [1]]))
    assert (incomplete.status_code, incomplete.json()) == (400, {"error": "rank each completion once, or set it aside"})
    for wrong in (message(task, tiers="012"), message(task, task="1"), message(task, annotator="you"), {}):
        assert client.post("/api/v1/submit", json=wrong).status_code == 422
    assert service.store.counts().rankings == 0


@pytest.mark.parametrize("path", ["/api/v1/submit", "/gradio_api/run/predict", "/gradio_api/upload", "/anything"])
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:9999", "https://evil.example:7860"]
)
def test_other_sites_may_not_send(visitor: TestClient, path: str, origin: str) -> None:
    answer = visitor.post(path, json={}, headers={"Origin": origin})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_our_own_page_and_a_tunnel_may_send(client: TestClient, task: Task) -> None:
    same = client.post("/api/v1/submit", json=message(task), headers={"Origin": ORIGIN})
    tunnel = {"Host": "127.0.0.1:9000", "Origin": "http://127.0.0.1:9000"}
    assert (same.status_code, client.post("/api/v1/undo", headers=tunnel).status_code) == (200, 200)


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.168.1.7:7860", "", "[::2]:7860"])
def test_the_page_answers_to_its_own_name_only(visitor: TestClient, host: str) -> None:
    assert visitor.get("/healthz", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7860", "[::1]:7860"])
def test_names_of_this_machine(visitor: TestClient, host: str) -> None:
    assert visitor.get("/healthz", headers={"Host": host}).json() == {"ok": True}


@pytest.mark.parametrize("path", ["/", "/config", "/healthz", "/gradio_api/info"])
def test_no_answer_lets_another_site_read_it(visitor: TestClient, path: str) -> None:
    answer = visitor.get(path, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    for name, value in loopback.SECURITY_HEADERS.items():
        assert answer.headers[name] == value


def test_a_preflight_from_elsewhere_fails(visitor: TestClient) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert visitor.options("/api/v1/submit", headers=asked).status_code in (400, 403)


def test_nothing_is_offered_as_an_api(visitor: TestClient) -> None:
    assert visitor.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for path in ("/docs", "/openapi.json", "/monitoring", "/monitoring/summary"):
        assert visitor.get(path).status_code in (403, 404), path


def test_the_store_is_not_served(client: TestClient, service: LabelService) -> None:
    for path in (f"/gradio_api/file={service.store.name}", f"/file={service.store.name}", "/gradio_api/file=labels.db"):
        assert client.get(path).status_code in (403, 404), path


def test_large_requests_are_refused(client: TestClient, task: Task) -> None:
    assert client.post("/api/v1/submit", json=message(task, rationale="x" * loopback.MAX_BODY)).status_code == 413


def test_the_page_carries_no_model_text_before_it_asks(client: TestClient, service: LabelService) -> None:
    service.store.add_completions("SECRET prompt", [Completion("SECRET text", "m", 0), Completion("y", "m", 1)])
    assert "SECRET" not in client.get("/").text + client.get("/config").text


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "example.org", "::"])
def test_a_page_without_login_stays_on_this_machine(service: LabelService, host: str) -> None:
    with pytest.raises(ConfigError, match="may be reached from this machine only"):
        app.serve(service, LabelConfig(store=service.store.name, host=host), print)


def test_a_port_in_use_and_missing_guidelines_are_named(service: LabelService, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = LabelConfig(store=service.store.name, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"port {config.port} of 127.0.0.1 cannot be used"):
            app.serve(service, config, print)
    with pytest.raises(ConfigError, match=r"guidelines is .*none\.md"):
        app.serve(service, LabelConfig(store=service.store.name, guidelines=str(tmp_path / "none.md")), print)


def test_more_completions_than_letters_are_refused(service: LabelService) -> None:
    service.store.add_completions("many", [Completion(str(n), "m", n) for n in range(27)])
    with pytest.raises(DataError, match="27 completions; the page can show 26"):
        app.serve(service, LabelConfig(store=service.store.name), print)
