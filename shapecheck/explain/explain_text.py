"""From a text to the faults that lead to it: every fault is simulated, on every UNet, at every size that it can be about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.explain.candidate_sizes import candidate_geometries
from shapecheck.explain.causes import list_causes
from shapecheck.explain.diagnosis import Candidate, Diagnosis, ModelAnswer, TextReading
from shapecheck.explain.fault_catalogue import list_faults
from shapecheck.explain.matching import find_slot, is_of_slot, reproduces
from shapecheck.explain.parse_text import find_symptoms, flatten_text
from shapecheck.explain.residual_table import Fault, Hints, RequestedSize, ResidualTable
from shapecheck.explain.simulate import Failure, FailureKind, Stage, UNetLayout, lay_out_unet, simulate_call
from shapecheck.explain.symptom import Symptom
from shapecheck.explain.unrelated import find_other_subject

_MOST_SYMPTOMS, _MOST_SIMULATED, _MOST_SIZES = 12, 4, 4
"""Symptoms of one text that are read, those for which every fault is simulated, and sizes of those after the first."""
_SIMULATED = (*get_args(FailureKind), "unequal", "pair", "dimensions")
Sizes = Mapping[tuple[str, ...], tuple[Geometry, ...]]
"""The sizes to try, by models that treat residuals alike."""


def explain_text(text: str, models: Mapping[str, Contract], size: RequestedSize) -> Diagnosis:
    """Explain a text on these UNets, by name. Raises ShapecheckError if one of them refuses the requested size."""
    flat = flatten_text(text)
    symptoms = find_symptoms(flat)
    if reason := find_other_subject(flat, symptoms):
        return Diagnosis((), tuple(models), reason)
    symptoms = tuple(symptom for symptom in symptoms if not symptom.elsewhere)
    diagnosis = Diagnosis(tuple(_explain_symptoms(symptoms[:_MOST_SYMPTOMS], models, size)), tuple(models))
    reason = "no slot of these UNets can give this text, with any fault there is a name for: it comes from somewhere else"
    return diagnosis if diagnosis.explanations else replace(diagnosis, reason=reason)


def _explain_symptoms(
    symptoms: Sequence[Symptom], models: Mapping[str, Contract], size: RequestedSize
) -> Iterator[TextReading]:
    """Try every size for the first symptom that is simulated; for those after it, the sizes at which that one arises."""
    sizes: Sizes | None = None
    left = _MOST_SIMULATED
    for symptom in symptoms:
        answers: tuple[ModelAnswer, ...] = ()
        if symptom.kind in _SIMULATED and left:
            left -= 1
            answers = tuple(_simulate_faults(symptom, names, models[names[0]], size, sizes) for names in group_models(models))
            sizes = sizes or {answer.models: _list_sizes(answer) for answer in answers}
        causes = tuple(list_causes(symptom, models))
        yield TextReading(symptom, tuple(answer for answer in answers if answer.candidates), causes)


def _list_sizes(answer: ModelAnswer) -> tuple[Geometry, ...]:
    """Return the usual size, and those at which a candidate leads to the text, whole multiples of the deepest stride first."""
    deepest = max(slot.stride for slot in answer.contract.slots)
    sizes = dict.fromkeys(at for candidate in answer.candidates for at in candidate.geometries)
    whole_first = sorted(sizes, key=lambda at: bool(at.height % deepest or at.width % deepest))
    return tuple(dict.fromkeys((answer.geometry, *whole_first)))[:_MOST_SIZES]


def group_models(models: Mapping[str, Contract]) -> list[tuple[str, ...]]:
    """Group the names of models that treat residuals alike."""
    groups: dict[object, list[str]] = {}
    keys = ("block_out_channels", "down_block_types", "up_block_types", "norm_num_groups")
    for name, contract in models.items():
        config = tuple(contract.config.get(key) for key in keys)
        slots = tuple((slot.skip, slot.up_block, slot.producer) for slot in contract.slots)
        groups.setdefault((slots, contract.divisor, config), []).append(name)
    return [tuple(sorted(names, key=lambda name: (len(name), name))) for names in groups.values()]


def _simulate_faults(
    symptom: Symptom, names: tuple[str, ...], contract: Contract, size: RequestedSize, sizes: Sizes | None
) -> ModelAnswer:
    if sizes:
        geometries = sizes[names]
    else:
        known = {"size_known": size.latent is not None, "batch_known": size.batch is not None}
        geometries = candidate_geometries(symptom, contract, size.complete(contract), **known)
    hints = _find_hints(symptom)
    candidates: dict[tuple[str, str], Candidate] = {}
    for geometry in geometries:
        unet = lay_out_unet(contract, geometry)
        if unet is None:
            raise ShapecheckError("this contract does not say how its UNet is built: give the model itself with --model")
        table = ResidualTable.of(contract, geometry)
        for faults in list_faults(table, hints):
            for failure in _find_failures(symptom, unet, table, faults[0]):
                # the same fault at another size is one candidate
                key = failure.slot, faults[0].message
                earlier = candidates.get(key, Candidate(failure, faults, ()))
                candidates[key] = replace(earlier, geometries=(*earlier.geometries, geometry))

    order = {slot.name: number for number, slot in enumerate(contract.slots)}

    def rank(candidate: Candidate) -> tuple[bool, int]:
        """Put those at the usual size first; then in slot order."""
        return geometries[0] not in candidate.geometries, order.get(candidate.failure.slot, len(order))

    return ModelAnswer(names, contract, geometries[0], tuple(sorted(candidates.values(), key=rank)))


def _find_hints(symptom: Symptom) -> Hints:
    """Return the widths, sizes and batches that the text says residuals had."""
    kind, axis, expected, actual, shape = symptom.kind, symptom.axis, symptom.expected, symptom.actual, symptom.actual_shape
    if kind == "unequal":
        return Hints(shape, tuple((None, size) for size in shape), shape)
    if kind in ("concat", "attention"):  # a residual of a larger batch shows only beside a skip of one image
        met = sorted(size for size in (expected, actual) if size)
        return Hints(batches=tuple(met[1:])) if met[:1] == [1] and axis in (None, 0) else Hints()
    if kind == "reshape":
        return Hints(batches=symptom.expected_shape[:1])
    if kind not in ("broadcast", "pair", "dimensions"):
        return Hints()
    if len(shape) == 3 and kind == "broadcast":  # attention, which folds images and cells
        return Hints(batches=shape[:1])
    if len(shape) == 4:
        return Hints.of_shapes([shape])
    if axis is None or axis >= 4 or actual is None:
        return Hints(tuple(width for width in shape[1:2] if width > 0))
    hints = Hints.of_axis(axis, actual)
    if axis == 1 and expected and actual and expected % actual == 0:  # attention again
        return replace(hints, batches=(expected // actual,))
    return hints


def _find_failures(symptom: Symptom, unet: UNetLayout, table: ResidualTable, fault: Fault) -> Iterator[Failure]:
    """Yield where this fault leads to the text: at the first failure, or at the slot that it names if each input is checked."""
    if symptom.kind == "pair":  # ComfyUI leaves out what does not fit, and goes on
        for slot, skip in zip(unet.slots, (*unet.skips, unet.mid), strict=True):
            if skip == symptom.expected_shape and fault.residuals.named.get(slot.name) == symptom.actual_shape:
                yield Failure("down", "broadcast", slot.name, slot.producer, skip, symptom.actual_shape)
    elif symptom.kind == "dimensions":
        name = find_slot(symptom.names[0], table.contract)
        if name and is_of_slot(symptom, table, fault.residuals, name):
            producer = next(slot.producer for slot in unet.slots if slot.name == name)
            stage: Stage = "mid" if name == table.names[-1] else "down"
            yield Failure(stage, "broadcast", name, producer, table.right.named[name], fault.residuals.named[name])
    elif (failure := simulate_call(unet, fault.residuals)) and reproduces(symptom, failure, table):
        yield failure
