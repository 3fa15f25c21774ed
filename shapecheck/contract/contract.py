"""The contract: what one UNet takes, slot by slot. Everything downstream reads this and nothing else."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shapecheck.contract.config import Config
from shapecheck.contract.dims import Dim, Shape
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.json_codec import OPTIONAL, POSITIVE, TextFormat, decode, decode_record, encode
from shapecheck.contract.mismatch import Port, compare_inputs, compare_shapes
from shapecheck.contract.naming import SHAPECHECK, detect_scheme, name_residuals
from shapecheck.contract.records import Header, Input, Mismatch, Role, Slot

_FORMAT = TextFormat(
    "shapecheck_contract",
    "a contract",
    writer="`shapecheck probe MODEL --format json`",
    remedy="probe the model again",
    largest=4 * 2**20,
)


Residuals = Mapping[str, Any] | Sequence[Any] | Any
"""By slot name, as the pair (downs, mid), flat with mid last, or as diffusers' ControlNetOutput."""


@dataclass(frozen=True, slots=True)
class Contract:
    """Base inputs, slots and identity of a UNet, as observed.

    A ControlNet has one too, where it is exported alone: its `role` says so, and its slots are what it emits.
    Two contracts are equal, and share a digest, when class, inputs, slots, features, config, divisor and role agree;
    the header (where it came from, library versions) never counts.
    """

    class_name: str
    """Class of the UNet in diffusers, or of the ControlNet."""
    inputs: tuple[Input, ...]
    slots: tuple[Slot, ...]
    config: Config
    divisor: int = field(default=1, metadata=POSITIVE)
    """Latent height and width must be multiples of this; 1 where every size runs."""
    header: Header = field(default_factory=Header, compare=False)
    role: Role = "unet"
    features: tuple[Slot, ...] = field(default=(), metadata=OPTIONAL)
    """Where a T2I-Adapter's features are added, if one was observed."""

    @property
    def digest(self) -> str:
        """`sha256:…` over everything that counts in equality, the same on every machine.

        It covers the whole config: a diffusers release that adds a config key changes it.
        """
        text = json.dumps(self._to_record(compared=True), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def residuals(self) -> tuple[Slot, ...]:
        """Everything the UNet adds: the slots of a ControlNet's residuals, then those of an adapter's features."""
        return self.slots + self.features

    @property
    def input_rules(self) -> dict[str, tuple[Dim, ...]]:
        """The shape of every input the exported model has, by name: base inputs, then a UNet's slots, then features."""
        rules = {each.name: each.shape for each in self.inputs}
        return rules | {slot.name: slot.shape for slot in self.residuals} if self.role == "unet" else rules

    @property
    def dtype(self) -> str:
        """The dtype of the sample, and so of the residuals."""
        dtypes = {each.name: each.dtype for each in self.inputs}
        return dtypes.get("sample") or next(iter(dtypes.values()), "float32")

    @property
    def input_dtypes(self) -> dict[str, str]:
        """The dtype of every input the exported model has, by name and in the order of `input_rules`."""
        dtypes = {each.name: each.dtype for each in self.inputs}
        return {name: dtypes.get(name, self.dtype) for name in self.input_rules}

    def match_names(self, declared: Iterable[str]) -> dict[str, str]:
        """Return what a file that declares these inputs calls each of ours: base inputs as we do, slots by its own scheme."""
        names = {name: name for name in self.input_rules}
        if self.role == "unet" and self.slots:
            scheme = detect_scheme(declared) or SHAPECHECK
            names |= zip((slot.name for slot in self.slots), scheme.names(len(self.slots) - 1), strict=True)
        return names

    def slot(self, name: str) -> Slot:
        """The slot of that name, of a residual or a feature. Raises ShapecheckError listing the known names."""
        for slot in self.residuals:
            if slot.name == name:
                return slot
        raise ShapecheckError(f"no slot {name!r}; this contract has {', '.join(slot.name for slot in self.residuals)}")

    def shapes(self, geometry: Geometry) -> dict[str, Shape]:
        """Slot name → (batch, channels, height, width) of its residual, in slot order; sizes in slot cells.

        Without a T2I-Adapter's features, which `feature_shapes` gives. Raises ShapecheckError where the UNet refuses the
        geometry.
        """
        self.require(geometry)
        return {slot.name: slot.shape_at(geometry) for slot in self.slots}

    def feature_shapes(self, geometry: Geometry) -> dict[str, Shape]:
        """The same of a T2I-Adapter's features, one a down block; empty where none was observed."""
        self.require(geometry)
        return {slot.name: slot.shape_at(geometry) for slot in self.features}

    def input_shapes(self, geometry: Geometry) -> dict[str, Shape]:
        """The shape of every input the exported model has: base inputs first, then a UNet's slots, then features."""
        self.require(geometry)
        return {name: geometry.shape_of(rule) for name, rule in self.input_rules.items()}

    def require(self, geometry: Geometry) -> None:
        """Raise ShapecheckError unless the UNet accepts this geometry."""
        if geometry.height % self.divisor or geometry.width % self.divisor:
            raise ShapecheckError(
                f"this UNet refuses latents of {geometry.height}×{geometry.width}: both must be multiples of {self.divisor}"
            )

    def compare_inputs(
        self, declared: Iterable[Port], names: Mapping[str, str] | None = None, *, present: str = ""
    ) -> tuple[Mismatch, ...]:
        """Return everything in which the inputs that a file or an engine declares are not ours; `names` is what it calls them.

        `present` is how to tell of one that it has besides; without it the shape is told.
        """
        producers = {slot.name: slot.producer for slot in self.residuals}
        return compare_inputs(self.input_rules, self.input_dtypes, declared, names=names, producers=producers, present=present)

    def mismatches(self, shapes: Residuals, geometry: Geometry | None = None) -> tuple[Mismatch, ...]:
        """Every disagreement between given residuals and the slots; empty when all is well.

        `shapes` is a mapping by slot name, what a ControlNet returns (its output or the pair (downs, mid)), or a flat
        sequence with mid last; each entry is a shape, anything that has one, or None for a residual that is not there.
        Without `geometry` batch, height and width are read off slot 0, whose stride is 1.
        Raises ShapecheckError where these are no shapes, or the UNet refuses the geometry.
        """
        given = _by_name(shapes)
        at = geometry or self._geometry_of(given)
        self.require(at)
        return compare_shapes(self.slots, at, given)

    def verify(self, shapes: Residuals, geometry: Geometry | None = None) -> None:
        """Raise ContractError with every mismatch, or return in silence."""
        if found := self.mismatches(shapes, geometry):
            raise ContractError(found, subject="the residuals do not fit this UNet", contract=self)

    def to_json(self) -> str:
        """Return the contract as JSON text, which `from_json` reads."""
        return json.dumps(self.to_value(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Read `to_json`'s text. Raises ShapecheckError on anything else, an edited file included."""
        return cls.from_value(_FORMAT.parse(text))

    def to_value(self) -> dict[str, Any]:
        """Return the contract as JSON values, which `from_value` reads."""
        start = {_FORMAT.key: _FORMAT.schema, "digest": self.digest, "header": encode(self.header)}
        return start | self._to_record(compared=False)

    @classmethod
    def from_value(cls, value: Any) -> Contract:
        """Read `to_value`'s values. Raises ShapecheckError on anything else, an edited contract included."""
        record = _FORMAT.check(value)
        try:
            contract: Contract = decode_record(cls, record)
            for slot, entry in zip(contract.residuals, [*record["slots"], *record.get("features", ())], strict=True):
                if len(slot.skip) != 4 or slot.skip[1].symbol is not None:
                    raise ValueError(f"slot {slot.name}: a skip is (batch, channels, height, width), got {entry['skip']}")
                stated = [decode(int, entry.get(key), f"slot {slot.name}: {key}") for key in ("channels", "stride")]
                if stated != [slot.channels, slot.stride]:
                    raise ValueError(f"slot {slot.name}: channels and stride do not agree with its shape {entry['skip']}")
            claimed = decode(str, record.get("digest"), "digest")
        except (ValueError, RecursionError) as error:
            raise ShapecheckError(f"a damaged contract: {error}") from None
        if contract.digest != claimed:
            raise ShapecheckError(
                f"an edited contract: its digest says {claimed}, its contents give {contract.digest}; probe the model again"
            )
        return contract

    def _to_record(self, *, compared: bool) -> dict[str, Any]:
        """Return all but the header as JSON values; with `compared`, only what counts in equality."""
        slots, features = (
            [
                {"name": slot.name, "channels": slot.channels, "stride": slot.stride} | encode(slot, compared=compared)
                for slot in slots
            ]
            for slots in (self.slots, self.features)
        )
        return {
            "class_name": self.class_name,
            "role": self.role,
            "divisor": self.divisor,
            "inputs": encode(self.inputs),
            "slots": slots,
            **({"features": features} if features else {}),
            "config": self.config.to_json(),
        }

    def _geometry_of(self, given: Mapping[str, Shape]) -> Geometry:
        name = self.slots[0].name if self.slots else "a contract without slots"
        first = given.get(name, ())
        if len(first) != 4:
            raise ShapecheckError(f"{name} gives no size to check against; pass geometry=Geometry(batch, height, width)")
        batch, _, height, width = first
        return Geometry(batch, height, width)


class ContractError(ShapecheckError):
    """The shapes disagree. `mismatches` holds every disagreement, never only the first.

    `contract` is what the UNet wants, where that could be learnt.
    """

    exit_status = 1

    def __init__(self, mismatches: tuple[Mismatch, ...], *, subject: str, contract: Contract | None = None) -> None:
        self.mismatches = mismatches
        self.subject = subject
        self.contract = contract
        count = f"{len(mismatches)} mismatch{'es' if len(mismatches) != 1 else ''}"
        super().__init__("\n".join([f"{subject}: {count}", *(f"  {each}" for each in mismatches)]))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled whole, subclasses too: an exception is otherwise made again from its text alone."""
        return _made_again, (type(self), self.args), self.__dict__


def _made_again(kind: type[ContractError], args: tuple[Any, ...]) -> ContractError:
    """One with this text; copy and pickle then give it its attributes."""
    return kind.__new__(kind, *args)


def _by_name(shapes: Residuals) -> dict[str, Shape]:
    """Slot name → shape, from any of the forms `Contract.mismatches` takes."""
    if getattr(shapes, "down_block_res_samples", None) is not None:  # which is a mapping too
        shapes = name_residuals(shapes)
    named = shapes if isinstance(shapes, Mapping) else _named(shapes)
    return {name: _shape(name, value) for name, value in named.items() if value is not None}


def _named(shapes: Any) -> dict[str, Any]:
    if not isinstance(shapes, (list, tuple)):
        raise ShapecheckError(
            "residuals are given by slot name, as (downs, mid), or in a list with the mid residual last, "
            f"not as {type(shapes).__name__}"
        )
    downs, mid = shapes if _is_pair(shapes) else (shapes[:-1], shapes[-1] if shapes else None)
    return name_residuals((downs or (), mid))


def _is_pair(shapes: Sequence[Any]) -> bool:
    """Whether these are (downs, mid) rather than two shapes in a row."""
    if len(shapes) != 2 or not (shapes[0] is None or isinstance(shapes[0], (list, tuple))):
        return False
    return not shapes[0] or not all(map(_is_size, shapes[0]))


def _is_size(value: Any) -> bool:
    return hasattr(value, "__index__") and not getattr(value, "shape", ())


def _shape(name: str, value: Any) -> Shape:
    """The shape of a tensor, or a shape given as such."""
    sizes = getattr(value, "shape", value)
    try:
        return tuple(map(operator.index, sizes))
    except TypeError:
        raise ShapecheckError(f"{name}: expected a tensor or a shape such as (2, 320, 64, 64), got {value!r:.60}") from None
