"""A parity run as text, Markdown or JSON; all its forms in a folder; and one failure as a test shows it."""

from __future__ import annotations

from pathlib import Path

from shapecheck.files import atomic_write
from shapecheck.parity import page
from shapecheck.parity.findings import list_consequences, suggest_command
from shapecheck.parity.json_record import OUTPUTS, compare_with_torch, record_parity
from shapecheck.parity.results import Parity, Result, Side, Verdict
from shapecheck.parity.summary import (
    count_statuses,
    describe_fp8,
    describe_reason,
    describe_rounding,
    describe_subject,
    list_unrun,
    name_backend,
    summarize,
)
from shapecheck.report.document import Document, Facts, Format, Heading, Lines, Part, Points, Table
from shapecheck.report.numbers import dump_json, format_number


def render_text(parity: Parity, form: Format = "human") -> str:
    """Return the whole report: for each backend what ran, what failed and why, where it began, then the numbers."""
    first, *others = [str(geometry) for geometry in parity.geometries] or [""]
    facts = [
        ("reference", parity.reference),
        ("tolerance", f"at most {parity.times_own:g} times PyTorch's own error in that precision{describe_fp8(parity)}"),
        ("sizes", first),
        *(("", geometry) for geometry in others),
        ("seed", str(parity.seed)),
        ("contract", parity.contract.digest),
        ("versions", ", ".join(f"{name} {release}" for name, release in parity.versions)),
    ]
    parts = [Facts(facts), *(part for side in parity.sides for part in _list_parts(side))]
    verdict = f"{parity.verdict}: {summarize(parity)}"
    command = suggest_command(parity)
    first_lines = [verdict, *([f"next: {command}"] if command else [])]
    return Document(f"Parity of {parity.model}", parts, first_lines, wraps_verdict=True).render(form)


def render_json(parity: Parity) -> str:
    """Return the same for machines, and more: every number, and the contract as `Contract.from_json` reads it."""
    return dump_json(record_parity(parity))


def write_all(parity: Parity, folder: Path) -> tuple[Path, ...]:
    """Write parity.json, parity.md and parity.html into a folder, each when it is whole. Return their paths.

    Raises ShapecheckError if the folder cannot be written.
    """
    texts = {"json": render_json(parity), "md": render_text(parity, "markdown"), "html": page.render_page(parity)}
    for suffix, text in texts.items():
        with atomic_write(folder / f"parity.{suffix}") as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return tuple(folder / f"parity.{suffix}" for suffix in texts)


def render_failure(result: Result, side: Side) -> str:
    """Return the text of a check that failed: the reason, the numbers, and where the image leaves PyTorch's."""
    lines = [result.reason]
    if result.geometry is not None:
        lines.append(f"at {result.geometry}, {side.artefact}, {side.ran or 'not run'}")
    if result.verdict is not None and str(result.verdict) not in result.reason:
        lines.append(str(result.verdict))
    first = next((failed for failed in side.failed if failed.check.kind == "case"), None)
    if result == first and (divergence := side.divergence):  # the same for every case: said once
        slot = f" (slot {divergence.slot})" if divergence.slot else ""
        place = f"{divergence.value}, of {divergence.module}{slot}"
        lines.append(f"the first value that is not PyTorch's: {place}: {divergence.verdict}")
        lines += [divergence.note] if divergence.note else []
        lines += [f"to see it without shapecheck: {divergence.command}"] if divergence.command else []
    return "\n".join(lines)


def _list_parts(side: Side) -> list[Part]:
    ran = [("ran", "nothing: it could not run")]
    if side.ran:
        ran = [("ran", f"{side.ran.provider} on {side.ran.device}, {side.ran.precision}"), ("with", side.ran.detail)]
    facts = Facts([*ran, ("artefact", side.artefact), ("checks", count_statuses(side)), ("rounding", describe_rounding(side))])
    parts: list[Part] = [Heading(name_backend(side)), facts, Points(side.notes, "note: ")]
    consequences = list_consequences(side)
    causes = [result for result in side.failed if result not in consequences]
    for title, results in (
        ("What failed", causes),
        ("What follows from it", consequences),
        ("What was not run", list_unrun(side)),
    ):
        if results:
            parts += [Heading(f"{title} on {side.backend}"), Points([describe_reason(result) for result in results])]
    if divergence := side.divergence:
        slot = f", slot {divergence.slot}" if divergence.slot else ""
        last = f", the last {divergence.agreed[-1]}" if divergence.agreed else ""
        lines = [
            f"{divergence.value} (module {divergence.module}{slot}): {divergence.verdict}",
            f"{len(divergence.agreed)} values before it agree{last}",
            *([divergence.note] if divergence.note else []),
        ]
        parts += [Heading(f"Where {side.backend} first leaves PyTorch"), Points(lines)]
        parts += [Lines([divergence.command], "    ")] if divergence.command else []
    if cases := [_tabulate_case(result) for result in side.results if result.check.kind in OUTPUTS]:
        headers = ["output", "worst error", "allowed", "own error", "worst/own", "outside", "cosine", "PSNR", "status"]
        parts += [Heading(f"Outputs of {side.backend}"), Table(headers, cases)]
    if probes := [_tabulate_probe(result) for result in side.results if result.check.kind in ("input", "slot")]:
        headers = ["input or slot", "strength", "cosine", "effect", "worst error", "allowed", "at", "status"]
        parts += [Heading(f"Effect of each input and slot on {side.backend}"), Table(headers, probes)]
    return parts


def _tabulate_case(result: Result) -> tuple[str, ...]:
    numbers: list[str] = ["-"] * 7
    if verdict := result.verdict:
        numbers = [
            _format_worst(verdict),
            *(format_number(error, "difference") for error in (verdict.allowed, verdict.own)),
            format_number(compare_with_torch(verdict), "times"),
            format_number(verdict.share, "share"),
            format_number(verdict.cosine, "cosine"),
            format_number(verdict.psnr, "decibel"),
        ]
    return (describe_subject(result).removeprefix("case "), *numbers, _format_status(result))


def _tabulate_probe(result: Result) -> tuple[str, ...]:
    effect, verdict = result.effect, result.verdict
    acts: tuple[str, ...] = ("-", "-", "-")
    if effect:
        strength, cosine = format_number(effect.strength, "strength"), format_number(effect.cosine, "cosine")
        acts = (strength, cosine, format_number(effect.size, "share"))
    compared = (_format_worst(verdict), format_number(verdict.allowed, "difference")) if verdict else ("", "")
    return (result.check.where, *acts, *compared, str(result.geometry or ""), _format_status(result))


def _format_worst(verdict: Verdict) -> str:
    counts = [f"{count} {name}" for name, count in (("NaN", verdict.nan), ("Inf", verdict.inf)) if count]
    if verdict.absolute is not None:
        counts.append(format_number(verdict.absolute.difference, "difference"))
    return ", ".join(counts) or "not compared"


def _format_status(result: Result) -> str:
    return "FAILED" if result.status == "failed" else result.status
