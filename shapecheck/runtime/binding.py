"""Decide which calls a file serves and how each is bound. Plain values in and out: needs neither torch nor TensorRT."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from shapecheck.contract import Contract, ContractError, Dim, Geometry, Mismatch, Shape, ShapecheckError, show
from shapecheck.contract.geometry import AXES, USUAL_TOKENS
from shapecheck.contract.mismatch import compare_shapes, describe_axes
from shapecheck.contract.naming import match_residuals
from shapecheck.tensorrt.profiles import Profile, Range, choose_profile, explain_refusal, range_of, verify_profiles
from shapecheck.tensorrt.size_ranges import format_range

TensorForm = tuple[Shape, str, str]
"""A tensor before it is bound: shape, dtype, device."""
_Axes = tuple[tuple[str, int, int], ...]
"""The places to read one size from: input, axis, and the number of axes of that input."""
_ADVICE = {
    "missing": "without a ControlNet pass zeros for every slot: a slot that is left out is never assumed to be zero",
    "dtype": "nothing is converted on the way in: pass every tensor in the dtype of the graph, with tensor.to(dtype)",
    "device": "nothing is moved on the way in: pass every tensor on the device of the session, with tensor.to(device)",
}


@dataclass(frozen=True, slots=True)
class BoundCall:
    """The plan for calls of one geometry."""

    geometry: Geometry
    profile: int
    expected: Mapping[str, TensorForm]
    """The form that every input must have, by the contract's names and in its order."""
    inputs: Mapping[str, Shape]
    """The same shapes by the file's names."""
    outputs: Mapping[str, Shape]
    """Shapes of the outputs by the file's names; empty if the contract does not determine them."""


PlacedCall = tuple[BoundCall, tuple[int, ...]]
"""The plan for a call, and the addresses of its inputs, in the contract's order."""


class CallError(ContractError):
    """A call cannot be served, for all of these reasons.

    `mismatches` are with the contract; `refusals` say, input by input, why no profile serves the size.
    """

    def __init__(
        self, mismatches: tuple[Mismatch, ...], refusals: tuple[str, ...], advice: Sequence[str], *, contract: Contract
    ) -> None:
        super().__init__(mismatches, subject="this call cannot be served", contract=contract)
        self.refusals = refusals
        reasons = (*mismatches, *refusals)
        first = f"{self.subject}: {len(reasons)} reason{'s' if len(reasons) != 1 else ''}"
        self.args = ("\n".join([first, *(f"  {reason}" for reason in reasons), *advice]),)


class Binding:
    """The calls that one file serves on one device, such as `cuda:0`.

    `names` pairs the name of every input in the contract with that in the file; `outputs` are the file's names. `profiles`
    are the sizes that are served, None for every size of the contract. Raises ShapecheckError if these contradict one
    another: an input without a name or, unless `varied`, profiles that are not images of one range.
    """

    def __init__(
        self,
        contract: Contract,
        names: tuple[tuple[str, str], ...],
        outputs: tuple[str, ...],
        device: str,
        profiles: tuple[Profile, ...] | None = None,
        *,
        varied: bool = False,
    ) -> None:
        self.names = dict(names)
        if self.names.keys() != contract.input_rules.keys() or len(set(self.names.values())) != len(names):
            raise ShapecheckError("the engine's record does not name each input of its contract once; build the engine again")
        if profiles is not None and not varied:
            verify_profiles(contract, profiles)
        self._varied = varied
        self.contract, self._outputs, self._device, self._profiles = contract, outputs, device, profiles
        # for each symbol the axes that show it, base inputs first
        axes = [(name, axis, rule) for name, rule in contract.input_rules.items() for axis in range(len(rule))]
        self._axes: tuple[_Axes, ...] = tuple(
            tuple((name, axis, len(rule)) for name, axis, rule in axes if rule[axis] == Dim(symbol)) for symbol in AXES
        )
        self._bind_kept = lru_cache(64)(self._bind)

    def serve(self, tensors: Mapping[str, TensorForm]) -> BoundCall:
        """Return how a call with these tensors, by the contract's names, is served.

        Raises CallError with everything that is wrong: names, shapes, dtypes, devices, and sizes that no profile serves.
        """
        sizes = _read_sizes(self._axes, tensors)
        if sizes is not None and (call := self._bind_kept(sizes)) is not None and tensors == call.expected:
            return call
        raise self._explain_refusal(sizes, tensors)

    def addresses(self, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> dict[str, int]:
        """Return every address by the file's names; `inputs` are by the contract's names, `outputs` by the file's.

        Raises ShapecheckError if one is missing or is 0.
        """
        table = {self.names[name]: address for name, address in inputs.items()} | dict(outputs)
        names = (*self.names.values(), *self._outputs)
        if missing := [name for name in names if not table.get(name)]:
            raise ShapecheckError(f"no memory was given for {', '.join(missing)}")
        return {name: table[name] for name in names}

    def _bind(self, sizes: tuple[int, ...]) -> BoundCall | None:
        """Return how calls of these sizes are served; None if no profile serves them or the model refuses them."""
        contract, names = self.contract, self._outputs
        try:
            geometry = Geometry(*sizes)
            shapes = contract.input_shapes(geometry)
        except ShapecheckError:
            return None
        profile = choose_profile(self._profiles, shapes) if self._profiles is not None else 0
        if profile is None:
            return None

        outputs: dict[str, Shape] = {}
        if contract.role == "controlnet":
            residuals = contract.shapes(geometry)
            outputs = {theirs: residuals[slot] for slot, theirs in match_residuals(tuple(residuals), names).items()}
        elif len(names) == 1 and (channels := contract.config.get("out_channels")) is not None:
            outputs = {names[0]: (geometry.batch, channels, geometry.height, geometry.width)}

        dtypes = contract.input_dtypes
        expected = {name: (shape, dtypes[name], self._device) for name, shape in shapes.items()}
        return BoundCall(geometry, profile, expected, {self.names[name]: shape for name, shape in shapes.items()}, outputs)

    def _explain_refusal(self, sizes: tuple[int, ...] | None, tensors: Mapping[str, TensorForm]) -> CallError:
        """Return the error for a call that cannot be served: every reason at once, and what to do."""
        contract, rules = self.contract, self.contract.input_rules
        mismatches: list[Mismatch] = []
        refused: tuple[str, ...] = ()
        advice: list[str] = []
        try:
            geometry = Geometry(*sizes) if sizes is not None else None
            if geometry is not None:
                contract.require(geometry)
        except ShapecheckError as error:
            empty = [f"{name}: {show(shape)} given, which is empty" for name, (shape, _, _) in tensors.items() if 0 in shape]
            geometry, refused = None, tuple(empty or [str(error)])
        if geometry is not None:
            slots = contract.residuals if contract.role == "unet" else ()
            shapes = {name: tuple(shape) for name, (shape, _, _) in tensors.items() if name in rules}
            mismatches += compare_shapes(slots, geometry, shapes, inputs=contract.inputs)
            if self._profiles is not None:
                # a tensor of the wrong shape says nothing about the profiles
                wrong = {mismatch.where for mismatch in mismatches}
                refused = explain_refusal(self._profiles, {name: tensors[name][0] for name in rules if name not in wrong})
                advice += _advise_sizes(contract, self._profiles, geometry) if refused and not self._varied else ()
        mismatches += _compare_forms(contract, self._device, tensors, sized=geometry is not None)
        order = list(rules)
        mismatches.sort(key=lambda mismatch: order.index(mismatch.where))

        slot_names = {slot.name for slot in contract.residuals}
        kinds = {mismatch.kind for mismatch in mismatches if mismatch.kind != "missing" or mismatch.where in slot_names}
        advice += [text for kind, text in _ADVICE.items() if kind in kinds]
        contract_names = {theirs: ours for ours, theirs in self.names.items()}
        surplus = [name for name in tensors if name not in rules]
        for name in surplus:
            meant = [contract_names[name]] if name in contract_names else difflib.get_close_matches(name, rules, 1)
            cause = f"the name here is {meant[0]}" if meant else ""
            mismatches.append(Mismatch("surplus", name, tuple(tensors[name][0]), "no such input", cause=cause))
        if surplus:
            advice.append(f"the inputs are {', '.join(rules)}")
        return CallError(tuple(mismatches), refused, advice, contract=contract)


def _read_sizes(axes: Sequence[_Axes], tensors: Mapping[str, TensorForm]) -> tuple[int, ...] | None:
    """Return batch, latent height, latent width and tokens; None if one of them cannot be seen."""
    sizes = []
    for candidates in axes:
        for name, axis, rank in candidates:
            if (tensor := tensors.get(name)) is not None and len(tensor[0]) == rank:
                sizes.append(tensor[0][axis])
                break
        else:
            if candidates:
                return None
            sizes.append(USUAL_TOKENS)
    return tuple(sizes)


def _compare_forms(contract: Contract, device: str, tensors: Mapping[str, TensorForm], *, sized: bool) -> Iterator[Mismatch]:
    """Yield every wrong dtype and device and, if the call shows no size to compare shapes at, every missing input and rank."""
    producers, dtypes = {slot.name: slot.producer for slot in contract.residuals}, contract.input_dtypes
    for name, rule in contract.input_rules.items():
        if name not in tensors:
            if not sized:
                yield Mismatch("missing", name, "nothing", show(rule))
            continue
        shape, dtype, place = tensors[name]
        if not sized and len(shape) != len(rule):
            yield Mismatch("rank", name, tuple(shape), show(rule), cause=describe_axes(rule))
        if dtype != dtypes[name]:
            yield Mismatch("dtype", name, dtype, dtypes[name], unet_module=producers.get(name, ""))
        if place != device:
            yield Mismatch("device", name, f"a tensor on {place}", f"one on {device}")


def _advise_sizes(contract: Contract, profiles: Sequence[Profile], geometry: Geometry) -> Iterator[str]:
    """Yield what the profiles serve, the size nearest to this one, and the options that build an engine for this one."""

    def measure_distance(sizes: Range) -> float:
        pairs = zip(sizes.nearest(geometry).sizes.values(), geometry.sizes.values(), strict=True)
        return max(max(one / other, other / one) for one, other in pairs)

    ranges, factor = [range_of(contract, profile) for profile in profiles], contract.header.vae_factor
    for number, sizes in enumerate(ranges):
        yield f"profile {number}, in latent cells: {'; '.join(sizes.outside(geometry))}"
    best = min(ranges, key=measure_distance)
    nearest = best.nearest(geometry)
    tokens = f", {nearest.tokens} tokens" if nearest.tokens != geometry.tokens else ""
    yield f"the nearest size that is served: {nearest}{tokens} ({nearest.width * factor}×{nearest.height * factor} pixels)"
    yield f"or build for this one too: {format_range(best.with_(geometry), factor)}"
