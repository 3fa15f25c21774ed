"""The records of a parity run: numbers and names, no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from shapecheck.contract.contract import Contract
from shapecheck.contract.dims import Shape, show
from shapecheck.contract.geometry import Geometry

CheckKind = Literal["provider", "contract", "weights", "precision", "input", "slot", "cfg", "switch", "case", "rounding"]
"""The subject of a check: what really runs; whether the file is of that contract; whose weights it has; the precision in which
it computes; one base input; one slot; the halves of a batch kept apart; control switched within one session; the output at one
size, with control on or off; the errors of all those outputs together, in a half precision. In this order: an earlier one
explains later ones."""
KINDS: tuple[CheckKind, ...] = get_args(CheckKind)
Status = Literal["passed", "failed", "not run"]
Grid = tuple[tuple[float, ...], ...]
"""Rows of numbers from 0 to 1: a picture of at most 8×8 cells."""


@dataclass(frozen=True, slots=True)
class Worst:
    """The value that is furthest from the reference; `difference` is absolute, or a share of the expected magnitude."""

    index: tuple[int, ...]
    found: float
    expected: float
    difference: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """One tensor beside the reference's, value by value; all differences were computed in float64."""

    shape: Shape
    allowed: float
    """The largest absolute difference that passes."""
    own: float
    """The largest absolute difference of PyTorch itself from the reference, in the same precision."""
    scale: float
    """The largest magnitude in the reference."""
    absolute: Worst | None = None
    """None if nothing could be compared."""
    relative: Worst | None = None
    rms: float = math.nan
    """Root mean square of the differences."""
    outside: int = 0
    """The number of values that differ by more than is allowed or are not finite."""
    nan: int = 0
    inf: int = 0
    cosine: float = math.nan
    psnr: float = math.nan
    """Peak signal-to-noise ratio in dB, the peak being `scale`; infinite if nothing differs."""
    fault: str = ""
    """The reason why nothing could be compared, such as another shape."""

    @property
    def passes(self) -> bool:
        return not self.fault and math.isfinite(self.allowed) and self.outside == 0 and self.nan == 0 and self.inf == 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def excess(self) -> float:
        """Return the largest difference as a multiple of what is allowed; infinity if nothing is."""
        difference = self.absolute.difference if self.absolute else math.inf
        return difference / self.allowed if self.allowed > 0 else math.inf

    @property
    def share(self) -> float:
        """Return the share of values that are outside of what is allowed, 0 to 1."""
        return self.outside / self.count if self.count else 0.0

    def __str__(self) -> str:
        if self.fault:
            return self.fault
        parts = [f"{self.nan} NaN and {self.inf} Inf among {self.count} values"] if self.nan or self.inf else []
        if worst := self.absolute:
            parts.append(
                f"largest difference {worst.difference:.2e} at {list(worst.index)} "
                f"({worst.found:.6g} for {worst.expected:.6g}), {self.allowed:.2e} allowed; "
                f"{self.outside} of {self.count} values outside ({self.share:.1%})"
            )
        return "; ".join(parts) or f"nothing to compare in {show(self.shape)}"


@dataclass(frozen=True, slots=True)
class Ran:
    """The runner that really ran, whatever was requested."""

    backend: str
    """As requested: a key of `doctor.environment.BACKENDS`."""
    provider: str
    """`CPUExecutionProvider`, `eager`, `TensorRT`."""
    device: str
    precision: str
    """The dtype of the artefact's graph."""
    detail: str
    """Versions, and whether TF32 was off."""

    def __str__(self) -> str:
        return f"{self.provider} on {self.device}, {self.precision}, {self.detail}"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to prove of one backend; `where` is the slot or input, or the case in words."""

    backend: str
    kind: CheckKind
    where: str

    def __str__(self) -> str:
        return f"{self.backend}/{self.kind}[{self.where}]" if self.where else f"{self.backend}/{self.kind}"


@dataclass(frozen=True, slots=True)
class Effect:
    """The change of the output when one input is perturbed, beside PyTorch's change."""

    strength: float
    """The change as a share of PyTorch's, along it: 1 is right, 0 is no effect."""
    cosine: float
    """Between the two changes: 1 is the same direction."""
    size: float
    """The largest change in PyTorch, as a share of the largest output."""
    expected: Grid
    found: Grid
    """PyTorch's fingerprint, and the backend's: the change's magnitude over height and width, the largest cell 1."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """The errors of one output in all calls together beside PyTorch's own in the same precision.

    Root mean squares; each row of a batch is counted as a share of its largest value.
    """

    found: float
    own: float
    allowed: float
    calls: int

    @property
    def passes(self) -> bool:
        return self.found <= self.allowed

    @property
    def times_own(self) -> float:
        return self.found / self.own if self.own else math.nan


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a check."""

    check: Check
    status: Status
    reason: str = ""
    """Empty if it passed; one or two sentences that name slot, input or case."""
    geometry: Geometry | None = None
    verdict: Verdict | None = None
    effect: Effect | None = None
    seconds: float = 0.0
    """The duration of the backend's call that was judged; 0 if there was none."""
    rounding: Rounding | None = None


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first of the contract's own values that leaves tolerance, in the order in which the UNet computes them."""

    value: str
    """Its name in the ONNX file."""
    module: str
    """Path of the PyTorch module that computes it."""
    slot: str
    """The slot whose skip or sum it is, if any."""
    verdict: Verdict
    agreed: tuple[str, ...]
    """The values before it, all of which agree."""
    command: str
    """A Polygraphy command that shows the same; empty if there is none."""
    note: str = ""
    """The file in which it was found, if that is not the artefact itself."""


@dataclass(frozen=True, slots=True)
class Side:
    """One backend of a run; `ran` is None if it could not run."""

    backend: str
    artefact: str
    ran: Ran | None
    results: tuple[Result, ...]
    divergence: Divergence | None = None
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.status == "failed")


@dataclass(frozen=True, slots=True)
class Parity:
    """A whole run: one model, one or more backends."""

    model: str
    contract: Contract
    reference: str
    """The precision of PyTorch's reference, and where it ran: `PyTorch float64 on cpu`."""
    times_own: float
    """A backend may be this many times as far from the reference as PyTorch is in the same precision."""
    seed: int
    geometries: tuple[Geometry, ...]
    sides: tuple[Side, ...]
    versions: tuple[tuple[str, str], ...]
    least_psnr: float | None = None
    """With layers in fp8: the least PSNR of an output in dB, and PyTorch's own error is that of the same layers in fp8."""
    requested: str = ""
    """The model as it was requested, to be typed again; empty for a live one."""

    @property
    def passes(self) -> bool:
        """Return whether something was checked on every backend and nothing failed."""
        return bool(self.sides) and all(
            any(result.status == "passed" for result in side.results) and not side.failed for side in self.sides
        )

    @property
    def verdict(self) -> str:
        return "PARITY" if self.passes else "BROKEN"

    @property
    def unjudged(self) -> int:
        """Return the number of checks that were not made."""
        return sum(result.status == "not run" for side in self.sides for result in side.results)

    def __str__(self) -> str:
        wrong = [f"  {result.check}: {result.reason}" for side in self.sides for result in side.failed]
        unjudged = f", {self.unjudged} checks not judged" if self.unjudged else ""
        return "\n".join([f"{self.verdict}: {self.model}{unjudged}", *wrong])
