"""The outcome of a check: one function a kind, from a backend's outputs to a result in words."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from shapecheck.contract import Role
from shapecheck.parity import hypotheses
from shapecheck.parity.cases import ForwardCase
from shapecheck.parity.explain import ComparedOutput
from shapecheck.parity.metrics import compare_effects, measure_row_errors, widen
from shapecheck.parity.plan import PlannedCheck
from shapecheck.parity.results import Effect, Result, Rounding, Status, Verdict

_TELLING = 2.5
"""A perturbation tells something if its effect is this many times what is allowed."""
_FULL, _BLURRED, _BLURRED_FP8 = 0.02, 0.25, 0.6
"""An effect's strength may be this far from 1, or as far as PyTorch's own rounding may make it; if that is further than the
second, none cannot be told from a whole one. In fp8, which blurs what deep slots do, it is tried up to the third."""
FP8_PSNR: Mapping[Role, float] = {"unet": 30.0, "controlnet": 25.0}
"""The least PSNR of every whole output of a file in fp8, in dB beside the reference: an error of 3 % of the image's largest
value, of 6 % of a residual's, which is only a part of the skip that it is added to. What fp8 costs is no fault of a file, and a
multiple of float16's error cannot judge it: it is a hundred of those."""
ROUNDING_SHARE = 0.45
"""The errors of all calls together may be this share of `times_own` times PyTorch's own, in root mean square: 1.8 times.
Healthy backends have up to 1.5, what shows in a picture more than 2.4 (reports/half_precision.md)."""
_CANNOT_RUN = "not judged: calls of this size cannot be run"
_TOO_SMALL = "not judged: the effect of the residuals in PyTorch is too small beside the tolerance"


@dataclass(frozen=True, slots=True)
class Evaluator(ComparedOutput):
    """The judge of one output of a backend: the image of a UNet, or one residual of a ControlNet."""

    def evaluate(self, plan: PlannedCheck, names: Container[str]) -> Result:
        """Return the result of a check, for a file that has the inputs of these names."""
        kind = plan.check.kind
        if kind in ("input", "slot"):
            if (name := plan.cases[1].perturbed) not in names:
                return Result(plan.check, "failed", f"the file has no input for {name}: it is baked into it, or left out")
            return self._evaluate_perturbed(plan)
        if kind == "cfg":
            return self._evaluate_halves(plan)
        if kind == "rounding":
            return self._evaluate_rounding(plan)
        return self._evaluate_switch(plan) if kind == "switch" else self._evaluate_case(plan)

    @property
    def _blurred(self) -> float:
        return _BLURRED_FP8 if self.in_fp8 else _BLURRED

    def _compare_worst_row(self, case: ForwardCase, actual: Tensor) -> Verdict:
        """Compare a call row by row, each with its own error, and return the worst: a loud row hides nothing of a quiet one."""
        if actual.shape != self.reference.reference[case].shape:
            return self._compare(case, actual)
        verdicts = [self._compare_row(case, row, actual) for row in range(case.geometry.batch)]
        worst = max(verdicts, key=lambda verdict: (not verdict.passes, verdict.outside, verdict.excess))
        return replace(worst, psnr=self._compare(case, actual).psnr)  # which is a whole output's

    def _evaluate_case(self, plan: PlannedCheck) -> Result:
        (case,) = plan.cases
        actual = self.actual[case]
        if isinstance(actual, str):
            return Result(plan.check, "failed", self._explain_by_square(case) + actual, case.geometry)
        if not torch.isfinite(self.reference.reference[case]).all():  # else it was refused: only of varied rows
            why = f"not judged: PyTorch's own {self._noun} is not finite there in {self.contract.dtype}"
            return Result(plan.check, "not run", why, case.geometry)
        verdict = self._compare(case, actual) if case.varied is None else self._compare_worst_row(case, actual)
        least = FP8_PSNR[self.contract.role]
        # calls beyond what pipelines were calibrated on may cost more, and are held to PyTorch's own error in fp8 alone
        if verdict.passes and (verdict.psnr >= least or not self.in_fp8 or case.varied is not None):
            return Result(plan.check, "passed", "", case.geometry, verdict)
        if verdict.passes:
            reason = f"fp8 costs too much: the {self._noun} has {verdict.psnr:.1f} dB PSNR, {least:g} are needed"
            return Result(plan.check, "failed", reason, case.geometry, verdict)
        why = self._contrast() if _is_bad(actual) else self._explain(case, actual)
        return Result(plan.check, "failed", _describe(verdict, actual, why), case.geometry, verdict)

    def _evaluate_rounding(self, plan: PlannedCheck) -> Result:
        """Require that the errors of all calls together are not much more than PyTorch's own in the same precision.

        A worst value says little of a half precision: it varies by its nature, so that it has to be allowed several times
        PyTorch's. Over all values errors hardly vary, and what is twice as inexact shows.
        """
        found, own, is_near = list[Tensor](), list[Tensor](), True
        for case in plan.cases:
            actual, expected, rounded = self.actual[case], self.reference.reference[case], self.reference.rounded.get(case)
            if rounded is None or _is_bad(expected) or _is_bad(rounded):
                continue
            if isinstance(actual, str) or actual.shape != expected.shape or _is_bad(actual):
                return Result(plan.check, "not run", f"not judged: the {self._noun} of some calls cannot be compared")
            found.append(measure_row_errors(actual, expected))
            own.append(measure_row_errors(rounded, expected))
            is_near &= self._compare(case, actual).passes
        if not found:
            return Result(plan.check, "not run", "not judged: PyTorch's own error is not known in this precision")
        torch_errors = torch.cat(own)
        known = torch.isfinite(torch_errors)  # a row that is zero has no scale
        # The rounding of the output alone is a tenth of the precision's unit.
        error, torch_error = (
            max(float(errors[known].mean().sqrt()), self.reference.least / 10) for errors in (torch.cat(found), torch_errors)
        )
        allowed = self.room * ROUNDING_SHARE * self.tolerance_factor * torch_error
        rounding = Rounding(error, torch_error, allowed, len(found))
        if rounding.passes:
            return Result(plan.check, "passed", rounding=rounding)
        if not is_near:
            return Result(
                plan.check, "not run", f"not judged: the {self._noun} is wrong by more than rounding", rounding=rounding
            )
        reason = (
            f"the errors of all {self._noun}s together are {rounding.times_own:.1f} times PyTorch's own in "
            f"{self.contract.dtype} (root mean square of {len(found)} calls), {rounding.allowed / torch_error:.1f} times are "
            "allowed: something is computed in fewer bits or by an approximation"
        )
        return Result(plan.check, "failed", reason, rounding=rounding)

    def _evaluate_halves(self, plan: PlannedCheck) -> Result:
        """Require that residuals in the first half of the batch act there alone, as with classifier-free guidance."""
        off, case = plan.cases
        before, after = self.actual[off], self.actual[case]
        if isinstance(before, str) or isinstance(after, str):
            return Result(plan.check, "not run", _CANNOT_RUN, case.geometry)
        if _is_bad(before) or _is_bad(after):
            return Result(plan.check, "not run", f"not judged: the {self._noun} is not finite", case.geometry)
        rows = case.geometry.batch // 2
        if not self._differ(off, case, slice(rows)):
            return Result(plan.check, "not run", _TOO_SMALL, case.geometry)
        verdict = self._compare(case, after[rows:], before[rows:], times=2)
        acts = _measure_distance(after[:rows], before[:rows]) > 2 * self._allow(case)
        if acts and verdict.passes:
            return Result(plan.check, "passed", "", case.geometry, verdict)
        if acts:
            reason = f"residuals given in the first half of the batch change the second: {verdict}"
        elif verdict.passes:
            reason = "residuals given in the first half of the batch change nothing there"
        else:
            reason = "residuals given in the first half of the batch act in the second: the halves are exchanged"
        return Result(plan.check, "failed", reason, case.geometry, verdict)

    def _evaluate_switch(self, plan: PlannedCheck) -> Result:
        """Require that nothing is kept when control is switched on, off, to other residuals, off and on in one session.

        Each step is compared with the same session's earlier ones, so that no other fault is taken for this one.
        """
        steps: list[tuple[ForwardCase, Tensor]] = []
        for case, actual in zip(plan.cases, self.switched, strict=True):
            if isinstance(actual, str):
                return Result(plan.check, "not run", _CANNOT_RUN, case.geometry)
            if _is_bad(actual):
                return Result(plan.check, "not run", f"not judged: the {self._noun} is not finite", case.geometry)
            if why := self._find_kept(steps, case, actual):
                return Result(plan.check, "failed", f"{_describe_step(len(steps), case)}: {why}", case.geometry)
            steps.append((case, actual))
        if not all(self._differ(one, other) for one, other in pairwise(plan.cases)):
            return Result(plan.check, "not run", _TOO_SMALL, plan.cases[0].geometry)
        verdict = self._compare(*steps[-1], steps[0][1], times=2)
        return Result(plan.check, "passed", "", plan.cases[0].geometry, verdict)

    def _find_kept(self, steps: Sequence[tuple[ForwardCase, Tensor]], case: ForwardCase, actual: Tensor) -> str:
        """Say in what a step is wrong: equal to an earlier one of other inputs, or unlike one of the same inputs."""
        for number, (earlier, other) in reversed(list(enumerate(steps))):
            equal = self._compare(case, actual, other, times=2).passes
            if earlier != case and equal and self._differ(earlier, case):
                return f"the image is that of {_describe_step(number, earlier)}: residuals of an earlier call are kept"
            if earlier == case and not equal:
                return f"the image is not that of step {number + 1}, which was given the same: a call in between is kept"
        return ""

    def _differ(self, one: ForwardCase, other: ForwardCase, rows: slice = slice(None)) -> bool:
        """Return whether PyTorch's outputs of two calls are further apart than could be missed."""
        distance = _measure_distance(self.reference.reference[one][rows], self.reference.reference[other][rows])
        return distance >= _TELLING * self._allow(other)

    def _evaluate_perturbed(self, plan: PlannedCheck) -> Result:
        """Require that the perturbation of one input or slot, alone, changes the output as it does in PyTorch."""
        base, case = plan.cases
        before, actual = self.actual[base], self.actual[case]
        if isinstance(before, str):
            return Result(plan.check, "not run", _CANNOT_RUN, case.geometry)
        if isinstance(actual, str):
            return Result(plan.check, "failed", actual, case.geometry)
        if _is_bad(before):
            reason = f"not judged: the {self._noun} is not finite before {case.perturbed} is perturbed"
            return Result(plan.check, "not run", reason, case.geometry)
        verdict = self._compare(case, actual)
        if _is_bad(actual) or verdict.fault:
            return Result(plan.check, "failed", _describe(verdict, actual), case.geometry, verdict)
        effect = compare_effects(widen(actual) - widen(before), self.reference.effect(case), self.reference.scale(base))
        status, reason = self._judge_effect(plan, verdict, effect, actual, before)
        return Result(plan.check, status, reason, case.geometry, verdict, effect)

    def _judge_effect(
        self, plan: PlannedCheck, verdict: Verdict, effect: Effect, actual: Tensor, before: Tensor
    ) -> tuple[Status, str]:
        base, case = plan.cases
        name, allowed = case.perturbed, self._allow(case)
        # Over all values together an effect shows that drowns in the rounding of the worst one, if that rounding is known.
        spread = max(_FULL, self.tolerance_factor * self.reference.blur(case))
        is_clear = case in self.reference.rounded and spread <= self._blurred
        is_telling = effect.size * self.reference.scale(base) >= _TELLING * allowed or is_clear
        # Less than a fiftieth of PyTorch's effect is none; one in another direction is no lesser effect.
        length = float((widen(actual) - widen(before)).norm())
        if length <= 0.02 * float(self.reference.effect(case).norm()) and is_telling:
            return "failed", self._explain_no_effect(name, base, before)
        is_sound = self._compare(base, before).passes
        if is_sound and verdict.passes and not is_telling:
            size = f"({effect.size:.1e} of the {self._noun})"
            return "not run", f"not judged: the effect of {name} in PyTorch {size} is too small beside the tolerance"
        if is_sound and verdict.passes and abs(effect.strength - 1) <= spread:
            return "passed", ""
        if why := self._explain_by_place(plan, actual, before, effect):
            return "failed", f"{name} {why}"
        strength = f"strength {effect.strength:.3f}, cosine {effect.cosine:.4f}"
        if not is_sound:
            if plan.check.kind == "input" and self.compute is not None:
                inputs = self.generate(base)
                if why := hypotheses.find_distortion(inputs, name, self.compute, widen(before), self._allow(base)):
                    return "failed", f"{name} {why}"
            return "not run", f"not judged: the {self._noun} is wrong even without it; its effect has {strength}"
        if math.isnan(effect.strength):
            return "failed", f"{name} changes the {self._noun}, which it does not in PyTorch: {verdict}"
        why = self._explain_effect(case, actual, before, effect)
        return "failed", why or f"{name} acts otherwise than in PyTorch: {strength}"


def combine_results(results: Iterator[tuple[str, Result]]) -> Result:
    """Combine the results of one check in several outputs: return the first failure, else the clearest pass."""
    others = []
    for output, result in results:
        if result.status == "failed":
            return replace(result, reason=f"{result.reason}, in {output}")
        others.append(result)
    passed = [result for result in others if result.status == "passed"]
    return max(passed, key=lambda result: result.effect.size if result.effect else 0.0, default=others[0])


def evaluate_outputs(plan: PlannedCheck, evaluators: Mapping[str, Evaluator], names: Container[str]) -> Result:
    """Return the combined result of a check of all outputs.

    An output that is wrong already says nothing of an input that acts in another as it should: the output is at fault.
    """
    base = plan.cases[0]
    right = [name for name, judge in evaluators.items() if plan.check.kind == "input" and judge.is_right(base)]
    if right:
        result = combine_results((name, evaluators[name].evaluate(plan, names)) for name in right)
        if result.status != "not run":
            return result
    return combine_results((name, judge.evaluate(plan, names)) for name, judge in evaluators.items())


def _measure_distance(one: Tensor, other: Tensor) -> float:
    return float((widen(one) - widen(other)).abs().max())


def _describe_step(number: int, case: ForwardCase) -> str:
    return f"step {number + 1}, control {'off' if case.frame is None else f'on with frame {case.frame}'}"


def _is_bad(actual: Tensor) -> bool:
    return not bool(torch.isfinite(actual).all())


def _describe(verdict: Verdict, actual: Tensor, why: str = "") -> str:
    """Return the verdict in words, after a likely cause if one is known."""
    if verdict.nan or verdict.inf:
        channels = torch.nonzero((~torch.isfinite(actual)).transpose(0, 1).flatten(1).any(1)).flatten().tolist()
        where = f"in channel {channels[0]}" if len(channels) == 1 else f"in {len(channels)} of {actual.shape[1]} channels"
        what = f"{verdict.nan} NaN and {verdict.inf} Inf among {verdict.count} values, {where}"
        return f"{what}; {why}" if why else what
    return f"{why}; {verdict}" if why else str(verdict)
