"""A claimed or observed table, compared with a UNet, as text or Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shapecheck.contract import show
from shapecheck.contract.records import shape_or_words
from shapecheck.explain.judge_mapping import Judgement
from shapecheck.explain.torch_messages import say_eager
from shapecheck.report.document import Cell, Facts, Heading, Paragraph, Part, Points, Table
from shapecheck.report.numbers import format_count


def list_judgement(judgement: Judgement) -> Iterator[Part]:
    """Yield the report of a table compared with a UNet."""
    yield Heading(f"The table given, on {name_models(judgement.models)}, {judgement.geometry}", 1)
    yield Paragraph(_describe_verdict(judgement))
    if judgement.failure is not None:
        yield Facts([("PyTorch says", say_eager(judgement.failure) or "an error that is not known here")])
    if judgement.matches:
        exact = judgement.matches[0].differs == 0
        rows = [(fault.kind, fault.told, str(match.differs or "")) for match in judgement.matches for fault in match.faults]
        yield Heading("This is what was done" if exact else "No known mistake gives this table; the nearest")
        yield Table(("fault", "what was done", "slots that differ"), rows)
        changes = dict.fromkeys((match.fault.kind, match.fault.change) for match in judgement.matches)
        yield Heading("What to change")
        yield Table(("fault", "change"), list(changes))
    yield Heading("Slot by slot")
    yield Table(("#", "slot", "given", "UNet takes", "verdict", "skip from", "likely cause"), list(_tabulate_slots(judgement)))
    about_mid = [] if judgement.tells_mid else ["this table says nothing of the mid residual: it is taken to be right"]
    yield Points([*judgement.notes, *about_mid], "note: ")


def _tabulate_slots(judgement: Judgement) -> Iterator[tuple[Cell, ...]]:
    """Yield every slot, right or wrong, then residuals that no slot takes."""
    wrong = {mismatch.where: mismatch for mismatch in judgement.mismatches}
    for number, slot in enumerate(judgement.contract.slots):
        expected = show(slot.shape_at(judgement.geometry))
        if mismatch := wrong.pop(slot.name, None):
            actual = shape_or_words(mismatch.observed)
            yield number, slot.name, actual, expected, mismatch.kind, slot.producer, mismatch.cause
        else:
            yield number, slot.name, expected, expected, "right", slot.producer, ""
    for mismatch in wrong.values():
        yield "", mismatch.where, shape_or_words(mismatch.observed), "no such slot", mismatch.kind, "", mismatch.cause


def list_others(judgements: Sequence[Judgement]) -> list[Part]:
    """Return the verdicts on the other UNets that were tried."""
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
    """Return some of the models, and how many more there are."""
    return ", ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")
