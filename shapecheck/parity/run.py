"""A parity run: one model in PyTorch beside the files that were made of it, check by check."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from shapecheck import doctor
from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.doctor.environment import check_known
from shapecheck.observe.subject import Precision, TorchModel
from shapecheck.parity.artefacts import File, file_for, judged
from shapecheck.parity.cases import Call, Draws, Emitted
from shapecheck.parity.evaluate import Judge, square_of
from shapecheck.parity.plan import FILE_KINDS, Planned, calls_of, planned
from shapecheck.parity.reference import Lazily, Sides, computed, device
from shapecheck.parity.results import Check, Divergence, Parity, Ran, Result, Side
from shapecheck.parity.runners import Artefact, Runner, open_runner
from shapecheck.parity.search import Search
from shapecheck.progress import Progress, silent
from shapecheck.tensorrt.profiles import Range

TIMES_OWN = 4.0
"""How many times PyTorch's own error a backend may have, unless something else is asked for."""


Opener = Callable[[str, Artefact], Runner]


_Key = tuple[Contract, tuple[Geometry, ...]]


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is made."""

    ranges: tuple[Range, ...] = ()
    """Sizes to run at; none for an engine's own profiles, else three small ones."""
    seed: int = 0
    times_own: float = TIMES_OWN
    reference: Precision = "auto"
    variant: str | None = None
    offline: bool = False
    folder: Path | None = None
    """Where to write what reproduces a difference without shapecheck; None for nowhere."""


class Study:
    """A run that computes what its checks need when the first of them is asked for, once for all of them.

    `model` is what `probe` takes, with weights, or a live UNet. `onnx` and `engine` are files made of it; each of `backends`
    (keys of `contract.environment.BACKENDS`) runs the one or the other, `torch` the model itself. `emitted` gives the
    residuals of a real ControlNet; `opener` opens a backend of one's own. Raises ShapecheckError where a file or the model is
    missing, or cannot be read.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        backends: Sequence[str],
        *,
        onnx: str | Path | None = None,
        engine: str | Path | None = None,
        options: Options = Options(),  # frozen
        emitted: Emitted | None = None,
        progress: Progress = silent,
        opener: Opener | None = None,
    ) -> None:
        check_known(backends)
        self.options, self._emitted, self._progress, self._opener = options, emitted, progress, opener
        self._model = TorchModel(model, variant=options.variant, offline=options.offline)
        paths = [Path(each) if each is not None else None for each in (onnx, engine)]
        self._files: dict[str, File] = {each: file_for(each, self._model, *paths) for each in backends}
        self._torch: dict[_Key, tuple[Draws, Sides]] = {}
        self._weights: dict[str, str | None] = {}
        self._done: dict[str, Side] = {}

    @cached_property
    def plans(self) -> Mapping[str, tuple[Planned, ...]]:
        """Every check of every backend, known before anything runs."""
        return {name: planned(file.contract, name, self._sizes(name)) for name, file in self._files.items()}

    @property
    def checks(self) -> tuple[Check, ...]:
        """What is to be proven."""
        return tuple(each.check for plans in self.plans.values() for each in plans)

    @property
    def contract(self) -> Contract:
        """Of the model, in the precision of the first backend's file."""
        return next(iter(self._files.values())).contract

    def result(self, check: Check) -> Result:
        """What a check came to; the first of a backend runs the backend."""
        return next(each for each in self.side(check.backend).results if each.check == check)

    def side(self, backend: str) -> Side:
        """Everything of one backend."""
        if backend not in self._done:
            self._done[backend] = self._run(backend)
        return self._done[backend]

    @property
    def is_complete(self) -> bool:
        """Whether every backend has been run."""
        return self._done.keys() == self._files.keys()

    @property
    def reference(self) -> str:
        """What backends are compared with, once one has been."""
        precisions = sorted({sides.precision for _, sides in self._torch.values()})
        return f"PyTorch {' and '.join(precisions)} on {device()}" if precisions else "none: no backend could run"

    def report(self) -> Parity:
        """The whole run."""
        sides = tuple(self.side(name) for name in self._files)
        sizes = tuple(dict.fromkeys(size for name in self._files for size in self._sizes(name)))
        return Parity(
            self._model.name, self.contract, self.reference, self.options.times_own, self.options.seed, sizes, sides,
            self.contract.header.versions,
        )  # fmt: skip

    def _sizes(self, backend: str) -> tuple[Geometry, ...]:
        return self._files[backend].geometries(self.options.ranges)

    def _run(self, backend: str) -> Side:
        file, plans = self._files[backend], self.plans[backend]
        told = self._model.name if file.path == Path() else str(file.path)
        if self._opener is None and (reason := _hindrance(backend)):
            return Side(backend, told, None, _cannot_run(plans, reason))
        draws, sides = self._computed(file.contract, self._sizes(backend))
        self._progress(f"opening {told} with {backend}")
        try:
            runner = self._open(backend, file)
        except ShapecheckError as error:
            return Side(backend, told, None, _cannot_run(plans, str(error)))
        try:
            found, switched, seconds = self._images(runner, plans, draws)
        finally:
            runner.close()
        compute = Lazily(self._model, file.contract)
        squares = {call: compute(draws(call)) for call in found.keys() - sides.reference.keys()}
        sides = replace(sides, reference={**sides.reference, **squares})
        judge = Judge(file.contract, draws, sides, self.options.times_own, compute, found, switched)
        results = tuple(self._judged(each, judge, file, runner.ran, seconds) for each in _runnable(plans, found))
        del judge, compute
        gc.collect()
        where, notes = self._search(backend, file, (draws, sides), plans, results)
        return Side(backend, told, runner.ran, results, where, notes)

    def _search(
        self, backend: str, file: File, torch_: tuple[Draws, Sides], plans: Sequence[Planned], results: Sequence[Result]
    ) -> tuple[Divergence | None, tuple[str, ...]]:
        """Where the first wrong image leaves PyTorch's; a backend of one's own is not searched, for it is no file."""
        calls = {each.check: each.calls for each in plans if each.check.kind == "case"}
        wrong = [each for each in results if each.check in calls and each.status == "failed" and each.verdict is not None]
        if not wrong or file.graph is None or self._opener is not None:
            return None, ()
        self._progress("looking for the first value that is not PyTorch's")
        search = Search(self._model, file, *torch_, self.options.times_own, self.options.folder)
        return search.at(calls[wrong[0].check][0], backend)

    def _judged(self, plan: Planned, judge: Judge, file: File, ran: Ran, seconds: Mapping[Call, float]) -> Result:
        if plan.check.kind in FILE_KINDS:
            return judged(plan.check, file, ran, self._weights[plan.check.backend])
        return replace(judge.result(plan, file.names), seconds=sum(seconds[call] for call in plan.calls[-1:]))

    def _open(self, backend: str, file: File) -> Runner:
        artefact = Artefact(file.path, file.contract, file.names)
        if self._opener is not None:
            return self._opener(backend, artefact)
        return open_runner(backend, artefact, self._sizes(backend), self._model.load)

    def _computed(self, contract: Contract, sizes: tuple[Geometry, ...]) -> tuple[Draws, Sides]:
        """PyTorch's side for every backend whose file has this contract and these sizes."""
        if (contract, sizes) not in self._torch:
            alike = [name for name, file in self._files.items() if file.contract == contract and self._sizes(name) == sizes]
            calls = calls_of([each for name in alike for each in self.plans[name]])
            draws = Draws(contract, self.options.seed, self._emitted)

            def look(module: nn.Module) -> None:
                for name in alike:
                    self._weights[name] = self._files[name].weights(module)

            made = computed(self._model, contract, calls, draws, self.options.reference, look, self._progress)
            self._torch[contract, sizes] = draws, made
        return self._torch[contract, sizes]

    def _images(
        self, runner: Runner, plans: Sequence[Planned], draws: Draws
    ) -> tuple[dict[Call, Tensor | str], list[Tensor | str], dict[Call, float]]:
        """The backend's images: first those of control switched, in a fresh session; then every call once, with its seconds."""
        seconds = {}

        def image(call: Call) -> Tensor | str:
            self._progress(f"computing with {runner.ran.backend}: {call}")
            given, began = draws(call), time.perf_counter()
            try:
                return runner(given).clone()
            except ShapecheckError as error:
                return str(error)
            finally:
                seconds[call] = time.perf_counter() - began

        switched = [image(call) for each in plans if each.check.kind == "switch" for call in each.calls]
        found = {call: image(call) for call in calls_of(plans)}
        squares = {square_of(call) for call, given in found.items() if isinstance(given, str)}
        found |= {call: image(call) for call in squares if call is not None and call not in found}
        return found, switched, seconds


def _runnable(plans: Sequence[Planned], found: Mapping[Call, Tensor | str]) -> tuple[Planned, ...]:
    """Inputs and slots probed at a square size, where calls of another cannot be run."""

    def squared(plan: Planned) -> Planned:
        calls = tuple(square_of(call) or call for call in plan.calls)
        stuck = plan.check.kind in ("input", "slot") and isinstance(found[plan.calls[0]], str)
        return replace(plan, calls=calls) if stuck and found.keys() >= set(calls) else plan

    return tuple(map(squared, plans))


def _hindrance(backend: str) -> str:
    """Why a backend cannot run here; empty where it can, or that shows when it is opened."""
    if backend in ("torch", "ort"):
        return ""
    known = doctor.backend(backend)
    return "" if known.runs else f"{known.name} cannot run here: {known.reason}" + (f"; {known.fix}" if known.fix else "")


def _cannot_run(plans: Sequence[Planned], reason: str) -> tuple[Result, ...]:
    """A backend that was asked for and does not run: one failure, and nothing else."""
    return tuple(
        Result(each.check, "failed", reason)
        if each.check.kind == "provider"
        else Result(each.check, "not run", f"{each.check.backend} does not run")
        for each in plans
    )
