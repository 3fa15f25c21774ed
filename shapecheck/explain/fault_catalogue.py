"""Every fault that has a name, at one geometry: whole tables made wrong, right tables spoilt, and one wrong residual."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import get_args

from shapecheck.contract import Shape, show
from shapecheck.explain.residual_table import Fault, FaultKind, Hints, ResidualShapes, ResidualTable
from shapecheck.explain.wrong_tables import list_wrong_tables

_AS_EMITTED = "give the residuals in the order the ControlNet returns them, none left out and none twice"


def list_faults(table: ResidualTable, hints: Hints = Hints()) -> list[tuple[Fault, ...]]:  # noqa: B008  # it is frozen
    """Return all faults, grouped by the table they lead to: no shape can tell those of one group apart."""
    faults = [*list_wrong_tables(table, hints)]
    for rule in (_leave_out_or_repeat, _reorder, _shift, _misplace_mid):
        faults += rule(table)
    for index, (slot, right) in enumerate(zip(table.contract.slots, table.flat, strict=True)):
        for kind, flaw, change, shape in _list_wrong_shapes(table, hints, right, slot.stride):
            message = f"{table.name_residual(index)} has {flaw}"
            faults.append(Fault(kind, message, change, table.replace_shape(index, shape), (slot.name,)))

    order = get_args(FaultKind)
    groups: dict[ResidualShapes, list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: order.index(fault.kind)):
        if fault.residuals != table.right:
            groups.setdefault(fault.residuals, []).append(fault)
    return [tuple(group) for group in groups.values()]


def _leave_out_or_repeat(table: ResidualTable) -> Iterator[Fault]:
    downs, mid, flat = table.downs, table.mid, table.flat
    for index, name in enumerate(table.names[:-1]):
        rest = "" if index == len(downs) - 1 else ": every one after it arrives a slot too early"
        shorter = ResidualShapes((*downs[:index], *downs[index + 1 :]), mid)
        yield Fault("drop", f"the residual of slot {index} is left out{rest}", _AS_EMITTED, shorter, (name,))
        longer = ResidualShapes((*downs[: index + 1], *downs[index:]), mid)
        message = f"the residual of slot {index} is given twice: every one after it arrives a slot too late"
        yield Fault("duplicate", message, _AS_EMITTED, longer, (name,))
    empty = ResidualShapes((), mid)
    yield Fault("empty", "there are no down residuals", "give all down residuals beside the mid one", empty, table.names[:-1])

    # one residual in two places, the second of which loses its own; of residuals of one shape the first stands for all
    firsts = {shape: index for index, shape in reversed(list(enumerate(flat)))}
    for index, name in enumerate(table.names):
        kind: FaultKind = "mid" if name == table.names[-1] else "duplicate"
        for shape, source in firsts.items():
            if shape != flat[index]:
                message = f"{table.name_residual(source)} is given for {table.name_slot(index)} too"
                yield Fault(kind, message, _AS_EMITTED, table.replace_shape(index, shape), (name,))


def _reorder(table: ResidualTable) -> Iterator[Fault]:
    """Yield every exchange of two residuals, and the reversed lists."""
    downs, mid, flat, names = table.downs, table.mid, table.flat, table.names
    for one, other in combinations(range(len(flat)), 2):
        if flat[one] == flat[other]:
            continue  # no shape shows it
        shapes = list(flat)
        shapes[one], shapes[other] = flat[other], flat[one]
        message = f"the residuals of {table.name_slot(one)} and {table.name_slot(other)} are exchanged"
        yield Fault("swap", message, "exchange the two", ResidualShapes.split(shapes), (names[one], names[other]))

    levels = dict.fromkeys(shape[2:] for shape in downs)
    by_level = tuple(shape for size in levels for shape in downs[::-1] if shape[2:] == size)
    change = "give them from the first to the last: diffusers adds them in the order of the skips, and does not pop them"
    for message, residuals in (
        ("the down residuals are in reverse, the order in which LDM and ComfyUI pop them", (downs[::-1], mid)),
        ("all residuals are in reverse, mid first", ((mid, *downs[:0:-1]), downs[0])),
        ("the residuals are in reverse within each level", (by_level, mid)),
    ):
        yield Fault("reverse", message, change, ResidualShapes(*residuals))


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
    for message, residuals in (
        (forgotten, (downs, None)),
        ("the mid residual stands at the end of the down residuals and nothing is given as mid", ((*downs, mid), None)),
        ("the mid residual comes first among the down residuals too", ((mid, *downs), mid)),
        ("the mid residual is repeated at the end of the down residuals", ((*downs, mid), mid)),
    ):
        yield Fault("mid", message, change, ResidualShapes(*residuals), last)
    message = "there is a residual more than slots, at the end of the list"
    change = "give one residual a slot: diffusers ignores others"
    yield Fault("surplus", message, change, ResidualShapes((*downs, downs[-1]), mid))

    change = "a ControlNet returns the down residuals as a list and mid beside it: take the last of a flat list as mid"
    wrong_end = "mid is taken from the wrong end of a list of all: the first for mid, and mid after the others"
    for message, residuals, touched in (
        ("the last down residual is taken for mid, and mid is lost", (downs[:-1], downs[-1]), names[-2:]),
        (wrong_end, ((*downs[1:], mid), downs[0]), ()),
        ("mid comes first in a list of all, and the last is taken for mid", ((mid, *downs[:-1]), downs[-1]), ()),
        ("the first is left out, and mid fills the list of down residuals", ((*downs[1:], mid), mid), names[:1]),
    ):
        yield Fault("mid", message, change, ResidualShapes(*residuals), touched)


def _list_wrong_shapes(
    table: ResidualTable, hints: Hints, right: Shape, stride: int
) -> Iterator[tuple[FaultKind, str, str, Shape]]:
    batch, channels, *size = right
    change = "give each residual the channels of its own slot"
    for width in dict.fromkeys((*(level.channels for level in table.levels), *hints.widths)):
        if width != channels:
            yield "width", f"{width} channels, not {channels}", change, (batch, width, *size)

    sizes = {level.size: f"stride {level.stride}" for level in table.levels}
    for rows, columns in hints.sizes:
        for other in table.complete_size(rows, columns, (size[0], size[1])):
            sizes.setdefault(other, f"{show(other)} cells")
    change = "give each residual the size of its own slot"
    for other, words in sizes.items():
        if other != tuple(size):
            yield "stride", f"{words}, not stride {stride}", change, (batch, channels, *other)

    change = "give every residual the batch of the latents"
    for count in dict.fromkeys((1, *hints.batches)):
        if count != batch:
            silent = ": PyTorch adds it to every image" if count == 1 else ""
            yield "batch", f"batch {count}, not {batch}{silent}", change, (count, *right[1:])
    change = "give (batch, channels, height, width)"
    yield "rank", "no batch axis: PyTorch adds it to every image in silence", change, right[1:]
    yield "rank", "an axis too many", change, (1, *right)
