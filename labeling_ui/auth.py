"""Accounts: who may log in, and how the server knows them again. All of it is in the store, none in memory.

Of passwords the store holds argon2 hashes, of sessions and invitations the sha256 of 256 random bits: who reads the
store can neither log in nor go on as somebody else. What changes an account is an event in the log.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from labeling_ui.passwords import Hashes, Refused, checked_name, checked_password
from labeling_ui.person import Person, Role
from rlhf.event_log import add_event, now
from rlhf.schema import assignments, invites, sessions, users
from rlhf.store import Store, insert
from rlhf.types import DataError

FREE_TRIES, FIRST_PAUSE, LONGEST_PAUSE = 5, 30.0, 900.0
"""After so many wrong passwords in a row an account answers nobody for 30 seconds, then 60, 120, ... 900."""

IDLE_SECONDS, ABSOLUTE_SECONDS = 12 * 3600.0, 7 * 86400.0
"""A session ends when it has not been used for so long, or is so old."""

SEEN_EVERY = 60.0
"""Seconds: how precisely a session's last use is kept."""

WRONG = (
    "This name and this password do not belong together. After five wrong passwords an account waits before it "
    "answers again, from half a minute to a quarter of an hour."
)
NOT_INVITED = "This invitation is unknown, used up or expired. Ask an admin for a new one."


@dataclass(frozen=True)
class Session:
    """Someone who is logged in. `csrf` goes with every write; None where the page has no login."""

    person: Person
    csrf: str | None


@dataclass(frozen=True)
class Login:
    """A new session; `token` is the browser's secret, which the store does not know."""

    token: str
    session: Session


@dataclass(frozen=True)
class Invitation:
    """What an invitation offers. `name` is None where the guest chooses one."""

    name: str | None
    role: Role
    created_by: str
    expires_at: float


@dataclass(frozen=True)
class Account:
    """One line of the list of people."""

    name: str
    role: Role
    paused: bool
    can_log_in: bool
    seen_at: float | None
    """Unix time at which a session of theirs that still lives was last used."""


class Accounts:
    """The people of one store. `clock` gives unix time; safe to call from several threads and processes."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time, hashes: Hashes | None = None) -> None:
        self.store = store
        self._clock = clock
        self._hashes = hashes or Hashes()

    # ------------------------------------------------------------------------------------------------ sessions

    def login(self, name: str, password: str, replacing: str | None = None) -> Login:
        """A new session; the one of the token `replacing` ends. Raises Refused.

        A wrong name, a wrong password and a waiting account get the same answer, after about the same time.
        """
        # An attempt counts before its password is looked at: many at once are no way around the pause.
        user, admitted = self._attempt(name)
        kept = user.password_hash if user is not None and admitted else None
        if not self._hashes.fits(kept, password) or user is None or kept is None:
            raise Refused("form", WRONG)
        renewed = self._hashes.make(password) if self._hashes.outdated(kept) else kept
        with self.store.write() as connection:
            unchanged = (users.c.id == user.id, users.c.password_hash == kept)
            values = {"failures": 0, "locked_until": 0.0, "password_hash": renewed}
            if connection.execute(sa.update(users).where(*unchanged).values(values)).rowcount == 0:
                raise Refused("form", WRONG)  # it was changed meanwhile
            self._clear(connection, replacing)
            return self._begin(connection, user.id, Person(user.name, user.role))

    def session(self, token: str | None) -> Session | None:
        """Who holds this token; None for nobody, or no longer."""
        if not token:
            return None
        at = self._clock()
        query = (
            sa.select(sessions, users.c.name, users.c.role)
            .join(users, sessions.c.user_id == users.c.id)
            .where(sessions.c.token_hash == digest(token))
        )
        with self.store.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None or at - row.seen_at > IDLE_SECONDS or at - row.created_at > ABSOLUTE_SECONDS:
            return None
        if at - row.seen_at > SEEN_EVERY:
            with self.store.write() as connection:
                mine = sessions.c.token_hash == row.token_hash
                connection.execute(sa.update(sessions).where(mine).values(seen_at=at))
        return Session(Person(row.name, row.role), row.csrf)

    def logout(self, token: str) -> None:
        """End this session; the person's others go on."""
        with self.store.write() as connection:
            self._clear(connection, token)

    def change_password(self, name: str, old: str, new: str) -> Login:
        """Another password, and one new session in place of all the old ones. Raises Refused."""
        new = checked_password(new, name)
        user, admitted = self._attempt(name)
        if user is None or not admitted or not self._hashes.fits(user.password_hash, old):
            raise Refused("old", "This is not your password. After five wrong ones an account waits for a while.")
        fresh = self._hashes.make(new)
        with self.store.write() as connection:
            values = {"failures": 0, "locked_until": 0.0, "password_hash": fresh}
            unchanged = (users.c.id == user.id, users.c.password_hash == user.password_hash)
            if connection.execute(sa.update(users).where(*unchanged).values(values)).rowcount == 0:
                raise Refused("old", "Your account was changed meanwhile: log in again, or ask an admin.")
            self._end_all(connection, user.id)
            add_event(connection, "password_changed", annotator=name)
            return self._begin(connection, user.id, Person(user.name, user.role))

    # --------------------------------------------------------------------------------------------- invitations

    def invite(self, role: Role, name: str | None = None, *, by: str = "the command line", days: float = 7.0) -> str:
        """A token that lets one person join, once. Raises Refused.

        For the name of an account whose password was removed it is the way back in.
        """
        name = None if name is None else checked_name(name)
        token = secrets.token_urlsafe(32)
        with self.store.write() as connection:
            user = None if name is None else _user(connection, name)
            if user is not None and user.password_hash is not None:
                raise Refused("name", f"{name!r} has an account already; remove its password to invite anew.")
            row = {"name": name, "role": role, "created_by": by, "expires_at": self._clock() + days * 86400}
            connection.execute(sa.insert(invites).values(token_hash=digest(token), **row))
            add_event(connection, "invited", annotator=name, role=role, by=by)
        return token

    def invitation(self, token: str) -> Invitation:
        """What this token offers. Raises Refused where it offers nothing, or no longer."""
        with self.store.read() as connection:
            return self._invitation(connection, token)

    def join(self, token: str, name: str, password: str) -> Login:
        """Make the account and log in; the invitation is used up. A name in the invitation wins. Raises Refused."""
        offered = self.invitation(token)
        name = checked_name(offered.name or name)
        kept = self._hashes.make(checked_password(password, name))
        with self.store.write() as connection:
            offered = self._invitation(connection, token)  # others may have been quicker
            user_id = self._enrol(connection, offered, name, kept)
            mine = invites.c.token_hash == digest(token)
            connection.execute(sa.update(invites).where(mine).values(used_by=name))
            add_event(connection, "joined", annotator=name, role=offered.role, by=offered.created_by)
            return self._begin(connection, user_id, Person(name, offered.role))

    def _enrol(self, connection: sa.Connection, offered: Invitation, name: str, kept: str) -> int:
        user = _user(connection, name)
        if user is not None and (offered.name is None or user.password_hash is not None):
            raise Refused("name", f"The name {name!r} is taken.")
        if user is None and offered.name is None and _has_ranked(connection, name):
            raise Refused("name", f"{name!r} has ranked here before: choose another, or be invited by this name.")
        values = {"password_hash": kept, "role": offered.role, "failures": 0, "locked_until": 0.0}
        if user is None:
            return insert(connection, users, {"name": name, "paused": False, "created_at": now(), **values})
        connection.execute(sa.update(users).where(users.c.id == user.id).values(values))
        return user.id

    def _invitation(self, connection: sa.Connection, token: str) -> Invitation:
        open_now = (invites.c.used_by.is_(None), invites.c.expires_at > self._clock())
        query = sa.select(invites).where(invites.c.token_hash == digest(token), *open_now)
        row = connection.execute(query).one_or_none()
        if row is None:
            raise Refused("form", NOT_INVITED)
        return Invitation(row.name, row.role, row.created_by, row.expires_at)

    # -------------------------------------------------------------------------------------------------- people

    def people(self) -> list[Account]:
        """Every account, by name."""
        seen = sa.select(sa.func.max(sessions.c.seen_at)).where(sessions.c.user_id == users.c.id).scalar_subquery()
        with self.store.read() as connection:
            rows = connection.execute(sa.select(users, seen.label("seen_at")).order_by(users.c.name)).all()
        return [Account(row.name, row.role, row.paused, row.password_hash is not None, row.seen_at) for row in rows]

    def invitations(self) -> list[Invitation]:
        """Those that are open, the one that ends first before the others."""
        open_now = (invites.c.used_by.is_(None), invites.c.expires_at > self._clock())
        with self.store.read() as connection:
            rows = connection.execute(sa.select(invites).where(*open_now).order_by(invites.c.expires_at)).all()
        return [Invitation(row.name, row.role, row.created_by, row.expires_at) for row in rows]

    def has_admin(self) -> bool:
        """Whether somebody can log in as an admin, or has been invited to: to join, the page must run."""
        people = [account.role for account in self.people() if account.can_log_in]
        return "admin" in (*people, *(each.role for each in self.invitations()))

    def pause(self, name: str, *, by: str = "the command line") -> None:
        """Give this person no more items; they can still log in. Raises DataError for an unknown name."""
        self._set(name, "paused", by, paused=True)

    def resume(self, name: str, *, by: str = "the command line") -> None:
        """Give them items again. Raises DataError for an unknown name."""
        self._set(name, "resumed", by, paused=False)

    def remove_password(self, name: str, *, by: str = "the command line") -> None:
        """Shut this person out, at once: sessions and the invitations that they made or were given end.

        What they ranked stays; a new invitation by their name lets them in again. Raises DataError.
        """
        self._set(name, "password_removed", by, password_hash=None)

    def _set(self, name: str, kind: str, by: str, **values: object) -> None:
        with self.store.write() as connection:
            user = _user(connection, name)
            if user is None:
                raise DataError(f"there is no account {name!r}: `rlhf accounts list` shows them all")
            connection.execute(sa.update(users).where(users.c.id == user.id).values(values))
            if kind == "password_removed":
                self._end_all(connection, user.id)
                theirs = sa.or_(invites.c.created_by == name, invites.c.name == name)
                connection.execute(sa.delete(invites).where(theirs, invites.c.used_by.is_(None)))
            add_event(connection, kind, annotator=name, by=by)

    # --------------------------------------------------------------------------------- steps inside a transaction

    def _attempt(self, name: str) -> tuple[sa.Row | None, bool]:
        """The account, and whether it may be tried now; counts as a failure until the password turns out right."""
        try:
            name = checked_name(name)
        except Refused:
            name = ""  # nobody's
        at = self._clock()
        with self.store.write() as connection:
            user = _user(connection, name)
            if user is None or user.locked_until > at:
                return user, False
            failures = user.failures + 1
            values: dict[str, float] = {"failures": failures}
            if failures >= FREE_TRIES:
                values["locked_until"] = at + pause_after(failures)
            if failures == FREE_TRIES:
                add_event(connection, "locked", annotator=user.name)
            connection.execute(sa.update(users).where(users.c.id == user.id).values(values))
            return user, True

    def _begin(self, connection: sa.Connection, user_id: int, person: Person) -> Login:
        at = self._clock()
        ended = sa.or_(sessions.c.seen_at < at - IDLE_SECONDS, sessions.c.created_at < at - ABSOLUTE_SECONDS)
        connection.execute(sa.delete(sessions).where(ended))
        token, csrf = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        row = {"token_hash": digest(token), "user_id": user_id, "csrf": csrf, "created_at": at, "seen_at": at}
        connection.execute(sa.insert(sessions).values(row))
        return Login(token, Session(person, csrf))

    def _clear(self, connection: sa.Connection, token: str | None) -> None:
        if token:
            connection.execute(sa.delete(sessions).where(sessions.c.token_hash == digest(token)))

    def _end_all(self, connection: sa.Connection, user_id: int) -> None:
        connection.execute(sa.delete(sessions).where(sessions.c.user_id == user_id))


def digest(token: str) -> str:
    """What the store keeps of a token. It has 256 random bits: one quick hash is enough."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def pause_after(failures: int) -> float:
    """Seconds that an account waits after so many wrong passwords in a row, the fifth and later."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - FREE_TRIES, 20))


def _user(connection: sa.Connection, name: str) -> sa.Row | None:
    return connection.execute(sa.select(users).where(users.c.name == name)).one_or_none()


def _has_ranked(connection: sa.Connection, name: str) -> bool:
    query = sa.select(assignments.c.id).where(assignments.c.annotator == name).limit(1)
    return connection.execute(query).one_or_none() is not None
