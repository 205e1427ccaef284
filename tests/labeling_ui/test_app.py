"""The whole application: its routes, what people may do on them, and how it refuses to start."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from starlette.testclient import TestClient

from labeling_ui import app, gate, loopback
from labeling_ui.admin import Admin
from labeling_ui.auth import Accounts
from labeling_ui.guidelines import publish
from labeling_ui.limits import MAX_BODY
from labeling_ui.passwords import Hashes
from labeling_ui.places import Policy
from labeling_ui.service import LabelService
from labeling_ui.task import Task
from rlhf.config import LabelConfig
from rlhf.store import Store
from rlhf.types import Completion, ConfigError, DataError

ORIGIN, PUBLIC = "http://localhost:7860", "https://label.example.org"
ADMINS = "Pause or resume an annotator"
"""Stands on the page for admins alone."""
PASSWORD, OTHER = "correct horse battery", "another five words of mine"


def make_service(folder: Path) -> LabelService:
    store = Store(folder / "labels.db")
    for prompt in ("p", "q"):
        store.add_completions(prompt, [Completion(text, "m", 0) for text in ("x", "y", "z")])
    return LabelService(store, Policy(overlap=2), criteria=["helpful"])


def config_of(service: LabelService, **settings: Any) -> LabelConfig:
    return LabelConfig(store=service.store.name, criteria=["helpful"], **settings)


def desk(service: LabelService, accounts: Accounts) -> Admin:
    return Admin(service.store, service.policy, accounts=accounts)


@pytest.fixture
def service(tmp_path: Path) -> LabelService:
    return make_service(tmp_path)


@pytest.fixture
def client(service: LabelService) -> Iterator[TestClient]:
    with TestClient(app.create(service, config_of(service), slots=3), base_url=ORIGIN) as client:
        yield client


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client that only looks, or is turned away."""
    service = make_service(tmp_path_factory.mktemp("visitor"))
    with TestClient(app.create(service, config_of(service), slots=3), base_url=ORIGIN) as client:
        yield client


@pytest.fixture
def accounts(service: LabelService) -> Accounts:
    return Accounts(service.store, hashes=Hashes(PasswordHasher(1, 8, 1)))


def test_what_loads_a_page_again_comes_before_all_that_may_be_lost(visitor: TestClient) -> None:
    answer = visitor.get("/")
    script = (app.rank_view.STATIC / "rank" / "patience.js").read_text(encoding="utf-8")
    assert answer.text.count(script) == 1
    assert answer.text.index(script) < answer.text.index("<meta")
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert script not in visitor.get("/gradio_api/info").text
    assert visitor.head("/").status_code in (200, 405)
    assert visitor.get("/page/rank/patience.js").text == script


@pytest.fixture
def public(service: LabelService, accounts: Accounts) -> Iterator[TestClient]:
    """The application behind TLS, with accounts; nobody is logged in, and redirects are not followed."""
    served = app.create(
        service, config_of(service, accounts=True, public_url=PUBLIC), accounts, slots=3, admin=desk(service, accounts)
    )
    with TestClient(served, base_url=PUBLIC, follow_redirects=False, headers={"Origin": PUBLIC}) as client:
        yield client


def enter(client: TestClient, accounts: Accounts, name: str, role: Any = "annotator") -> None:
    """Join through the form, and send the token from then on as the page's script does."""
    form = {"invite": accounts.invite(role, name), "password": PASSWORD, "again": PASSWORD}
    answer = client.post("/join", data=form)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    client.headers["X-CSRF-Token"] = client.cookies["__Host-rlhf-csrf"]


@pytest.fixture
def task(service: LabelService) -> Task:
    found = service.next_task("me")
    assert found is not None
    return found


def message(given: Task, **changes: Any) -> dict[str, Any]:
    return {"task": given.id, "key": given.key, "tiers": [[0], [1, 2]]} | changes


# ---------------------------------------------------------------------------------------------- the page's own routes


def test_submit_skip_and_undo(client: TestClient, service: LabelService, task: Task) -> None:
    said = {"rationale": "r", "flags": {"unsafe": True, "note": "n", "ratings": {"helpful": [1, None, 5]}}}
    first = client.post("/api/v1/submit", json=message(task, seconds=1.5, **said))
    assert (first.status_code, first.json()) == (200, {"saved": True, "ranking": 1, "repeated": False})
    again = client.post("/api/v1/submit", json=message(task, **said))
    assert again.json() == {"saved": True, "ranking": 1, "repeated": True}
    kept = service.store.rankings()[0]
    assert (kept.annotator, kept.flags["unsafe"], kept.flags["note"]) == ("me", True, "n")
    assert 0 < (kept.seconds or 0) <= 1.5
    assert sorted(map(str, kept.flags["ratings"]["helpful"])) == ["1", "5", "None"]
    assert client.post("/api/v1/undo").json() == {"task": task.id}
    assert client.post("/api/v1/undo", json={}).json() == {"task": None}
    assert client.post("/api/v1/skip", json={"task": task.id, "reason": "long"}).json() == {"skipped": task.id}
    assert service.progress("me").skipped == 1


def test_draft_diff_recent_and_reopen(client: TestClient, service: LabelService, task: Task) -> None:
    saved = client.post("/api/v1/draft", json={"task": task.id, "body": {"places": [1, 2, 3]}}).json()["saved_at"]
    again = service.next_task("me")
    assert again is not None
    assert (saved[:2], again.id, again.draft) == ("20", task.id, {"places": [1, 2, 3]})
    parts = client.post("/api/v1/diff", json={"task": task.id, "first": 0, "second": 1}).json()["parts"]
    assert parts == [["gone", task.completions[0]], ["new", task.completions[1]]]
    client.post("/api/v1/submit", json=message(task))
    (past,) = client.get("/api/v1/recent").json()["tasks"]
    assert (past["task_id"], past["state"], past["editable"]) == (task.id, "ranked", True)
    assert client.post("/api/v1/reopen", json={"task": task.id}).json() == {"task": task.id}
    again = service.next_task("me")
    assert again is not None
    assert again.id == task.id


def test_the_quiz(client: TestClient, service: LabelService, tmp_path: Path) -> None:
    quiz = tmp_path / "quiz.yaml"
    quiz.write_text("- {question: Q, options: [a, b], answer: b, explanation: because}\n")
    publish(service.store, 1, None, str(quiz))
    answer = client.post("/api/v1/quiz", json={"answers": [0]}).json()
    assert answer == {"passed": False, "answers": [{"right": False, "explanation": "because"}]}
    assert client.post("/api/v1/quiz", json={"answers": [1]}).json()["passed"]


def test_what_is_wrong_is_told_in_words(client: TestClient, service: LabelService, task: Task) -> None:
    incomplete = client.post("/api/v1/submit", json=message(task, tiers=[[0], [1]]))
    assert (incomplete.status_code, incomplete.json()) == (400, {"error": "rank each completion once, or set it aside"})
    wrong = [message(task, tiers="012"), message(task, task="1"), message(task, annotator="you"), {}, [], "x", None]
    wrong += [message(task, flags=flags) for flags in ({"ranks": []}, {"unsafe": "yes"}, {"note": 1}, [])]
    for body in wrong:
        answer = client.post("/api/v1/submit", json=body)
        assert (answer.status_code, list(answer.json())) == (400, ["error"]), body
    assert client.post("/api/v1/submit", json=message(task, task="1")).json()["error"].startswith("task: ")
    assert client.post("/api/v1/submit", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert client.post("/api/v1/submit", content=b"task=1", headers={"Content-Type": "text/plain"}).status_code == 400
    assert service.store.counts().rankings == 0


def test_what_is_not_theirs_or_too_late_has_a_status_of_its_own(
    client: TestClient, service: LabelService, task: Task
) -> None:
    other = service.next_task("somebody")
    assert other is not None
    for name, body in (
        ("submit", message(other)),
        ("draft", {"task": other.id, "body": {}}),
        ("skip", {"task": other.id}),
        ("reopen", {"task": other.id}),
        ("diff", {"task": other.id, "first": 0, "second": 1}),
        ("skip", {"task": 999}),
    ):
        assert client.post(f"/api/v1/{name}", json=body).status_code == 403, name
    client.post("/api/v1/submit", json=message(task))
    assert client.post("/api/v1/submit", json=message(task, tiers=[[1], [0, 2]])).status_code == 409
    assert client.post("/api/v1/draft", json={"task": task.id, "body": {}}).status_code == 409
    assert {ranking.annotator for ranking in service.store.rankings()} == {"me"}


def test_a_store_that_cannot_be_reached_is_told_apart_from_a_mistake(
    public: TestClient, service: LabelService, accounts: Accounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.types import StoreError

    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise StoreError("the label store /srv/secret/labels.db cannot be written (disk is full): make room")

    assert public.get("/healthz").json() == {"ok": True}
    enter(public, accounts, "anna")
    monkeypatch.setattr(service, "undo", broken)
    answer = public.post("/api/v1/undo", json={})
    assert (answer.status_code, "secret" in answer.text) == (503, False)
    monkeypatch.setattr(accounts, "session", broken)
    assert (public.get("/config").status_code, "secret" in public.get("/config").text) == (503, False)
    monkeypatch.setattr(service.store, "read", broken)
    assert (public.get("/healthz").status_code, public.get("/healthz").json()) == (503, {"ok": False})


# ------------------------------------------------------------------------------------------ one person, at this machine


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
    for name, value in gate.SECURITY_HEADERS.items():
        assert answer.headers[name] == value


def test_a_preflight_from_elsewhere_fails(visitor: TestClient) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert visitor.options("/api/v1/submit", headers=asked).status_code == 403


def test_nothing_is_offered_as_an_api(visitor: TestClient) -> None:
    assert visitor.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for path in ("/docs", "/openapi.json", "/monitoring", "/monitoring/summary", "/login", "/logout", "/admin"):
        assert visitor.get(path).status_code == 404, path


FILE_ROUTES = ("/gradio_api/file={}", "/file={}", "/gradio_api/file/{}", "/gradio_api/proxy=file://{}", "/page/{}")


def test_the_store_is_not_served(client: TestClient, service: LabelService) -> None:
    names = (service.store.name, "labels.db", "../labels.db", "%2e%2e/labels.db", service.store.name.lstrip("/"))
    for path in (route.format(name) for route in FILE_ROUTES for name in names):
        answer = client.get(path)
        assert (answer.status_code, b"SQLite" in answer.content) == (404, False), path


def test_gradio_itself_would_not_serve_it_either(service: LabelService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the gate's list of doors, and from the folder in which the server runs."""
    monkeypatch.chdir(Path(service.store.name).parent)
    served = app.create(service, config_of(service), slots=3)
    served.user_middleware[:] = [each for each in served.user_middleware if each.cls is not gate.Gate]
    with TestClient(served, base_url=ORIGIN) as bare:
        for path in (route.format(name) for route in FILE_ROUTES for name in (service.store.name, "labels.db")):
            answer = bare.get(path)
            assert answer.status_code in (401, 403, 404), path
            assert b"SQLite" not in answer.content
        assert bare.get("/").status_code == 401
        assert bare.post("/gradio_api/run/predict", json={"fn_index": 0, "data": []}).status_code == 401
        assert bare.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
        assert bare.post("/api/v1/undo").status_code == 401


def test_large_requests_are_refused(client: TestClient, task: Task) -> None:
    assert client.post("/api/v1/submit", json=message(task, rationale="x" * MAX_BODY)).status_code == 413
    assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404


def test_the_page_carries_no_model_text_before_it_asks(client: TestClient, service: LabelService) -> None:
    service.store.add_completions("SECRET prompt", [Completion("SECRET text", "m", 0), Completion("y", "m", 1)])
    assert "SECRET" not in client.get("/").text + client.get("/config").text


def test_the_page_finds_its_scripts_and_nothing_else(client: TestClient) -> None:
    assert "export function" in client.get("/page/rank/main.js").text
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/", "/page/none.js"):
        assert client.get(path).status_code == 404


# -------------------------------------------------------------------------------------------- with accounts, behind TLS


def test_join_work_leave_and_come_back(public: TestClient, accounts: Accounts, service: LabelService) -> None:
    enter(public, accounts, "anna")
    assert public.get("/api/v1/me").json() == {"name": "anna", "role": "annotator", "login": True}
    shown = public.post("/gradio_api/run/predict", json={"fn_index": 0, "data": [], "session_hash": "s"})
    assert shown.json()["data"][0]["person"] == "anna"
    given = service.next_task("anna")
    assert given is not None
    assert public.post("/api/v1/submit", json=message(given)).status_code == 200
    assert [ranking.annotator for ranking in service.store.rankings()] == ["anna"]
    session = public.cookies["__Host-rlhf-session"]
    assert public.post("/logout", data={"csrf": "wrong"}).status_code == 403
    left = public.post("/logout", data={"csrf": public.cookies["__Host-rlhf-csrf"]})
    assert (left.status_code, left.headers["location"], dict(public.cookies)) == (303, "/login", {})
    assert public.get("/config", headers={"Cookie": f"__Host-rlhf-session={session}"}).status_code == 401
    wrong = public.post("/login", data={"name": "anna", "password": OTHER, "next": "/"})
    assert (wrong.status_code, 'role="alert"' in wrong.text, OTHER in wrong.text) == (401, True, False)
    back = public.post("/login", data={"name": "anna", "password": PASSWORD, "next": "//evil.example"})
    assert (back.status_code, back.headers["location"]) == (303, "/")
    assert public.get("/login?next=/password").headers["location"] == "/password"


def test_the_cookies_of_a_session(public: TestClient, accounts: Accounts) -> None:
    form = {"invite": accounts.invite("annotator", "anna"), "password": PASSWORD, "again": PASSWORD}
    session, csrf = sorted(public.post("/join", data=form).headers.get_list("set-cookie"), reverse=True)
    assert session.startswith("__Host-rlhf-session=")
    assert csrf.startswith("__Host-rlhf-csrf=")
    for cookie, script_may_read in ((session, False), (csrf, True)):
        parts = {part.strip().lower() for part in cookie.split(";")[1:]}
        assert parts >= {"path=/", "secure", "samesite=strict"}
        assert ("httponly" not in parts) == script_may_read
        assert not [part for part in parts if part.startswith("domain")]


def test_a_password_is_changed_and_other_sessions_end(public: TestClient, accounts: Accounts) -> None:
    enter(public, accounts, "anna")
    elsewhere = accounts.login("anna", PASSWORD)
    page = public.get("/password").text
    csrf = re.findall(r'name="csrf" value="([^"]+)"', page)[0]
    form = {"csrf": csrf, "old": PASSWORD, "password": OTHER, "again": OTHER}
    assert public.post("/password", data=form | {"csrf": "x"}).status_code == 403
    unlike = public.post("/password", data=form | {"again": PASSWORD})
    assert (unlike.status_code, 'id="again-error"' in unlike.text) == (400, True)
    assert public.post("/password", data=form).status_code == 303
    assert accounts.session(elsewhere.token) is None
    assert public.get("/config").status_code == 200
    assert accounts.login("anna", OTHER).session.person.name == "anna"


def test_forms_say_beside_the_field_what_is_wrong_and_escape_it(public: TestClient, accounts: Accounts) -> None:
    hostile = '"><script>alert(1)</script>'
    form = {"invite": accounts.invite("annotator"), "name": hostile, "password": PASSWORD, "again": PASSWORD}
    page = public.post("/join", data=form)
    assert (page.status_code, "<script>alert" in page.text) == (400, False)
    assert 'aria-describedby="name-hint name-error"' in page.text
    assert 'aria-invalid="true"' in page.text
    assert "<title>Error: Join</title>" in page.text
    assert "<script>alert" not in public.get("/join", params={"invite": hostile}).text
    assert hostile not in public.get("/login", params={"next": hostile}).text
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")


def test_the_admins_page_is_for_admins(public: TestClient, accounts: Accounts) -> None:
    html = {"Accept": "text/html"}
    assert public.get("/admin/", headers=html).headers["location"] == "/login?next=/admin/"
    enter(public, accounts, "anna")
    for path in ("/admin", "/admin/", "/admin/config", "/admin/gradio_api/info", "/admin/theme.css"):
        assert public.get(path).status_code == 403, path
    assert ADMINS not in public.get("/").text + public.get("/config").text
    refused = public.get("/admin/", headers=html)
    assert (refused.status_code, "This is for admins." in refused.text) == (403, True)
    enter(public, accounts, "root", "admin")
    assert public.get("/admin").headers["location"] == "/admin/"
    assert ADMINS in public.get("/admin/config").text
    assert public.get("/admin/config").json()["root"] == PUBLIC + "/admin"


def test_gradio_knows_the_public_address_and_believes_nobody_else(public: TestClient, accounts: Accounts) -> None:
    enter(public, accounts, "anna")
    lies = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "http", "X-Gradio-Server": "http://evil.example"}
    for path in ("/config", "/"):
        answer = public.get(path, headers=lies)
        assert (answer.status_code, "evil.example" in answer.text) == (200, False)
    assert public.get("/config").json()["root"] == PUBLIC


def test_under_a_path_of_another_host(service: LabelService, accounts: Accounts) -> None:
    config = config_of(service, accounts=True, public_url=PUBLIC + "/rank")
    served = app.create(service, config, accounts, slots=3, admin=desk(service, accounts))
    with TestClient(served, base_url=PUBLIC, follow_redirects=False, headers={"Origin": PUBLIC}) as client:
        form = {"invite": accounts.invite("admin", "root"), "password": PASSWORD, "again": PASSWORD}
        assert client.post("/rank/join", data=form).headers["location"] == "/rank/"
        assert client.get("/rank/config").json()["root"] == PUBLIC + "/rank"
        assert client.get("/config").json()["root"] == PUBLIC + "/rank"
        assert client.get("/rank/admin").headers["location"] == "/rank/admin/"
        assert client.get("/rank/admin/config").json()["root"] == PUBLIC + "/rank/admin"


def test_a_page_with_accounts_puts_the_token_on_every_write(public: TestClient, accounts: Accounts) -> None:
    enter(public, accounts, "anna")
    assert "X-CSRF-Token" in public.get("/").text
    assert public.get("/config").json()["username"] == "anna"


# ------------------------------------------------------------------------------------------------------ how it starts


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "example.org", "::"])
def test_a_page_without_login_stays_on_this_machine(service: LabelService, host: str) -> None:
    with pytest.raises(ConfigError, match="may be reached from this machine only"):
        app.serve(service, LabelConfig(store=service.store.name, host=host), print)
    with pytest.raises(ConfigError, match="may be reached from this machine only"):
        loopback.listen(host, 0)


def test_without_an_admin_it_says_how_to_invite_one(service: LabelService, accounts: Accounts) -> None:
    config = config_of(service, accounts=True, public_url=PUBLIC)
    accounts.join(accounts.invite("annotator", "anna"), "", PASSWORD)
    command = f"rlhf accounts invite --role admin --store {service.store.name} --public_url {PUBLIC}"
    with pytest.raises(ConfigError, match="nobody can log in as an admin") as refusal:
        app.serve(service, config, print)
    assert f"`{command}`" in str(refusal.value)


def test_a_port_in_use_is_named(service: LabelService) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = LabelConfig(store=service.store.name, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"port {config.port} of 127.0.0.1 cannot be used"):
            app.serve(service, config, print)


def test_more_completions_than_letters_are_refused(service: LabelService) -> None:
    service.store.add_completions("many", [Completion(str(n), "m", n) for n in range(27)])
    with pytest.raises(DataError, match="27 completions; the page can show 26"):
        app.serve(service, LabelConfig(store=service.store.name), print)
