"""A demo written down beside its pictures: the record, the text and the page."""

from __future__ import annotations

from pathlib import Path

from shapecheck.contract.demo import Demo
from shapecheck.files import whole
from shapecheck.report.demo import as_json, page, told


def write_all(demo: Demo, folder: Path) -> None:
    """Write demo.json, demo.md and index.html into the folder that holds the pictures, each when it is whole.

    Raises ShapecheckError where the folder cannot be written.
    """
    pictures = {each.file: (folder / each.file).read_bytes() for each in demo.pictures}
    texts = {"demo.json": as_json(demo), "demo.md": told(demo, "markdown"), "index.html": page(demo, pictures)}
    for name, text in texts.items():
        with whole(folder / name) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
