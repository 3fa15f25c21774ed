"""Right tables spoilt: residuals left out, given twice, exchanged, or in another order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from shapecheck.contract import Shape
from shapecheck.explain.fault import Fault, FaultKind
from shapecheck.explain.residual_table import Given, Table

_AS_EMITTED = "give the residuals in the order the ControlNet returns them, none left out and none twice"


def edits(table: Table) -> Iterator[Fault]:
    """Every single fault of this sort."""
    yield from _dropped(table)
    yield from _duplicated(table)
    yield from _copied(table)
    yield from _swapped(table)
    yield from _reordered(table)
    yield from _shifted(table)
    yield from _mids(table)
    yield from _split(table)


def _dropped(table: Table) -> Iterator[Fault]:
    downs = table.downs
    for index, name in enumerate(table.names[:-1]):
        rest = "" if index == len(downs) - 1 else ": every one after it arrives a slot too early"
        given = Given((*downs[:index], *downs[index + 1 :]), table.mid)
        yield Fault("drop", f"the residual of slot {index} is left out{rest}", _AS_EMITTED, given, (name,))
    yield Fault(
        "empty",
        "there are no down residuals",
        "give all down residuals beside the mid one",
        Given((), table.mid),
        table.names[:-1],
    )


def _duplicated(table: Table) -> Iterator[Fault]:
    downs = table.downs
    for index, name in enumerate(table.names[:-1]):
        given = Given((*downs[: index + 1], *downs[index:]), table.mid)
        told = f"the residual of slot {index} is given twice: every one after it arrives a slot too late"
        yield Fault("duplicate", told, _AS_EMITTED, given, (name,))


def _copied(table: Table) -> Iterator[Fault]:
    """One residual in two places, the second of which loses its own; of residuals of one shape the first stands for all."""
    flat = [*table.downs, table.mid]
    firsts = {shape: at for at, shape in reversed(list(enumerate(flat)))}
    for at, name in enumerate(table.names):
        for shape, source in firsts.items():
            if shape != flat[at]:
                kind: FaultKind = "mid" if name == table.names[-1] else "duplicate"
                told = f"{table.residual(source)} is given for {table.place(at)} too"
                yield Fault(kind, told, _AS_EMITTED, table.changed(at, shape), (name,))


def _swapped(table: Table) -> Iterator[Fault]:
    flat = [*table.downs, table.mid]
    for one, other in combinations(range(len(flat)), 2):
        if flat[one] == flat[other]:
            continue  # no shape shows it
        changed = list(flat)
        changed[one], changed[other] = flat[other], flat[one]
        names = table.names[one], table.names[other]
        told = f"the residuals of {table.place(one)} and {table.place(other)} are exchanged"
        yield Fault("swap", told, "exchange the two", Given(tuple(changed[:-1]), changed[-1]), names)


def _reordered(table: Table) -> Iterator[Fault]:
    downs, mid = table.downs, table.mid
    change = "give them from the first to the last: diffusers adds them in the order of the skips, and does not pop them"
    popped = "the down residuals are in reverse, the order in which LDM and ComfyUI pop them"
    yield Fault("reverse", popped, change, Given(downs[::-1], mid))
    yield Fault(
        "reverse", "all residuals are in reverse, mid first", change, Given((mid, *downs[:0:-1]), downs[0])
    )  # fmt: skip
    yield Fault("reverse", "the residuals are in reverse within each level", change, Given(tuple(_by_level(downs)), mid))


def _by_level(downs: tuple[Shape, ...]) -> Iterator[Shape]:
    sizes = list(dict.fromkeys(shape[2:] for shape in downs))
    for size in sizes:
        yield from [shape for shape in downs if shape[2:] == size][::-1]


def _shifted(table: Table) -> Iterator[Fault]:
    downs = table.downs
    for by in range(1, len(downs)):
        for told, residuals, slots in _shifts(downs, by):
            yield Fault("shift", told, _AS_EMITTED, Given(residuals, table.mid), table.names[:-1][slots])


def _shifts(downs: tuple[Shape, ...], by: int) -> Iterator[tuple[str, tuple[Shape, ...], slice]]:
    """The ways in which a list is shifted by so many slots: in words, the list, the slots whose residuals are lost."""
    slots, count = ("a slot", "residual is") if by == 1 else (f"{by} slots", f"{by} residuals are")
    early, late = f"every residual arrives {slots} too early", f"every residual arrives {slots} too late"
    none, first, last = slice(0), slice(by), slice(-by, None)
    yield f"the first {count} left out: {early}", downs[by:], first
    yield f"{early}, the last is repeated to fill the list", (*downs[by:], *downs[-1:] * by), first
    yield f"the first is given {by + 1} times: {late}", (*downs[:1] * by, *downs), none
    yield f"the first is given {by + 1} times and the last {count} left out: {late}", (*downs[:1] * by, *downs[:-by]), last
    yield f"the list is turned: {early}, the first come last", (*downs[by:], *downs[:by]), none
    if by > 1:
        yield f"the last {count} left out", downs[:-by], last


def _mids(table: Table) -> Iterator[Fault]:
    downs, mid, names = table.downs, table.mid, table.names
    change = "give the mid residual as mid_block_additional_residual, and the down residuals alone in the list"
    last = (names[-1],)
    yield Fault(
        "mid", "the mid residual is forgotten: diffusers takes the down residuals for T2I-Adapter features", change,
        Given(downs, None), last,
    )  # fmt: skip
    yield Fault(
        "mid", "the mid residual stands at the end of the down residuals and nothing is given as mid", change,
        Given((*downs, mid), None), last,
    )  # fmt: skip
    yield Fault("mid", "the mid residual comes first among the down residuals too", change, Given((mid, *downs), mid), last)
    yield Fault("mid", "the mid residual is repeated at the end of the down residuals", change, Given((*downs, mid), mid), last)
    yield Fault(
        "surplus", "there is a residual more than slots, at the end of the list",
        "give one residual a slot: diffusers ignores others",
        Given((*downs, downs[-1]), mid),
    )  # fmt: skip


def _split(table: Table) -> Iterator[Fault]:
    """One list of all residuals, taken apart into down and mid at the wrong place."""
    downs, mid, names = table.downs, table.mid, table.names
    change = "a ControlNet returns the down residuals as a list and mid beside it: take the last of a flat list as mid"
    yield Fault(
        "mid", "the last down residual is taken for mid, and mid is lost", change, Given(downs[:-1], downs[-1]), names[-2:]
    )
    yield Fault(
        "mid", "mid is taken from the wrong end of a list of all: the first for mid, and mid after the others", change,
        Given((*downs[1:], mid), downs[0]),
    )  # fmt: skip
    yield Fault(
        "mid", "mid comes first in a list of all, and the last is taken for mid", change, Given((mid, *downs[:-1]), downs[-1])
    )
    yield Fault(
        "mid",
        "the first is left out, and mid fills the list of down residuals",
        change,
        Given((*downs[1:], mid), mid),
        names[:1],
    )
