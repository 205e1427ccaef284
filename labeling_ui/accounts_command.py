"""`rlhf accounts`: who may log in to the ranking page. Each command says in one line what it did."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import NoReturn

from labeling_ui.auth import Account, Accounts
from labeling_ui.site import site_of
from rlhf.config import LabelConfig
from rlhf.store import Store
from rlhf.types import ConfigError

USAGE = """\
usage: rlhf accounts COMMAND [NAME] [--store FILE_OR_URL] ...

  invite           print a link with which one person can join, once
                     --role annotator|admin  (annotator)
                     --name NAME             (the guest chooses)
                     --days N                (7) until it expires
                     --public_url URL        (http://HOST:PORT) where `rlhf label` is reached
                     --host HOST --port PORT (127.0.0.1, 7860)
                     --insecure_http true    for a URL with http:// that is not of this machine
  list             everybody who has an account, and the open invitations
  pause NAME       give NAME no more items
  resume NAME      give NAME items again
  remove-password NAME
                   shut NAME out at once; `invite --name NAME` lets NAME in again

The store is runs/default/labels.db unless --store names another; PostgreSQL as postgresql+psycopg://...
"""

COMMANDS = ("invite", "list", "pause", "resume", "remove-password")


def main(arguments: Sequence[str]) -> None:
    """Run one command. Raises UserError."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.rstrip())
        return
    if arguments[0] not in COMMANDS:
        raise ConfigError(f"there is no command `accounts {arguments[0]}`: it is one of {', '.join(COMMANDS)}")
    command, options = arguments[0], _options(arguments)
    with closing(Store(options.store, create=False)) as store:
        accounts = Accounts(store)
        if command == "invite":
            _invite(accounts, options)
        elif command == "list":
            _list(accounts)
        elif command == "pause":
            accounts.pause(options.name)
            print(f"{options.name} gets no more items; `rlhf accounts resume {options.name}` ends this")
        elif command == "resume":
            accounts.resume(options.name)
            print(f"{options.name} gets items again")
        else:
            accounts.remove_password(options.name)
            print(f"{options.name} is logged out everywhere and cannot log in; `invite --name` lets them in again")


def _options(arguments: Sequence[str]):
    """The flags of a command. Raises ConfigError."""
    from argparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message}; `rlhf accounts --help` shows how")

    defaults = LabelConfig()
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("command")
    parser.add_argument("--store", default=defaults.store)
    if arguments[0] == "invite":
        parser.add_argument("--role", choices=("annotator", "admin"), default="annotator")
        parser.add_argument("--name")
        parser.add_argument("--days", type=float, default=7.0)
        parser.add_argument("--public_url")
        parser.add_argument("--host", default=defaults.host)
        parser.add_argument("--port", type=int, default=defaults.port)
        parser.add_argument("--insecure_http", choices=("true", "false"), nargs="?", const="true", default="false")
    elif arguments[0] != "list":
        parser.add_argument("name")
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE.rstrip())
        sys.exit(0)
    return parser.parse_args(arguments)


def _invite(accounts: Accounts, options) -> None:
    if not 0 < options.days <= 365:
        raise ConfigError(f"days is {options.days:g}, but it must be above 0 and at most 365")
    url, insecure = options.public_url, options.insecure_http == "true"
    config = LabelConfig(accounts=True, host=options.host, port=options.port, public_url=url, insecure_http=insecure)
    address = site_of(config).url or f"http://{config.host}:{config.port}"  # refuses what `rlhf label` would refuse
    token = accounts.invite(options.role, options.name, days=options.days)
    whom = options.name or "whoever opens it"
    print(f"{address}/join?invite={token}")
    print(f"lets {whom} join as {options.role}, once, within {options.days:g} days", file=sys.stderr)


def _list(accounts: Accounts) -> None:
    people, open_invitations = accounts.people(), accounts.invitations()
    width = max([len(account.name) for account in people], default=0)
    for account in people:
        print(f"{account.name:{width}}  {account.role:9}  {_state(account)}")
    for each in open_invitations:
        until = f"{datetime.fromtimestamp(each.expires_at, UTC):%Y-%m-%d %H:%M} UTC"
        print(f"invited: {each.name or 'anyone'} as {each.role} by {each.created_by}, until {until}")
    if not people and not open_invitations:
        print("there are no accounts yet; `rlhf accounts invite --role admin` makes the first")


def _state(account: Account) -> str:
    if not account.can_log_in:
        return "cannot log in"
    seen = "not logged in"
    if account.seen_at is not None:
        seen = f"last seen {datetime.fromtimestamp(account.seen_at, UTC):%Y-%m-%d %H:%M} UTC"
    return f"paused, {seen}" if account.paused else seen
