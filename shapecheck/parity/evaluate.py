"""What the images of a backend prove: one function a kind of check, from numbers to a result in words."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from shapecheck.contract import Contract
from shapecheck.parity import hypotheses
from shapecheck.parity.cases import Call, Draws
from shapecheck.parity.hypotheses import Compute, Suspicion
from shapecheck.parity.metrics import bad_channels, compare, effect_of
from shapecheck.parity.plan import Planned
from shapecheck.parity.reference import Sides
from shapecheck.parity.results import Effect, Result, Verdict

_TELLING = 2.5
"""A perturbation tells something where its effect is this many times what is allowed."""


_FULL = 0.02
"""How far an effect's strength may be from 1, where PyTorch's own rounding does not make it further."""


_SAME_DIRECTION = 0.9


_DROWNS = "not judged: what the residuals do drowns in what is allowed"


_NONE = 0.02
"""Less than this share of PyTorch's effect is none."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Everything that a backend's images are held to."""

    contract: Contract
    draws: Draws
    sides: Sides
    times_own: float
    compute: Compute
    """PyTorch in the file's precision, for what has to be explained."""
    found: Mapping[Call, Tensor | str]
    """The backend's images, or why a call could not be run."""
    switched: Sequence[Tensor | str] = ()
    """Those of the calls of the `switch` check, in one session, before any other."""

    def result(self, plan: Planned, names: Container[str]) -> Result:
        """What a check came to, for a file that has the inputs of these names."""
        if plan.check.kind in ("input", "slot") and (name := plan.calls[1].perturbed) not in names:
            return Result(plan.check, "failed", f"the file has no input for {name}: it is baked into it, or left out")
        decide = {"input": self.perturbed, "slot": self.perturbed, "cfg": self.halves, "switch": self.switch}
        return decide.get(plan.check.kind, self.case)(plan)

    def allowed(self, call: Call) -> float:
        """The largest absolute difference that passes."""
        return self.times_own * self.sides.own(call)

    def verdict(self, call: Call, image: Tensor, expected: Tensor | None = None) -> Verdict:
        """An image beside the reference, or beside another one of that call."""
        reference = self.sides.reference[call] if expected is None else expected
        return compare(image, reference, allowed=self.allowed(call), own=self.sides.own(call))

    def case(self, plan: Planned) -> Result:
        """The image at one size."""
        (call,) = plan.calls
        image = self.found[call]
        if isinstance(image, str):
            return Result(plan.check, "failed", self._square(call) + image, call.geometry)
        verdict = self.verdict(call, image)
        if verdict.passes:
            return Result(plan.check, "passed", "", call.geometry, verdict)
        why = "" if _is_bad(image) else self._explained(hypotheses.of_image(self.contract, self.draws, call), call, image)
        return Result(plan.check, "failed", _reason(verdict, image, why), call.geometry, verdict)

    def halves(self, plan: Planned) -> Result:
        """Residuals in the first half of the batch act there and nowhere else, as with classifier-free guidance."""
        if not plan.calls:
            return Result(plan.check, "not run", "no size of this run has a batch of two halves")
        off, call = plan.calls
        before, after = self.found[off], self.found[call]
        if isinstance(before, str) or isinstance(after, str):
            return Result(plan.check, "not run", "not judged: calls of this size cannot be run", call.geometry)
        if _is_bad(before) or _is_bad(after):
            return Result(plan.check, "not run", "not judged: the image is not finite", call.geometry)
        rows, allowed = call.geometry.batch // 2, 2 * self.allowed(call)
        if not self._differ(off, call, slice(rows)):
            return Result(plan.check, "not run", _DROWNS, call.geometry)
        verdict = compare(after[rows:], before[rows:], allowed=allowed, own=self.sides.own(call))
        acts = float((after[:rows].double() - before[:rows].double()).abs().max()) > allowed
        if acts and verdict.passes:
            return Result(plan.check, "passed", "", call.geometry, verdict)
        if acts:
            reason = f"residuals given in the first half of the batch change the second: {verdict}"
        elif verdict.passes:
            reason = "residuals given in the first half of the batch change nothing there"
        else:
            reason = "residuals given in the first half of the batch act in the second: the halves are exchanged"
        return Result(plan.check, "failed", reason, call.geometry, verdict)

    def switch(self, plan: Planned) -> Result:
        """Control on, off, with other residuals, off and on again, in one session: nothing of an earlier call is kept.

        Each step is held to what the same session gave before, so that no other fault is taken for this one.
        """
        steps = list(zip(plan.calls, self.switched, strict=True))
        for number, (call, image) in enumerate(steps):
            if isinstance(image, str):
                return Result(plan.check, "not run", "not judged: calls of this size cannot be run", call.geometry)
            if _is_bad(image):
                return Result(plan.check, "not run", "not judged: the image is not finite", call.geometry)
            if why := self._kept(steps[:number], call, image):
                return Result(plan.check, "failed", f"step {number + 1}, {_step(call)}: {why}", call.geometry)
        if not all(self._differ(one, other) for one, other in pairwise(plan.calls)):
            return Result(plan.check, "not run", _DROWNS, plan.calls[0].geometry)
        verdict = self._step_verdict(steps[0][1], steps[-1])
        return Result(plan.check, "passed", "", plan.calls[0].geometry, verdict)

    def _kept(self, before: Sequence[tuple[Call, Tensor | str]], call: Call, image: Tensor) -> str:
        """What is wrong with a step beside those before it: as another where it should differ, or unlike an equal one."""
        for number, (earlier, other) in reversed(list(enumerate(before))):
            equal = self._step_verdict(other, (call, image)).passes
            if earlier != call and equal and self._differ(earlier, call):
                return f"the image is that of step {number + 1}, {_step(earlier)}: residuals of an earlier call are kept"
            if earlier == call and not equal:
                return f"the image is not that of step {number + 1}, which was given the same: a call in between is kept"
        return ""

    def _differ(self, one: Call, other: Call, rows: slice = slice(None)) -> bool:
        """Whether PyTorch's images of two calls are further apart than could be missed."""
        apart = (self.sides.reference[one] - self.sides.reference[other])[rows].abs().max()
        return float(apart) >= _TELLING * self.allowed(other)

    def _step_verdict(self, other: Tensor | str, step: tuple[Call, Tensor | str]) -> Verdict:
        call, image = step
        assert isinstance(image, Tensor)
        assert isinstance(other, Tensor)
        return compare(image, other, allowed=2 * self.allowed(call), own=self.sides.own(call))

    def perturbed(self, plan: Planned) -> Result:
        """One input or slot: its perturbation, alone, changes the image as it does in PyTorch."""
        base, call = plan.calls
        at, image, name = self.found[base], self.found[call], call.perturbed
        if isinstance(at, str):
            return Result(plan.check, "not run", "not judged: calls of this size cannot be run", call.geometry)
        if isinstance(image, str):
            return Result(plan.check, "failed", image, call.geometry)
        if _is_bad(at):
            return Result(
                plan.check, "not run", f"not judged: the image is not finite before {name} is perturbed", call.geometry
            )
        verdict = self.verdict(call, image)
        if _is_bad(image) or verdict.fault:
            return Result(plan.check, "failed", _reason(verdict, image, ""), call.geometry, verdict)
        expected = self.sides.reference[call] - self.sides.reference[base]
        effect = effect_of(image.double() - at.double(), expected, self.sides.scale(base))
        told = effect.size * self.sides.scale(base) >= _TELLING * self.allowed(call)
        if abs(effect.strength) <= _NONE and told:
            reason = self._without_effect(name, base, at)
            return Result(plan.check, "failed", reason, call.geometry, verdict, effect)
        if not self.verdict(base, at).passes:
            return self._loosely(plan, verdict, effect, image, at)
        if not told:
            reason = f"not judged: the effect of {name} in PyTorch ({effect.size:.1e} of the image) drowns in what is allowed"
            return Result(plan.check, "not run", reason, call.geometry, verdict, effect)
        if verdict.passes and self._is_full(effect, base, call):
            return Result(plan.check, "passed", "", call.geometry, verdict, effect)
        return Result(plan.check, "failed", self._otherwise(plan, effect, image, at), call.geometry, verdict, effect)

    def _is_full(self, effect: Effect, base: Call, call: Call) -> bool:
        """Whether an effect has its whole strength: seen through rounding that hides a tenth of it in every single value."""
        own, reference = self.sides.images, self.sides.reference
        if call not in own:
            return abs(effect.strength - 1) <= _FULL
        rounding = effect_of(own[call] - own[base], reference[call] - reference[base], 1.0).strength - 1
        return abs(effect.strength - 1) <= max(_FULL, self.times_own * abs(rounding))

    def _loosely(self, plan: Planned, verdict: Verdict, effect: Effect, image: Tensor, at: Tensor) -> Result:
        """Where the image without the perturbation is wrong already, only what acts elsewhere is told."""
        call = plan.calls[1]
        if why := self._elsewhere(plan, image, at, better_than=effect.cosine):
            return Result(plan.check, "failed", f"{call.perturbed} {why}", call.geometry, verdict, effect)
        reason = (
            "not judged: the image is wrong even without it; "
            f"its effect has strength {effect.strength:.2f} and cosine {effect.cosine:.3f}"
        )
        return Result(plan.check, "not run", reason, call.geometry, verdict, effect)

    def _otherwise(self, plan: Planned, effect: Effect, image: Tensor, at: Tensor) -> str:
        name = plan.calls[1].perturbed
        if why := self._elsewhere(plan, image, at, better_than=effect.cosine):
            return f"{name} {why}"
        call = plan.calls[1]
        if effect.cosine >= _SAME_DIRECTION:
            given = (self.draws, call, self.compute, image.double(), effect.strength, self.allowed(call))
            if (share := hypotheses.share_of(*given)) is not None:
                return f"{name} acts as if {share:.3f} of it were given"
        return f"{name} acts otherwise than in PyTorch: strength {effect.strength:.3f}, cosine {effect.cosine:.4f}"

    def _elsewhere(self, plan: Planned, image: Tensor, at: Tensor, *, better_than: float) -> str:
        """For a slot that does not act as itself: where it acts."""
        if plan.check.kind != "slot" or better_than >= 0.99:
            return ""
        off = self.compute(self.draws(plan.calls[0]))
        suspicions = hypotheses.of_slot(self.contract, self.draws, plan.calls[1])
        return hypotheses.alike(suspicions, self.compute, image.double(), off, at.double())

    def _without_effect(self, name: str, base: Call, at: Tensor) -> str:
        given = self.draws(base)
        if name not in {slot.name for slot in self.contract.slots}:
            zeros: Iterator[Suspicion] = iter([Suspicion("as zeros", given | {name: torch.zeros_like(given[name])})])
            baked = hypotheses.equal(zeros, self.compute, at.double(), self.sides.reference[base], self.allowed(base))
            return f"{name} changes nothing: it is baked into the file{' ' if baked else ''}{baked}"
        return f"{name} changes nothing: what the ControlNet gives there is lost"

    def _explained(self, suspicions: Iterator[Suspicion], call: Call, image: Tensor) -> str:
        return hypotheses.equal(suspicions, self.compute, image.double(), self.sides.reference[call], self.allowed(call))

    def _square(self, call: Call) -> str:
        """What is behind a call that cannot be run where height and width differ; empty where nothing is known."""
        square = square_of(replace(call, frame=0, half=False, perturbed=""))
        image = self.found.get(square) if square else None
        if square is None or not isinstance(image, Tensor):
            return ""
        given = self.draws(square)
        exchanged = {slot.name: hypotheses.transposed(given[slot.name]) for slot in self.contract.slots}
        near = self.verdict(square, image, self.compute(given | exchanged)).passes
        return "height and width of the residuals are exchanged, as a square size shows; " if near else ""


def square_of(call: Call) -> Call | None:
    """The same call at a square size; None for one of a square size already."""
    at = call.geometry
    return None if at.height == at.width else replace(call, geometry=replace(at, width=at.height))


def _step(call: Call) -> str:
    return "control off" if call.frame is None else f"control on with frame {call.frame}"


def _is_bad(image: Tensor) -> bool:
    return not bool(torch.isfinite(image).all())


def _reason(verdict: Verdict, image: Tensor, why: str) -> str:
    """The verdict in words, less a likely cause where one is known."""
    if verdict.nan or verdict.inf:
        channels = bad_channels(image)
        where = f"in channel {channels[0]}" if len(channels) == 1 else f"in {len(channels)} of {image.shape[1]} channels"
        return f"{verdict.nan} NaN and {verdict.inf} Inf among {verdict.count} values, {where}"
    return f"{why}; {verdict}" if why else str(verdict)
