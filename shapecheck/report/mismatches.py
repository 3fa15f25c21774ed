"""Mismatches as a table, and in words: how many there are, and the cause that all of them share."""

from __future__ import annotations

from collections.abc import Sequence

from shapecheck.contract import Mismatch
from shapecheck.contract.naming import SHAPECHECK, is_feature
from shapecheck.contract.records import format_observed
from shapecheck.report.document import Paragraph, Part, Table
from shapecheck.report.numbers import format_count


def list_mismatches(mismatches: Sequence[Mismatch], actual: str, expected: str = "UNet takes") -> list[Part]:
    """Return a table of every mismatch, less the cause that all of them share, and the size they were found at.

    `actual` and `expected` are the headers of the two sides.
    """
    emitter = "adapter module" if all(is_feature(mismatch.where) for mismatch in mismatches) else "ControlNet module"
    headers = ("where", "kind", actual, expected, "UNet module", "ControlNet", emitter, "likely cause")
    shared = find_shared_cause(mismatches)
    several = len({mismatch.controlnet for mismatch in mismatches}) > 1
    rows = [
        (
            mismatch.where,
            mismatch.kind,
            format_observed(mismatch.observed),
            format_observed(mismatch.expected),
            mismatch.unet_module,
            mismatch.controlnet if several else "",
            mismatch.controlnet_module,
            mismatch.cause.removeprefix(shared).removeprefix("; ") if shared else mismatch.cause,
        )
        for mismatch in mismatches
    ]
    spared = (emitter,) if all(map(_is_from_usual_module, mismatches)) else ()
    geometry = next((mismatch.geometry for mismatch in mismatches if mismatch.geometry), None)
    return [Table(headers, rows, spared), *([Paragraph(f"Told at {geometry}.")] if geometry else [])]


def _is_from_usual_module(mismatch: Mismatch) -> bool:
    number = SHAPECHECK.index(mismatch.where)
    module = "controlnet_mid_block" if number == -1 else f"controlnet_down_blocks.{number}"
    return is_feature(mismatch.where) or mismatch.controlnet_module in ("", module)


def find_shared_cause(mismatches: Sequence[Mismatch]) -> str:
    """Return the cause that every mismatch names first, or nothing."""
    firsts = {mismatch.cause.split("; ")[0] for mismatch in mismatches}
    return firsts.pop() if len(firsts) == 1 and len(mismatches) > 1 else ""


def count_mismatches(mismatches: Sequence[Mismatch], noun: str) -> str:
    """Return `13 places; likely cause: …`: how many there are, and what the table leaves out."""
    cause = find_shared_cause(mismatches)
    return format_count(len(mismatches), noun) + (f"; likely cause: {cause}" if cause else "")


def describe_fit(controlnets: Sequence[str], misfits: Sequence[Mismatch]) -> str:
    """Return the line that says whether these ControlNets fit."""
    fit = f"does not fit: {count_mismatches(misfits, 'place')}" if misfits else "fits"
    return f"CONTROLNET: {', '.join(controlnets)} {fit}"
