"""Why a person's request is turned down, where the web answers each reason with a status of its own."""

from __future__ import annotations

from rlhf.types import DataError


class NotAllowed(DataError):
    """Something that this person may not do: it is not theirs, or they are not admitted to it yet."""


class Conflict(DataError):
    """Something that no longer fits what the store holds: somebody else, or another tab, was quicker."""
