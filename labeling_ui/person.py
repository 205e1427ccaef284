"""Who sends a request, as the gate in front of every route and event has found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["annotator", "admin"]

PERSON = "rlhf.person"
"""Where the gate leaves the person in a request's ASGI scope."""


@dataclass(frozen=True)
class Person:
    """Someone who may use the page. An admin may do all that an annotator may."""

    name: str
    role: Role


def person_of(scope: Mapping[str, Any]) -> Person:
    """The person behind an ASGI scope (`request.scope`, or `request.request.scope` of a `gr.Request`).

    Raises PermissionError where no gate let the request in: a handler must never go on then.
    """
    person = scope.get(PERSON)
    if not isinstance(person, Person):
        raise PermissionError("this request came past the login")
    return person
