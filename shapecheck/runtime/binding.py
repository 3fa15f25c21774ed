"""Which calls a file takes, and how each is bound. Plain values in and out: needs neither torch nor TensorRT."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

from shapecheck.contract import Contract, ContractError, Dim, Geometry, Mismatch, Shape, ShapecheckError, show
from shapecheck.contract.geometry import AXES, USUAL_TOKENS
from shapecheck.contract.mismatch import compare, tell_axes
from shapecheck.tensorrt import profile_check
from shapecheck.tensorrt.profiles import Profile, choose, range_of, refusals
from shapecheck.tensorrt.size_ranges import written

TensorForm = tuple[Shape, str, str]
"""A tensor as it is before it is bound: shape, dtype, device."""


_KEPT = 64
"""Geometries whose shapes are remembered."""


_Places = tuple[tuple[str, int, int], ...]
"""Where a size is read off: input, axis, and how many axes that input has."""


class Servable(Protocol):
    """What a file takes: an engine's record is one."""

    @property
    def contract(self) -> Contract:
        """Of the model in it."""

    @property
    def profiles(self) -> tuple[Profile, ...] | None:
        """The sizes it takes; None where it takes every size of its contract."""

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """Every input: its name in the contract, and in the file."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """By the file's names."""


@dataclass(frozen=True, slots=True)
class UnboundedSizes:
    """A file that takes every size of its contract."""

    contract: Contract
    names: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    profiles: None = None


@dataclass(frozen=True, slots=True)
class BoundCall:
    """How calls of one geometry are served."""

    geometry: Geometry
    profile: int
    given: Mapping[str, TensorForm]
    """What every input has to be, by the contract's names and in its order."""
    inputs: Mapping[str, Shape]
    """The same shapes by the file's names."""
    outputs: Mapping[str, Shape]
    """Shapes of the outputs by the file's names, where the contract tells them; else empty."""


class CallError(ContractError):
    """A call cannot be served, for all of these reasons.

    `mismatches` are with the contract; `refusals` say, input by input, why no profile takes the size.
    """

    def __init__(
        self, mismatches: tuple[Mismatch, ...], refusals: tuple[str, ...], advice: Sequence[str], *, contract: Contract
    ) -> None:
        super().__init__(mismatches, subject="this call cannot be served", contract=contract)
        self.refusals = refusals
        count = len(mismatches) + len(refusals)
        first = f"{self.subject}: {count} reason{'s' if count != 1 else ''}"
        self.args = ("\n".join([first, *(f"  {each}" for each in (*mismatches, *refusals)), *advice]),)


class Binding:
    """The calls that one file takes on one device, such as `cuda:0`.

    Raises ShapecheckError where what it takes contradicts itself: an input without a name, profiles that are not
    images of one range.
    """

    def __init__(self, taken: Servable, device: str) -> None:
        names, rules = dict(taken.names), taken.contract.input_rules
        if names.keys() != rules.keys() or len(set(names.values())) != len(taken.names):
            raise ShapecheckError("the engine's record does not name each input of its contract once; build the engine again")
        if taken.profiles is not None:
            profile_check.verify(taken.contract, taken.profiles)
        self._taken, self._device, self._names = taken, device, names
        self._places = _places(rules)
        self._at = lru_cache(_KEPT)(partial(serving_at, taken, device))

    def serve(self, given: Mapping[str, TensorForm]) -> BoundCall:
        """How a call is served. `given` is by the contract's names.

        Raises CallError with everything that is wrong: names, shapes, dtypes, devices, and sizes that no profile takes.
        """
        sizes = _sizes(self._places, given)
        if sizes is not None and (found := self._at(sizes)) is not None and given == found.given:
            return found
        raise refusal(self._taken, self._device, given)

    def addresses(self, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> dict[str, int]:
        """Where every tensor lies, by the file's names. `inputs` are by the contract's names, `outputs` by the file's.

        Raises ShapecheckError where one is missing or lies nowhere.
        """
        table = {self._names[name]: address for name, address in inputs.items()} | dict(outputs)
        wanted = (*self._names.values(), *self._taken.outputs)
        if lost := [name for name in wanted if not table.get(name)]:
            raise ShapecheckError(f"no memory was given for {', '.join(lost)}")
        return {name: table[name] for name in wanted}


def serving_at(taken: Servable, device: str, sizes: tuple[int, ...]) -> BoundCall | None:
    """How calls of these sizes (batch, latent height, latent width, tokens) are served; None where nothing serves them."""
    contract = taken.contract
    try:
        geometry = Geometry(*sizes)
        shapes = contract.input_shapes(geometry)
    except ShapecheckError:
        return None
    profile = choose(taken.profiles, shapes) if taken.profiles is not None else 0
    if profile is None:
        return None
    dtypes, names = contract.input_dtypes, dict(taken.names)
    return BoundCall(
        geometry,
        profile,
        given={name: (shape, dtypes[name], device) for name, shape in shapes.items()},
        inputs={names[name]: shape for name, shape in shapes.items()},
        outputs=_outputs(taken, geometry),
    )


def refusal(taken: Servable, device: str, given: Mapping[str, TensorForm]) -> CallError:
    """What to raise for a call that cannot be served: every reason at once, and what to do."""
    contract = taken.contract
    rules = contract.input_rules
    sizes = _sizes(_places(rules), given)
    found: list[Mismatch] = []
    refused: tuple[str, ...] = ()
    advice: list[str] = []
    try:
        geometry = Geometry(*sizes) if sizes is not None else None
        if geometry is not None:
            contract.require(geometry)
    except ShapecheckError as error:
        empty = [f"{name}: {show(shape)} given, which is empty" for name, (shape, _, _) in given.items() if 0 in shape]
        geometry, refused = None, tuple(empty or [str(error)])
    if geometry is None:
        found += _unplaced(rules, given)
    else:
        slots = contract.residuals if contract.role == "unet" else ()
        shapes = {name: tuple(shape) for name, (shape, _, _) in given.items() if name in rules}
        found += compare(slots, geometry, shapes, inputs=contract.inputs)
        wrong = {each.where for each in found}
        shapes = {name: given[name][0] for name in rules if name not in wrong}
        refused = refusals(taken.profiles, shapes) if taken.profiles is not None else ()
        advice += _sizes_advice(taken, geometry) if refused else ()
    found += _of_another_kind(contract, device, given)
    order = {name: place for place, name in enumerate(rules)}
    found.sort(key=lambda each: order[each.where])
    found += _unknown(taken, given)
    return CallError(tuple(found), refused, [*advice, *_advice(contract, found)], contract=contract)


def _places(rules: Mapping[str, tuple[Dim, ...]]) -> tuple[_Places, ...]:
    """For each symbol, the axes that show it, base inputs first."""
    shown = [(name, axis, rule) for name, rule in rules.items() for axis in range(len(rule))]
    return tuple(tuple((name, axis, len(rule)) for name, axis, rule in shown if rule[axis] == Dim(symbol)) for symbol in AXES)


def _sizes(places: Sequence[_Places], given: Mapping[str, TensorForm]) -> tuple[int, ...] | None:
    """The size of each symbol; None where one is nowhere to be seen."""
    sizes = []
    for candidates in places:
        for name, axis, rank in candidates:
            if (each := given.get(name)) is not None and len(each[0]) == rank:
                sizes.append(each[0][axis])
                break
        else:
            if candidates:
                return None
            sizes.append(USUAL_TOKENS)
    return tuple(sizes)


def _outputs(taken: Servable, geometry: Geometry) -> dict[str, Shape]:
    contract = taken.contract
    if contract.role == "controlnet":
        shapes = contract.shapes(geometry)
        return {name: shapes[name] for name in taken.outputs} if shapes.keys() == set(taken.outputs) else {}
    channels = contract.config.get("out_channels")
    if len(taken.outputs) != 1 or channels is None:
        return {}
    return {taken.outputs[0]: (geometry.batch, channels, geometry.height, geometry.width)}


def _unplaced(rules: Mapping[str, tuple[Dim, ...]], given: Mapping[str, TensorForm]) -> Iterator[Mismatch]:
    """What can be said of the shapes where they show no size."""
    for name, rule in rules.items():
        if name not in given:
            yield Mismatch("missing", name, "nothing", show(rule))
        elif len(given[name][0]) != len(rule):
            yield Mismatch("rank", name, tuple(given[name][0]), show(rule), cause=tell_axes(rule))


def _of_another_kind(contract: Contract, device: str, given: Mapping[str, TensorForm]) -> Iterator[Mismatch]:
    """Tensors of another dtype, or that lie on another device."""
    producers = {slot.name: slot.producer for slot in contract.residuals}
    for name, wanted in contract.input_dtypes.items():
        if name not in given:
            continue
        _, dtype, place = given[name]
        if dtype != wanted:
            yield Mismatch("dtype", name, dtype, wanted, unet_module=producers.get(name, ""))
        if place != device:
            yield Mismatch("device", name, f"a tensor on {place}", f"one on {device}")


def _unknown(taken: Servable, given: Mapping[str, TensorForm]) -> Iterator[Mismatch]:
    known = taken.contract.input_rules
    theirs = {engine: name for name, engine in taken.names if name != engine}
    for name, (shape, _, _) in given.items():
        if name not in known:
            meant = [theirs[name]] if name in theirs else difflib.get_close_matches(name, known, 1)
            cause = f"the name here is {meant[0]}" if meant else ""
            yield Mismatch("surplus", name, tuple(shape), "no such input", cause=cause)


def _advice(contract: Contract, found: Sequence[Mismatch]) -> Iterator[str]:
    """What to do about disagreements with the contract, a line for each sort of them."""
    seen, slots = {each.kind for each in found}, {slot.name for slot in contract.residuals}
    if any(each.kind == "missing" and each.where in slots for each in found):
        yield "without a ControlNet give zeros for every slot: a slot that is left out is never taken for zero"
    if "dtype" in seen:
        yield "nothing is converted on the way in: give every tensor in the dtype of the graph, with tensor.to(dtype)"
    if "device" in seen:
        yield "nothing is moved on the way in: give every tensor where the session runs, with tensor.to(device)"
    if "surplus" in seen:
        yield f"the inputs are {', '.join(contract.input_rules)}"


def _sizes_advice(taken: Servable, geometry: Geometry) -> Iterator[str]:
    """What the profiles take, the size nearest to the one that was wanted, and how to get an engine for that one."""
    contract = taken.contract
    ranges = [range_of(contract, profile) for profile in taken.profiles or ()]
    for number, each in enumerate(ranges):
        yield f"profile {number}, in latent cells: {'; '.join(each.outside(geometry))}"
    best = min(ranges, key=lambda each: _distance(each.nearest(geometry), geometry))
    nearest, factor = best.nearest(geometry), contract.header.vae_factor
    tokens = f", {nearest.tokens} tokens" if nearest.tokens != geometry.tokens else ""
    yield f"the nearest size it takes: {nearest}{tokens} ({nearest.width * factor}×{nearest.height * factor} pixels)"
    yield f"or build for this one too: {written(best.with_(geometry), factor)}"


def _distance(one: Geometry, other: Geometry) -> float:
    """The largest ratio between two sizes of the same symbol."""
    return max(max(a / b, b / a) for a, b in zip(one.sizes.values(), other.sizes.values(), strict=True))
