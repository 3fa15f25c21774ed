"""A table that was claimed or given, held against a UNet, as text or Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shapecheck.contract import show
from shapecheck.contract.records import shape_or_words
from shapecheck.explain.diagnosis import Diagnosis
from shapecheck.explain.judge_mapping import Judgement
from shapecheck.explain.torch_messages import eager
from shapecheck.report.tables import Format, clean, fact_list, heading, note_list, table

_SHOWN = 4
"""Names of models that are written out."""


def judged(judgement: Judgement, form: Format) -> Iterator[str]:
    """A table held against a UNet."""
    title = f"The table given, on {names(judgement.models)}, {judgement.geometry}"
    yield f"# {title}" if form == "markdown" else title
    yield _verdict_line(judgement)
    if judgement.failure is not None:
        yield fact_list([("PyTorch says", eager(judgement.failure) or "an error that is not known here")], form)
    if judgement.matches:
        exact = judgement.matches[0].differs == 0
        yield heading("This is what was done" if exact else "No known mistake gives this table; the nearest", form)
        yield table(_match_rows(judgement), ("fault", "what was done", "slots that differ"), form)
        yield heading("What to change", form)
        changes = dict.fromkeys((match.fault.kind, match.fault.change) for match in judgement.matches)
        yield table(list(changes), ("fault", "change"), form)
    yield heading("Slot by slot", form)
    yield table(_slot_rows(judgement), ("#", "slot", "given", "UNet takes", "verdict", "skip from", "likely cause"), form)
    notes = [clean(note, form) for note in judgement.notes]
    if not judgement.tells_mid:
        notes.append("this table says nothing of the mid residual: it is taken to be right")
    if notes:
        yield note_list(notes, form)


def agreement(diagnosis: Diagnosis, judgement: Judgement, form: Format) -> str:
    """Whether the table gives the text, where both were given."""
    agreed = judgement.gives(diagnosis)
    if agreed is None:
        return ""
    told = (
        "this table gives the text above"
        if agreed
        else "this table does not give the text above: that comes from other residuals"
    )
    return note_list([told], form)


def _slot_rows(judgement: Judgement) -> list[tuple[object, ...]]:
    """Every slot, right or wrong, then what no slot takes."""
    wrong = {each.where: each for each in judgement.mismatches}
    rows: list[tuple[object, ...]] = []
    for number, slot in enumerate(judgement.contract.slots):
        takes = show(slot.shape_at(judgement.geometry))
        fault = wrong.pop(slot.name, None)
        given = takes if fault is None else shape_or_words(fault.observed)
        rows.append(
            (number, slot.name, given, takes, fault.kind if fault else "right", slot.producer, fault.cause if fault else "")
        )
    rows += [
        ("", each.where, shape_or_words(each.observed), "no such slot", each.kind, "", each.cause) for each in wrong.values()
    ]
    return rows


def elsewhere(judgements: Sequence[Judgement], form: Format) -> Iterator[str]:
    """The same table on the other UNets that were tried."""
    if judgements:
        yield heading("On other models", form)
        rows = [(names(each.models), _verdict_line(each)) for each in judgements]
        yield table(rows, ("models", "verdict"), form)


def _verdict_line(judgement: Judgement) -> str:
    """What a table comes to, in a line."""
    if judgement.is_right:
        return f"RIGHT: every one of the {len(judgement.contract.slots)} slots gets what it takes"
    count = f"{len(judgement.mismatches)} {'slot' if len(judgement.mismatches) == 1 else 'slots'}"
    if judgement.is_silent:
        return f"WRONG IN SILENCE: {count} do not fit, and PyTorch runs all the same: the image is wrong"
    return f"WRONG: {count} do not fit; PyTorch fails at {judgement.failure.slot if judgement.failure else 'some place'}"


def _match_rows(judgement: Judgement) -> list[tuple[str, str, str]]:
    return [(fault.kind, fault.told, str(match.differs or "")) for match in judgement.matches for fault in match.faults]


def names(models: Sequence[str]) -> str:
    """Some of the models, and how many more."""
    return ", ".join(models[:_SHOWN]) + (f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else "")
