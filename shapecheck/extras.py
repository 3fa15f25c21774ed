"""Packages that only some tasks need, and how to get them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from shapecheck.contract import ShapecheckError

_EXTRAS = {
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "tensorrt": "gpu",
    "tensorrt_rtx": "rtx",
    "tokenizers": "demo",
    "transformers": "demo",
}
"""From a module to the extra of this distribution that installs it."""


def explain_missing(error: ModuleNotFoundError, task: str) -> Exception:
    """What to raise where a module is not there: how to install it, if an extra does; else the error itself."""
    name = (error.name or "").partition(".")[0]
    if name not in _EXTRAS:
        return error
    return ShapecheckError(f"{task} needs the package {name}: pip install 'shapecheck-controlnet[{_EXTRAS[name]}]'")


def list_versions(distributions: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Name and version of those that are installed."""
    found = []
    for name in distributions:
        with suppress(PackageNotFoundError):
            found.append((name, version(name)))
    return tuple(found)
