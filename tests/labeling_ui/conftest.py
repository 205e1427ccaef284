"""What the tests of the labeling service share."""

from __future__ import annotations

import pytest

from tests.labeling_ui.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()
