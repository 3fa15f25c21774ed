"""Right tables spoilt: residuals left out, given twice, exchanged, or in another order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from shapecheck.explain.fault import Fault, FaultKind
from shapecheck.explain.residual_table import ResidualShapes, ResidualTable

_AS_EMITTED = "give the residuals in the order the ControlNet returns them, none left out and none twice"


_MID = "give the mid residual as mid_block_additional_residual, and the down residuals alone in the list"


_SPLIT = "a ControlNet returns the down residuals as a list and mid beside it: take the last of a flat list as mid"


_FORWARDS = "give them from the first to the last: diffusers adds them in the order of the skips, and does not pop them"


def list_reordered(table: ResidualTable) -> Iterator[Fault]:
    """Yield every single fault of this sort."""
    yield from _leave_out_or_repeat(table)
    yield from _exchange(table)
    yield from _reverse(table)
    yield from _shift(table)
    yield from _misplace_mid(table)


def _leave_out_or_repeat(table: ResidualTable) -> Iterator[Fault]:
    downs, mid, flat = table.downs, table.mid, table.flat
    for index, name in enumerate(table.names[:-1]):
        rest = "" if index == len(downs) - 1 else ": every one after it arrives a slot too early"
        shorter = ResidualShapes((*downs[:index], *downs[index + 1 :]), mid)
        yield Fault("drop", f"the residual of slot {index} is left out{rest}", _AS_EMITTED, shorter, (name,))
    empty = ResidualShapes((), mid)
    yield Fault("empty", "there are no down residuals", "give all down residuals beside the mid one", empty, table.names[:-1])
    for index, name in enumerate(table.names[:-1]):
        longer = ResidualShapes((*downs[: index + 1], *downs[index:]), mid)
        told = f"the residual of slot {index} is given twice: every one after it arrives a slot too late"
        yield Fault("duplicate", told, _AS_EMITTED, longer, (name,))

    # one residual in two places, the second of which loses its own; of residuals of one shape the first stands for all
    firsts = {shape: index for index, shape in reversed(list(enumerate(flat)))}
    for index, name in enumerate(table.names):
        kind: FaultKind = "mid" if name == table.names[-1] else "duplicate"
        for shape, source in firsts.items():
            if shape != flat[index]:
                told = f"{table.name_residual(source)} is given for {table.name_slot(index)} too"
                yield Fault(kind, told, _AS_EMITTED, table.replace_shape(index, shape), (name,))


def _exchange(table: ResidualTable) -> Iterator[Fault]:
    flat = table.flat
    for one, other in combinations(range(len(flat)), 2):
        if flat[one] == flat[other]:
            continue  # no shape shows it
        changed = list(flat)
        changed[one], changed[other] = flat[other], flat[one]
        told = f"the residuals of {table.name_slot(one)} and {table.name_slot(other)} are exchanged"
        names = table.names[one], table.names[other]
        yield Fault("swap", told, "exchange the two", ResidualShapes.split(changed), names)


def _reverse(table: ResidualTable) -> Iterator[Fault]:
    downs, mid = table.downs, table.mid
    popped = "the down residuals are in reverse, the order in which LDM and ComfyUI pop them"
    yield Fault("reverse", popped, _FORWARDS, ResidualShapes(downs[::-1], mid))
    told = "all residuals are in reverse, mid first"
    yield Fault("reverse", told, _FORWARDS, ResidualShapes((mid, *downs[:0:-1]), downs[0]))
    sizes = dict.fromkeys(shape[2:] for shape in downs)
    by_level = tuple(shape for size in sizes for shape in downs[::-1] if shape[2:] == size)
    yield Fault("reverse", "the residuals are in reverse within each level", _FORWARDS, ResidualShapes(by_level, mid))


def _shift(table: ResidualTable) -> Iterator[Fault]:
    """Yield the ways in which the list is shifted by so many slots, each with the slots whose residuals are lost."""
    downs = table.downs
    for by in range(1, len(downs)):
        slots, count = ("a slot", "residual is") if by == 1 else (f"{by} slots", f"{by} residuals are")
        early, late = f"every residual arrives {slots} too early", f"every residual arrives {slots} too late"
        none, first, last = slice(0), slice(by), slice(-by, None)
        again = f"the first is given {by + 1} times"
        ways = [
            (f"the first {count} left out: {early}", downs[by:], first),
            (f"{early}, the last is repeated to fill the list", (*downs[by:], *downs[-1:] * by), first),
            (f"{again}: {late}", (*downs[:1] * by, *downs), none),
            (f"{again} and the last {count} left out: {late}", (*downs[:1] * by, *downs[:-by]), last),
            (f"the list is turned: {early}, the first come last", (*downs[by:], *downs[:by]), none),
            *([(f"the last {count} left out", downs[:-by], last)] if by > 1 else []),
        ]
        for told, residuals, lost in ways:
            yield Fault("shift", told, _AS_EMITTED, ResidualShapes(residuals, table.mid), table.names[:-1][lost])


def _misplace_mid(table: ResidualTable) -> Iterator[Fault]:
    """Yield mid in a wrong place, and one list of all residuals taken apart into down and mid at the wrong place."""
    downs, mid, names = table.downs, table.mid, table.names
    last = names[-1:]
    told = "the mid residual is forgotten: diffusers takes the down residuals for T2I-Adapter features"
    yield Fault("mid", told, _MID, ResidualShapes(downs, None), last)
    told = "the mid residual stands at the end of the down residuals and nothing is given as mid"
    yield Fault("mid", told, _MID, ResidualShapes((*downs, mid), None), last)
    told = "the mid residual comes first among the down residuals too"
    yield Fault("mid", told, _MID, ResidualShapes((mid, *downs), mid), last)
    told = "the mid residual is repeated at the end of the down residuals"
    yield Fault("mid", told, _MID, ResidualShapes((*downs, mid), mid), last)
    told = "there is a residual more than slots, at the end of the list"
    change = "give one residual a slot: diffusers ignores others"
    yield Fault("surplus", told, change, ResidualShapes((*downs, downs[-1]), mid))
    told = "the last down residual is taken for mid, and mid is lost"
    yield Fault("mid", told, _SPLIT, ResidualShapes(downs[:-1], downs[-1]), names[-2:])
    told = "mid is taken from the wrong end of a list of all: the first for mid, and mid after the others"
    yield Fault("mid", told, _SPLIT, ResidualShapes((*downs[1:], mid), downs[0]))
    told = "mid comes first in a list of all, and the last is taken for mid"
    yield Fault("mid", told, _SPLIT, ResidualShapes((mid, *downs[:-1]), downs[-1]))
    told = "the first is left out, and mid fills the list of down residuals"
    yield Fault("mid", told, _SPLIT, ResidualShapes((*downs[1:], mid), mid), names[:1])
