"""A parity run written down: every form of its report in a folder, and one failure as a test tells it."""

from __future__ import annotations

from pathlib import Path

from shapecheck.contract.parity import Parity, Result, Side
from shapecheck.files import whole
from shapecheck.report import html
from shapecheck.report.parity import as_json, told

NAMES = {"json": "parity.json", "markdown": "parity.md", "html": "parity.html"}


def write_all(parity: Parity, folder: Path) -> tuple[Path, ...]:
    """Write parity.json, parity.md and parity.html into a folder, each when it is whole. Returns their paths.

    Raises ShapecheckError where the folder cannot be written.
    """
    texts = {"json": as_json(parity), "markdown": told(parity, "markdown"), "html": html.page(parity)}
    written = []
    for form, text in texts.items():
        path = folder / NAMES[form]
        with whole(path) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        written.append(path)
    return tuple(written)


def failure(result: Result, side: Side) -> str:
    """What a test says of a check that failed: the reason, the numbers, and where the image leaves PyTorch's."""
    lines = [result.reason]
    if result.geometry is not None:
        lines.append(f"at {result.geometry}, {side.artefact}, {side.ran or 'not run'}")
    if result.verdict is not None and str(result.verdict) not in result.reason:
        lines.append(str(result.verdict))
    first = next((each for each in side.failed if each.check.kind == "case"), None)
    found = side.divergence if result == first else None  # the same for every case: told once
    if found is not None:
        slot = f" (slot {found.slot})" if found.slot else ""
        lines.append(f"the first value that is not PyTorch's: {found.value}, of {found.module}{slot}: {found.verdict}")
        lines += [found.note] if found.note else []
        lines += [f"to see it without shapecheck: {found.command}"] if found.command else []
    return "\n".join(lines)
