"""The contract: the inputs and slots of one UNet. Everything downstream reads this and nothing else."""

from __future__ import annotations

import copyreg
import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shapecheck.contract.config import Config
from shapecheck.contract.dims import Dim, Shape
from shapecheck.contract.errors import ShapecheckError
from shapecheck.contract.geometry import Geometry
from shapecheck.contract.json_codec import OPTIONAL, POSITIVE, TextFormat, decode, decode_record, encode
from shapecheck.contract.mismatch import Port, compare_inputs, compare_shapes
from shapecheck.contract.naming import SHAPECHECK, detect_scheme, find_declared, name_residuals
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

    A ControlNet has one too if it is exported alone: its `role` says so, and its slots are the residuals it emits.
    Two contracts are equal, and share a digest, if class, inputs, slots, features, config, divisor and role agree;
    the header (where it came from, library versions) never counts.
    """

    class_name: str
    """Class of the UNet in diffusers, or of the ControlNet."""
    inputs: tuple[Input, ...]
    slots: tuple[Slot, ...]
    config: Config
    divisor: int = field(default=1, metadata=POSITIVE)
    """Latent height and width must be multiples of this; 1 if every size runs."""
    header: Header = field(default_factory=Header, compare=False)
    role: Role = "unet"
    features: tuple[Slot, ...] = field(default=(), metadata=OPTIONAL)
    """The slots of a T2I-Adapter's features, if one was observed."""

    @property
    def digest(self) -> str:
        """`sha256:…` over everything that counts in equality, the same on every machine.

        It covers the whole config: a diffusers release that adds a config key changes it.
        """
        text = json.dumps(self._to_record(compared=True), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @property
    def residuals(self) -> tuple[Slot, ...]:
        """Return everything the UNet adds: the slots of a ControlNet's residuals, then those of an adapter's features."""
        return self.slots + self.features

    @property
    def input_rules(self) -> dict[str, tuple[Dim, ...]]:
        """Return the shape of every input of the exported model, by name: base inputs, then a UNet's slots, then features."""
        rules = {entry.name: entry.shape for entry in self.inputs}
        return rules | {slot.name: slot.shape for slot in self.residuals} if self.role == "unet" else rules

    @property
    def dtype(self) -> str:
        """Return the dtype of the sample, and so of the residuals."""
        dtypes = {entry.name: entry.dtype for entry in self.inputs}
        return dtypes.get("sample") or next(iter(dtypes.values()), "float32")

    @property
    def input_dtypes(self) -> dict[str, str]:
        """Return the dtype of every input of the exported model, by name and in the order of `input_rules`."""
        dtypes = {entry.name: entry.dtype for entry in self.inputs}
        own = self.dtype
        return {name: dtypes.get(name, own) for name in self.input_rules}

    def with_dtypes(self, dtypes: Mapping[str, str]) -> Contract:
        """Return the contract with these dtypes of base inputs, by name: a model is exported in any precision."""
        return replace(self, inputs=tuple(replace(base, dtype=dtypes.get(base.name, base.dtype)) for base in self.inputs))

    def match_names(self, declared: Iterable[str]) -> dict[str, str]:
        """Return our name → the name in a file that declares these inputs: base inputs one by one, slots by one scheme."""
        declared = tuple(declared)
        names = {name: name for name in self.input_rules} | {
            base.name: find_declared(base.name, declared) for base in self.inputs
        }
        if self.role == "unet" and self.slots:
            scheme = detect_scheme(declared) or SHAPECHECK
            names |= zip((slot.name for slot in self.slots), scheme.names(len(self.slots) - 1), strict=True)
        return names

    def slot(self, name: str) -> Slot:
        """Return the slot of that name, of a residual or a feature. Raises ShapecheckError listing the known names."""
        slots = {slot.name: slot for slot in self.residuals}
        if name not in slots:
            raise ShapecheckError(f"no slot {name!r}; this contract has {', '.join(slots)}")
        return slots[name]

    def shapes(self, geometry: Geometry) -> dict[str, Shape]:
        """Return slot name → (batch, channels, height, width) of its residual, in slot order; sizes in slot cells.

        `feature_shapes` has the features of a T2I-Adapter. Raises ShapecheckError if the UNet refuses the geometry.
        """
        self.require(geometry)
        return {slot.name: slot.shape_at(geometry) for slot in self.slots}

    def feature_shapes(self, geometry: Geometry) -> dict[str, Shape]:
        """Return the shapes of a T2I-Adapter's features, one per down block, as `shapes` does; empty if none was observed."""
        self.require(geometry)
        return {slot.name: slot.shape_at(geometry) for slot in self.features}

    def input_shapes(self, geometry: Geometry) -> dict[str, Shape]:
        """Return the shape of every input of the exported model: base inputs first, then a UNet's slots, then features."""
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
        """Compare the inputs that a file or an engine declares with ours, as `mismatch.compare_inputs` does."""
        producers = {slot.name: slot.producer for slot in self.residuals}
        return compare_inputs(self.input_rules, self.input_dtypes, declared, names=names, producers=producers, present=present)

    def mismatches(self, shapes: Residuals, geometry: Geometry | None = None) -> tuple[Mismatch, ...]:
        """Return every disagreement between residuals and the slots; empty if all is well.

        `shapes` is a mapping by slot name, a ControlNet's result (its output or the pair (downs, mid)), or a flat
        sequence with mid last; each entry is a shape, anything that has one, or None for a residual that is not there.
        Without `geometry` batch, height and width are read off slot 0, whose stride is 1.
        Raises ShapecheckError if these are not shapes, or the UNet refuses the geometry.
        """
        actual = _parse_residuals(shapes)
        if geometry is None:
            name = self.slots[0].name if self.slots else "a contract without slots"
            if len(first := actual.get(name, ())) != 4:
                raise ShapecheckError(f"{name} gives no size to check against; pass geometry=Geometry(batch, height, width)")
            geometry = Geometry(first[0], *first[2:])
        self.require(geometry)
        return compare_shapes(self.slots, geometry, actual)

    def verify(self, shapes: Residuals, geometry: Geometry | None = None) -> None:
        """Raise ContractError with every mismatch, or return in silence."""
        if mismatches := self.mismatches(shapes, geometry):
            raise ContractError(mismatches, subject="the residuals do not fit this UNet", contract=self)

    def to_json(self) -> str:
        """Return the contract as JSON text, which `from_json` reads."""
        return json.dumps(self.to_value(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Read `to_json`'s text. Raises ShapecheckError on anything else, an edited file included."""
        return cls.from_value(_FORMAT.parse(text))

    def to_value(self) -> dict[str, Any]:
        """Return the contract as JSON values, which `from_value` reads."""
        identity = {_FORMAT.key: _FORMAT.schema, "digest": self.digest, "header": encode(self.header)}
        return identity | self._to_record(compared=False)

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
            stored = decode(str, record.get("digest"), "digest")
        except (ValueError, RecursionError) as error:
            raise ShapecheckError(f"a damaged contract: {error}") from None
        if contract.digest != stored:
            raise ShapecheckError(
                f"an edited contract: its digest is {stored}, its contents have {contract.digest}; probe the model again"
            )
        return contract

    def _to_record(self, *, compared: bool) -> dict[str, Any]:
        """Return all but the header as JSON values; with `compared`, only what counts in equality."""

        def encode_slot(slot: Slot) -> dict[str, Any]:
            record: dict[str, Any] = encode(slot, compared=compared)
            return {"name": slot.name, "channels": slot.channels, "stride": slot.stride} | record

        return {
            "class_name": self.class_name,
            "role": self.role,
            "divisor": self.divisor,
            "inputs": encode(self.inputs),
            "slots": [encode_slot(slot) for slot in self.slots],
            **({"features": [encode_slot(slot) for slot in self.features]} if self.features else {}),
            "config": self.config.to_json(),
        }


class ContractError(ShapecheckError):
    """The shapes disagree: `mismatches` holds every disagreement, and `contract` is the UNet's, if it is known."""

    exit_status = 1

    def __init__(self, mismatches: tuple[Mismatch, ...], *, subject: str, contract: Contract | None = None) -> None:
        self.mismatches = mismatches
        self.subject = subject
        self.contract = contract
        count = f"{len(mismatches)} mismatch{'es' if len(mismatches) != 1 else ''}"
        super().__init__("\n".join([f"{subject}: {count}", *(f"  {mismatch}" for mismatch in mismatches)]))

    def __reduce__(self) -> tuple[Any, ...]:
        # copied and pickled whole, subclasses too: an exception is otherwise made again from its text alone
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


def _parse_residuals(shapes: Residuals) -> dict[str, Shape]:
    """Return slot name → shape, from any of the forms that `Contract.mismatches` takes."""
    if (downs := getattr(shapes, "down_block_res_samples", None)) is not None:  # diffusers' output, which is a mapping too
        if not isinstance(downs, (list, tuple)):
            raise ShapecheckError(f"down_block_res_samples: expected a list of tensors, got {type(downs).__name__}")
        named: Mapping[str, Any] = name_residuals(shapes)
    elif isinstance(shapes, Mapping):
        named = shapes
    elif isinstance(shapes, (list, tuple)):
        # two entries are (downs, mid), unless the first is a shape: then they are two shapes in a row
        first = shapes[0] if len(shapes) == 2 else False
        pair = first is None or isinstance(first, (list, tuple))
        if isinstance(first, (list, tuple)) and first:
            pair = not all(hasattr(size, "__index__") and not getattr(size, "shape", ()) for size in first)
        downs, mid = shapes if pair else (shapes[:-1], shapes[-1] if shapes else None)
        named = name_residuals((downs or (), mid))
    else:
        raise ShapecheckError(
            f"residuals are passed by slot name, as (downs, mid), or in a list with the mid residual last, "
            f"not as {type(shapes).__name__}"
        )
    parsed = {}
    for name, value in named.items():
        if value is not None:
            try:
                parsed[name] = tuple(map(operator.index, getattr(value, "shape", value)))
            except TypeError:
                raise ShapecheckError(
                    f"{name}: expected a tensor or a shape such as (2, 320, 64, 64), got {value!r:.60}"
                ) from None
    return parsed
