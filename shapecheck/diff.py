"""Two contracts side by side: everything that differs between them, at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from shapecheck.contract.contract import Contract
from shapecheck.contract.dims import show
from shapecheck.contract.records import Input, Slot
from shapecheck.presets.families import describe_families, extract_architecture, find_families
from shapecheck.report.document import Document, Facts, Format, Heading, Part, Points, Table
from shapecheck.report.numbers import dump_json, format_count

ContractPart = Literal["model", "input", "slot", "feature", "setting"]
"""Of what: the model as a whole, one base input, one slot, one slot of a T2I-Adapter's feature, one setting of its
configuration."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that two contracts, A and B, do not say alike."""

    part: ContractPart
    name: str
    """Of the input, the slot or the setting; of the model: class, role, divisor, inputs or slots."""
    aspect: str
    """In what: shape, dtype, channels, size, …; empty where the whole is meant."""
    a: str | None
    """What A says; None where A has no such thing."""
    b: str | None


def list_differences(a: Contract, b: Contract) -> tuple[Difference, ...]:
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


def _members(
    part: ContractPart, a: Sequence[Input] | Sequence[Slot], b: Sequence[Input] | Sequence[Slot]
) -> Iterator[Difference]:
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


def _told(part: ContractPart, name: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    """What differs between two tables; without a name the keys are names, else aspects of that one."""
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            yield Difference(part, name or key, key if name else "", a.get(key), b.get(key))


_OF_THE_SHAPE = ("", "batch", "channels", "size", "spatial")
"""What of a slot decides whether a residual has its shape."""


_OF_THE_PIPELINE = ("sample", "timestep")


_COUNTED = {"input": "base input", "slot": "slot", "feature": "feature", "setting": "setting"}


_LONGEST = 400


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: what the user called it, and its contract."""

    name: str
    contract: Contract


def render_text(a: Side, b: Side, *, form: Format = "human") -> str:
    """Return the whole report."""
    found = list_differences(a.contract, b.contract)
    facts = []
    for letter, side in zip("AB", (a, b), strict=True):
        contract = side.contract
        name = contract.header.source or side.name
        facts += [
            (letter, f"{name}: {contract.class_name}, {len(contract.slots)} slots, {describe_families(contract)}"),
            (f"digest {letter}", contract.digest),
        ]
    parts: list[Part] = [Points(explain_differences(a, b)), Facts(facts)]
    if found:
        rows = [
            (
                difference.part,
                difference.name,
                difference.aspect,
                *("not there" if value is None else _cut(value) for value in (difference.a, difference.b)),
            )
            for difference in found
        ]
        parts += [Heading("Differences"), Table(("of", "name", "in", "A", "B"), rows)]
    parts.append(Points(_list_notes(a.contract, b.contract), "note: "))
    return Document(f"{a.name} against {b.name}", parts, [_describe_verdict(a, found)]).render(form)


def render_json(a: Side, b: Side) -> str:
    """Return the same for machines."""
    record = {
        "verdict": "same" if a.contract == b.contract else "different",
        "same_architecture": _have_same_architecture(a.contract, b.contract),
        "controlnet_of_a_fits_b": _fits(a.contract, b.contract),
        "controlnet_of_b_fits_a": _fits(b.contract, a.contract),
        "meaning": list(explain_differences(a, b)),
        "a": _record_side(a),
        "b": _record_side(b),
        "differences": [asdict(difference) for difference in list_differences(a.contract, b.contract)],
        "notes": list(_list_notes(a.contract, b.contract)),
    }
    return dump_json(record)


def explain_differences(a: Side, b: Side) -> tuple[str, ...]:
    """Return what the differences mean to who has a ControlNet, an export or an engine of one of the two, in sentences."""
    left, right = a.contract, b.contract
    if left == right:
        return ("One contract: ControlNets, exports and engines of one have the shapes of the other's.",)
    if left.role != right.role:
        unet, net = (a, b) if left.role == "unet" else (b, a)
        return (f"{net.name} is a ControlNet, {unet.name} a UNet: `shapecheck probe UNET --controlnet NAME` says what fits.",)
    sentences = []
    if left.features and right.features and left.features != right.features:
        sentences.append(
            "Features are added in other places or of other shapes: a T2I-Adapter made for one does not fit the other."
        )
    elif left.features != right.features:
        taking, other = (a, b) if left.features else (b, a)
        exported = f"{taking.name} takes a T2I-Adapter's features too, as `export --adapter` makes it"
        sentences.append(f"{exported}; {other.name} was observed without.")
    elif _have_same_architecture(left, right):
        settings = [difference.name for difference in list_differences(left, right) if difference.part == "setting"]
        only = f"; only {_join_names(settings)} {'differs' if len(settings) == 1 else 'differ'}" if settings else ""
        sentences.append(f"The same architecture: exports and engines of both take calls of the same shapes{only}.")
    if left.role == "unet":
        sentences += _compare_unets(a, b)
    elif wrong := _count_wrong_slots(left, right):
        sentences.append(f"One ControlNet cannot stand in for the other: {', '.join(wrong)}.")
    else:
        sentences.append(f"Both ControlNets give the same {len(left.slots)} residuals.")
    first, second = (next((given.dtype for given in side.inputs if given.name == "sample"), "") for side in (left, right))
    if first != second:
        sentences.append(
            f"The precision differs, {first} against {second}: residuals must come in that of the model they go to."
        )
    return tuple(sentences)


def _compare_unets(a: Side, b: Side) -> list[str]:
    """Return whether a ControlNet made for one UNet fits the other, in both directions, and what to know if it does."""
    left, right = a.contract, b.contract
    if without := [side.name for side in (a, b) if not side.contract.slots]:
        return [f"No ControlNet fits {_join_names(without)}: there are no slots."]
    wrong = _count_wrong_slots(left, right)
    shared = [*wrong, *_compare_widths(left, right)]
    forth, back = _find_lacking_inputs(left, right), _find_lacking_inputs(right, left)
    same = [] if wrong else [f"the {len(left.slots)} slots are the same"]
    if shared or (forth and back):
        one_sided = [f"only {side.name} takes {_join_names(names)}" for side, names in ((a, forth), (b, back)) if names]
        sentences = [f"A ControlNet made for one does not fit the other: {', '.join([*same, *shared, *one_sided])}."]
    elif forth or back:
        of, to = (a, b) if forth else (b, a)
        missing = f"it takes {_join_names(forth or back)}, which a pipeline of {to.name} does not give"
        sentences = [f"A ControlNet made for {of.name} does not fit {to.name}: {', '.join(same)}, but {missing}."]
        sentences.append(f"A ControlNet made for {to.name} fits {of.name} by its shapes.")
    else:
        sentences = [f"A ControlNet made for one fits the other by its shapes: {', '.join(same)}, as is the text width."]
    moved = [found.name for found in list_differences(left, right) if found.part == "slot" and found.aspect == "skip from"]
    if moved and not shared:
        sentences.append(f"The same shapes are made elsewhere in the two: the skips of {_join_names(moved)}.")
    if (channels := _find_latent_channels(left)) != (other := _find_latent_channels(right)):
        sentences.append(
            f"The UNets take {channels} and {other} latent channels: a ControlNet must take what the pipeline gives it, "
            "in diffusers' own pipelines 4."
        )
    return sentences


def _count_wrong_slots(a: Contract, b: Contract) -> list[str]:
    wrong = {found.name for found in list_differences(a, b) if found.part == "slot" and found.aspect in _OF_THE_SHAPE}
    count = len({slot.name for slot in (*a.slots, *b.slots)})
    return [f"{len(wrong)} of {count} slots differ in shape"] if wrong else []


def _compare_widths(a: Contract, b: Contract) -> list[str]:
    """Return the inputs that pipelines give to ControlNets too, and that both take with another shape."""
    theirs = {given.name: given.shape for given in b.inputs}
    return [
        f"{'text width' if given.name == 'encoder_hidden_states' else given.name} differs: "
        f"{'×'.join(map(str, given.shape[-1:]))} against {'×'.join(map(str, theirs[given.name][-1:]))}"
        for given in a.inputs
        if given.name not in _OF_THE_PIPELINE and theirs.get(given.name, given.shape) != given.shape
    ]


def _find_lacking_inputs(of: Contract, to: Contract) -> list[str]:
    """Return the inputs that the ControlNet of one UNet takes and a pipeline of the other does not give."""
    names = {given.name for given in to.inputs}
    return [given.name for given in of.inputs if given.name not in names]


def _fits(of: Contract, to: Contract) -> bool | None:
    """Return whether a ControlNet of one UNet fits another by its shapes; None if these are not two UNets with slots."""
    if (of.role, to.role) != ("unet", "unet") or not of.slots or not to.slots:
        return None
    return not (_count_wrong_slots(of, to) or _compare_widths(of, to) or _find_lacking_inputs(of, to))


def _have_same_architecture(a: Contract, b: Contract) -> bool:
    """Return whether nothing but native size, numeric settings, spelling and precision differs."""
    dtypes = {given.name: given.dtype for given in a.inputs}
    inputs = tuple(replace(given, dtype=dtypes.get(given.name, given.dtype)) for given in b.inputs)
    alike = (a.role, a.divisor, extract_architecture(a)) == (b.role, b.divisor, extract_architecture(replace(b, inputs=inputs)))
    return alike and not _count_wrong_slots(a, b)


def _find_latent_channels(contract: Contract) -> str:
    samples = (given for given in contract.inputs if given.name == "sample" and len(given.shape) == 4)
    return next((str(sample.shape[1]) for sample in samples), "no")


def _describe_verdict(a: Side, found: Sequence[Difference]) -> str:
    contract = a.contract
    if not found:
        return f"SAME: {len(contract.slots)} slots, {len(contract.inputs)} base inputs, {len(contract.config)} settings"
    counted = [difference.name for difference in found if difference.part == "model"]
    for part, noun in _COUNTED.items():
        if names := {difference.name for difference in found if difference.part == part}:
            counted.append(format_count(len(names), noun))
    return f"DIFFERENT: {', '.join(counted)}"


def _list_notes(a: Contract, b: Contract) -> tuple[str, ...]:
    """Return what differs without counting, and may matter."""
    notes = []
    if a.header.vae_factor != b.header.vae_factor:
        notes.append(f"a latent cell covers {a.header.vae_factor} pixels along each side in A, {b.header.vae_factor} in B")
    left, right = dict(a.header.versions), dict(b.header.versions)
    releases = [f"{name} {left[name]} and {right[name]}" for name in left if right.get(name, left[name]) != left[name]]
    if releases:
        notes.append(f"observed with other releases: {', '.join(releases)}; a setting that one side lacks may come from that")
    return tuple(notes)


def _record_side(side: Side) -> dict[str, Any]:
    contract = side.contract
    return {
        "name": side.name,
        "source": contract.header.source,
        "class_name": contract.class_name,
        "role": contract.role,
        "slots": len(contract.slots),
        "families": list(find_families(contract)),
        "digest": contract.digest,
    }


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _join_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
