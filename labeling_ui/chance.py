"""Chance that a key decides: the same for every process, database and day."""

from __future__ import annotations

import hashlib
from typing import Any

import sqlalchemy as sa

from rlhf.schema import items

PRIME = 2_147_483_647
"""2^31 - 1: `id -> (a id + b) mod PRIME` visits ids in an order that looks random and that any database computes."""


def number(*key: object) -> int:
    """A number of 128 bits from a key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16])


def shuffled(*key: object) -> sa.ColumnElement[int]:
    """A number from 0 to PRIME - 1 for each item, in an order that the key decides; for the database to compute."""
    return _on_line(**line(*key))


def shuffled_later() -> sa.ColumnElement[int]:
    """The same for a statement that is kept: its parameters `factor` and `offset` are those of `line(*key)`."""
    return _on_line(
        factor=sa.bindparam("factor", type_=sa.BigInteger), offset=sa.bindparam("offset", type_=sa.BigInteger)
    )


def place(item_id: int, *key: object) -> int:
    """The number that `shuffled` gives this item."""
    return (item_id * (drawn := line(*key))["factor"] + drawn["offset"]) % PRIME


def line(*key: object) -> dict[str, int]:
    """Factor and offset of the order that a key decides."""
    drawn = number(*key)
    return {"factor": 1 + drawn % (PRIME - 1), "offset": drawn // PRIME % PRIME}


def _on_line(factor: Any, offset: Any) -> sa.ColumnElement[int]:
    return (sa.cast(items.c.id, sa.BigInteger) * factor + offset) % PRIME
