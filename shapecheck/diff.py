"""Two contracts side by side: everything that differs between them, at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from shapecheck.contract.contract import Contract
from shapecheck.contract.dims import show
from shapecheck.contract.records import Input, Slot
from shapecheck.presets.families import architecture, families, identity
from shapecheck.report.numbers import storable
from shapecheck.report.tables import Format, clean, fact_list, heading, note_list, table, wrapped

Part = Literal["model", "input", "slot", "feature", "setting"]
"""Of what: the model as a whole, one base input, one slot, one slot of a T2I-Adapter's feature, one setting of its
configuration."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that two contracts, A and B, do not say alike."""

    part: Part
    name: str
    """Of the input, the slot or the setting; of the model: class, role, divisor, inputs or slots."""
    aspect: str
    """In what: shape, dtype, channels, size, …; empty where the whole is meant."""
    a: str | None
    """What A says; None where A has no such thing."""
    b: str | None


def differences(a: Contract, b: Contract) -> tuple[Difference, ...]:
    """Everything in which the contracts differ; empty exactly where they are equal.

    In the order model, base inputs, slots, features, settings; A's order of inputs and slots, then what only B has.
    """
    return (
        *_told("model", "", _whole(a), _whole(b)),
        *_members("input", a.inputs, b.inputs),
        *_members("slot", a.slots, b.slots),
        *_members("feature", a.features, b.features),
        *_told("setting", "", _settings(a), _settings(b)),
    )


def _whole(contract: Contract) -> Mapping[str, str]:
    return {"class": contract.class_name, "role": contract.role, "divisor": str(contract.divisor)}


def _settings(contract: Contract) -> Mapping[str, str]:
    config: Mapping[str, Any] = contract.config.to_json()
    return {key: json.dumps(value, ensure_ascii=False, sort_keys=True) for key, value in config.items()}


def _members(part: Part, a: Sequence[Input] | Sequence[Slot], b: Sequence[Input] | Sequence[Slot]) -> Iterator[Difference]:
    """Inputs or slots, by name; their order only where the names are the same."""
    left, right = _by_name(a), _by_name(b)
    if left.keys() == right.keys() and tuple(left) != tuple(right):
        yield Difference("model", f"{part}s", "order", ", ".join(left), ", ".join(right))
    for name in dict.fromkeys((*left, *right)):
        if name in left and name in right:
            yield from _told(part, name, _aspects(left[name]), _aspects(right[name]))
        else:
            yield Difference(part, name, "", *(_summary(side[name]) if name in side else None for side in (left, right)))


def _by_name(members: Sequence[Input] | Sequence[Slot]) -> Mapping[str, Input | Slot]:
    """Each under its name; a name that comes twice, as in no observed contract, is counted."""
    named: dict[str, Input | Slot] = {}
    for each in members:
        count = sum(other.name == each.name for other in named.values())
        named[f"{each.name} ({count + 1})" if count else each.name] = each
    return named


def _aspects(each: Input | Slot) -> Mapping[str, str]:
    if isinstance(each, Input):
        return {"shape": show(each.shape), "dtype": each.dtype, "argument": each.argument}
    batch, channels, *size = each.skip
    return {
        "batch": str(batch),
        "channels": str(channels),
        "size": show(tuple(size)),
        "spatial": each.spatial,
        "skip from": each.producer,
        "used by": each.up_block,
        "added in": ", ".join(f"{add.owner or 'the UNet'}: {add.function}" for add in each.adds),
    }


def _summary(each: Input | Slot) -> str:
    if isinstance(each, Input):
        return f"{show(each.shape)} {each.dtype}"
    return show(each.skip) if each.spatial == "full" else f"{show(each.skip)} {each.spatial}"


def _told(part: Part, name: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    """What differs between two tables; without a name the keys are names, else aspects of that one."""
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            yield Difference(part, name or key, key if name else "", a.get(key), b.get(key))


_OF_THE_SHAPE = ("", "batch", "channels", "size", "spatial")
"""What of a slot decides whether a residual has its shape."""


_OF_THE_PIPELINE = ("sample", "timestep")


_COUNTED: tuple[tuple[Part, str], ...] = (
    ("input", "base input"),
    ("slot", "slot"),
    ("feature", "feature"),
    ("setting", "setting"),
)


_LONGEST = 400


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: what the user called it, and its contract."""

    name: str
    contract: Contract


def told(a: Side, b: Side, *, form: Format = "human") -> str:
    """The whole report."""
    found = differences(a.contract, b.contract)
    title = f"{clean(a.name, form)} against {clean(b.name, form)}"
    verdict = _verdict(a, found)
    verdict = f"**{verdict}**" if form == "markdown" else verdict
    sentences = [clean(each, form) for each in meaning(a, b)]
    meant = "\n".join(f"- {each}" if form == "markdown" else wrapped(each, "    ") for each in sentences)
    parts = [f"# {title}" if form == "markdown" else title, verdict, meant, _facts(a, b, form)]
    if found:
        rows = [[clean(cell, form) for cell in _row(each)] for each in found]
        parts += [heading("Differences", form), table(rows, ("of", "name", "in", "A", "B"), form)]
    parts += [note_list(_notes(a.contract, b.contract), form), verdict if form == "human" else ""]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(a: Side, b: Side) -> str:
    """The same for machines."""
    record = {
        "verdict": "same" if a.contract == b.contract else "different",
        "same_architecture": _same_architecture(a.contract, b.contract),
        "controlnet_of_a_fits_b": _fits(a.contract, b.contract),
        "controlnet_of_b_fits_a": _fits(b.contract, a.contract),
        "meaning": list(meaning(a, b)),
        "a": _record(a),
        "b": _record(b),
        "differences": [asdict(each) for each in differences(a.contract, b.contract)],
        "notes": list(_notes(a.contract, b.contract)),
    }
    return storable(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def meaning(a: Side, b: Side) -> tuple[str, ...]:
    """What the differences mean for who has a ControlNet, an export or an engine of one of the two: one sentence each."""
    left, right = a.contract, b.contract
    if left == right:
        return ("One contract: ControlNets, exports and engines of one have the shapes of the other's.",)
    if left.role != right.role:
        unet, net = (a, b) if left.role == "unet" else (b, a)
        return (f"{net.name} is a ControlNet, {unet.name} a UNet: `shapecheck probe UNET --controlnet NAME` says what fits.",)
    sentences = []
    if left.features != right.features:
        sentences.append(_of_features(a, b))
    elif _same_architecture(left, right):
        settings = [each.name for each in differences(left, right) if each.part == "setting"]
        only = f"; only {_listed(settings)} {'differs' if len(settings) == 1 else 'differ'}" if settings else ""
        sentences.append(f"The same architecture: exports and engines of both take calls of the same shapes{only}.")
    sentences += _of_unets(a, b) if left.role == "unet" else [_emitted(left, right)]
    if precision := _precisions(left, right):
        sentences.append(f"The precision differs, {precision}: residuals must come in that of the model they go to.")
    return tuple(sentences)


def _of_unets(a: Side, b: Side) -> list[str]:
    """Whether a ControlNet made for one UNet fits the other, in both directions."""
    left, right = a.contract, b.contract
    if without := [each.name for each in (a, b) if not each.contract.slots]:
        return [f"No ControlNet fits {_listed(without)}: there are no slots."]
    shared = [*_wrong_slots(left, right), *_other_widths(left, right)]
    forth, back = _lacking(left, right), _lacking(right, left)
    same = [] if _wrong_slots(left, right) else [f"the {len(left.slots)} slots are the same"]
    if shared or (forth and back):
        one_sided = [f"only {each.name} takes {_listed(names)}" for each, names in ((a, forth), (b, back)) if names]
        sentences = [f"A ControlNet made for one does not fit the other: {', '.join([*same, *shared, *one_sided])}."]
    elif forth or back:
        of, to = (a, b) if forth else (b, a)
        missing = f"it takes {_listed(forth or back)}, which a pipeline of {to.name} does not give"
        sentences = [f"A ControlNet made for {of.name} does not fit {to.name}: {', '.join(same)}, but {missing}."]
        sentences.append(f"A ControlNet made for {to.name} fits {of.name} by its shapes.")
    else:
        sentences = [f"A ControlNet made for one fits the other by its shapes: {', '.join(same)}, as is the text width."]
    return sentences + _conditions(left, right, fits=not shared)


def _conditions(a: Contract, b: Contract, *, fits: bool) -> list[str]:
    """What to know where shapes fit, and are not all."""
    told = []
    if fits and (moved := [each.name for each in differences(a, b) if each.part == "slot" and each.aspect == "skip from"]):
        told.append(f"The same shapes are made elsewhere in the two: the skips of {_listed(moved)}.")
    if (channels := _latents(a)) != (other := _latents(b)):
        told.append(
            f"The UNets take {channels} and {other} latent channels: a ControlNet must take what the pipeline gives it, "
            "in diffusers' own pipelines 4."
        )
    return told


def _wrong_slots(a: Contract, b: Contract) -> list[str]:
    """That there are slots which do not take the same residuals, if there are."""
    wrong = {each.name for each in differences(a, b) if each.part == "slot" and each.aspect in _OF_THE_SHAPE}
    count = len({slot.name for slot in (*a.slots, *b.slots)})
    return [f"{len(wrong)} of {count} slots differ in shape"] if wrong else []


def _other_widths(a: Contract, b: Contract) -> list[str]:
    """Inputs that pipelines give to ControlNets too, where both take them, each otherwise."""
    theirs = {each.name: each.shape for each in b.inputs}
    return [
        f"{'text width' if each.name == 'encoder_hidden_states' else each.name} differs: "
        f"{'×'.join(map(str, each.shape[-1:]))} against {'×'.join(map(str, theirs[each.name][-1:]))}"
        for each in a.inputs
        if each.name not in _OF_THE_PIPELINE and theirs.get(each.name, each.shape) != each.shape
    ]


def _lacking(of: Contract, to: Contract) -> list[str]:
    """Inputs that the ControlNet of one UNet takes and a pipeline of the other does not give."""
    given = {each.name for each in to.inputs}
    return [each.name for each in of.inputs if each.name not in given]


def _fits(of: Contract, to: Contract) -> bool | None:
    """Whether a ControlNet of one UNet fits another by its shapes; None where these are no two UNets with slots."""
    if (of.role, to.role) != ("unet", "unet") or not of.slots or not to.slots:
        return None
    return not (_wrong_slots(of, to) or _other_widths(of, to) or _lacking(of, to))


def _emitted(a: Contract, b: Contract) -> str:
    if wrong := _wrong_slots(a, b):
        return f"One ControlNet cannot stand in for the other: {', '.join(wrong)}."
    return f"Both ControlNets give the same {len(a.slots)} residuals."


def _of_features(a: Side, b: Side) -> str:
    if a.contract.features and b.contract.features:
        return "Features are added in other places or of other shapes: a T2I-Adapter made for one does not fit the other."
    taking, other = (a, b) if a.contract.features else (b, a)
    return (
        f"{taking.name} takes a T2I-Adapter's features too, as `export --adapter` makes it; {other.name} was observed without."
    )


def _same_architecture(a: Contract, b: Contract) -> bool:
    """Whether nothing but native size, numeric settings, spelling and precision differs."""
    kept = {each.name: each for each in a.inputs}
    inputs = tuple(replace(each, dtype=kept[each.name].dtype) if each.name in kept else each for each in b.inputs)
    alike = (a.role, a.divisor, architecture(a)) == (b.role, b.divisor, architecture(replace(b, inputs=inputs)))
    return alike and not _wrong_slots(a, b)


def _precisions(a: Contract, b: Contract) -> str:
    first, second = (next((each.dtype for each in side.inputs if each.name == "sample"), "") for side in (a, b))
    return f"{first} against {second}" if first != second else ""


def _latents(contract: Contract) -> str:
    return next((str(each.shape[1]) for each in contract.inputs if each.name == "sample" and len(each.shape) == 4), "no")


def _verdict(a: Side, found: Sequence[Difference]) -> str:
    contract = a.contract
    if not found:
        return f"SAME: {len(contract.slots)} slots, {len(contract.inputs)} base inputs, {len(contract.config)} settings"
    counts = [(len({each.name for each in found if each.part == part}), word) for part, word in _COUNTED]
    whole = [each.name for each in found if each.part == "model"]
    return f"DIFFERENT: {', '.join([*whole, *(_counted(count, word) for count, word in counts if count)])}"


def _facts(a: Side, b: Side, form: Format) -> str:
    facts = []
    for letter, side in zip("AB", (a, b), strict=True):
        contract = side.contract
        where = contract.header.source or side.name
        facts += [
            (letter, clean(f"{where}: {contract.class_name}, {len(contract.slots)} slots, {identity(contract)}", form)),
            (f"digest {letter}", contract.digest),
        ]
    return fact_list(facts, form)


def _notes(a: Contract, b: Contract) -> tuple[str, ...]:
    """What differs without counting, and may matter."""
    notes = []
    if a.header.vae_factor != b.header.vae_factor:
        notes.append(f"a latent cell covers {a.header.vae_factor} pixels along each side in A, {b.header.vae_factor} in B")
    releases = dict(a.header.versions), dict(b.header.versions)
    moved = [name for name in releases[0] if releases[1].get(name, releases[0][name]) != releases[0][name]]
    if moved:
        told = ", ".join(f"{name} {releases[0][name]} and {releases[1][name]}" for name in moved)
        notes.append(f"observed with other releases: {told}; a setting that one side lacks may come from that")
    return tuple(notes)


def _record(side: Side) -> dict[str, Any]:
    contract = side.contract
    return {
        "name": side.name,
        "source": contract.header.source,
        "class_name": contract.class_name,
        "role": contract.role,
        "slots": len(contract.slots),
        "families": list(families(contract)),
        "digest": contract.digest,
    }


def _row(each: Difference) -> tuple[str, ...]:
    return each.part, each.name, each.aspect, *("not there" if value is None else _cut(value) for value in (each.a, each.b))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
