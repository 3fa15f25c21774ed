"""What this repository's own tests share; the options are those of shapecheck's plugin."""

from __future__ import annotations

import pytest


@pytest.fixture
def update_reports(request: pytest.FixtureRequest) -> bool:
    """Whether what is said today is accepted as what has to be said."""
    return bool(request.config.getoption("--shapecheck-update"))
