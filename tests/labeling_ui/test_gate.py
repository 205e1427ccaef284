"""The gate by raw ASGI calls: what reaches the application behind it, as whom, and what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher

from labeling_ui.auth import Accounts
from labeling_ui.doors import ALONE, OTHER, TOGETHER, canonical
from labeling_ui.entrance import local
from labeling_ui.gate import SECURITY_HEADERS, Gate
from labeling_ui.limits import MAX_BODY, Limits, RateLimit, network
from labeling_ui.passwords import Hashes
from labeling_ui.person import PERSON, Person
from labeling_ui.site import HERE, Site, site_of
from rlhf.config import LabelConfig
from rlhf.store import Store
from rlhf.types import ConfigError
from tests import own_loop
from tests.labeling_ui.raw_requests import Behind, ask

PASSWORD = "correct horse battery"
URL = "https://label.example.org"
SITE = Site(URL, strict=True)


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(Store(tmp_path / "labels.db"), hashes=Hashes(PasswordHasher(1, 8, 1)))


@pytest.fixture
def behind() -> Behind:
    return Behind()


@pytest.fixture
def gate(accounts: Accounts, behind: Behind) -> Gate:
    return Gate(behind, site=SITE, doors=TOGETHER, accounts=accounts)


Headers = Callable[..., dict[str, str]]


@pytest.fixture
def as_person(accounts: Accounts) -> Headers:
    """Headers of somebody's own page; a role makes a new person."""

    def headers(role: Any = "annotator", **changes: str | None) -> dict[str, str]:
        name = f"{role}{len(accounts.people())}"
        login = accounts.join(accounts.invite(role, name), "", PASSWORD)
        token = f"__Host-rlhf-session={login.token}"
        given = {"cookie": token, "origin": URL, "x_csrf_token": login.session.csrf, **changes}
        return {key.replace("_", "-"): value for key, value in given.items() if value is not None}

    return headers


SUBMIT = "/api/v1/submit"

# ------------------------------------------------------------------------------------------------------ who may pass


def test_a_person_passes_with_session_origin_and_token(gate: Gate, behind: Behind, as_person: Headers) -> None:
    answer = ask(gate, "POST", SUBMIT, as_person(), body=[b"{}"])
    assert (answer.status, behind.person, behind.bodies) == (200, Person("annotator0", "annotator"), [b"{}"])


WRONG = {
    "no origin": ({"origin": None}, 403),
    "another origin": ({"origin": "https://evil.example"}, 403),
    "the null origin": ({"origin": "null"}, 403),
    "our name, unencrypted": ({"origin": "http://label.example.org"}, 403),
    "our name, another port": ({"origin": URL + ":8443"}, 403),
    "our name as a part": ({"origin": "https://label.example.org.evil.example"}, 403),
    "sent by another page of the domain": ({"sec_fetch_site": "same-site"}, 403),
    "no token": ({"x_csrf_token": None}, 403),
    "an empty token": ({"x_csrf_token": ""}, 403),
    "a wrong token": ({"x_csrf_token": "x" * 43}, 403),
    "a token that is no text": ({"x_csrf_token": "\xff"}, 403),
    "no session": ({"cookie": None}, 401),
    "a made-up session": ({"cookie": "__Host-rlhf-session=" + "x" * 43}, 401),
    "the session under a name that any page can set": ({"cookie": "rlhf-session=stolen"}, 401),
    "broken cookies": ({"cookie": "=;;==\xff"}, 401),
    "a foreign host": ({"host": "evil.example"}, 421),
    "no host": ({"host": ""}, 421),
    "a proxy's word for another host": ({"host": "evil.example", "x_forwarded_host": "label.example.org"}, 421),
    "too long a body": ({"content_length": str(MAX_BODY + 1)}, 413),
    "a length that is no number": ({"content_length": "-1"}, 413),
}


@pytest.mark.parametrize("what", WRONG)
def test_whatever_is_wrong_with_a_write_keeps_it_out(gate: Gate, behind: Behind, as_person: Headers, what: str) -> None:
    changes, status = WRONG[what]
    answer = ask(gate, "POST", SUBMIT, as_person(**changes), body=[b"{}"])
    assert (answer.status, behind.scopes) == (status, [])
    assert answer.error
    assert not [name for name, _ in answer.headers if name.startswith("access-control")]


def test_another_persons_token_is_a_wrong_one(gate: Gate, behind: Behind, as_person: Headers) -> None:
    other = as_person()["x-csrf-token"]
    assert ask(gate, "POST", SUBMIT, as_person(x_csrf_token=other)).status == 403
    assert behind.scopes == []


@pytest.mark.parametrize("path", ["/admin/", "/admin/config", "/api/v1/admin/export", "/admin"])
def test_only_admins_reach_what_is_theirs(gate: Gate, behind: Behind, as_person: Headers, path: str) -> None:
    assert ask(gate, "GET", path).status == 401
    assert ask(gate, "GET", path, as_person("annotator")).status == 403
    assert behind.scopes == []
    assert ask(gate, "GET", path, as_person("admin")).status == 200
    assert behind.person == Person("admin1", "admin")


AROUND = [
    *("//admin/config", "/admin//config", "/x/../admin/config", "/./admin/config", "/admin/./config", "/admin/.."),
    *("/%61dmin/config", "/admin%2Fconfig", "/admin%2fconfig", "/%2e%2e/admin/config", "/x/%2e%2e/admin/config"),
    *("/admin\\config", "\\admin\\config", "/admin;x/config", "/admin/config\x00", "/admin/config ", "/ádmin/config"),
    *("admin/config", "", "*", "http://label.example.org/admin/config", "/ADMIN/config", "/Admin/", "/admin/config/"),
    *("/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/gradio_api/file=labels.db", "/file=labels.db"),
    *("/gradio_api/file/labels.db", "/gradio_api/proxy=http://evil.example/", "/monitoring", "/monitoring/summary"),
    *("/docs", "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/runs", "/gradio_api/token", "/nothing"),
    *("/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/cancel", "/gradio_api/component_server"),
]


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get"])
def test_paths_that_mean_something_else_lead_nowhere(
    gate: Gate, behind: Behind, as_person: Headers, method: str
) -> None:
    visitor = as_person("annotator")
    for path in AROUND:
        answer = ask(gate, method, path, visitor)
        assert (answer.status, behind.scopes) == (404, []), path


def test_a_path_that_was_decoded_on_the_way_leads_nowhere(gate: Gate, behind: Behind, as_person: Headers) -> None:
    """Servers decode `path`; what was sent is in `raw_path`."""
    admin = as_person("admin")
    for raw in (b"/%61dmin/config", b"/admin%2fconfig", b"/x/../admin/config", b"//admin/config"):
        assert ask(gate, "GET", "/admin/config", admin, raw=raw).status == 404
    assert behind.scopes == []
    assert ask(gate, "GET", "/admin/config", admin, raw=b"/admin/config?x=%2f").status == 200
    assert canonical("/gradio_api/info", None)


def test_methods_that_no_door_names_lead_nowhere(gate: Gate, behind: Behind, as_person: Headers) -> None:
    visitor = as_person()
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "post"):
        assert ask(gate, method, SUBMIT, visitor).status == 404
    assert ask(gate, "GET", "/logout", visitor).status == 404  # Gradio has one
    assert behind.scopes == []


def test_a_websocket_is_closed_and_the_lifespan_passes(gate: Gate, behind: Behind) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    own_loop.run(gate({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert (sent, behind.scopes) == ([{"type": "websocket.close", "code": 1008}], [])
    own_loop.run(gate({"type": "lifespan"}, receive, send))
    assert behind.scopes == [{"type": "lifespan"}]


def test_nobody_can_bring_a_person_along(gate: Gate, behind: Behind) -> None:
    claimed = {PERSON: Person("root", "admin")}
    assert ask(gate, "GET", "/", more=claimed).status == 401
    assert ask(gate, "GET", "/login", more=claimed).status == 200
    assert behind.person is None


# --------------------------------------------------------------------------------------------- how it answers


def test_a_browser_without_a_session_is_led_to_the_login_and_back(gate: Gate) -> None:
    html = {"accept": "text/html,application/xhtml+xml"}
    for path, wanted in (("/", "/login"), ("/admin/", "/login?next=/admin/"), ("/password", "/login?next=/password")):
        answer = ask(gate, "GET", path, html)
        assert (answer.status, answer.header("location")) == (303, wanted)
    assert ask(gate, "POST", "/logout", html | {"origin": URL}).header("location") == "/login"
    assert ask(gate, "POST", SUBMIT, {"origin": URL}).status == 401
    assert ask(gate, "GET", "/config").error == "log in: you are not, or no longer, logged in"


@pytest.mark.parametrize(
    "away",
    [
        *("https://evil.example", "//evil.example", "/\\evil.example", "\\\\evil.example", "/%2f/evil.example", "evil"),
        *(
            "javascript:alert(1)",
            "/login?next=//evil.example",
            "/a\nb",
            "/\tevil",
            "",
            " /",
            "/a//b",
            "/..//evil",
            "/@",
        ),
    ],
)
def test_the_way_back_leads_nowhere_else(away: str) -> None:
    assert local(away) == "/"
    assert [local(path) for path in ("/", "/admin/", "/password")] == ["/", "/admin/", "/password"]


def test_every_answer_carries_the_security_headers(gate: Gate, as_person: Headers) -> None:
    visitor = as_person()
    for method, path, status in (
        ("GET", "/", 200),
        ("GET", "/nothing", 404),
        ("POST", SUBMIT, 403),
        ("GET", "/admin/", 403),
    ):
        answer = ask(gate, method, path, visitor | {"x-csrf-token": ""})
        assert answer.status == status
        for name, value in SECURITY_HEADERS.items():
            assert answer.header(name.lower()) == value
        assert answer.header("strict-transport-security") == "max-age=31536000"
        assert answer.header("cache-control") == "no-store"
    assert ask(gate, "GET", "/assets/x.js").header("cache-control") is None


def test_without_tls_nothing_is_promised_about_it(accounts: Accounts, behind: Behind) -> None:
    plain = Gate(behind, site=Site("http://10.0.0.5:7860", strict=True), doors=TOGETHER, accounts=accounts)
    answer = ask(plain, "GET", "/login", {"host": "10.0.0.5:7860"})
    assert (answer.status, answer.header("strict-transport-security")) == (200, None)


def test_answers_stream_through_piece_by_piece(accounts: Accounts, as_person: Headers) -> None:
    """Each piece leaves before the next one is made: events must not wait for the end of an answer."""
    order: list[str] = []

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(3):
            order.append(f"made {number}")
            yield b"data: x\n\n"

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import StreamingResponse

        await StreamingResponse(pieces(), media_type="text/event-stream")(scope, receive, send)

    visitor = as_person()
    scope = {
        **{"type": "http", "method": "GET", "path": "/gradio_api/heartbeat/x", "query_string": b""},
        "headers": [(b"host", b"label.example.org"), (b"cookie", visitor["cookie"].encode())],
    }

    async def send(message: Any) -> None:
        order.append("sent" if message.get("body") else message["type"])

    async def receive() -> Any:
        await asyncio.sleep(3600)

    own_loop.run(Gate(stream, site=SITE, doors=TOGETHER, accounts=accounts)(scope, receive, send))
    assert order[1:] == ["made 0", "sent", "made 1", "sent", "made 2", "sent", "http.response.body"]


def test_a_store_that_does_not_answer_is_no_logout(gate: Gate, as_person: Headers, accounts: Accounts) -> None:
    visitor = as_person()
    accounts.store.close()
    Path(accounts.store.name).write_bytes(b"no database" * 1000)
    for suffix in ("-wal", "-shm"):
        Path(accounts.store.name + suffix).unlink(missing_ok=True)
    assert ask(gate, "GET", "/config", visitor).status == 503


# --------------------------------------------------------------------------------------------------- how much


def test_a_body_in_pieces_is_counted_and_handed_on_whole(gate: Gate, behind: Behind, as_person: Headers) -> None:
    visitor = as_person()
    assert ask(gate, "POST", SUBMIT, visitor, body=[b"x" * (MAX_BODY // 2)] * 3).status == 413
    assert behind.scopes == []
    assert ask(gate, "POST", SUBMIT, visitor, body=[b'{"a":', b"", b"1}"]).status == 200
    assert behind.bodies == [b'{"a":1}']


def test_a_body_that_trickles_is_given_up(
    gate: Gate, behind: Behind, as_person: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labeling_ui.limits.BODY_SECONDS", 0.05)
    visitor, sent = as_person(), []
    headers = [(name.encode(), value.encode()) for name, value in {"host": "label.example.org", **visitor}.items()]

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": SUBMIT, "headers": headers, "query_string": b""}
    own_loop.run(gate(scope, receive, send))
    assert (sent[0]["status"], behind.scopes) == (408, [])


def test_a_bucket_fills_up_again() -> None:
    now = [0.0]
    limit = RateLimit(3, 6.0, lambda: now[0])
    assert [limit.wait("a") for _ in range(4)] == [0, 0, 0, 2]
    assert limit.wait("b") == 0
    now[0] = 2.0
    assert [limit.wait("a"), limit.wait("a")] == [0, 2]
    now[0] = 1000.0
    assert [limit.wait("a") for _ in range(4)] == [0, 0, 0, 2]


def test_too_many_logins_or_writes_are_told_to_wait(accounts: Accounts, behind: Behind, as_person: Headers) -> None:
    limits = Limits(RateLimit(2, 60), RateLimit(3, 60), RateLimit(9, 60))
    gate = Gate(behind, site=SITE, doors=TOGETHER, accounts=accounts, limits=limits)
    forms = [ask(gate, "POST", path, {"origin": URL}).status for path in ("/login", "/join", "/login")]
    assert forms == [200, 200, 429]
    one, other = as_person(), as_person()
    answers = [ask(gate, "POST", SUBMIT, one) for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[-1].header("retry-after") or 0) <= 20
    assert ask(gate, "GET", "/config", one).status == 200
    assert [ask(gate, "POST", SUBMIT, other).status for _ in range(3)] == [200, 200, 429]  # the address's ninth is over
    assert ask(gate, "POST", SUBMIT, other, client="10.0.0.8").status == 200


def test_the_address_is_the_one_that_our_proxy_wrote_down_last(
    accounts: Accounts, behind: Behind, as_person: Headers
) -> None:
    forwarded = {"x-forwarded-for": "6.6.6.6, 10.9.9.9"}
    gate = Gate(behind, site=SITE, doors=TOGETHER, accounts=accounts)
    ask(gate, "GET", "/login", forwarded)
    assert behind.scopes[-1]["client"][0] == "10.9.9.9"
    for site in (HERE, Site("http://label.example.org", strict=True)):  # nobody says that there is a proxy
        door = {"person": Person("me", "admin")} if site is HERE else {"accounts": accounts}
        open_gate = Gate(behind, site=site, doors=TOGETHER, **door)
        ask(open_gate, "GET", "/login", forwarded | ({"host": "localhost"} if site is HERE else {}))
        assert behind.scopes[-1]["client"][0] == "10.0.0.7"
    assert network("2001:db8:1:2:3:4:5:6") == network("2001:db8:1:2::9") != network("2001:db8:1:3::9")


def test_what_gradio_would_believe_never_reaches_it(gate: Gate, behind: Behind, as_person: Headers) -> None:
    lies = {"x-forwarded-host": "evil.example", "x-forwarded-proto": "http", "X-Gradio-Server": "http://evil.example"}
    ask(gate, "GET", "/", as_person() | lies | {"forwarded": "host=evil.example", "x-other": "kept"})
    names = {name for name, _ in behind.scopes[-1]["headers"]}
    assert b"x-other" in names
    assert not [name for name in names if name.startswith((b"x-forwarded", b"forwarded", b"x-gradio"))]
    assert behind.scopes[-1]["scheme"] == "https"


# ------------------------------------------------------------------------------------------------- other sites


def test_a_public_prefix_is_taken_off_and_put_on(accounts: Accounts, behind: Behind, as_person: Headers) -> None:
    gate = Gate(behind, site=Site(URL + "/rank", strict=True), doors=TOGETHER, accounts=accounts)
    visitor = as_person()
    for path in ("/rank/config", "/config"):  # whether the proxy strips it or not
        assert ask(gate, "GET", path, visitor).status == 200
        assert (behind.scopes[-1]["root_path"], behind.scopes[-1]["path"]) == ("/rank", "/rank/config")
    assert ask(gate, "GET", "/rank/admin/", visitor).status == 403
    assert ask(gate, "GET", "/rank//admin/", visitor).status == 404
    answer = ask(gate, "GET", "/rank/admin/", {"accept": "text/html"})
    assert answer.header("location") == "/rank/login?next=/admin/"


def test_a_page_without_login_lets_this_machine_in_and_no_one_else(behind: Behind) -> None:
    gate = Gate(behind, site=HERE, doors=ALONE, person=Person("me", "admin"))
    for host in ("localhost", "127.0.0.1:7860", "[::1]:7860"):
        assert ask(gate, "POST", SUBMIT, {"host": host}).status == 200
        assert ask(gate, "POST", SUBMIT, {"host": host, "origin": f"http://{host}"}).status == 200
        assert behind.person == Person("me", "admin")
        assert ask(gate, "POST", SUBMIT, {"host": host, "origin": "http://evil.example"}).status == 403
        assert ask(gate, "POST", SUBMIT, {"host": host, "origin": "null"}).status == 403
    for host in ("evil.example", "localhost.evil.example", "", "[::2]", "[x", "127.0.0.1@evil.example"):
        assert ask(gate, "GET", "/healthz", {"host": host}).status == 421
    assert ask(gate, "GET", "/login", {"host": "localhost"}).status == 404
    assert ask(Gate(behind, site=HERE, doors=OTHER, person=Person("me", "admin")), "GET", "/admin/").status == 421


def test_a_gate_is_for_accounts_or_for_one_person(accounts: Accounts, behind: Behind) -> None:
    for both in ({}, {"accounts": accounts, "person": Person("me", "admin")}):
        with pytest.raises(ValueError, match="either"):
            Gate(behind, site=HERE, doors=ALONE, **both)


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, None),
        ({"accounts": True}, None),
        ({"accounts": True, "public_url": URL + "/"}, URL),
        ({"accounts": True, "public_url": "HTTPS://Label.Example.org:443/rank/"}, URL + "/rank"),
        ({"accounts": True, "public_url": URL, "host": "0.0.0.0"}, URL),
        ({"accounts": True, "host": "10.0.0.5", "insecure_http": True}, "http://10.0.0.5:7860"),
        ({"accounts": True, "host": "fd00::5", "insecure_http": True}, "http://[fd00::5]:7860"),
        (
            {"accounts": True, "host": "0.0.0.0", "public_url": "http://lab:80", "insecure_http": True},
            "http://lab",
        ),
    ],
)
def test_the_site_of_a_configuration(settings: dict[str, Any], url: str | None) -> None:
    site = site_of(LabelConfig(**settings))
    assert (site.url, site.strict) == (url, bool(settings))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host": "0.0.0.0"}, "may be reached from this machine only"),
        ({"public_url": URL}, "would let everybody in"),
        ({"accounts": True, "host": "0.0.0.0"}, "--public_url"),
        ({"accounts": True, "host": "10.0.0.5"}, "--public_url"),
        ({"accounts": True, "host": "0.0.0.0", "insecure_http": True}, "--public_url"),
        ({"accounts": True, "host": "10.0.0.5", "public_url": "http://lab"}, "--insecure_http"),
        ({"accounts": True, "public_url": "http://lab"}, "unencrypted"),
        ({"accounts": True, "public_url": "label.example.org"}, "must be an address"),
        ({"accounts": True, "public_url": "https://x/?a=1"}, "must be an address"),
        ({"accounts": True, "public_url": "https://me:pw@x/"}, "must be an address"),
    ],
)
def test_a_configuration_that_would_be_open_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        site_of(LabelConfig(**settings))
