"""What an error text comes to, as text or Markdown; and beside it a table that was claimed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from shapecheck.contract import Contract, Geometry, show
from shapecheck.explain.diagnosis import Answer, Candidate, Cause, Diagnosis, Reading
from shapecheck.explain.judge_mapping import Judgement
from shapecheck.explain.mapping_report import agreement, elsewhere, judged, names
from shapecheck.explain.symptom import Symptom
from shapecheck.report.tables import LINE, Format, clean, fact_list, heading, note_list, table, wrapped

_SHOWN = 4
"""Sizes that are written out."""


_LONGEST = 400
"""Characters of the text that are repeated."""


def told(
    diagnosis: Diagnosis, judgement: Judgement | None = None, others: Sequence[Judgement] = (), *, form: Format = "human"
) -> str:
    """The whole report: what each symptom comes to; then the table that was claimed, if one was, on the UNet it fits best.

    `others` are the same on the other UNets that were tried.
    """
    parts: list[str] = []
    for reading in diagnosis.found:
        parts += _reading(reading, form, diagnosis.tried[0] if len(diagnosis.tried) == 1 else None)
    if not diagnosis.found and diagnosis.reason:
        parts += [wrapped(f"NO DIAGNOSIS: {diagnosis.reason}", ""), _tried(diagnosis, form)]
    if judgement is not None:
        parts += [*judged(judgement, form), agreement(diagnosis, judgement, form), *elsewhere(others, form)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tried(diagnosis: Diagnosis, form: Format) -> str:
    tried = f"tried: {', '.join(diagnosis.tried)}"
    return tried if form == "markdown" else wrapped(tried, "       ")


def _reading(reading: Reading, form: Format, model: str | None) -> Iterator[str]:
    """One symptom; `model` is the one that was named, if one was."""
    symptom = reading.symptom
    line = clean(symptom.line[:_LONGEST], form)
    yield f"# {symptom.source}: {line}" if form == "markdown" else wrapped(f"{symptom.source}: {line}", "  ")
    if said := meaning(symptom):
        yield said if form == "markdown" else wrapped(said, "")
    for cause in reading.causes:
        yield _cause(cause, form, model)
    if not reading.answers:
        return
    answers = sorted(reading.answers, key=lambda each: -len(each.models))
    if model is None:
        yield heading("Models that can give this text", form)
        rows = [(names(each.models), _places(each), len(each.candidates)) for each in answers]
        yield table(rows, ("models", "where it shows", "faults"), form)
    yield from _answer(answers[0], form)
    yield _certainty(answers[0], form)


_PLACES = {
    "down": ", in the additions to the skips",
    "mid": ", in the addition after mid",
    "feature": ", inside the down blocks, where T2I-Adapter features are added",
    "up": ", on the way up",
}


def meaning(symptom: Symptom) -> str:
    """What the words of a symptom mean, in terms of residuals; empty where they say it themselves."""
    place = _PLACES.get(symptom.stage or "", "")
    wanted = symptom.wanted if symptom.wanted is not None else "another size"
    given = symptom.given if symptom.given is not None else "another"
    if symptom.kind in ("broadcast", "pair") and symptom.wanted_shape:
        return f"The UNet's own tensor is {show(symptom.wanted_shape)}, what is added to it {show(symptom.given_shape)}{place}."
    if symptom.stage == "nets":
        return ""
    if symptom.kind == "broadcast":
        axis = dict(enumerate(("batch", "channels", "height", "width"))).get(symptom.axis or 0, "an axis")
        return (
            f"In skip + residual the UNet's own tensor is a and has {_counted(wanted, axis)}; the residual is b and has "
            f"{_counted(given, axis)}{place}. PyTorch compares the last axis first and names the first that differs."
        )
    if symptom.kind == "concat":
        return f"On the way up, a tensor of size {wanted} meets a skip of {given}."
    if symptom.kind in ("attention", "reshape"):
        return "On the way up, attention meets a text of one image and tensors of more: some residual has a larger batch."
    if symptom.kind in ("norm", "groups"):
        return "On the way up, a layer gets other channels than it has weights for: skips are missing or in another's place."
    if symptom.kind == "index":
        return "On the way up, no skip is left: too few residuals cut the list of skips short, in silence."
    if symptom.kind == "unequal":
        return "ONNX Runtime names the smaller size first, whichever side it is on."
    return ""


def _counted(size: object, axis: str) -> str:
    return f"{size} channels" if axis == "channels" else f"{axis} {size}"


def _cause(cause: Cause, form: Format, model: str | None) -> str:
    facts = [
        ("cause", cause.told),
        *([("where", cause.where)] if cause.where else []),
        ("change", cause.change),
        *([("certain", cause.command.replace("MODEL", model or "MODEL"))] if cause.command else []),
    ]
    told = [(name, clean(text, form)) for name, text in facts]
    if form == "human":
        told = [(name, textwrap.fill(text, LINE - 9, break_long_words=False, break_on_hyphens=False)) for name, text in told]
    return fact_list(told, form)


def _answer(answer: Answer, form: Format) -> Iterator[str]:
    here, others = _split(answer)
    count = len(here or others)
    faults = f"{count} fault gives" if count == 1 else f"{count} faults give"
    more = f"; {len(others)} more at other sizes" if here and others else ""
    yield heading(f"On {names(answer.models)}, {faults} exactly this text, at {_places(answer)}{more}", form)
    for candidates in _by_slot(here):
        yield _place(candidates[0], form)
        yield table(list(_rows(candidates)), ("fault", "what was done"), form)
    if others:
        yield heading(f"At other sizes than latents of {_sizes([answer.geometry])}", form)
        rows = [_elsewhere_row(candidates) for candidates in _by_slot(others)]
        yield table(rows, ("where", "at latents of", "UNet has", "meets", "faults"), form)
    yield heading("What to change", form)
    yield table(_changes(answer.candidates), ("fault", "change"), form)
    yield heading(f"The right table, at {answer.geometry}", form)
    yield right_table(answer.contract, answer.geometry, form)


def _split(answer: Answer) -> tuple[list[Candidate], list[Candidate]]:
    """The candidates at the size the answer is told at, and those that need another."""
    here = [each for each in answer.candidates if answer.geometry in each.geometries]
    return here, [each for each in answer.candidates if answer.geometry not in each.geometries]


def _by_slot(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    groups: dict[str, list[Candidate]] = {}
    for each in candidates:
        groups.setdefault(each.slot, []).append(each)
    return list(groups.values())


def _place(candidate: Candidate, form: Format) -> str:
    """The slot and the two shapes that meet there."""
    met = f"the UNet has {show(candidate.wanted)}, and meets {show(candidate.given) if candidate.given else 'nothing'}"
    told = f"{candidate.slot} ({candidate.module}): {met}"
    return f"### {told}" if form == "markdown" else wrapped(told, "  ")


def _elsewhere_row(candidates: Sequence[Candidate]) -> tuple[str, ...]:
    first = candidates[0]
    sizes = _sizes(list(dict.fromkeys(at for each in candidates for at in each.geometries)))
    kinds = ", ".join(dict.fromkeys(each.fault.kind for each in candidates))
    return first.slot, sizes, show(first.wanted), show(first.given) if first.given else "nothing", kinds


def _rows(candidates: Sequence[Candidate]) -> Iterator[tuple[str, str]]:
    """One row a kind of fault; others of a kind are counted."""
    for kind in dict.fromkeys(each.fault.kind for each in candidates):
        alike = [each for each in candidates if each.fault.kind == kind]
        first = alike[0]
        done = first.fault.told
        if others := [fault.told for fault in first.faults[1:] if fault.kind != kind]:
            done += f"; or, which is the same, {others[0]}"
        if len(alike) > 1:
            done += f" (and {len(alike) - 1} more of this kind)"
        yield kind, done


def _sizes(geometries: Sequence[Geometry]) -> str:
    told = ", ".join(f"{each.height}×{each.width}" for each in geometries[:_SHOWN])
    return f"{told}{', …' * (len(geometries) > _SHOWN)}"


def _changes(candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    """What to do, once a kind of fault."""
    changes: dict[str, str] = {}
    for each in candidates:
        changes.setdefault(each.fault.kind, each.fault.change)
    return list(changes.items())


def _certainty(answer: Answer, form: Format) -> str:
    if len(answer.candidates) == 1:
        return ""
    note = (
        f"the text alone cannot tell these apart; the shapes that were given can: {certain(answer)}, or "
        "`with shapecheck.explained(unet, controlnet):` around the call"
    )
    return note_list([note], form)


def certain(answer: Answer) -> str:
    """The command that makes it certain."""
    return f"shapecheck explain --model {answer.models[0]} --mapping SHAPES.json"


def right_table(contract: Contract, geometry: Geometry, form: Format) -> str:
    """Number, slot, channels, stride, shape and producer of every slot."""
    rows = [
        (number, slot.name, slot.channels, slot.stride, show(slot.shape_at(geometry)), slot.producer)
        for number, slot in enumerate(contract.slots)
    ]
    return table(rows, ("#", "slot", "channels", "stride", "shape", "skip from"), form)


def _places(answer: Answer) -> str:
    """`slots 0, 1, 2, 3 and mid`: at the size the answer is told at, where there are any."""
    names = [slot.name for slot in answer.contract.slots]
    found = dict.fromkeys(each.slot for each in _split(answer)[0] or answer.candidates)
    numbers = [str(names.index(name)) for name in found if name in names[:-1]]
    parts = [f"slot{'s' * (len(numbers) > 1)} {', '.join(numbers)}"] if numbers else []
    parts += ["mid"] if names[-1] in found else []
    parts += [name for name in found if name not in names]
    return " and ".join(parts)
