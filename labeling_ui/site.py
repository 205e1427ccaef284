"""Under which address the annotators' browsers know the page, and which requests claim to come from there."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from rlhf.config import LabelConfig
from rlhf.types import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

SESSION, CSRF = "rlhf-session", "rlhf-csrf"
"""The cookies: the first is a secret that no script sees, the second is read by the page's own scripts."""


@dataclass(frozen=True)
class Site:
    """`url` is None for a page that any name of this machine leads to, and ends without a slash."""

    url: str | None = None
    strict: bool = False
    """Whether a write must say where it comes from; a page without login lets a script of this machine stay silent."""

    @property
    def https(self) -> bool:
        return (self.url or "").startswith("https://")

    @property
    def prefix(self) -> str:
        """The path before ours in the browser, such as `/rank`; empty at the root of a host."""
        return urlsplit(self.url or "").path

    def cookie(self, name: str) -> str:
        """Behind TLS, under a name that browsers accept from this host alone, encrypted, for all of it."""
        return f"__Host-{name}" if self.https else name

    def knows(self, host: str) -> bool:
        """Whether a Host header names this site: else a foreign name was made to point here (DNS rebinding)."""
        if self.url is not None:
            return host.lower() == urlsplit(self.url).netloc
        try:
            return urlsplit(f"//{host}").hostname in LOOPBACK
        except ValueError:
            return False

    def sent(self, headers: Headers) -> bool:
        """Whether a write comes from a page of this site. Browsers name the origin of every write; pages cannot."""
        origin = headers.get("origin")
        if origin is None:
            return not self.strict
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            return False
        if self.url is None:
            return urlsplit(origin).netloc == headers.get("host", "")
        return origin.lower() == "{0.scheme}://{0.netloc}".format(urlsplit(self.url))

    def client(self, headers: Headers, peer: str) -> str:
        """The address that asks: the one that our own proxy wrote down last. Without TLS there need be no proxy."""
        if not self.https:
            return peer
        return headers.get("x-forwarded-for", peer).rpartition(",")[2].strip() or peer


HERE = Site()
"""A page without login, at this machine."""


def site_of(config: LabelConfig) -> Site:
    """The site of a configuration. Raises ConfigError where it would be open to others, or unencrypted, unasked."""
    if not config.accounts:
        _check_alone(config)
        return HERE
    url = (config.public_url or "").rstrip("/")
    if not url and config.host in LOOPBACK:
        return Site(strict=True)
    if not url and config.insecure_http and config.host not in ("0.0.0.0", "::"):
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{host}:{config.port}"
    _check_url(url, config)
    parts = urlsplit(url)
    port = {"http": ":80", "https": ":443"}[parts.scheme]  # browsers leave it out
    return Site(f"{parts.scheme}://{parts.netloc.lower().removesuffix(port)}{parts.path}", strict=True)


def _check_alone(config: LabelConfig) -> None:
    if config.host not in LOOPBACK:
        raise ConfigError(
            f"host is {config.host!r}, but the page has no login and may be reached from this machine only: use one "
            f"of {', '.join(LOOPBACK)}, and from another machine a tunnel (ssh -L 7860:localhost:7860); or let people "
            "log in with --accounts true --public_url https://..."
        )
    if config.public_url:
        raise ConfigError(
            f"public_url is {config.public_url!r}, but the page has no login, and this would let everybody in: "
            "add --accounts true, or leave it out"
        )


def _check_url(url: str, config: LabelConfig) -> None:
    if not url:
        raise ConfigError(
            f"host is {config.host!r}, so others can reach the page, but not under which address: pass --public_url "
            "https://... (a proxy in front that speaks TLS), or a http:// address and --insecure_http true"
        )
    parts = urlsplit(url)
    plain = not (parts.query or parts.fragment or parts.username or "//" in parts.path)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ConfigError(f"public_url is {url!r}, but it must be an address such as https://label.example.org/rank")
    if parts.scheme == "http" and parts.hostname not in LOOPBACK and not config.insecure_http:
        raise ConfigError(
            f"public_url is {url!r}: passwords would cross the network unencrypted. Put a proxy that speaks TLS in "
            "front and give its https:// address, or accept it with --insecure_http true"
        )
