"""Chance that a key decides: the same for every process, database and day."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa

from rlhf.schema import items

PRIME = 2_147_483_647
"""2^31 - 1: `id -> (a id + b) mod PRIME` visits ids in an order that looks random and that any database computes."""


def number(*key: object) -> int:
    """A number of 128 bits from a key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16])


def shuffled(*key: object) -> sa.ColumnElement[int]:
    """A number from 0 to PRIME - 1 for each item, in an order that the key decides; for the database to compute."""
    factor, offset = _line(*key)
    return (sa.cast(items.c.id, sa.BigInteger) * factor + offset) % PRIME


def place(item_id: int, *key: object) -> int:
    """The number that `shuffled` gives this item."""
    factor, offset = _line(*key)
    return (item_id * factor + offset) % PRIME


def _line(*key: object) -> tuple[int, int]:
    drawn = number(*key)
    return 1 + drawn % (PRIME - 1), drawn // PRIME % PRIME
