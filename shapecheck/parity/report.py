"""What a parity run came to, as text, Markdown or JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from shapecheck.files import whole
from shapecheck.parity import json_record, page
from shapecheck.parity.results import Divergence, Parity, Result, Side, Verdict
from shapecheck.parity.summary import backend_title, counts, explained, sentence, subject, unrun
from shapecheck.report.numbers import written
from shapecheck.report.tables import Format, clean, fact_list, heading, note_list, table, wrapped

_OUTPUT = ("case", "switch", "cfg")


_PROBED = ("input", "slot")


def told(parity: Parity, form: Format = "human") -> str:
    """The whole report: per backend what ran, what failed and why, where it began, then the numbers."""
    title = clean(f"Parity of {parity.model}", form)
    verdict = clean(f"{parity.verdict}: {sentence(parity)}", form)
    line = f"**{verdict}**" if form == "markdown" else wrapped(verdict, "    ")
    parts = [f"# {title}" if form == "markdown" else title, line, fact_list(_cleaned(_facts(parity), form), form)]
    for side in parity.sides:
        parts += _side(side, form)
    parts += [line if form == "human" else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(parity: Parity) -> str:
    """The same for machines, and more: every number, and the contract as `Contract.from_json` reads it."""
    return json_record.dumps(parity)


def _facts(parity: Parity) -> list[tuple[str, str]]:
    return [
        ("reference", parity.reference),
        ("tolerance", f"at most {parity.times_own:g} times PyTorch's own error in that precision"),
        *(("sizes" if number == 0 else "", str(each)) for number, each in enumerate(parity.geometries)),
        ("seed", str(parity.seed)),
        ("contract", parity.contract.digest),
        ("versions", ", ".join(f"{name} {release}" for name, release in parity.versions)),
    ]


def _side(side: Side, form: Format) -> Iterator[str]:
    yield _heading(backend_title(side), form)
    yield fact_list(_cleaned(_what_ran(side), form), form)
    yield note_list([clean(note, form) for note in side.notes], form)
    if side.failed:
        yield _heading(f"What failed on {side.backend}", form)
        yield _reasons(side.failed, form)
    if unrun(side):
        yield _heading(f"What was not run on {side.backend}", form)
        yield _reasons(unrun(side), form)
    if side.divergence:
        yield _heading(f"Where {side.backend} first leaves PyTorch", form)
        yield _divergence(side.divergence, form)
    if cases := [each for each in side.results if each.check.kind in _OUTPUT]:
        yield _heading(f"Outputs of {side.backend}", form)
        yield table([_case(each, form) for each in cases], _CASE_HEADERS, form)
    if probed := [each for each in side.results if each.check.kind in _PROBED]:
        yield _heading(f"Effect of each input and slot on {side.backend}", form)
        yield table([_probe(each, form) for each in probed], _PROBE_HEADERS, form)


def _heading(text: str, form: Format) -> str:
    return heading(clean(text, form), form)


def _what_ran(side: Side) -> list[tuple[str, str]]:
    ran = side.ran
    really = [("ran", f"{ran.provider} on {ran.device}, {ran.precision}"), ("with", ran.detail)] if ran else []
    return [*(really or [("ran", "nothing: it could not run")]), ("artefact", side.artefact), ("checks", counts(side))]


def _reasons(results: Sequence[Result], form: Format) -> str:
    """One paragraph a check."""
    lines = _clean_all([explained(each) for each in results], form)
    return note_list(lines, form) if form == "markdown" else _paragraphs(lines)


def _divergence(found: Divergence, form: Format) -> str:
    slot = f", slot {found.slot}" if found.slot else ""
    agreed = f"{len(found.agreed)} values before it agree" + (f", the last {found.agreed[-1]}" if found.agreed else "")
    lines = [f"{found.value} (module {found.module}{slot}): {found.verdict}", agreed, *([found.note] if found.note else [])]
    told = note_list(_clean_all(lines, form), form) if form == "markdown" else _paragraphs(lines)
    command = textwrap.indent(clean(found.command, "human"), "    ")
    return f"{told}\n\n{command}" if found.command else told


def _paragraphs(lines: Sequence[str]) -> str:
    return "\n".join(wrapped(clean(line, "human"), "    ") for line in lines)


_CASE_HEADERS = ("output", "worst error", "allowed", "own error", "worst/own", "outside", "cosine", "PSNR", "status")


_PROBE_HEADERS = ("input or slot", "strength", "cosine", "effect", "worst error", "allowed", "at", "status")


def _case(result: Result, form: Format) -> tuple[str, ...]:
    return (clean(subject(result).removeprefix("case "), form), *_numbers(result.verdict), _status(result))


def _numbers(verdict: Verdict | None) -> tuple[str, ...]:
    """Worst difference, allowed, own, ratio, share, cosine, PSNR."""
    if verdict is None:
        return ("-",) * 7
    return (
        _worst(verdict),
        written(verdict.allowed, "difference"),
        written(verdict.own, "difference"),
        written(json_record.times_own(verdict), "times"),
        written(verdict.share, "share"),
        written(verdict.cosine, "cosine"),
        written(verdict.psnr, "decibel"),
    )


def _worst(verdict: Verdict) -> str:
    told = [f"{count} {name}" for name, count in (("NaN", verdict.nan), ("Inf", verdict.inf)) if count]
    if verdict.absolute is not None:
        told.append(written(verdict.absolute.difference, "difference"))
    return ", ".join(told) or "not compared"


def _probe(result: Result, form: Format) -> tuple[str, ...]:
    effect, verdict = result.effect, result.verdict
    seen = (
        (written(effect.strength, "strength"), written(effect.cosine, "cosine"), written(effect.size, "share"))
        if effect
        else ("-", "-", "-")
    )
    compared = (_worst(verdict), written(verdict.allowed, "difference")) if verdict else ("", "")
    return (clean(result.check.where, form), *seen, *compared, str(result.geometry or ""), _status(result))


def _status(result: Result) -> str:
    return "FAILED" if result.status == "failed" else result.status


def _cleaned(facts: Sequence[tuple[str, str]], form: Format) -> list[tuple[str, str]]:
    """In Markdown a fact that goes on is told under one name."""
    if form == "markdown":
        merged: dict[str, str] = {}
        last = ""
        for name, value in facts:
            last = name or last
            merged[last] = f"{merged[last]}; {value}" if last in merged else value
        facts = list(merged.items())
    return [(name, clean(value, form)) for name, value in facts if value]


def _clean_all(lines: Sequence[str], form: Format) -> list[str]:
    return [clean(line, form) for line in lines]


NAMES = {"json": "parity.json", "markdown": "parity.md", "html": "parity.html"}


def write_all(parity: Parity, folder: Path) -> tuple[Path, ...]:
    """Write parity.json, parity.md and parity.html into a folder, each when it is whole. Returns their paths.

    Raises ShapecheckError where the folder cannot be written.
    """
    texts = {"json": as_json(parity), "markdown": told(parity, "markdown"), "html": page.page(parity)}
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
