"""From a claimed or an observed table to what is wrong with it: slot by slot, and which mistake makes such a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shapecheck.artefact import resolve_contract
from shapecheck.contract import Contract, Geometry, Mismatch, ShapecheckError
from shapecheck.contract.mismatch import compare_shapes
from shapecheck.explain.claimed_table import MID, Claim, name_slots
from shapecheck.explain.diagnosis import Diagnosis
from shapecheck.explain.fault_catalogue import list_faults
from shapecheck.explain.mapping_parser import parse_value
from shapecheck.explain.matching import reproduces
from shapecheck.explain.residual_table import Fault, Hints, RequestedSize, ResidualShapes, ResidualTable, right_shapes
from shapecheck.explain.simulate import Failure, lay_out_unet, simulate_call
from shapecheck.models import lookup
from shapecheck.observe.request import ProbeRequest, resolve_geometry
from shapecheck.progress import Progress, silent

_MOST_MATCHES, _MOST_SIZES = 3, 12


@dataclass(frozen=True, slots=True)
class Match:
    """Mistakes with one and the same table, and the number of places at which it differs from the one that is judged."""

    faults: tuple[Fault, ...]
    differs: int

    @property
    def fault(self) -> Fault:
        """The one to report first."""
        return self.faults[0]


@dataclass(frozen=True, slots=True)
class Judgement:
    """A table compared with one UNet at one size."""

    models: tuple[str, ...]
    contract: Contract
    geometry: Geometry
    received: ResidualShapes
    mismatches: tuple[Mismatch, ...]
    """Every slot that is wrong, missing or surplus."""
    failure: Failure | None
    """The first error of PyTorch; None if it runs."""
    matches: tuple[Match, ...]
    """Mistakes that lead to this very table, else the nearest."""
    tells_mid: bool = True
    notes: tuple[str, ...] = ()
    """How the table was read, if it could have been read otherwise."""

    @property
    def is_right(self) -> bool:
        return not self.mismatches

    @property
    def is_silent(self) -> bool:
        """Return whether something is wrong and PyTorch raises nothing."""
        return bool(self.mismatches) and self.failure is None

    def reproduces(self, diagnosis: Diagnosis) -> bool | None:
        """Return whether this table leads to one of the symptoms of an explained text, or None if that has none."""
        if not diagnosis.readings:
            return None
        failure, table = self.failure, ResidualTable.of(self.contract, self.geometry)
        return failure is not None and any(reproduces(reading.symptom, failure, table) for reading in diagnosis.readings)

    @property
    def distance(self) -> tuple[bool, int, int]:
        """The distance from this UNet: a right table is nearer than one that a known mistake explains, and that than others."""
        nearest = self.matches[0].differs if self.matches else 0
        return not self.is_right, nearest, len(self.mismatches)


def resolve_unet(model: str, *, offline: bool, progress: Progress) -> Contract:
    """Return the contract of a UNet that takes residuals. Raises ShapecheckError if the model is none."""
    contract = resolve_contract(model, offline=offline, progress=progress)
    if contract.role != "unet":
        raise ShapecheckError(f"{model} is a ControlNet; give the UNet as the model, and this one with --controlnet")
    if not contract.slots:
        raise ShapecheckError(f"{model} takes no residuals: it was exported with --no-control")
    return contract


def judge_mapping(request: ProbeRequest, *, offline: bool = False, progress: Progress = silent) -> Judgement:
    """Compare the mapping of a request with its model. Raises ShapecheckError if there is no such model or size."""
    contract = resolve_unet(request.model, offline=offline, progress=progress)
    at = resolve_geometry(request, contract.header.vae_factor) or Geometry(request.batch, *contract.header.usual)
    claim = parse_value(request.mapping, "`mapping`", at)
    return judge_claim(claim, (request.model,), contract, RequestedSize((at.height, at.width), at.batch))


def judge_controlnets(
    controlnets: Sequence[str], model: str, contract: Contract, geometry: Geometry, *, offline: bool, progress: Progress
) -> list[Judgement]:
    """Compare what each of these ControlNets emits at that geometry, observed on the meta device, with a UNet.

    A UNet preset's name stands for the ControlNet made for it. Raises ShapecheckError if one cannot be found or run.
    """
    for name in controlnets:
        lookup.find(name, "controlnet", offline=offline)
    progress("importing torch and diffusers")
    from shapecheck.models.model import build_controlnets
    from shapecheck.observe.probe import probe_controlnet

    judgements = []
    for net in build_controlnets(controlnets, offline):
        progress(f"observing {net.name}")
        emitted = right_shapes(probe_controlnet(net.module), geometry)
        judgements.append(judge_residuals(emitted, (model,), contract, geometry))
    return judgements


def judge_residuals(
    received: ResidualShapes, models: tuple[str, ...], contract: Contract, geometry: Geometry, *, sized: bool = True
) -> Judgement:
    """Judge the residuals that a UNet received at this geometry. Raises ShapecheckError if the UNet refuses the geometry.

    `sized`: the size is known to be the UNet's, so that a whole table of another size is a mistake too.
    """
    mismatches = compare_shapes(contract.slots, geometry, received.named)
    unet = lay_out_unet(contract, geometry)
    failure = simulate_call(unet, received) if unet else None
    matches = _match_faults(received, ResidualTable.of(contract, geometry), sized)
    return Judgement(models, contract, geometry, received, mismatches, failure, matches)


def judge_on_all(
    claim: Claim, groups: Sequence[tuple[str, ...]], models: Mapping[str, Contract], size: RequestedSize
) -> list[Judgement]:
    """Judge it on each group of UNets that treat residuals alike, the nearest first."""
    judgements = []
    for names in groups:
        try:
            judgements.append(judge_claim(claim, names, models[names[0]], size))
        except ShapecheckError:
            if len(groups) == 1:
                raise
    return sorted(judgements, key=lambda judgement: judgement.distance)


def judge_claim(claim: Claim, models: tuple[str, ...], contract: Contract, size: RequestedSize) -> Judgement:
    """Judge a claimed table at the requested size, else at the one at which least is wrong.

    Raises ShapecheckError if the UNet refuses every size it can be about.
    """
    usual = size.complete(contract)
    usual = replace(usual, batch=size.batch or claim.batch or usual.batch)
    sizes = [(usual.height, usual.width)]
    if size.latent is None and (claimed := claim.sizes()):  # the largest, the model's own, and every other that it names
        largest = max(height for height, _ in claimed), max(width for _, width in claimed)
        sizes = [largest, *sizes, *claimed[:_MOST_SIZES]]

    judgements: list[Judgement] = []
    refusal: ShapecheckError | None = None
    for height, width in dict.fromkeys(sizes):
        try:
            table = ResidualTable.of(contract, replace(usual, height=height, width=width))
        except ShapecheckError as error:
            refusal = error
            continue
        judgements += _judge_meanings(claim, table, models, sized=size.latent is not None)
    if not judgements:
        raise refusal or ShapecheckError(f"{claim.origin}: no size to compare it at; give --size")
    return min(judgements, key=lambda judgement: judgement.distance)


def _judge_meanings(claim: Claim, table: ResidualTable, models: tuple[str, ...], *, sized: bool) -> Iterator[Judgement]:
    """Judge everything that the claim can mean at this geometry."""
    claim = claim.from_zero(len(table.downs))
    tables = list(claim.tables(table))
    if not claim.gaps:
        for number, received in enumerate(tables):
            tells_mid = claim.tells_mid or received.mid != table.mid or (number == 0 and len(claim.downs) > len(table.downs))
            judgement = judge_residuals(received, models, table.contract, table.geometry, sized=sized)
            yield replace(judgement, tells_mid=tells_mid, notes=claim.notes)
        return

    # of residuals by name, those left out come first in the report, then what is wrong with the others
    judgement = judge_residuals(tables[0], models, table.contract, table.geometry, sized=sized)
    mismatches = compare_shapes(table.contract.slots, table.geometry, claim.named_shapes(table))
    others = _match_faults(claim.completed(table), table, sized)
    which = name_slots([number for number in claim.gaps if number != MID], has_mid=MID in claim.gaps)
    verb, names = ("is", "its name") if len(claim.gaps) == 1 else ("are", "their names")
    message = f"{which} {verb} left out under {names}{'' if others else ', the others are in place'}"
    slots = tuple(table.names[index] for index in claim.gaps if index < len(table.names))
    fault = Fault("drop", message, "give every slot", tables[0], slots)
    matches = (Match((fault,), others[0].differs if others else 0), *others)
    yield replace(judgement, mismatches=mismatches, matches=matches, notes=claim.notes)


def _match_faults(received: ResidualShapes, table: ResidualTable, sized: bool) -> tuple[Match, ...]:
    """Return the mistakes that lead to this table; if there are none, those that come nearest."""
    if received == table.right:
        return ()
    matches = []
    for group in list_faults(table, Hints.of_shapes((*received.downs, received.mid or ()))):
        if faults := tuple(fault for fault in group if sized or fault.kind != "size"):
            matches.append(Match(faults, _count_differences(faults[0].residuals, received)))  # noqa: PERF401
    matches.sort(key=lambda match: match.differs)
    return tuple(match for match in matches if match.differs == 0) or tuple(matches[:_MOST_MATCHES])


def _count_differences(one: ResidualShapes, other: ResidualShapes) -> int:
    both = zip(one.downs, other.downs, strict=False)
    return sum(a != b for a, b in both) + abs(len(one.downs) - len(other.downs)) + (one.mid != other.mid)
