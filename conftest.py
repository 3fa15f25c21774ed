"""Options of this repository's own tests."""

from __future__ import annotations

from collections.abc import Callable

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
def require_backend(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Ends a test whose backend cannot run here: as failed where `--shapecheck-backends` asks for it, else as skipped."""
    asked = str(request.config.getoption("--shapecheck-backends")).split(",")

    def require(name: str) -> None:
        from shapecheck import doctor

        known = doctor.backend(name)
        if not known.runs:
            (pytest.fail if name in asked else pytest.skip)(f"{name} cannot run here: {known.reason}")

    return require


@pytest.fixture
def update_reports(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-reports"))
