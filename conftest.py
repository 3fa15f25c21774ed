"""What this repository's own tests share; the options are those of shapecheck's plugin."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Probes of one topology by default, SD1.5's; those of the others are marked `full`."""
    for item in items:
        if item.path.suffix == ".toml" and not item.path.stem.startswith(("sd15", "mapping-")):
            item.add_marker("full")


@pytest.fixture
def update_reports(request: pytest.FixtureRequest) -> bool:
    """Whether what is said today is accepted as what has to be said."""
    return bool(request.config.getoption("--shapecheck-update"))
