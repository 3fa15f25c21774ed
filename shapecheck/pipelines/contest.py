"""Find the fastest backend of a pipeline: each candidate is prepared, checked, and timed against the best so far."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property

import torch
from torch import nn

from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.parity.metrics import find_room
from shapecheck.pipelines import measure
from shapecheck.pipelines.candidates import (
    SHARES_WEIGHTS,
    Candidate,
    CandidateMaker,
    close_all,
    explain_failure,
    keep_in_torch,
    list_refusals,
    require_running,
)
from shapecheck.pipelines.measured_record import Measurement
from shapecheck.runtime.gpu import free_memory

_log = logging.getLogger(__name__)


def explain_not_begun(expected: float, left: float, *, accelerated: bool) -> str:
    """Return why a candidate is not begun that takes `expected` seconds where `left` are left; nothing if it is.

    As long as nothing is faster than PyTorch, one may take twice what is left: better late than slow for good.
    """
    if expected <= (left if accelerated else 2 * left):
        return ""
    return f"not begun: it takes about {expected:.0f} s, and {max(left, 0):.0f} s of the budget are left"


class Contest:
    """The candidates of one pipeline, one after the other, against the champion: PyTorch at first, then the best so far.

    So no more than three sets of models are in memory at once. `measured` has what was found out, PyTorch first.
    """

    def __init__(
        self,
        maker: CandidateMaker,
        unet: nn.Module,
        controlnets: Sequence[nn.Module],
        geometry: Geometry,
        measured: Sequence[Measurement] = (Measurement("torch", verdict="as it is"),),
        champion: Candidate | None = None,
    ) -> None:
        self._maker, self._unet, self._controlnets, self._geometry = maker, unet, tuple(controlnets), geometry
        first = next(unet.parameters())
        self._device, self._dtype = first.device, str(first.dtype).removeprefix("torch.")
        self._measured = {measurement.backend: measurement for measurement in measured}
        self.champion = champion or keep_in_torch(unet, self._controlnets)

    @property
    def measured(self) -> tuple[Measurement, ...]:
        return tuple(self._measured.values())

    @cached_property
    def _inputs(self) -> measure.FrameInputs:
        return measure.make_inputs(self._maker, self._unet, self._controlnets, self._geometry)

    @cached_property
    def _reference(self) -> measure.Reference:
        self._maker.progress("computing what is right with PyTorch")
        return measure.compute_reference((self._unet, self._controlnets), self._inputs)

    def run(self, backends: Sequence[str], deadline: float) -> None:
        """Try these backends in turn. One that is expected to end after the deadline, of `time.monotonic`, is not begun."""
        models = (self._unet, *self._controlnets)
        with ThreadPoolExecutor(max_workers=2) as pool:
            # doctor asks processes of their own, which takes seconds: meanwhile the first is prepared
            asked = {name: pool.submit(require_running, name) for name in backends if name not in SHARES_WEIGHTS}
            for backend in backends:
                expected, left = self._maker.estimate_seconds(backend, models), deadline - time.monotonic()
                refusal = _find_refusal(asked.get(backend))
                not_begun = explain_not_begun(expected, left, accelerated=self.champion.backend != "torch")
                if refusal or not_begun:
                    self._note(Measurement(backend, refusal=refusal or not_begun, waiting=not refusal))
                else:
                    self._note(self._try_candidate(backend))

    def _note(self, measurement: Measurement) -> None:
        self._measured[measurement.backend] = measurement
        wrong = measurement.verdict and not measurement.right
        _log.log(logging.WARNING if wrong else logging.INFO, "%s", measurement.describe(self._measured["torch"].milliseconds))

    def _try_candidate(self, backend: str) -> Measurement:
        """Prepare, check and time a candidate; the faster one is the champion, and the other is closed."""
        start, candidate = time.monotonic(), None
        try:
            _ = self._reference  # before a compiler captures where the weights are
            self._maker.progress(f"preparing {backend}")
            candidate = self._maker.prepare(backend, self._unet, self._controlnets, checked=True)
            self._maker.progress(f"checking {backend}")
            models = measure.get_models(candidate)
            with torch.no_grad():
                outputs, room = self._inputs.compute_outputs(models), find_room(backend, self._dtype)
                right, verdict = measure.check_outputs(outputs, self._reference, room=room)
            seconds = time.monotonic() - start
            if not right:
                close_all(candidate.parts)
                return Measurement(backend, verdict=verdict, seconds=seconds)
            self._maker.progress(f"timing {backend}")
            duel = {self.champion.backend: measure.get_models(self.champion), backend: models}
            times = measure.time_in_turns(duel, self._inputs, self._device)
        except list_refusals(backend) as error:
            refusal = one_line(explain_failure(error, self._device), longest=500)
            if candidate is not None:
                close_all(candidate.parts)
            free_memory()
            return Measurement(backend, refusal=refusal, seconds=time.monotonic() - start)
        best = self._measured[self.champion.backend]
        if best.milliseconds is None:
            best = self._measured[best.backend] = replace(best, milliseconds=times[best.backend])
            _log.info("%s", best.describe(best.milliseconds))
        # In the champion's milliseconds: its first measurement may be of a cooler machine.
        milliseconds = (best.milliseconds or math.nan) * times[backend] / times[best.backend]
        loser = candidate
        if times[backend] < times[best.backend]:
            loser, self.champion = self.champion, candidate
        close_all(loser.parts)
        return Measurement(backend, milliseconds, verdict, right=True, seconds=seconds)


def _find_refusal(asked: Future[None] | None) -> str:
    """Return why doctor says that a backend does not run; nothing if it does, or was not asked."""
    try:
        if asked is not None:
            asked.result()
    except ShapecheckError as error:
        return one_line(str(error), longest=500)
    return ""
