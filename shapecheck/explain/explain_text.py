"""From a text to the faults that give it: every fault is played through, on every UNet, at every size it can be about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.explain import causes
from shapecheck.explain.candidate_sizes import geometries
from shapecheck.explain.diagnosis import Answer, Candidate, Diagnosis, Reading
from shapecheck.explain.fault import Fault
from shapecheck.explain.fault_catalogue import mistakes
from shapecheck.explain.hints import Hints
from shapecheck.explain.matching import gives, is_of_slot, slot_of
from shapecheck.explain.parse_text import flattened, symptoms_in
from shapecheck.explain.prefilter import may_give
from shapecheck.explain.residual_table import Table
from shapecheck.explain.simulate import Failure, Stage, outcome
from shapecheck.explain.size import Size
from shapecheck.explain.symptom import Symptom
from shapecheck.explain.unet_layout import Anatomy, anatomy
from shapecheck.explain.unrelated import unrelated

_MOST, _MOST_PLAYED, _MOST_SIZES = 12, 4, 4
"""Symptoms of one text that are looked into, those of them for which every fault is played through, and at how many sizes
those after the first."""


_NOTHING_FITS = "no slot of these UNets can give this text, with any fault there is a name for: it comes from somewhere else"


_PLAYED = (
    "broadcast", "output", "concat", "rank", "norm", "groups", "index", "attention", "reshape", "upsample", "keyword",
    "unequal", "pair", "dimensions",
)  # fmt: skip
"""Symptoms that a fault can be played through to."""


Sizes = Mapping[tuple[str, ...], tuple[Geometry, ...]]
"""Where to look, by models that treat residuals alike."""


def explain_text(text: str, models: Mapping[str, Contract], size: Size) -> Diagnosis:
    """What a text comes to on these UNets, by name. Raises ShapecheckError where one of them refuses the size asked for."""
    flat = flattened(text)
    told = symptoms_in(flat)
    if reason := unrelated(flat, told):
        return Diagnosis((), tuple(models), reason)
    told = tuple(symptom for symptom in told if not symptom.elsewhere)
    diagnosis = Diagnosis(tuple(_readings(told[:_MOST], models, size)), tuple(models))
    return diagnosis if diagnosis.found else replace(diagnosis, reason=_NOTHING_FITS)


def _readings(told: Sequence[Symptom], models: Mapping[str, Contract], size: Size) -> Iterator[Reading]:
    """Every size is looked at for the first symptom that is played; for those after it, the sizes at which that one arises."""
    sizes: Sizes | None = None
    left = _MOST_PLAYED
    for symptom in told:
        answers: tuple[Answer, ...] = ()
        if symptom.kind in _PLAYED and left:
            left -= 1
            answers = tuple(_answer(symptom, names, models[names[0]], size, sizes) for names in alike_models(models))
            sizes = sizes or {answer.models: _arises_at(answer) for answer in answers}
        direct = tuple(causes.causes(symptom, models))
        yield Reading(symptom, tuple(answer for answer in answers if answer.candidates), direct)


def _arises_at(answer: Answer) -> tuple[Geometry, ...]:
    """The usual size, and those at which a candidate gives the text, whole multiples of the deepest stride first."""
    deepest = max(slot.stride for slot in answer.contract.slots)
    found = dict.fromkeys(at for candidate in answer.candidates for at in candidate.geometries)
    whole_first = sorted(found, key=lambda at: bool(at.height % deepest or at.width % deepest))
    return tuple(dict.fromkeys((answer.geometry, *whole_first)))[:_MOST_SIZES]


def alike_models(models: Mapping[str, Contract]) -> list[tuple[str, ...]]:
    """Names of models that treat residuals alike."""
    groups: dict[object, list[str]] = {}
    for name, contract in models.items():
        config = contract.config
        built = tuple(
            config.get(key) for key in ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups")
        )
        slots = tuple((slot.skip, slot.up_block, slot.producer) for slot in contract.slots)
        groups.setdefault((slots, contract.divisor, built), []).append(name)
    return [tuple(sorted(names, key=lambda name: (len(name), name))) for names in groups.values()]


def _answer(symptom: Symptom, names: tuple[str, ...], contract: Contract, size: Size, sizes: Sizes | None) -> Answer:
    told = size.latent is not None, size.batch is not None
    at = sizes[names] if sizes else geometries(symptom, contract, size.usual(contract), size_known=told[0], batch_known=told[1])
    found: dict[tuple[str, str], Candidate] = {}
    for geometry in at:
        for candidate in _candidates(symptom, contract, geometry):
            key = (candidate.slot, candidate.fault.told)
            known = found.get(key)
            found[key] = replace(known, geometries=(*known.geometries, geometry)) if known else candidate
    return Answer(names, contract, at[0], tuple(sorted(found.values(), key=lambda each: _position(each, contract, at[0]))))


def _position(candidate: Candidate, contract: Contract, usual: Geometry) -> tuple[bool, int]:
    """Those at the usual size first; then in slot order, within a slot as they are told."""
    names = [slot.name for slot in contract.slots]
    place = names.index(candidate.slot) if candidate.slot in names else len(names)
    return usual not in candidate.geometries, place


def _candidates(symptom: Symptom, contract: Contract, geometry: Geometry) -> Iterator[Candidate]:
    unet = anatomy(contract, geometry)
    if unet is None:
        raise ShapecheckError("this contract does not say how its UNet is built: give the model itself with --model")
    if not may_give(unet, symptom):
        return
    table = Table.of(contract, geometry)
    for faults in mistakes(table, _hints(symptom)):
        for failure in _failures(symptom, unet, table, faults[0]):
            yield Candidate(failure.slot, failure.module, failure.stage, failure.wanted, failure.given, faults, (geometry,))


def _hints(symptom: Symptom) -> Hints:
    """What the text says that residuals had."""
    if symptom.kind == "unequal":
        return Hints(symptom.given_shape, tuple((None, each) for each in symptom.given_shape), symptom.given_shape)
    if symptom.kind in ("concat", "attention"):
        return _hints_of_concat(symptom)
    if symptom.kind == "reshape":
        return Hints(batches=symptom.wanted_shape[:1])
    if symptom.kind not in ("broadcast", "pair", "dimensions"):
        return Hints()
    if len(symptom.given_shape) == 3 and symptom.kind == "broadcast":  # attention, which folds images and cells
        return Hints(batches=symptom.given_shape[:1])
    if len(symptom.given_shape) == 4:
        return Hints.of_shapes([symptom.given_shape])
    if symptom.axis is not None and symptom.axis < 4 and symptom.given is not None:
        return _hints_of_axis(symptom.axis, symptom.wanted, symptom.given)
    return Hints(tuple(width for width in symptom.given_shape[1:2] if width > 0))


def _hints_of_concat(symptom: Symptom) -> Hints:
    """A residual of a larger batch shows only beside a skip of one image."""
    met = sorted(size for size in (symptom.wanted, symptom.given) if size)
    return Hints(batches=tuple(met[1:])) if met[:1] == [1] and symptom.axis in (None, 0) else Hints()


def _hints_of_axis(axis: int, wanted: int | None, given: int) -> Hints:
    hints = Hints.of_axis(axis, given)
    if axis == 1 and wanted and given and wanted % given == 0:  # attention again
        return replace(hints, batches=(wanted // given,))
    return hints


def _failures(symptom: Symptom, unet: Anatomy, table: Table, fault: Fault) -> Iterator[Failure]:
    """Where this fault gives the text: at the first failure; where inputs are checked one by one, at the slot that is named."""
    if symptom.kind == "dimensions":
        slot = slot_of(symptom.names[0], table.contract)
        if slot and is_of_slot(symptom, table, fault.given, slot):
            producer = next(each.producer for each in unet.slots if each.name == slot)
            stage: Stage = "mid" if slot == table.names[-1] else "down"
            yield Failure(stage, "broadcast", slot, producer, table.right.named[slot], fault.given.named[slot])
    elif symptom.kind == "pair":
        yield from _pairs(symptom, unet, fault)
    elif (failure := outcome(unet, fault.given)) and gives(symptom, failure, table):
        yield failure


def _pairs(symptom: Symptom, unet: Anatomy, fault: Fault) -> Iterator[Failure]:
    """Every slot where these two shapes meet: ComfyUI leaves out what does not fit, and goes on."""
    for slot, skip in zip(unet.slots, (*unet.skips, unet.mid), strict=True):
        if skip == symptom.wanted_shape and fault.given.named.get(slot.name) == symptom.given_shape:
            yield Failure("down", "broadcast", slot.name, slot.producer, skip, symptom.given_shape)
