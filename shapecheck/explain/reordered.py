"""Right tables spoilt: residuals left out, given twice, exchanged, or in another order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from shapecheck.explain.residual_table import Fault, FaultKind, ResidualShapes, ResidualTable

_AS_EMITTED = "give the residuals in the order the ControlNet returns them, none left out and none twice"


def list_reordered(table: ResidualTable) -> Iterator[Fault]:
    """Yield every fault of this sort."""
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
        message = f"the residual of slot {index} is given twice: every one after it arrives a slot too late"
        yield Fault("duplicate", message, _AS_EMITTED, longer, (name,))

    # one residual in two places, the second of which loses its own; of residuals of one shape the first stands for all
    firsts = {shape: index for index, shape in reversed(list(enumerate(flat)))}
    for index, name in enumerate(table.names):
        kind: FaultKind = "mid" if name == table.names[-1] else "duplicate"
        for shape, source in firsts.items():
            if shape != flat[index]:
                message = f"{table.name_residual(source)} is given for {table.name_slot(index)} too"
                yield Fault(kind, message, _AS_EMITTED, table.replace_shape(index, shape), (name,))


def _exchange(table: ResidualTable) -> Iterator[Fault]:
    flat = table.flat
    for one, other in combinations(range(len(flat)), 2):
        if flat[one] == flat[other]:
            continue  # no shape shows it
        shapes = list(flat)
        shapes[one], shapes[other] = flat[other], flat[one]
        message = f"the residuals of {table.name_slot(one)} and {table.name_slot(other)} are exchanged"
        names = table.names[one], table.names[other]
        yield Fault("swap", message, "exchange the two", ResidualShapes.split(shapes), names)


def _reverse(table: ResidualTable) -> Iterator[Fault]:
    downs, mid = table.downs, table.mid
    levels = dict.fromkeys(shape[2:] for shape in downs)
    by_level = tuple(shape for size in levels for shape in downs[::-1] if shape[2:] == size)
    change = "give them from the first to the last: diffusers adds them in the order of the skips, and does not pop them"
    for message, given in (
        ("the down residuals are in reverse, the order in which LDM and ComfyUI pop them", (downs[::-1], mid)),
        ("all residuals are in reverse, mid first", ((mid, *downs[:0:-1]), downs[0])),
        ("the residuals are in reverse within each level", (by_level, mid)),
    ):
        yield Fault("reverse", message, change, ResidualShapes(*given))


def _shift(table: ResidualTable) -> Iterator[Fault]:
    """Yield the ways to shift the list by some slots, each with the slots whose residuals are lost."""
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
        for message, residuals, lost in ways:
            yield Fault("shift", message, _AS_EMITTED, ResidualShapes(residuals, table.mid), table.names[:-1][lost])


def _misplace_mid(table: ResidualTable) -> Iterator[Fault]:
    """Yield mid in a wrong place, and one list of all residuals split into down and mid at the wrong place."""
    downs, mid, names = table.downs, table.mid, table.names
    last = names[-1:]
    change = "give the mid residual as mid_block_additional_residual, and the down residuals alone in the list"
    forgotten = "the mid residual is forgotten: diffusers takes the down residuals for T2I-Adapter features"
    for message, given in (
        (forgotten, (downs, None)),
        ("the mid residual stands at the end of the down residuals and nothing is given as mid", ((*downs, mid), None)),
        ("the mid residual comes first among the down residuals too", ((mid, *downs), mid)),
        ("the mid residual is repeated at the end of the down residuals", ((*downs, mid), mid)),
    ):
        yield Fault("mid", message, change, ResidualShapes(*given), last)
    message = "there is a residual more than slots, at the end of the list"
    change = "give one residual a slot: diffusers ignores others"
    yield Fault("surplus", message, change, ResidualShapes((*downs, downs[-1]), mid))

    change = "a ControlNet returns the down residuals as a list and mid beside it: take the last of a flat list as mid"
    wrong_end = "mid is taken from the wrong end of a list of all: the first for mid, and mid after the others"
    for message, given, touched in (
        ("the last down residual is taken for mid, and mid is lost", (downs[:-1], downs[-1]), names[-2:]),
        (wrong_end, ((*downs[1:], mid), downs[0]), ()),
        ("mid comes first in a list of all, and the last is taken for mid", ((mid, *downs[:-1]), downs[-1]), ()),
        ("the first is left out, and mid fills the list of down residuals", ((*downs[1:], mid), mid), names[:1]),
    ):
        yield Fault("mid", message, change, ResidualShapes(*given), touched)
