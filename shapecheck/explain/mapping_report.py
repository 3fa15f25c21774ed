"""A table that was claimed or given, held against a UNet, as text or Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shapecheck.contract import show
from shapecheck.contract.records import shape_or_words
from shapecheck.explain.diagnosis import Diagnosis
from shapecheck.explain.judge_mapping import Judgement
from shapecheck.explain.torch_messages import say_eager
from shapecheck.report.document import Cell, Facts, Heading, Paragraph, Part, Points, Table
from shapecheck.report.numbers import format_count

_SHOWN = 4
"""Names of models that are written out."""


def list_judgement(judgement: Judgement) -> Iterator[Part]:
    """Yield the report of a table held against a UNet."""
    yield Heading(f"The table given, on {name_models(judgement.models)}, {judgement.geometry}", 1)
    yield Paragraph(_describe_verdict(judgement))
    if judgement.failure is not None:
        yield Facts([("PyTorch says", say_eager(judgement.failure) or "an error that is not known here")])
    if judgement.matches:
        exact = judgement.matches[0].differs == 0
        rows = [(fault.kind, fault.told, str(match.differs or "")) for match in judgement.matches for fault in match.faults]
        yield Heading("This is what was done" if exact else "No known mistake gives this table; the nearest")
        yield Table(("fault", "what was done", "slots that differ"), rows)
        yield Heading("What to change")
        yield Table(
            ("fault", "change"), list(dict.fromkeys((match.fault.kind, match.fault.change) for match in judgement.matches))
        )
    yield Heading("Slot by slot")
    yield Table(("#", "slot", "given", "UNet takes", "verdict", "skip from", "likely cause"), _tabulate_slots(judgement))
    about_mid = [] if judgement.tells_mid else ["this table says nothing of the mid residual: it is taken to be right"]
    yield Points([*judgement.notes, *about_mid], "note: ")


def describe_agreement(diagnosis: Diagnosis, judgement: Judgement) -> list[Part]:
    """Return whether the table gives the text, if both were given."""
    gives = judgement.reproduces(diagnosis)
    if gives is None:
        return []
    wrong = "this table does not give the text above: that comes from other residuals"
    return [Points(["this table gives the text above" if gives else wrong], "note: ")]


def _tabulate_slots(judgement: Judgement) -> list[tuple[Cell, ...]]:
    """Return every slot, right or wrong, then what no slot takes."""
    wrong = {mismatch.where: mismatch for mismatch in judgement.mismatches}
    rows: list[tuple[Cell, ...]] = []
    for number, slot in enumerate(judgement.contract.slots):
        takes = show(slot.shape_at(judgement.geometry))
        fault = wrong.pop(slot.name, None)
        given = takes if fault is None else shape_or_words(fault.observed)
        rows.append(
            (number, slot.name, given, takes, fault.kind if fault else "right", slot.producer, fault.cause if fault else "")
        )
    rows += [
        ("", fault.where, shape_or_words(fault.observed), "no such slot", fault.kind, "", fault.cause)
        for fault in wrong.values()
    ]
    return rows


def list_others(judgements: Sequence[Judgement]) -> list[Part]:
    """Return what the same table comes to on the other UNets that were tried."""
    rows = [(name_models(judgement.models), _describe_verdict(judgement)) for judgement in judgements]
    return [Heading("On other models"), Table(("models", "verdict"), rows)] if rows else []


def _describe_verdict(judgement: Judgement) -> str:
    if judgement.is_right:
        return f"RIGHT: every one of the {len(judgement.contract.slots)} slots gets what it takes"
    count = format_count(len(judgement.mismatches), "slot")
    if judgement.is_silent:
        return f"WRONG IN SILENCE: {count} do not fit, and PyTorch runs all the same: the image is wrong"
    return f"WRONG: {count} do not fit; PyTorch fails at {judgement.failure.slot if judgement.failure else 'some place'}"


def name_models(models: Sequence[str]) -> str:
    """Return some of the models, and how many more."""
    return ", ".join(models[:_SHOWN]) + (f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else "")
