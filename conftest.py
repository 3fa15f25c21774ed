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


def pytest_sessionstart(session: pytest.Session) -> None:
    """End the run where a backend that was asked for cannot run here, whatever tests were chosen."""
    asked = session.config.getoption("--shapecheck-backends")
    if not asked or hasattr(session.config, "workerinput"):  # the other processes of pytest-xdist need not ask again
        return
    from shapecheck import ShapecheckError, doctor

    for name in asked.split(","):
        try:
            known = doctor.backend(name.strip())
        except ShapecheckError as error:
            raise pytest.UsageError(f"--shapecheck-backends: {error}") from None
        if not known.runs:
            pytest.exit(f"{known.name} cannot run here: {known.reason}", returncode=1)


@pytest.fixture(scope="session")
def require_backend() -> Callable[[str], None]:
    """Skips a test whose backend cannot run here, and that nobody asked for."""

    def require(name: str) -> None:
        from shapecheck import doctor

        known = doctor.backend(name)
        if not known.runs:
            pytest.skip(f"{name} cannot run here: {known.reason}")

    return require


@pytest.fixture
def update_reports(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-reports"))
