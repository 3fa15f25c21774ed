"""Fixtures for the tests of a user."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from shapecheck.pytest_plugin.options import build_request, get_run, option

if TYPE_CHECKING:
    from shapecheck.contract import Contract
    from shapecheck.parity.results import Parity


@pytest.fixture(scope="session")
def shapecheck_contract(pytestconfig: pytest.Config) -> Contract:
    """Return the contract of `--shapecheck-model`, in the precision of the file beside it; skip if no model is given."""
    if not option(pytestconfig, "model"):
        pytest.skip("no --shapecheck-model")
    return get_run(pytestconfig).contract


@pytest.fixture(scope="session")
def shapecheck_parity(pytestconfig: pytest.Config) -> Callable[..., Parity]:
    """Return a function that compares a model with files made of it: `shapecheck_parity("./sd15", onnx="unet.onnx")`.

    Keywords are the fields of `shapecheck.parity.request.ParityRequest`; those left out are taken from the command line.
    Returns a `Parity`: `assert parity.passes, str(parity)`; pytest shortens the text of anything but a string.
    """

    def compare(model: str | None = None, **fields: Any) -> Parity:
        from dataclasses import replace

        from shapecheck import ShapecheckError
        from shapecheck.parity.request import create_run

        if model is None and not option(pytestconfig, "model"):
            raise ShapecheckError("no model: pass one, or --shapecheck-model")
        changed: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return create_run(replace(build_request(pytestconfig, model), **changed)).report()

    return compare


@pytest.fixture(scope="session")
def shapecheck_require() -> Callable[[str], None]:
    """Return a function that skips a test whose backend cannot run here, with the reason: `shapecheck_require("trt")`."""

    def require(name: str) -> None:
        from shapecheck import doctor

        backend = doctor.backend(name)
        if not backend.runs:
            pytest.skip(f"{name} cannot run here: {backend.reason}")

    return require
