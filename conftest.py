"""Options of this repository's own tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-reports", action="store_true", help="accept what shapecheck says today as reports/ and presets/contracts/"
    )
    parser.addoption(
        "--shapecheck-backends",
        default="",
        metavar="NAMES",
        help="backends that must run here, such as trt,ort: see `shapecheck doctor`",
    )


@pytest.fixture(scope="session")
def shapecheck_backends(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The backends that were asked for: where one cannot run, its tests fail instead of being skipped."""
    return tuple(filter(None, request.config.getoption("--shapecheck-backends").split(",")))


@pytest.fixture
def update_reports(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-reports"))
