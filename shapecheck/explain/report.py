"""The explanation of an error text, and a table compared with a UNet, as text or Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shapecheck.contract import Geometry, show
from shapecheck.contract.records import format_observed
from shapecheck.explain.claimed_table import name_slots
from shapecheck.explain.diagnosis import Candidate, Diagnosis, ModelAnswer, TextReading
from shapecheck.explain.judge_mapping import Judgement
from shapecheck.explain.predicted_messages import format_message
from shapecheck.explain.symptom import Symptom
from shapecheck.report.document import LINE, Cell, Document, Facts, Format, Heading, Paragraph, Part, Points, Table
from shapecheck.report.numbers import format_count


def render_text(
    diagnosis: Diagnosis, judgement: Judgement | None = None, others: Sequence[Judgement] = (), *, form: Format = "human"
) -> str:
    """Return the whole report: the explanation of each symptom; then the table that was claimed, on the UNet it fits best.

    `others` judge the same table on the other UNets that were tried.
    """
    parts: list[Part] = []
    for reading in diagnosis.explanations:
        parts += _list_reading(reading, diagnosis.tried[0] if len(diagnosis.tried) == 1 else None)
    if not diagnosis.explanations and diagnosis.reason:
        parts.append(Paragraph(f"NO DIAGNOSIS: {diagnosis.reason}", indent=""))
        parts.append(Paragraph(f"tried: {', '.join(diagnosis.tried)}", indent=" " * len("tried: ")))
    if judgement is not None:
        parts += list_judgement(judgement)
        if (agrees := judgement.reproduces(diagnosis)) is not None:
            wrong = "this table does not lead to the text above: that comes from other residuals"
            parts.append(Points(["this table leads to the text above" if agrees else wrong], "note: "))
        rows = [(_name_models(other.models), _describe_verdict(other)) for other in others]
        parts += [Heading("On other models"), Table(("models", "verdict"), rows)] if rows else []
    return Document("", parts).render(form)


def _list_reading(reading: TextReading, model: str | None) -> Iterator[Part]:
    """Yield the explanation of one symptom; `model` is the one that was named, if one was."""
    symptom = reading.symptom
    yield Heading(f"{symptom.source}: {symptom.line[:400]}", 1, indent="  ")
    yield Paragraph(explain_symptom(symptom), indent="")
    for cause in reading.causes:
        command = cause.command.replace("MODEL", model or "MODEL")
        facts = [("cause", cause.message), ("where", cause.where), ("change", cause.change), ("certain", command)]
        yield Facts(facts, width=LINE - len("certain  "))
    if not reading.answers:
        return
    answers = sorted(reading.answers, key=lambda answer: -len(answer.models))
    if model is None:
        yield Heading("Models that can give this text")
        rows = [(_name_models(answer.models), _name_places(answer), len(answer.candidates)) for answer in answers]
        yield Table(("models", "where it shows", "faults"), rows)
    yield from _list_answer(answers[0])


_PLACES = {
    "down": ", in the additions to the skips",
    "mid": ", in the addition after mid",
    "feature": ", inside the down blocks, where T2I-Adapter features are added",
    "up": ", on the way up",
}
_ATTENTION = "On the way up, attention meets a text of one image and tensors of more: some residual has a larger batch."
_NORM = "On the way up, a layer gets other channels than it has weights for: skips are missing or in another's place."
_MEANINGS = {
    "attention": _ATTENTION,
    "reshape": _ATTENTION,
    "norm": _NORM,
    "groups": _NORM,
    "index": "On the way up, no skip is left: too few residuals cut the list of skips short, in silence.",
    "unequal": "ONNX Runtime names the smaller size first, whichever side it is on.",
}


def explain_symptom(symptom: Symptom) -> str:
    """Return what the words of a symptom mean, in terms of residuals; empty if they say it themselves."""
    place = _PLACES.get(symptom.stage or "", "")
    expected = symptom.expected if symptom.expected is not None else "another size"
    actual = symptom.actual if symptom.actual is not None else "another"
    if symptom.kind in ("broadcast", "pair") and symptom.expected_shape:
        added = f"what is added to it {show(symptom.actual_shape)}{place}"
        return f"The UNet's own tensor is {show(symptom.expected_shape)}, {added}."
    if symptom.stage == "nets":
        return ""
    if symptom.kind == "broadcast":
        axis = dict(enumerate(("batch", "channels", "height", "width"))).get(symptom.axis or 0, "an axis")
        a, b = (f"{size} channels" if axis == "channels" else f"{axis} {size}" for size in (expected, actual))
        return (
            f"In skip + residual the UNet's own tensor is a and has {a}; the residual is b and has {b}{place}. PyTorch "
            "compares the last axis first and names the first that differs."
        )
    if symptom.kind == "concat":
        return f"On the way up, a tensor of size {expected} meets a skip of {actual}."
    return _MEANINGS.get(symptom.kind, "")


def _list_answer(answer: ModelAnswer) -> Iterator[Part]:
    same_size, others = _split_candidates(answer)
    count = len(same_size or others)
    more = f"; {len(others)} more at other sizes" if same_size and others else ""
    verb = "gives" if count == 1 else "give"
    where = f"{format_count(count, 'fault')} {verb} exactly this text, at {_name_places(answer)}{more}"
    yield Heading(f"On {_name_models(answer.models)}, {where}")
    for candidates in _group_by_slot(same_size):
        failure = candidates[0].failure
        met = f"the UNet has {show(failure.expected)}, and meets {show(failure.actual) if failure.actual else 'nothing'}"
        yield Heading(f"{failure.slot} ({failure.module}): {met}", 3, indent="  ")
        yield Table(("fault", "what was done"), list(_tabulate_faults(candidates)))
    if others:
        yield Heading(f"At other sizes than latents of {_list_sizes([answer.geometry])}")
        rows = []
        for candidates in _group_by_slot(others):
            failure = candidates[0].failure
            sizes = _list_sizes(list(dict.fromkeys(size for candidate in candidates for size in candidate.geometries)))
            kinds = ", ".join(dict.fromkeys(candidate.fault.kind for candidate in candidates))
            actual = show(failure.actual) if failure.actual else "nothing"
            rows.append((failure.slot, sizes, show(failure.expected), actual, kinds))
        yield Table(("where", "at latents of", "UNet has", "meets", "faults"), rows)
    changes: dict[str, str] = {}
    for candidate in answer.candidates:
        changes.setdefault(candidate.fault.kind, candidate.fault.change)
    yield Heading("What to change")
    yield Table(("fault", "change"), list(changes.items()))
    yield Heading(f"The right table, at {answer.geometry}")
    slots = [
        (number, slot.name, slot.channels, slot.stride, show(slot.shape_at(answer.geometry)), slot.producer)
        for number, slot in enumerate(answer.contract.slots)
    ]
    yield Table(("#", "slot", "channels", "stride", "shape", "skip from"), slots)
    if len(answer.candidates) > 1:
        note = (
            f"the text alone cannot tell these apart; the shapes that were given can: {name_certain_command(answer)}, or "
            "`with shapecheck.explained(unet, controlnet):` around the call"
        )
        yield Points([note], "note: ")


def _split_candidates(answer: ModelAnswer) -> tuple[list[Candidate], list[Candidate]]:
    """Return the candidates at the size of the answer, and those that need another."""
    same_size = [candidate for candidate in answer.candidates if answer.geometry in candidate.geometries]
    return same_size, [candidate for candidate in answer.candidates if answer.geometry not in candidate.geometries]


def _group_by_slot(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.failure.slot, []).append(candidate)
    return list(groups.values())


def _tabulate_faults(candidates: Sequence[Candidate]) -> Iterator[tuple[str, str]]:
    """Yield one row a kind of fault; others of a kind are counted."""
    for kind in dict.fromkeys(candidate.fault.kind for candidate in candidates):
        alike = [candidate for candidate in candidates if candidate.fault.kind == kind]
        first = alike[0]
        message = first.fault.message
        if others := [fault.message for fault in first.faults[1:] if fault.kind != kind]:
            message += f"; or, which is the same, {others[0]}"
        if len(alike) > 1:
            message += f" (and {len(alike) - 1} more of this kind)"
        yield kind, message


def _list_sizes(geometries: Sequence[Geometry]) -> str:
    return ", ".join([f"{at.height}×{at.width}" for at in geometries[:4]] + ["…"] * (len(geometries) > 4))


def name_certain_command(answer: ModelAnswer) -> str:
    """Return the command that makes it certain."""
    return f"shapecheck explain --model {answer.models[0]} --mapping SHAPES.json"


def _name_places(answer: ModelAnswer) -> str:
    """Return `slots 0, 1, 2, 3 and mid`: at the size of the answer, if there are any."""
    names = [slot.name for slot in answer.contract.slots]
    places = dict.fromkeys(candidate.failure.slot for candidate in _split_candidates(answer)[0] or answer.candidates)
    slots = name_slots([names.index(name) for name in places if name in names[:-1]], has_mid=names[-1] in places)
    return " and ".join([*([slots] if slots else []), *(name for name in places if name not in names)])


def _name_models(models: Sequence[str]) -> str:
    """Return some of the models, and how many more there are."""
    return ", ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")


def list_judgement(judgement: Judgement) -> Iterator[Part]:
    """Yield the report of a table compared with a UNet."""
    yield Heading(f"The table given, on {_name_models(judgement.models)}, {judgement.geometry}", 1)
    yield Paragraph(_describe_verdict(judgement))
    if judgement.failure is not None:
        yield Facts([("PyTorch says", format_message(judgement.failure) or "an error that is not known here")])
    if judgement.matches:
        exact = judgement.matches[0].differs == 0
        rows = [(fault.kind, fault.message, str(match.differs or "")) for match in judgement.matches for fault in match.faults]
        yield Heading("This is what was done" if exact else "No known mistake gives this table; the nearest")
        yield Table(("fault", "what was done", "slots that differ"), rows)
        changes = dict.fromkeys((match.fault.kind, match.fault.change) for match in judgement.matches)
        yield Heading("What to change")
        yield Table(("fault", "change"), list(changes))

    # every slot, right or wrong, then residuals that no slot takes
    slots: list[tuple[Cell, ...]] = []
    wrong = {mismatch.where: mismatch for mismatch in judgement.mismatches}
    for number, slot in enumerate(judgement.contract.slots):
        expected = show(slot.shape_at(judgement.geometry))
        if mismatch := wrong.pop(slot.name, None):
            actual = format_observed(mismatch.observed)
            slots.append((number, slot.name, actual, expected, mismatch.kind, slot.producer, mismatch.cause))
        else:
            slots.append((number, slot.name, expected, expected, "right", slot.producer, ""))
    for name, mismatch in wrong.items():
        slots += [("", name, format_observed(mismatch.observed), "no such slot", mismatch.kind, "", mismatch.cause)]
    yield Heading("Slot by slot")
    yield Table(("#", "slot", "given", "UNet takes", "verdict", "skip from", "likely cause"), slots)
    about_mid = [] if judgement.tells_mid else ["this table says nothing of the mid residual: it is taken to be right"]
    yield Points([*judgement.notes, *about_mid], "note: ")


def _describe_verdict(judgement: Judgement) -> str:
    if judgement.is_right:
        return f"RIGHT: every one of the {len(judgement.contract.slots)} slots gets what it takes"
    count = format_count(len(judgement.mismatches), "slot")
    if judgement.is_silent:
        return f"WRONG IN SILENCE: {count} do not fit, and PyTorch runs all the same: the image is wrong"
    return f"WRONG: {count} do not fit; PyTorch fails at {judgement.failure.slot if judgement.failure else 'some place'}"
