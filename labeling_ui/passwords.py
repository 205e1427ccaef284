"""Passwords and names: what may be one, and how a password is kept."""

from __future__ import annotations

import re
import threading
import unicodedata
from functools import cached_property

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from rlhf.renewal import SIMULATED
from rlhf.types import DataError

SHORTEST, LONGEST = 10, 200
"""Characters of a password."""

AT_ONCE = 2
"""Passwords hashed at the same time: each takes 64 MiB, and anybody may ask for it."""

COMMON = ("password", "passwort", "qwerty", "123456", "abcdef", "letmein", "iloveyou", "welcome", "admin", "labeling")


class Refused(DataError):
    """A name, password or invitation that will not do; `field` is the form's field that it is about."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def checked_name(name: str) -> str:
    """The name in the form in which it is kept. Raises Refused."""
    name = unicodedata.normalize("NFKC", name).strip()
    if not re.fullmatch(r"[\w.@+-]+( [\w.@+-]+)*", name) or len(name) > 64:
        raise Refused("name", "A name has up to 64 letters and digits, and . _ - @ + or single spaces between them.")
    if name.lower().startswith(SIMULATED):
        raise Refused("name", f"Names that begin with {SIMULATED} belong to simulated annotators.")
    return name


def checked_password(password: str, name: str) -> str:
    """The password in the form that is hashed. Raises Refused, with what to do."""
    password = normal(password)
    bare = re.sub(r"[\W\d_]+", "", password.lower())
    if len(password) < SHORTEST:
        raise Refused("password", f"Use at least {SHORTEST} characters: a few words in a row are fine.")
    if len(password) > LONGEST:
        raise Refused("password", f"Use at most {LONGEST} characters.")
    if name.lower() in password.lower() and len(password) < len(name) + SHORTEST:
        raise Refused("password", "Leave your name out of it.")
    if len(set(password)) < 5 or bare in COMMON or any(password.lower().startswith(each * 2) for each in COMMON):
        raise Refused("password", "This is one of the first that others would try: use a few words in a row.")
    if password.isdecimal() and len(password) < 16:
        raise Refused("password", "Digits alone are quickly tried out: use a few words in a row.")
    return password


def normal(password: str) -> str:
    """The same characters, whichever keyboard they were typed on."""
    return unicodedata.normalize("NFKC", password)


class Hashes:
    """argon2id, a few at a time."""

    def __init__(self, hasher: PasswordHasher | None = None) -> None:
        self._hasher = hasher or PasswordHasher()
        self._turn = threading.BoundedSemaphore(AT_ONCE)

    def make(self, password: str) -> str:
        with self._turn:
            return self._hasher.hash(normal(password))

    def fits(self, kept: str | None, password: str) -> bool:
        """Whether the password is the one kept; where none is kept, no, after as long a time."""
        if len(password) > LONGEST:
            return False
        try:
            with self._turn:
                return self._hasher.verify(kept or self._nobodys, normal(password)) and kept is not None
        except (VerificationError, InvalidHashError):
            return False

    def outdated(self, kept: str) -> bool:
        """Whether it was made with other parameters than today's."""
        return self._hasher.check_needs_rehash(kept)

    @cached_property
    def _nobodys(self) -> str:
        return self._hasher.hash("nobody's password")
