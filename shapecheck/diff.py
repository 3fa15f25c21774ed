"""Two contracts side by side: everything that differs between them, at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

from shapecheck.contract.contract import Contract
from shapecheck.contract.dims import show
from shapecheck.contract.records import Input, Slot
from shapecheck.presets.families import describe_families, extract_architecture, find_families
from shapecheck.report.document import Document, Facts, Format, Heading, Part, Points, Table
from shapecheck.report.numbers import dump_json, format_count

ContractPart = Literal["model", "input", "slot", "feature", "setting"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that two contracts, A and B, do not say alike.

    `name` is that of the input, the slot or the setting; of the model it is class, role, divisor, inputs or slots.
    `aspect` says in what they differ: shape, dtype, channels, size, …; empty if one of them has no such thing.
    """

    part: ContractPart
    name: str
    aspect: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True)
class NamedContract:
    """One of the two: what the user called it, and its contract."""

    name: str
    contract: Contract


def list_differences(a: Contract, b: Contract) -> tuple[Difference, ...]:
    """Return everything in which the contracts differ; nothing exactly if they are equal.

    In the order model, base inputs, slots, features, settings; A's order of inputs and slots, then what only B has.
    """
    models, settings = [], []
    for contract in (a, b):
        models.append({"class": contract.class_name, "role": contract.role, "divisor": str(contract.divisor)})
        config = contract.config.to_json()
        settings.append({key: json.dumps(value, ensure_ascii=False, sort_keys=True) for key, value in config.items()})
    return (
        *_compare_tables("model", "", *models),
        *_compare_members("input", a.inputs, b.inputs),
        *_compare_members("slot", a.slots, b.slots),
        *_compare_members("feature", a.features, b.features),
        *_compare_tables("setting", "", *settings),
    )


def _compare_members(
    part: ContractPart, a: Sequence[Input] | Sequence[Slot], b: Sequence[Input] | Sequence[Slot]
) -> Iterator[Difference]:
    """Compare inputs or slots by name; their order only if the names are the same."""
    left, right = _name_members(a), _name_members(b)
    if left.keys() == right.keys() and tuple(left) != tuple(right):
        yield Difference("model", f"{part}s", "order", ", ".join(left), ", ".join(right))
    for name in dict.fromkeys((*left, *right)):
        if name in left and name in right:
            yield from _compare_tables(part, name, _list_aspects(left[name]), _list_aspects(right[name]))
        else:
            texts: list[str | None] = []
            for member in (left.get(name), right.get(name)):
                if isinstance(member, Slot):
                    texts.append(show(member.skip) + ("" if member.spatial == "full" else f" {member.spatial}"))
                else:
                    texts.append(None if member is None else f"{show(member.shape)} {member.dtype}")
            yield Difference(part, name, "", *texts)


def _compare_tables(part: ContractPart, name: str, a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    """Compare two tables whose keys are aspects of that name, or names if there is none."""
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            yield Difference(part, name or key, key if name else "", a.get(key), b.get(key))


def _name_members(members: Sequence[Input] | Sequence[Slot]) -> Mapping[str, Input | Slot]:
    named: dict[str, Input | Slot] = {}
    for member in members:
        # No observed contract has a name twice, but an edited one may.
        count = sum(other.name == member.name for other in named.values())
        named[f"{member.name} ({count + 1})" if count else member.name] = member
    return named


def _list_aspects(member: Input | Slot) -> Mapping[str, str]:
    if isinstance(member, Input):
        return {"shape": show(member.shape), "dtype": member.dtype, "argument": member.argument}
    batch, channels, *size = member.skip
    return {
        "batch": str(batch),
        "channels": str(channels),
        "size": show(tuple(size)),
        "spatial": member.spatial,
        "skip from": member.producer,
        "used by": member.up_block,
        "added in": ", ".join(f"{add.owner or 'the UNet'}: {add.function}" for add in member.adds),
    }


def render_text(a: NamedContract, b: NamedContract, *, form: Format = "human") -> str:
    """Return the whole report."""
    facts = []
    for letter, side in zip("AB", (a, b), strict=True):
        contract = side.contract
        name = contract.header.source or side.name
        facts += [
            (letter, f"{name}: {contract.class_name}, {len(contract.slots)} slots, {describe_families(contract)}"),
            (f"digest {letter}", contract.digest),
        ]
    parts: list[Part] = [Points(explain_differences(a, b)), Facts(facts)]
    contract, differences = a.contract, list_differences(a.contract, b.contract)
    verdict = f"SAME: {len(contract.slots)} slots, {len(contract.inputs)} base inputs, {len(contract.config)} settings"
    if differences:
        names = [difference.name for difference in differences if difference.part == "model"]
        for part, noun in (("input", "base input"), ("slot", "slot"), ("feature", "feature"), ("setting", "setting")):
            if count := len({difference.name for difference in differences if difference.part == part}):
                names.append(format_count(count, noun))
        verdict = f"DIFFERENT: {', '.join(names)}"
        rows = []
        for difference in differences:
            texts = ("not there" if value is None else value for value in (difference.a, difference.b))
            cut = (text if len(text) <= 400 else f"{text[:399]}…" for text in texts)
            rows.append((difference.part, difference.name, difference.aspect, *cut))
        parts += [Heading("Differences"), Table(("of", "name", "in", "A", "B"), rows)]
    parts.append(Points(_list_notes(a.contract, b.contract), "note: "))
    return Document(f"{a.name} against {b.name}", parts, [verdict]).render(form)


def render_json(a: NamedContract, b: NamedContract) -> str:
    """Return the report for machines."""
    left, right = a.contract, b.contract
    sides = {
        letter: {
            "name": side.name,
            "source": side.contract.header.source,
            "class_name": side.contract.class_name,
            "role": side.contract.role,
            "slots": len(side.contract.slots),
            "families": list(find_families(side.contract)),
            "digest": side.contract.digest,
        }
        for letter, side in (("a", a), ("b", b))
    }
    record = {
        "verdict": "same" if left == right else "different",
        "same_architecture": _have_same_architecture(left, right),
        "controlnet_of_a_fits_b": _fits(left, right),
        "controlnet_of_b_fits_a": _fits(right, left),
        "meaning": list(explain_differences(a, b)),
        **sides,
        "differences": [asdict(difference) for difference in list_differences(left, right)],
        "notes": _list_notes(left, right),
    }
    return dump_json(record)


def explain_differences(a: NamedContract, b: NamedContract) -> tuple[str, ...]:
    """Return what the differences mean for a ControlNet, an export or an engine of one of the two, in sentences."""
    left, right = a.contract, b.contract
    if left == right:
        return ("One contract: ControlNets, exports and engines of one have the shapes of the other's.",)
    if left.role != right.role:
        unet, net = (a, b) if left.role == "unet" else (b, a)
        return (f"{net.name} is a ControlNet, {unet.name} a UNet: `shapecheck probe UNET --controlnet NAME` says what fits.",)
    sentences = []
    if left.features and right.features and left.features != right.features:
        sentences = [
            "Features are added in other places or of other shapes: a T2I-Adapter made for one does not fit the other."
        ]
    elif left.features != right.features:
        taking, other = (a, b) if left.features else (b, a)
        exported = f"{taking.name} takes a T2I-Adapter's features too, as `export --adapter` makes it"
        sentences = [f"{exported}; {other.name} was observed without."]
    elif _have_same_architecture(left, right):
        settings = [difference.name for difference in list_differences(left, right) if difference.part == "setting"]
        only = f"; only {_join_names(settings)} {'differs' if len(settings) == 1 else 'differ'}" if settings else ""
        sentences = [f"The same architecture: exports and engines of both take calls of the same shapes{only}."]
    if left.role == "unet":
        sentences += _compare_unets(a, b)
    elif wrong := _count_wrong_slots(left, right):
        sentences.append(f"One ControlNet cannot stand in for the other: {', '.join(wrong)}.")
    else:
        sentences.append(f"Both ControlNets give the same {len(left.slots)} residuals.")
    first, second = (next((base.dtype for base in side.inputs if base.name == "sample"), "") for side in (left, right))
    if first != second:
        sentences.append(
            f"The precision differs, {first} against {second}: residuals must come in that of the model they go to."
        )
    return tuple(sentences)


def _compare_unets(a: NamedContract, b: NamedContract) -> list[str]:
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
    of_slots = [difference for difference in list_differences(left, right) if difference.part == "slot"]
    moved = [difference.name for difference in of_slots if difference.aspect == "skip from"]
    if moved and not shared:
        sentences.append(f"The same shapes are made elsewhere in the two: the skips of {_join_names(moved)}.")
    samples = [next((base.shape for base in side.inputs if base.name == "sample"), ()) for side in (left, right)]
    channels = [str(shape[1]) if len(shape) == 4 else "no" for shape in samples]
    if channels[0] != channels[1]:
        sentences.append(
            f"The UNets take {' and '.join(channels)} latent channels: a ControlNet must take what the pipeline gives it, "
            "in diffusers' own pipelines 4."
        )
    return sentences


def _count_wrong_slots(a: Contract, b: Contract) -> list[str]:
    of_slots = [difference for difference in list_differences(a, b) if difference.part == "slot"]
    # Only these aspects decide whether a residual has a slot's shape; it is empty if one side lacks the slot.
    wrong = {difference.name for difference in of_slots if difference.aspect in ("", "batch", "channels", "size", "spatial")}
    count = len({slot.name for slot in (*a.slots, *b.slots)})
    return [f"{len(wrong)} of {count} slots differ in shape"] if wrong else []


def _compare_widths(a: Contract, b: Contract) -> list[str]:
    """Return the inputs that pipelines give to ControlNets too, and that both take with another shape."""
    theirs = {base.name: base.shape for base in b.inputs}
    return [
        f"{'text width' if base.name == 'encoder_hidden_states' else base.name} differs: "
        f"{'×'.join(map(str, base.shape[-1:]))} against {'×'.join(map(str, theirs[base.name][-1:]))}"
        for base in a.inputs
        if base.name not in ("sample", "timestep") and theirs.get(base.name, base.shape) != base.shape
    ]


def _find_lacking_inputs(of: Contract, to: Contract) -> list[str]:
    """Return the inputs that the ControlNet of one UNet takes and a pipeline of the other does not give."""
    return [base.name for base in of.inputs if base.name not in {other.name for other in to.inputs}]


def _fits(of: Contract, to: Contract) -> bool | None:
    """Return whether a ControlNet of one UNet fits another by its shapes; None if these are not two UNets with slots."""
    if (of.role, to.role) != ("unet", "unet") or not of.slots or not to.slots:
        return None
    return not (_count_wrong_slots(of, to) or _compare_widths(of, to) or _find_lacking_inputs(of, to))


def _have_same_architecture(a: Contract, b: Contract) -> bool:
    """Return whether nothing but native size, numeric settings, spelling and precision differs."""
    dtypes = {base.name: base.dtype for base in a.inputs}
    inputs = tuple(replace(base, dtype=dtypes.get(base.name, base.dtype)) for base in b.inputs)
    alike = (a.role, a.divisor, extract_architecture(a)) == (b.role, b.divisor, extract_architecture(replace(b, inputs=inputs)))
    return alike and not _count_wrong_slots(a, b)


def _list_notes(a: Contract, b: Contract) -> list[str]:
    """Return what differs without counting, and may matter."""
    notes = []
    if a.header.vae_factor != b.header.vae_factor:
        notes.append(f"a latent cell covers {a.header.vae_factor} pixels along each side in A, {b.header.vae_factor} in B")
    left, right = dict(a.header.versions), dict(b.header.versions)
    releases = [f"{name} {left[name]} and {right[name]}" for name in left if right.get(name, left[name]) != left[name]]
    if releases:
        notes.append(f"observed with other releases: {', '.join(releases)}; a setting that one side lacks may come from that")
    return notes


def _join_names(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
