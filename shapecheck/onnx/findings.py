"""What is wrong with a graph that is held to a contract: one record for each fault, all of them at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from shapecheck.contract import Contract, Dim, Geometry, Input, Mismatch, Slot, show
from shapecheck.contract.mismatch import compare
from shapecheck.contract.naming import SHAPECHECK
from shapecheck.contract.records import MismatchKind
from shapecheck.onnx.input_roles import Matching, Roles, match, roles_of
from shapecheck.onnx.reading import GraphTensor
from shapecheck.onnx.size_sweep import Survey

_NOTHING = "what is given to it changes nothing, and no runtime says so"


_BAKED = "the graph computes with a constant in its place: every call gets the same conditioning"


_TIED = "TensorRT ties sizes by equal names only: a residual of another size would not be refused"


_CALLED = "callers name the tensors they give; rename it, or give it under this name"


_TRACED = "the graph was traced at a convenient size; trace it at an odd one, such as a latent of 17×25"


_SHOWN_NAMES = 4


@dataclass(frozen=True, slots=True)
class Case:
    """Everything the findings are drawn from."""

    roles: Roles
    survey: Survey
    contract: Contract
    asked: Geometry | None = None
    itself: bool = False
    """Whether the contract is the file's own table: what that leaves out is no fault."""

    @property
    def matching(self) -> Matching:
        """Which graph input stands for what the contract wants."""
        return match(self.roles, self.contract)

    def called(self, slot: Slot) -> str:
        """What the file's own naming scheme calls a slot."""
        index = SHAPECHECK.index(slot.name)
        if self.roles.naming is None or index is None:
            return slot.name
        return self.roles.naming.mid if index < 0 else self.roles.naming.down(index)


def findings(case: Case) -> tuple[Mismatch, ...]:
    """Every fault: inputs first, then slots in their order, then what concerns the graph as a whole."""
    matching = case.matching
    found = [
        *(each for pair in matching.inputs for each in _input(case, matching, *pair)),
        *_slots(case, matching),
        *_surplus(case, matching),
    ]
    return (*found, *_symbols(matching, {each.where for each in found}), *size_faults(case))


def _input(case: Case, matching: Matching, want: Input, each: GraphTensor | None) -> Iterator[Mismatch]:
    """What is wrong with one base input."""
    expected = show(want.shape)
    if each is None:
        latents = want.name in ("sample", "controlnet_cond")
        yield Mismatch("missing" if latents else "baked", want.name, "no such input", expected, cause="" if latents else _BAKED)
        return
    if each.name in matching.renamed:
        yield Mismatch("name", each.name, each.name, want.name, cause=f"known by its shape; {_CALLED}")
    if not each.live:
        yield Mismatch("unused", each.name, "no effect on the output", expected, cause=f"baked: {_NOTHING}")
    if each.is_float != ("float" in want.dtype):
        cause = "a fractional timestep is cut off" if want.name == "timestep" else ""
        yield Mismatch("dtype", each.name, each.dtype, want.dtype, cause=cause)
    if each.dims is None or len(roles_of(each)) > 1:
        return
    if len(each.dims) != len(want.shape):
        yield Mismatch("rank", each.name, each.rule, expected)
        return
    numbers = [(dim, size) for dim, size in zip(want.shape, each.dims, strict=True) if isinstance(size, int)]
    if any(dim.symbol is None and size != dim.scale for dim, size in numbers):
        yield Mismatch("channels" if each.is_image else "input", each.name, each.rule, expected)
    elif any(dim.symbol == "batch" and "batch" not in case.survey.fixed for dim, _ in numbers):
        yield Mismatch("input", each.name, each.rule, expected, cause="its batch is fixed, and the sample's is not")


def _slots(case: Case, matching: Matching) -> Iterator[Mismatch]:
    places = _wrong_places(case, matching)
    for slot, each in matching.slots:
        if each is None:
            name, cause = case.called(slot), "never exported, or dropped by the exporter because nothing used it"
            yield Mismatch("missing", name, "no such input", show(slot.shape), None, slot.producer, cause=cause)
            continue
        if each.name in matching.renamed:
            cause = f"known by the sum it ends in; {_CALLED}"
            yield Mismatch("name", each.name, each.name, case.called(slot), None, slot.producer, cause=cause)
        declared = [*_declared(case, slot, each)]
        yield from declared
        makers = [add.module or add.skip for add in each.adds]
        known = slot.producer if not case.itself else ""  # the file's own table says where it is, not where it should be
        expected = f"added to the output of {known or 'its own module'}"
        if not each.adds or not each.live:
            observed = "no effect on the output" if each.adds else "added to nothing"
            yield Mismatch("unused", each.name, observed, expected, None, slot.producer, cause=_NOTHING)
        elif len(makers) > 1:
            yield Mismatch("order", each.name, f"added to {', '.join(makers)}", "added once", None, slot.producer)
        elif each.name in places:
            observed, cause = f"added to the output of {makers[0]}", f"this is the place of {places[each.name]}"
            yield Mismatch("order", each.name, observed, expected, None, slot.producer, cause=cause)
        elif not declared:
            yield from _skip(case, slot, each)


def _wrong_places(case: Case, matching: Matching) -> dict[str, str]:
    """Residuals that are added where another belongs, with the name of that other.

    Each skip is computed from the one before it: their order in the graph is that of the slots, whatever the shapes. Where
    names tell the modules that make the skips, a residual in the place of a missing one is seen too.
    """
    placed = [each for each in case.roles.slots if each.adds and case.roles.position(each) is not None]
    named = sorted(placed, key=lambda each: case.roles.position(each) or 0)
    pairs = zip(placed, named, strict=True)  # two that share a skip, as KOALA's last ones do, may change places
    found = {each.name: owner.name for each, owner in pairs if each.adds[0].rank != owner.adds[0].rank}
    owners = {slot.producer: case.called(slot) for slot, _ in reversed(matching.slots) if slot.producer}
    for slot, each in matching.slots:
        if each is not None and each.adds and each.name not in found:
            makers = [producer for producer in owners if f"{each.adds[0].module}.".startswith(f"{producer}.")]
            if makers and slot.producer not in makers:
                found[each.name] = owners[max(makers, key=len)]
    return found


def _declared(case: Case, slot: Slot, each: GraphTensor) -> Iterator[Mismatch]:
    """The shape the file declares for a residual."""
    if each.dims is None:
        return
    fault: tuple[MismatchKind, str] | None = None
    if len(each.dims) != 4:
        fault = "rank", ""
    elif isinstance(each.dims[1], int) and each.dims[1] != slot.channels:
        fault = "channels", ""
    else:
        pairs = zip(each.dims, slot.shape, strict=True)
        wrong = [size for size, dim in pairs if isinstance(size, int) and dim.symbol and size != _fixed(dim, case.survey.fixed)]
        if 1 in wrong:
            fault = "broadcast", "a residual of one cell is broadcast over the skip, and a whole one refused"
        elif wrong:
            fault = "size", f"fixed at {wrong[0]}"
    if fault:
        yield Mismatch(fault[0], each.name, each.rule, show(slot.shape), None, slot.producer, cause=fault[1])


def _fixed(dim: Dim, fixed: Mapping[str, int]) -> int | None:
    """What an axis measures where the file fixes the size it depends on."""
    try:
        return dim.at(fixed)
    except (KeyError, ValueError):
        return None


def _skip(case: Case, slot: Slot, each: GraphTensor) -> Iterator[Mismatch]:
    """What the residual is added to, as measured, against the contract's skip: the first size at which they differ."""
    skips = [replace(one, spatial="full") for one in case.contract.residuals]
    for geometry, shape in case.survey.measured(each.adds[0].skip).items():
        if geometry.height % case.contract.divisor == 0 and geometry.width % case.contract.divisor == 0:
            expected = {one.name: one.shape_at(geometry) for one in skips}
            for found in compare(skips, geometry, expected | {slot.name: shape}):
                yield replace(found, where=each.name)
                return


def _surplus(case: Case, matching: Matching) -> Iterator[Mismatch]:
    for each in matching.surplus:
        if not each.live:
            yield Mismatch("unused", each.name, "no effect on the output", "an effect, or no input", cause=_NOTHING)
        elif not case.itself:
            yield Mismatch("surplus", each.name, each.rule, "no such input", cause="who follows the contract does not give it")


def _symbols(matching: Matching, wrong: set[str]) -> Iterator[Mismatch]:
    """Equal sizes under different names, and one name for different sizes; inputs that are wrong otherwise are left out."""
    pairs: list[tuple[Input | Slot, GraphTensor | None]] = [*matching.inputs, *matching.slots]
    names: dict[str, list[str | None]] = defaultdict(list)
    meanings: dict[str, dict[str, str]] = defaultdict(dict)
    for want, each in pairs:
        if each is None or each.dims is None or each.name in wrong or len(each.dims) != len(want.shape):
            continue
        for declared, dim in zip(each.dims, want.shape, strict=True):
            if dim.symbol is not None and not isinstance(declared, int):
                names[str(dim)].append(declared)
                if declared is not None:
                    meanings[declared].setdefault(str(dim), each.name)
    for size, given in names.items():
        if len(set(given)) > 1 or given.count(None) > 1:
            texts = [f"`{name}`" if name else "unnamed" for name in dict.fromkeys(given)]
            more = ", …" if len(texts) > _SHOWN_NAMES else ""
            yield Mismatch("symbol", size, ", ".join(texts[:_SHOWN_NAMES]) + more, "one name for one size", cause=_TIED)
    for name, meant in meanings.items():
        if len(meant) > 1:
            told = ", ".join(f"{size} in {where}" for size, where in meant.items())
            yield Mismatch("symbol", name, told, "one size under one name", cause="TensorRT refuses inputs that differ there")


def size_faults(case: Case) -> Iterator[Mismatch]:
    """Sizes at which the graph cannot work; where one size was asked for, only whether it works there."""
    survey, asked, divisor = case.survey, case.asked, case.contract.divisor
    every = f"multiples of {divisor}" if divisor > 1 else "every latent size"
    fixed = {symbol: size for symbol, size in survey.fixed.items() if symbol != "tokens"}
    if asked is not None:
        fault = survey.fault(survey.pinned(asked))
        if others := {symbol: size for symbol, size in fixed.items() if size != asked.sizes[symbol]}:
            fault = f"the file fixes {_told(others)}"
        if fault:
            yield Mismatch("sizes", "sample", "does not work", "works", asked, cause=fault)
        return
    if fixed:
        cause = "exported without dynamic axes; --latent HxW checks this one size"
        yield Mismatch("sizes", "sample", f"{_told(fixed)} only", f"{every}, every batch", cause=cause)
    fault = survey.fault(survey.refused)
    if survey.divisor == 0:
        yield Mismatch("sizes", "sample", "no size that was tried works", every, survey.refused, cause=fault)
    elif survey.divisor > divisor:
        cause = f"{_TRACED}; {fault}"
        yield Mismatch("sizes", "sample", f"multiples of {survey.divisor} only", every, survey.refused, cause=cause)
    if other := survey.refused_batch:
        observed = f"fails at batch {other.batch} with {other.tokens} tokens"
        yield Mismatch("sizes", "sample", observed, "every batch and number of tokens", other, cause=survey.fault(other))


def _told(fixed: Mapping[str, int]) -> str:
    return ", ".join(f"{symbol}={size}" for symbol, size in fixed.items())
