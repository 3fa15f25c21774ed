"""Packages that only some tasks need, and how to get them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from shapecheck.contract import ShapecheckError

_EXTRAS = {
    **dict.fromkeys(("onnx", "onnx_ir", "onnxscript", "onnxruntime"), "onnx"),
    **dict.fromkeys(("tokenizers", "transformers"), "demo"),
    "tensorrt": "gpu",
    "tensorrt_rtx": "rtx",
}
"""From a module to the extra of this distribution that installs it."""


def explain_missing(error: ModuleNotFoundError, task: str) -> Exception:
    """Return an error that says which extra installs a missing module; the error itself if none does."""
    name = (error.name or "").partition(".")[0]
    if name not in _EXTRAS:
        return error
    return ShapecheckError(f"{task} needs the package {name}: pip install 'shapecheck-controlnet[{_EXTRAS[name]}]'")


def list_versions(distributions: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return name and version of those that are installed."""
    installed = []
    for name in distributions:
        with suppress(PackageNotFoundError):
            installed.append((name, version(name)))
    return tuple(installed)
