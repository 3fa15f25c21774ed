"""From a claimed table, or one that was given, to what is wrong with it: slot by slot, and which mistake makes such a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shapecheck.contract import Contract, Geometry, Mismatch, Shape, ShapecheckError
from shapecheck.contract.mismatch import compare
from shapecheck.explain.diagnosis import Diagnosis
from shapecheck.explain.fault import Fault
from shapecheck.explain.fault_catalogue import mistakes
from shapecheck.explain.hints import Hints
from shapecheck.explain.mapping import MID, Claim
from shapecheck.explain.matching import gives
from shapecheck.explain.residual_table import Given, Table
from shapecheck.explain.simulate import Failure, outcome
from shapecheck.explain.size import Size
from shapecheck.explain.unet_layout import anatomy

_NEAREST = 3


_MOST_SIZES = 12


@dataclass(frozen=True, slots=True)
class Match:
    """A mistake, and in how many places its table differs from the one at hand."""

    faults: tuple[Fault, ...]
    differs: int

    @property
    def fault(self) -> Fault:
        """The one told first."""
        return self.faults[0]


@dataclass(frozen=True, slots=True)
class Judgement:
    """A table held against one UNet at one size."""

    models: tuple[str, ...]
    contract: Contract
    geometry: Geometry
    given: Given
    mismatches: tuple[Mismatch, ...]
    """Every slot that is wrong, missing or surplus."""
    failure: Failure | None
    """What PyTorch raises first; None where it runs."""
    matches: tuple[Match, ...]
    """Mistakes that lead to this very table, else the nearest."""
    tells_mid: bool = True
    notes: tuple[str, ...] = ()
    """How the table was read, where it could have been read otherwise."""

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return not self.mismatches

    @property
    def is_silent(self) -> bool:
        """Whether something is wrong and PyTorch says nothing."""
        return bool(self.mismatches) and self.failure is None

    def gives(self, diagnosis: Diagnosis) -> bool | None:
        """Whether this table gives a text that was explained: one of its symptoms. None where that has none."""
        if not diagnosis.readings:
            return None
        failure, table = self.failure, Table.of(self.contract, self.geometry)
        return failure is not None and any(gives(each.symptom, failure, table) for each in diagnosis.readings)

    @property
    def distance(self) -> tuple[bool, int, int]:
        """How far it is from this UNet: a right table before one that a known mistake explains, before others."""
        nearest = self.matches[0].differs if self.matches else 0
        return not self.is_right, nearest, len(self.mismatches)


def judge_given(given: Given, models: tuple[str, ...], contract: Contract, geometry: Geometry) -> Judgement:
    """What is wrong with residuals that a UNet was given at this geometry.

    Raises ShapecheckError where the UNet refuses the geometry.
    """
    table = Table.of(contract, geometry)
    return _judged(given, given.named, table, models)


def judge_claim(claim: Claim, models: tuple[str, ...], contract: Contract, size: Size) -> Judgement:
    """What is wrong with a claimed table, at the size asked for, else at the one where least is.

    Raises ShapecheckError where the UNet refuses every size it can be about.
    """
    judged: list[Judgement] = []
    refused: ShapecheckError | None = None
    for geometry in _geometries(claim, contract, size):
        try:
            table = Table.of(contract, geometry)
        except ShapecheckError as error:
            refused = error
            continue
        judged += _readings(claim, table, models, sized=size.latent is not None)
    if not judged:
        raise refused or ShapecheckError(f"{claim.origin}: no size to hold it against; give --size")
    return min(judged, key=lambda each: each.distance)


def best(claim: Claim, groups: Sequence[tuple[str, ...]], models: Mapping[str, Contract], size: Size) -> list[Judgement]:
    """On each group of UNets that treat residuals alike, the nearest first."""
    judged = []
    for names in groups:
        try:
            judged.append(judge_claim(claim, names, models[names[0]], size))
        except ShapecheckError:
            if len(groups) == 1:
                raise
    return sorted(judged, key=lambda each: each.distance)


def _readings(claim: Claim, table: Table, models: tuple[str, ...], *, sized: bool) -> Iterator[Judgement]:
    claim = claim.from_zero(len(table.downs))
    if claim.gaps:
        yield replace(_with_gaps(claim, table, models, sized=sized), notes=claim.notes)
        return
    for number, given in enumerate(claim.tables(table)):
        tells_mid = claim.tells_mid or given.mid != table.mid or (number == 0 and len(claim.downs) > len(table.downs))
        judged = _judged(given, given.named, table, models, sized=sized)
        yield replace(judged, tells_mid=tells_mid, notes=claim.notes)


def _with_gaps(claim: Claim, table: Table, models: tuple[str, ...], *, sized: bool) -> Judgement:
    """Residuals by name, some of them left out: that first, then what is wrong with the others."""
    given = next(iter(claim.tables(table)))
    judged = _judged(given, claim.named_shapes(table), table, models, sized=sized)
    others = _matches(claim.completed(table), table, sized)
    names = "their names" if len(claim.gaps) > 1 else "its name"
    rest = "" if others else ", the others are in place"
    told = f"{_slots(claim.gaps)} left out under {names}{rest}"
    slots = tuple(table.names[index] for index in claim.gaps if index < len(table.names))
    fault = Fault("drop", told, "give every slot", given, slots)
    return replace(judged, matches=(Match((fault,), others[0].differs if others else 0), *others))


def _slots(numbers: tuple[int, ...]) -> str:
    """`slot 3 is`, `slots 3, 4 and mid are`, `mid is`."""
    downs = [str(number) for number in numbers if number != MID]
    parts = [f"slot{'s' * (len(downs) > 1)} {', '.join(downs)}"] if downs else []
    return f"{' and '.join([*parts, *['mid'] * (MID in numbers)])} {'is' if len(numbers) == 1 else 'are'}"


def _judged(
    given: Given, named: Mapping[str, Shape], table: Table, models: tuple[str, ...], *, sized: bool = True
) -> Judgement:
    mismatches = compare(table.contract.slots, table.geometry, named)
    unet = anatomy(table.contract, table.geometry)
    failure = outcome(unet, given) if unet else None
    matches = _matches(given, table, sized)
    return Judgement(models, table.contract, table.geometry, given, mismatches, failure, matches)


def _matches(given: Given, table: Table, sized: bool) -> tuple[Match, ...]:
    """The mistakes that lead to this table; where there are none, those that come nearest.

    `sized`: the size is known to be the UNet's, so that a whole table of another size is a mistake too.
    """
    if given == table.right:
        return ()
    known = mistakes(table, Hints.of_given(given))
    if not sized:
        known = [kept for each in known if (kept := tuple(fault for fault in each if fault.kind != "size"))]
    counted = sorted((Match(each, _differences(each[0].given, given)) for each in known), key=lambda match: match.differs)
    exact = tuple(match for match in counted if match.differs == 0)
    return exact or tuple(counted[:_NEAREST])


def _differences(one: Given, other: Given) -> int:
    """Places at which two tables differ."""
    both = zip(one.downs, other.downs, strict=False)
    return sum(a != b for a, b in both) + abs(len(one.downs) - len(other.downs)) + (one.mid != other.mid)


def _geometries(claim: Claim, contract: Contract, size: Size) -> tuple[Geometry, ...]:
    """Sizes a claim can be about: the one asked for; else its largest, the model's own, and every other it names."""
    usual = size.usual(contract)
    usual = replace(usual, batch=size.batch or claim.batch or usual.batch)
    if size.latent is not None:
        return (usual,)
    told = claim.sizes()
    largest = [(max(height for height, _ in told), max(width for _, width in told))] if told else []
    sizes = [*largest, (usual.height, usual.width), *told[:_MOST_SIZES]]
    return tuple(dict.fromkeys(replace(usual, height=height, width=width) for height, width in sizes))
