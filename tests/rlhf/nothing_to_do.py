"""A stage that has nothing to do."""

from __future__ import annotations

from typing import Any


def run(_config: Any) -> None:
    """Leaves everything as it is."""
