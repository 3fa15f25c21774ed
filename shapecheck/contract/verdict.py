"""How far one tensor is from the reference: numbers, and what was allowed; never a bare bool."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shapecheck.contract.dims import Shape, show


@dataclass(frozen=True, slots=True)
class Worst:
    """The value that is furthest from the reference."""

    index: tuple[int, ...]
    found: float
    expected: float
    difference: float
    """Absolute, or as a share of the expected value's magnitude."""


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
    """None where nothing could be compared."""
    relative: Worst | None = None
    rms: float = math.nan
    """Root mean square of the differences."""
    outside: int = 0
    """How many values differ by more than is allowed, those that are no finite numbers included."""
    nan: int = 0
    """How many values are not a number where the reference is one."""
    inf: int = 0
    """How many values are infinite where the reference is finite."""
    cosine: float = math.nan
    psnr: float = math.nan
    """Peak signal-to-noise ratio in dB, the peak being `scale`; infinite where nothing differs."""
    fault: str = ""
    """Why nothing could be compared, such as another shape."""

    @property
    def passes(self) -> bool:
        """Whether every value is finite and as near as is allowed."""
        return not self.fault and math.isfinite(self.allowed) and self.outside == 0 and self.nan == 0 and self.inf == 0

    @property
    def count(self) -> int:
        """How many values there are."""
        return math.prod(self.shape)

    @property
    def share(self) -> float:
        """The share of values outside of what is allowed, 0 to 1."""
        return self.outside / self.count if self.count else 0.0

    def __str__(self) -> str:
        if self.fault:
            return self.fault
        told = []
        if self.nan or self.inf:
            told.append(f"{self.nan} NaN and {self.inf} Inf among {self.count} values")
        if self.absolute is not None:
            worst = self.absolute
            told.append(
                f"largest difference {worst.difference:.2e} at {list(worst.index)} "
                f"({worst.found:.6g} for {worst.expected:.6g}), {self.allowed:.2e} allowed; "
                f"{self.outside} of {self.count} values outside ({self.share:.1%})"
            )
        return "; ".join(told) or f"nothing to compare in {show(self.shape)}"
