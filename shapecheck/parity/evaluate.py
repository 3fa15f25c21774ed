"""What the outputs of a backend prove: one function a kind of check, from numbers to a result in words."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from shapecheck.contract import Contract
from shapecheck.contract.naming import is_feature
from shapecheck.parity import hypotheses as parity_hypotheses
from shapecheck.parity.cases import ForwardCase, InputGenerator, residual_slots
from shapecheck.parity.hypotheses import Compute, Hypothesis
from shapecheck.parity.metrics import bad_channels, compare, effect_of
from shapecheck.parity.plan import PlannedCheck
from shapecheck.parity.reference import ReferenceOutputs
from shapecheck.parity.results import Effect, Result, Verdict

_TELLING = 2.5
"""A perturbation tells something if its effect is this many times what is allowed."""


_FULL = 0.02
"""How far an effect's strength may be from 1, if PyTorch's own rounding does not make it further."""


_SAME_DIRECTION = 0.9


_DROWNS = "not judged: what the residuals do drowns in what is allowed"


_NONE = 0.02
"""Less than this share of PyTorch's effect is none."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Everything that one output of a backend is held to: the image of a UNet, or one residual of a ControlNet."""

    contract: Contract
    generate: InputGenerator
    reference: ReferenceOutputs
    tolerance_factor: float
    compute: Compute | None
    """PyTorch in the file's precision, for what has to be explained; None if nothing has to be."""
    actual: Mapping[ForwardCase, Tensor | str]
    """What the backend gave, or why a call could not be run."""
    switched: Sequence[Tensor | str] = ()
    """What it gave for the calls of the `switch` check, in one session, before any other."""
    siblings: Mapping[str, ReferenceOutputs] = field(default_factory=dict)
    """PyTorch's other outputs, whose place this one may have taken."""

    def evaluate(self, plan: PlannedCheck, names: Container[str]) -> Result:
        """Return what a check came to, for a file that has the inputs of these names."""
        if plan.check.kind in ("input", "slot") and (name := plan.cases[1].perturbed) not in names:
            return Result(plan.check, "failed", f"the file has no input for {name}: it is baked into it, or left out")
        evaluators = {
            "input": self.evaluate_perturbed, "slot": self.evaluate_perturbed, "cfg": self.evaluate_halves,
            "switch": self.evaluate_switch,
        }  # fmt: skip
        return evaluators.get(plan.check.kind, self.evaluate_case)(plan)

    @property
    def noun(self) -> str:
        """What the output is called in a reason."""
        return "image" if self.contract.role == "unet" else "residual"

    def allowed(self, case: ForwardCase) -> float:
        """Return the largest absolute difference that passes."""
        return self.tolerance_factor * self.reference.torch_error(case)

    def verdict(self, case: ForwardCase, actual: Tensor, expected: Tensor | None = None) -> Verdict:
        """Compare an output with the reference, or with another one of that call."""
        expected = self.reference.reference[case] if expected is None else expected
        return compare(actual, expected, allowed=self.allowed(case), own=self.reference.torch_error(case))

    def evaluate_case(self, plan: PlannedCheck) -> Result:
        """Evaluate the output at one size."""
        (case,) = plan.cases
        actual = self.actual[case]
        if isinstance(actual, str):
            return Result(plan.check, "failed", self._explain_by_square(case) + actual, case.geometry)
        verdict = self.verdict(case, actual)
        if verdict.passes:
            return Result(plan.check, "passed", "", case.geometry, verdict)
        why = "" if _is_bad(actual) or self.compute is None else self._explain(case, actual)
        return Result(plan.check, "failed", _reason(verdict, actual, why), case.geometry, verdict)

    def evaluate_halves(self, plan: PlannedCheck) -> Result:
        """Require that residuals in the first half of the batch act there alone, as with classifier-free guidance."""
        if not plan.cases:
            return Result(plan.check, "not run", "no size of this run has a batch of two halves")
        off, case = plan.cases
        before, after = self.actual[off], self.actual[case]
        if isinstance(before, str) or isinstance(after, str):
            return Result(plan.check, "not run", "not judged: calls of this size cannot be run", case.geometry)
        if _is_bad(before) or _is_bad(after):
            return Result(plan.check, "not run", f"not judged: the {self.noun} is not finite", case.geometry)
        rows, allowed = case.geometry.batch // 2, 2 * self.allowed(case)
        if not self._differ(off, case, slice(rows)):
            return Result(plan.check, "not run", _DROWNS, case.geometry)
        verdict = compare(after[rows:], before[rows:], allowed=allowed, own=self.reference.torch_error(case))
        acts = float((after[:rows].double() - before[:rows].double()).abs().max()) > allowed
        if acts and verdict.passes:
            return Result(plan.check, "passed", "", case.geometry, verdict)
        if acts:
            reason = f"residuals given in the first half of the batch change the second: {verdict}"
        elif verdict.passes:
            reason = "residuals given in the first half of the batch change nothing there"
        else:
            reason = "residuals given in the first half of the batch act in the second: the halves are exchanged"
        return Result(plan.check, "failed", reason, case.geometry, verdict)

    def evaluate_switch(self, plan: PlannedCheck) -> Result:
        """Switch control on, off, to other residuals, off and on again in one session: nothing of an earlier call is kept.

        Each step is held to what the same session gave before, so that no other fault is taken for this one.
        """
        steps = list(zip(plan.cases, self.switched, strict=True))
        for number, (case, actual) in enumerate(steps):
            if isinstance(actual, str):
                return Result(plan.check, "not run", "not judged: calls of this size cannot be run", case.geometry)
            if _is_bad(actual):
                return Result(plan.check, "not run", f"not judged: the {self.noun} is not finite", case.geometry)
            if why := self._find_kept(steps[:number], case, actual):
                return Result(plan.check, "failed", f"step {number + 1}, {_describe_step(case)}: {why}", case.geometry)
        if not all(self._differ(one, other) for one, other in pairwise(plan.cases)):
            return Result(plan.check, "not run", _DROWNS, plan.cases[0].geometry)
        verdict = self._compare_steps(steps[0][1], steps[-1])
        return Result(plan.check, "passed", "", plan.cases[0].geometry, verdict)

    def _find_kept(self, before: Sequence[tuple[ForwardCase, Tensor | str]], case: ForwardCase, actual: Tensor) -> str:
        """Say what is wrong with a step beside those before it: as another where it should differ, or unlike an equal one."""
        for number, (earlier, other) in reversed(list(enumerate(before))):
            equal = self._compare_steps(other, (case, actual)).passes
            if earlier != case and equal and self._differ(earlier, case):
                step = f"step {number + 1}, {_describe_step(earlier)}"
                return f"the image is that of {step}: residuals of an earlier call are kept"
            if earlier == case and not equal:
                return f"the image is not that of step {number + 1}, which was given the same: a call in between is kept"
        return ""

    def _differ(self, one: ForwardCase, other: ForwardCase, rows: slice = slice(None)) -> bool:
        """Return whether PyTorch's outputs of two calls are further apart than could be missed."""
        distance = (self.reference.reference[one] - self.reference.reference[other])[rows].abs().max()
        return float(distance) >= _TELLING * self.allowed(other)

    def _compare_steps(self, other: Tensor | str, step: tuple[ForwardCase, Tensor | str]) -> Verdict:
        case, actual = step
        assert isinstance(actual, Tensor)
        assert isinstance(other, Tensor)
        return compare(actual, other, allowed=2 * self.allowed(case), own=self.reference.torch_error(case))

    def evaluate_perturbed(self, plan: PlannedCheck) -> Result:
        """Require that the perturbation of one input or slot, alone, changes the output as it does in PyTorch."""
        base, case = plan.cases
        before, actual, name = self.actual[base], self.actual[case], case.perturbed
        if isinstance(before, str):
            return Result(plan.check, "not run", "not judged: calls of this size cannot be run", case.geometry)
        if isinstance(actual, str):
            return Result(plan.check, "failed", actual, case.geometry)
        if _is_bad(before):
            reason = f"not judged: the {self.noun} is not finite before {name} is perturbed"
            return Result(plan.check, "not run", reason, case.geometry)
        verdict = self.verdict(case, actual)
        if _is_bad(actual) or verdict.fault:
            return Result(plan.check, "failed", _reason(verdict, actual, ""), case.geometry, verdict)
        expected = self.reference.reference[case] - self.reference.reference[base]
        effect = effect_of(actual.double() - before.double(), expected, self.reference.scale(base))
        is_telling = effect.size * self.reference.scale(base) >= _TELLING * self.allowed(case)
        if abs(effect.strength) <= _NONE and is_telling:
            reason = self._explain_no_effect(name, base, before)
            return Result(plan.check, "failed", reason, case.geometry, verdict, effect)
        if not self.verdict(base, before).passes:
            return self._evaluate_loosely(plan, verdict, effect, actual, before)
        if not is_telling:
            reason = (
                f"not judged: the effect of {name} in PyTorch ({effect.size:.1e} of the {self.noun}) drowns in what is allowed"
            )
            return Result(plan.check, "not run", reason, case.geometry, verdict, effect)
        if verdict.passes and self._is_full(effect, base, case):
            return Result(plan.check, "passed", "", case.geometry, verdict, effect)
        return Result(plan.check, "failed", self._explain_effect(plan, effect, actual, before), case.geometry, verdict, effect)

    def _is_full(self, effect: Effect, base: ForwardCase, case: ForwardCase) -> bool:
        """Return whether an effect has its whole strength: seen through rounding that hides a tenth of it in every value."""
        rounded, reference = self.reference.rounded, self.reference.reference
        if case not in rounded:
            return abs(effect.strength - 1) <= _FULL
        rounding = effect_of(rounded[case] - rounded[base], reference[case] - reference[base], 1.0).strength - 1
        return abs(effect.strength - 1) <= max(_FULL, self.tolerance_factor * abs(rounding))

    def _evaluate_loosely(self, plan: PlannedCheck, verdict: Verdict, effect: Effect, actual: Tensor, before: Tensor) -> Result:
        """Say only what acts elsewhere, if the output without the perturbation is wrong already."""
        case = plan.cases[1]
        if why := self._explain_by_place(plan, actual, before, better_than=effect.cosine):
            return Result(plan.check, "failed", f"{case.perturbed} {why}", case.geometry, verdict, effect)
        reason = (
            f"not judged: the {self.noun} is wrong even without it; "
            f"its effect has strength {effect.strength:.2f} and cosine {effect.cosine:.3f}"
        )
        return Result(plan.check, "not run", reason, case.geometry, verdict, effect)

    def _explain_effect(self, plan: PlannedCheck, effect: Effect, actual: Tensor, before: Tensor) -> str:
        case = plan.cases[1]
        name = case.perturbed
        if why := self._explain_by_place(plan, actual, before, better_than=effect.cosine):
            return f"{name} {why}"
        if effect.cosine >= _SAME_DIRECTION and self.compute is not None:
            share = parity_hypotheses.find_share(
                self.generate, case, self.compute, actual.double(), effect.strength, self.allowed(case)
            )
            if share is not None:
                return f"{name} acts as if {share:.3f} of it were given"
        return f"{name} acts otherwise than in PyTorch: strength {effect.strength:.3f}, cosine {effect.cosine:.4f}"

    def _explain_by_place(self, plan: PlannedCheck, actual: Tensor, before: Tensor, *, better_than: float) -> str:
        """Say where a slot acts that does not act as itself."""
        if plan.check.kind != "slot" or better_than >= 0.99 or self.compute is None:
            return ""
        off = self.compute(self.generate(plan.cases[0]))
        hypotheses = parity_hypotheses.suppose_of_slot(self.contract, self.generate, plan.cases[1])
        return parity_hypotheses.find_alike(hypotheses, self.compute, actual.double(), off, before.double())

    def _explain_no_effect(self, name: str, base: ForwardCase, before: Tensor) -> str:
        if name in {slot.name for slot in residual_slots(self.contract)}:
            giver = "T2I-Adapter" if is_feature(name) else "ControlNet"
            return f"{name} changes nothing: what the {giver} gives there is lost"
        given = self.generate(base)
        zeros = iter([Hypothesis(" as zeros", given | {name: torch.zeros_like(given[name])})])
        return f"{name} changes nothing: it is baked into the file{self._find_equal(zeros, base, before)}"

    def _explain(self, case: ForwardCase, actual: Tensor) -> str:
        """Say why the output of a call is wrong; empty if no hypothesis gives it."""
        for name, sibling in self.siblings.items():
            expected = sibling.reference[case]
            if expected.shape == actual.shape and self.verdict(case, actual, expected).passes:
                return f"it holds what belongs in {name}"
        if self.siblings:
            return ""  # what is baked into a ControlNet is told by its inputs' checks, once and not for each residual
        return self._find_equal(parity_hypotheses.suppose_of_output(self.contract, self.generate, case), case, actual)

    def _find_equal(self, hypotheses: Iterator[Hypothesis], case: ForwardCase, actual: Tensor) -> str:
        if self.compute is None:
            return ""
        expected = self.reference.reference[case]
        return parity_hypotheses.find_equal(hypotheses, self.compute, actual.double(), expected, self.allowed(case))

    def _explain_by_square(self, case: ForwardCase) -> str:
        """Say what is behind a call that cannot be run where height and width differ; empty if nothing is known."""
        slots, square = residual_slots(self.contract), square_of(replace(case, frame=0, half=False, perturbed=""))
        actual = self.actual.get(square) if square else None
        if square is None or not isinstance(actual, Tensor) or not slots or self.compute is None:
            return ""
        given = self.generate(square)
        exchanged = {slot.name: parity_hypotheses.transpose(given[slot.name]) for slot in slots}
        is_near = self.verdict(square, actual, self.compute(given | exchanged)).passes
        return "height and width of the residuals are exchanged, as a square size shows; " if is_near else ""


def combine_results(results: Iterator[tuple[str, Result]]) -> Result:
    """Return what the results of one check in several outputs come to: the first failure, else the clearest pass."""
    judged = []
    for output, result in results:
        if result.status == "failed":
            return replace(result, reason=f"{result.reason}, in {output}")
        judged.append(result)
    passed = [result for result in judged if result.status == "passed"]
    return max(passed, key=lambda result: result.effect.size if result.effect else 0.0, default=judged[0])


def square_of(case: ForwardCase) -> ForwardCase | None:
    """Return the same call at a square size; None for one of a square size already."""
    at = case.geometry
    return None if at.height == at.width else replace(case, geometry=replace(at, width=at.height))


def _describe_step(case: ForwardCase) -> str:
    return "control off" if case.frame is None else f"control on with frame {case.frame}"


def _is_bad(actual: Tensor) -> bool:
    return not bool(torch.isfinite(actual).all())


def _reason(verdict: Verdict, actual: Tensor, why: str) -> str:
    """Return the verdict in words, after a likely cause if one is known."""
    if verdict.nan or verdict.inf:
        channels = bad_channels(actual)
        where = f"in channel {channels[0]}" if len(channels) == 1 else f"in {len(channels)} of {actual.shape[1]} channels"
        return f"{verdict.nan} NaN and {verdict.inf} Inf among {verdict.count} values, {where}"
    return f"{why}; {verdict}" if why else str(verdict)
