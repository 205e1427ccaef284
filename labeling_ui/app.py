"""The web server of the ranking page: the gate, our own routes, and the Gradio pages behind them.

Nothing that security rests on is held in memory, but for the rate limits: several processes may serve one PostgreSQL
store behind one proxy, each with limits of its own. The proxy speaks TLS, passes on the Host header, and sets
X-Forwarded-For, which is believed only where `public_url` is https; then nobody but the proxy may reach the port.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from fastapi.staticfiles import StaticFiles

from labeling_ui import admin_routes, admin_view, api, entrance, loopback, rank_view
from labeling_ui.admin import Admin
from labeling_ui.auth import Accounts
from labeling_ui.doors import ALONE, TOGETHER
from labeling_ui.limits import Limits
from labeling_ui.person import Person
from labeling_ui.service import LabelService
from labeling_ui.site import Site, site_of
from rlhf.config import LabelConfig
from rlhf.types import ConfigError, DataError


def create(
    service: LabelService,
    config: LabelConfig,
    accounts: Accounts | None = None,
    *,
    slots: int,
    admin: Admin | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """The whole application. Without `accounts` it is for the annotator of the config, at this machine.

    With `admin` there is a page of its own for admins, at /admin. Raises ConfigError where the config would let others
    in.
    """
    site = site_of(config)
    app = _application(site, config, accounts, limits)
    api.add_routes(app, service)
    if accounts is not None:
        entrance.add_routes(app, accounts, site)
    if admin is not None:
        _add_admin(app, admin, config, site, accounts)
    app.mount("/page", StaticFiles(directory=rank_view.STATIC))
    page = rank_view.build(service, slots=slots, criteria=config.criteria)
    style = (rank_view.STATIC / "rank.css").read_text(encoding="utf-8")
    return loopback.mount(app, page, head=f"<style>{style}</style>{head(accounts)}", data=_data(config))


def _add_admin(app: FastAPI, admin: Admin, config: LabelConfig, site: Site, accounts: Accounts | None) -> None:
    app.add_api_route("/admin", lambda: RedirectResponse(f"{site.prefix}/admin/", 303), methods=["GET"])
    admin_routes.add_routes(app, admin)
    style = admin_view.head() + head(accounts)
    loopback.mount(app, admin_view.build(admin), head=style, data=_data(config), path="/admin", role="admin")


def _application(site: Site, config: LabelConfig, accounts: Accounts | None, limits: Limits | None) -> FastAPI:
    first = (rank_view.STATIC / "rank" / "patience.js").read_text(encoding="utf-8")
    if accounts is None:
        return loopback.application(site=site, doors=ALONE, first=first, person=Person(config.annotator, "admin"))
    return loopback.application(site=site, doors=TOGETHER, first=first, accounts=accounts, limits=limits)


def head(accounts: Accounts | None) -> str:
    """What a page needs in its head where people log in: the CSRF token on every write, and a way out."""
    if accounts is None:
        return ""
    return f"<script>{(rank_view.STATIC / 'account.js').read_text(encoding='utf-8')}</script>"


def serve(service: LabelService, config: LabelConfig, opened: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted; `opened` is told its address. Raises ConfigError or DataError."""
    site = site_of(config)
    accounts = Accounts(service.store) if config.accounts else None
    if accounts is not None and not accounts.has_admin():
        raise ConfigError(f"nobody can log in as an admin yet; invite one: {_invite_command(config, site)}")
    slots = service.slots()
    if slots > len(rank_view.LETTERS):
        raise DataError(f"an item has {slots} completions; the page can show {len(rank_view.LETTERS)}")
    admin = Admin(service.store, service.policy, accounts=accounts, guideline_version=service.guideline_version)
    app = create(service, config, accounts, slots=slots, admin=admin)
    with loopback.listen(config.host, config.port, login=config.accounts) as listener:
        opened(site.url or loopback.address(listener))
        loopback.serve(app, listener)


def _invite_command(config: LabelConfig, site: Site) -> str:
    address = f"--public_url {site.url}" if site.url else f"--port {config.port}"
    return f"`rlhf accounts invite --role admin --store {config.store} {address}`"


def _data(config: LabelConfig) -> Path | None:
    """The folder of the store, which no page may ever serve; a database server's is none."""
    return None if "://" in config.store else Path(config.store).parent
