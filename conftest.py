"""Options of this repository's own tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-reports", action="store_true", help="accept what shapecheck says today as reports/ and presets/contracts/"
    )


@pytest.fixture
def update_reports(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-reports"))
