"""Login, joining by invitation, another password, and leaving: the pages before and beside the ranking page."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qs

from fastapi import Depends, FastAPI, Request
from fastapi.responses import RedirectResponse, Response

from labeling_ui.auth import ABSOLUTE_SECONDS, Accounts, Invitation, Login
from labeling_ui.forms import Field, Form, form_page, problem_page
from labeling_ui.gate import TOKEN, cookie, drop_session, same, set_session
from labeling_ui.passwords import SHORTEST, Refused
from labeling_ui.person import person_of
from labeling_ui.site import SESSION, Site

Said = dict[str, str]
"""The fields of a form."""

HINT = f"At least {SHORTEST} characters. A few words in a row are easy to remember and hard to guess."


def add_routes(app: FastAPI, accounts: Accounts, site: Site) -> None:
    """`/login`, `/join`, `/password` and `/logout`."""
    _add_login(app, accounts, site)
    _add_join(app, accounts, site)
    _add_password(app, accounts, site)

    @app.post("/logout")
    def logout(request: Request, said: Said = SAID) -> Response:
        if not _by_this_page(request, said):
            return problem_page("this page is out of date: go back and reload it", 403, site.prefix)
        accounts.logout(_token(request, site) or "")
        answer = RedirectResponse(f"{site.prefix}/login", 303)
        drop_session(answer, site)
        return answer


def _add_login(app: FastAPI, accounts: Accounts, site: Site) -> None:
    @app.get("/login")
    def ask(request: Request, next: str = "/") -> Response:
        if accounts.session(_token(request, site)) is not None:
            return RedirectResponse(site.prefix + local(next), 303)
        return form_page(_login_form(local(next)))

    @app.post("/login")
    def enter(request: Request, said: Said = SAID) -> Response:
        next, name = local(said.get("next", "/")), said.get("name", "")
        try:
            login = accounts.login(name, said.get("password", ""), replacing=_token(request, site))
        except Refused as error:
            return form_page(_login_form(next, name), {error.field: str(error)}, 401)
        return _entered(login, site, next)


def _add_join(app: FastAPI, accounts: Accounts, site: Site) -> None:
    @app.get("/join")
    def ask(invite: str = "") -> Response:
        try:
            return form_page(_join_form(invite, accounts.invitation(invite)))
        except Refused as error:
            return problem_page(str(error).rstrip("."), 404, site.prefix)

    @app.post("/join")
    def enter(said: Said = SAID) -> Response:
        invite, name = said.get("invite", ""), said.get("name", "")
        try:
            offered = accounts.invitation(invite)
        except Refused as error:
            return problem_page(str(error).rstrip("."), 404, site.prefix)
        try:
            login = accounts.join(invite, name, _repeated(said))
        except Refused as error:
            return form_page(_join_form(invite, offered, name), {error.field: str(error)}, 400)
        return _entered(login, site, "/")


def _add_password(app: FastAPI, accounts: Accounts, site: Site) -> None:
    @app.get("/password")
    def ask(request: Request) -> Response:
        return form_page(_password_form(request))

    @app.post("/password")
    def change(request: Request, said: Said = SAID) -> Response:
        if not _by_this_page(request, said):
            return form_page(_password_form(request), {"form": "This page was out of date: try again."}, 403)
        try:
            login = accounts.change_password(person_of(request.scope).name, said.get("old", ""), _repeated(said))
        except Refused as error:
            return form_page(_password_form(request), {error.field: str(error)}, 400)
        return _entered(login, site, "/")


def _login_form(next: str, name: str = "") -> Form:
    fields = (
        Field("name", "Name", "username", value=name, secret=False),
        Field("password", "Password", "current-password"),
    )
    return Form("Log in", "To rank completions, log in with your own name.", "login", "Log in", fields, {"next": next})


def _join_form(invite: str, offered: Invitation, name: str = "") -> Form:
    what = "You are invited as an admin." if offered.role == "admin" else "You are invited to rank completions."
    fixed = offered.name is not None
    fields = (
        Field("name", "Name", "username", value=offered.name or name, secret=False, fixed=fixed)
        if fixed
        else Field("name", "Name", "username", "Your rankings are kept under it.", name, secret=False),
        Field("password", "Password", "new-password", HINT),
        Field("again", "Password again", "new-password"),
    )
    return Form("Join", f"{what} This link works once.", "join", "Join", fields, {"invite": invite})


def _password_form(request: Request) -> Form:
    fields = (
        Field("name", "Name", "username", value=person_of(request.scope).name, secret=False, fixed=True),
        Field("old", "Password now", "current-password"),
        Field("password", "New password", "new-password", HINT),
        Field("again", "New password again", "new-password"),
    )
    intro = "Wherever else you are logged in, you will have to log in again."
    hidden = {"csrf": str(request.scope[TOKEN])}
    return Form("Change your password", intro, "password", "Change it", fields, hidden, back="./")


async def _said(request: Request) -> Said:
    """The fields of a form, the first of each name."""
    body = (await request.body()).decode("utf-8", "replace")
    try:
        return {name: values[0] for name, values in parse_qs(body, max_num_fields=20).items()}
    except ValueError:
        return {}


SAID: Any = Depends(_said)


def _repeated(said: Said) -> str:
    """The new password. Raises Refused unless it was typed twice alike."""
    if said.get("password", "") != said.get("again", ""):
        raise Refused("again", "The two are not the same: type it twice.")
    return said.get("password", "")


def _entered(login: Login, site: Site, next: str) -> Response:
    answer = RedirectResponse(site.prefix + next, 303)
    set_session(answer, site, login.token, str(login.session.csrf), ABSOLUTE_SECONDS)
    return answer


def _token(request: Request, site: Site) -> str | None:
    return cookie(request.headers, site.cookie(SESSION))


def _by_this_page(request: Request, said: Said) -> bool:
    """Whether the form came from a page of this session: its token is a field of the form."""
    return same(said.get("csrf", ""), str(request.scope[TOKEN]))


def local(path: str) -> str:
    """Where to go after a login: a page of this site, or the first one. Anything else would lead people away."""
    return path if re.fullmatch(r"/(?:[a-z0-9-]+/)*[a-z0-9-]*", path) else "/"
