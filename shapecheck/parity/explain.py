"""One output of a backend beside PyTorch's, and why it is wrong: what wrong calls share, and hypotheses tried in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shapecheck.contract import Contract
from shapecheck.contract.naming import is_feature
from shapecheck.parity import hypotheses
from shapecheck.parity.cases import ForwardCase, InputGenerator, list_rows, residual_slots
from shapecheck.parity.contrast import JudgedRow, describe_contrast
from shapecheck.parity.hypotheses import Compute, Hypothesis
from shapecheck.parity.metrics import compare, compute_strength, widen
from shapecheck.parity.plan import PlannedCheck
from shapecheck.parity.reference import ReferenceOutputs
from shapecheck.parity.results import Effect, Verdict

_REVERSED = 0.02
"""The share of an output whose sign is reversed may be this far from -1."""


@dataclass(frozen=True, slots=True)
class ComparedOutput:
    """One output of a backend: the image of a UNet, or one residual of a ControlNet."""

    contract: Contract
    generate: InputGenerator
    reference: ReferenceOutputs
    tolerance_factor: float
    compute: Compute | None
    """PyTorch in the file's precision, for what has to be explained; None if nothing has to be."""
    actual: Mapping[ForwardCase, Tensor | str]
    """The backend's outputs, or why a call could not be run."""
    switched: Sequence[Tensor | str] = ()
    """Its outputs for the calls of the `switch` check, in one session, before any other."""
    siblings: Mapping[str, ReferenceOutputs] = field(default_factory=dict)
    """PyTorch's other outputs, whose place this one may have taken."""
    in_fp8: bool = False
    """Layers of the file are in fp8, and so they are where PyTorch's own error was measured."""
    room: float = 1.0
    """How many times the usual tolerance this backend has; an effect's strength is known as well as elsewhere."""

    @property
    def _noun(self) -> str:
        return "image" if self.contract.role == "unet" else "residual"

    def is_right(self, case: ForwardCase) -> bool:
        """Return whether the output of a call is as near to PyTorch's as is allowed."""
        actual = self.actual[case]
        return isinstance(actual, Tensor) and self._compare(case, actual).passes

    def _allow(self, case: ForwardCase) -> float:
        """Return the largest absolute difference that passes."""
        return self.room * self.tolerance_factor * self.reference.torch_error(case)

    def _compare(self, case: ForwardCase, actual: Tensor, expected: Tensor | None = None, times: int = 1) -> Verdict:
        """Compare an output with the reference, or with another output of that call."""
        expected = self.reference.reference[case] if expected is None else expected
        return compare(actual, expected, allowed=times * self._allow(case), own=self.reference.torch_error(case))

    def _compare_row(self, case: ForwardCase, row: int, actual: Tensor) -> Verdict:
        own, expected = self.reference.row_error(case, row), self.reference.reference[case]
        rows = slice(row, row + 1)
        return compare(actual[rows], expected[rows], allowed=self.room * self.tolerance_factor * own, own=own)

    def _explain_effect(self, case: ForwardCase, actual: Tensor, before: Tensor, effect: Effect) -> str:
        """Say how much of what is perturbed seems to act; empty if that is not known."""
        name = case.perturbed
        if (
            effect.cosine < 0.99
            and self.compute is not None
            and (
                bound := hypotheses.find_cut(self.generate, case, self.compute, widen(actual) - widen(before), effect.strength)
            )
        ):
            return f"{name} acts as if it were cut off at ±{bound:.2g}"
        if effect.cosine >= 0.9 and self.compute is not None:
            share = hypotheses.find_share(self.generate, case, self.compute, widen(actual), effect.strength, self._allow(case))
            if share is not None:
                return f"{name} acts as if {share:.3f} of it were given"
        return ""

    def _explain_by_place(self, plan: PlannedCheck, actual: Tensor, before: Tensor, effect: Effect) -> str:
        """Say where a slot acts, or how much of a text, that does not act as itself; empty if that is not known."""
        if effect.cosine >= 0.99 or self.compute is None:
            return ""
        base, case = plan.cases
        if plan.check.kind == "slot":
            off = self.compute(self.generate(base))
            suppositions = hypotheses.suppose_of_slot(self.contract, self.generate, case)
            return hypotheses.find_alike(suppositions, self.compute, widen(actual), widen(off), widen(before))
        if case.perturbed == "encoder_hidden_states":
            return hypotheses.find_tokens(self.generate, case, self.compute, widen(actual) - widen(before))
        return ""

    def _explain_no_effect(self, name: str, base: ForwardCase, before: Tensor) -> str:
        if name in {slot.name for slot in residual_slots(self.contract)}:
            giver = "T2I-Adapter" if is_feature(name) else "ControlNet"
            return f"{name} changes nothing: what the {giver} gives there is lost"
        inputs = self.generate(base)
        zeros = iter([Hypothesis(" as zeros", inputs | {name: torch.zeros_like(inputs[name])})])
        # loud residuals hide what an input does: that it shows without them says nothing of the input
        if (contrast := self._contrast()) and "control" not in contrast:
            return f"{name} changes nothing in this call; the {self._noun} {contrast}"
        return f"{name} changes nothing: it is baked into the file{self._find_equal(zeros, base, before)}"

    def _explain(self, case: ForwardCase, actual: Tensor) -> str:
        """Say why the output of a call is wrong; empty if no hypothesis explains it."""
        for name, sibling in self.siblings.items():
            expected = sibling.reference[case]
            if expected.shape == actual.shape and self._compare(case, actual, expected).passes:
                return f"it holds what belongs in {name}"
        contrast = self._contrast()
        if case.varied is not None and contrast:
            rows = [row for row in range(len(actual)) if not self._compare_row(case, row, actual).passes]
            suppositions = hypotheses.suppose_of_rows(self.contract, self.generate, case, rows)
            why = self._find_equal(suppositions, case, actual) if any(list_rows(case)[row].frames for row in rows) else ""
            return "; ".join(filter(None, (contrast, why)))
        if self.siblings:
            return contrast or self._explain_by_scale(
                case, actual
            )  # the checks of a ControlNet's inputs tell what is baked, once and not for each residual
        return self._find_equal(hypotheses.suppose_of_output(self.contract, self.generate, case), case, actual) or contrast

    def _explain_by_scale(self, case: ForwardCase, actual: Tensor) -> str:
        """Say that an output is PyTorch's times a number; empty if it is not."""
        expected = widen(self.reference.reference[case])
        if not actual.any():
            return "it is zero everywhere"
        share = compute_strength(actual, expected)
        if not self._compare(case, share * expected, widen(actual)).passes:
            return ""
        return "its sign is reversed" if abs(share + 1) <= _REVERSED else f"it is {share:.3f} times PyTorch's"

    def _contrast(self) -> str:
        """Say what the wrong rows of all calls have in common; empty if that is not known."""
        rows = []
        for call, actual in self.actual.items():
            expected = self.reference.reference[call]
            if not call.perturbed and not call.half and isinstance(actual, Tensor) and actual.shape == expected.shape:
                numbers = self._list_numbers(call)
                rows += [
                    JudgedRow(call, row, self._compare_row(call, row, actual).passes, numbers[row])
                    for row in range(len(actual))
                ]
        return describe_contrast(rows)

    def _list_numbers(self, case: ForwardCase) -> list[dict[str, float]]:
        """Return for each row of a call the strength and the label that it is given."""
        names = [spec.name for spec in self.contract.inputs if spec.name in ("conditioning_scale", "class_labels")]
        inputs, batch = self.generate(case) if names else {}, case.geometry.batch
        columns = {name: inputs[name].flatten().expand(batch).tolist() for name in names if inputs[name].numel() in (1, batch)}
        return [{name: float(column[row]) for name, column in columns.items()} for row in range(batch)]

    def _find_equal(self, suppositions: Iterator[Hypothesis], case: ForwardCase, actual: Tensor) -> str:
        if self.compute is None:
            return ""
        expected = self.reference.reference[case]
        return hypotheses.find_equal(suppositions, self.compute, widen(actual), widen(expected), self._allow(case))

    def _explain_by_square(self, case: ForwardCase) -> str:
        """Say why a call cannot be run if height and width differ; empty if that is not known."""
        slots, square = residual_slots(self.contract), square_of(replace(case, frame=0, half=False, perturbed=""))
        actual = self.actual.get(square) if square else None
        if square is None or not isinstance(actual, Tensor) or not slots or self.compute is None:
            return ""
        inputs = self.generate(square)
        exchanged = {slot.name: hypotheses.transpose(inputs[slot.name]) for slot in slots}
        is_near = self._compare(square, actual, self.compute(inputs | exchanged)).passes
        return "height and width of the residuals are exchanged, as a square size shows; " if is_near else ""


def square_of(case: ForwardCase) -> ForwardCase | None:
    """Return the same call at a square size; None if its size is square."""
    at = case.geometry
    return None if at.height == at.width else replace(case, geometry=replace(at, width=at.height))
