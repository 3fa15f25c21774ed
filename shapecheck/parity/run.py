"""A parity run: one model in PyTorch beside the files that were made of it, check by check."""

from __future__ import annotations

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
from shapecheck.parity.artefacts import ParityFile, evaluate_file, read_files
from shapecheck.parity.cases import EmitResiduals, ForwardCase, InputGenerator
from shapecheck.parity.evaluate import Evaluator, combine_results, square_of
from shapecheck.parity.plan import FILE_KINDS, PlannedCheck, list_cases, plan_checks
from shapecheck.parity.reference import LazyReference, Outputs, ReferenceOutputs, compute_reference, reference_device
from shapecheck.parity.results import Check, Divergence, Parity, Ran, Result, Side
from shapecheck.parity.runners import Session, describe_session, open_session
from shapecheck.parity.search import Search
from shapecheck.progress import Progress, silent
from shapecheck.runtime.engine_session import EngineSession
from shapecheck.runtime.torch_session import OUTPUT
from shapecheck.tensorrt.profiles import Range

TOLERANCE_FACTOR = 4.0
"""How many times PyTorch's own error a backend may have, unless something else is asked for."""


OpenSession = Callable[[str, ParityFile], Session]


Plan = Callable[[Contract, str, Sequence[Geometry]], tuple[PlannedCheck, ...]]


_Reference = tuple[InputGenerator, dict[str, ReferenceOutputs]]


@dataclass(frozen=True, slots=True)
class ParityOptions:
    """How a run is made."""

    ranges: tuple[Range, ...] = ()
    """Sizes to run at; none for an engine's own profiles, else three small ones."""
    seed: int = 0
    tolerance_factor: float = TOLERANCE_FACTOR
    reference: Precision = "auto"
    variant: str | None = None
    offline: bool = False
    folder: Path | None = None
    """Where to write what reproduces a difference without shapecheck; None for nowhere."""
    plan: Plan = plan_checks
    explain: bool = True
    """Whether to find out why an output differs, and where: that takes further calls of PyTorch."""


class ParityRun:
    """A run that computes what its checks need when the first of them is asked for, once for all of them.

    `model` is a UNet or ControlNet: what `probe` takes, with weights, or a live module. `onnx` and `engine` are files made of
    it; each of `backends` (keys of `contract.environment.BACKENDS`) runs the one or the other, `torch` the model itself. `emit`
    gives the residuals of a real ControlNet; `opener` opens a backend of one's own. Raises ShapecheckError if a file or the
    model is missing, or cannot be read.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        backends: Sequence[str],
        *,
        onnx: str | Path | None = None,
        engine: str | Path | None = None,
        options: ParityOptions = ParityOptions(),  # frozen
        emit: EmitResiduals | None = None,
        progress: Progress = silent,
        opener: OpenSession | None = None,
    ) -> None:
        check_known(backends)
        self.options, self._emit, self._progress, self._opener = options, emit, progress, opener
        self._model = TorchModel(model, variant=options.variant, offline=options.offline)
        if emit is not None and self._model.role == "controlnet":
            raise ShapecheckError(f"{self._model.name} is a ControlNet and takes no residuals: --controlnet is for UNets")
        paths = [Path(path) if path is not None else None for path in (onnx, engine)]
        self._files = read_files(backends, self._model, *paths)
        self._references: dict[tuple[Contract, tuple[Geometry, ...]], _Reference] = {}
        self._weights: dict[str, str | None] = {}
        self._sides: dict[str, Side] = {}

    @cached_property
    def plans(self) -> Mapping[str, tuple[PlannedCheck, ...]]:
        """Every check of every backend, known before anything runs."""
        return {name: self.options.plan(file.contract, name, self._geometries(name)) for name, file in self._files.items()}

    @property
    def checks(self) -> tuple[Check, ...]:
        """What is to be proven."""
        return tuple(plan.check for plans in self.plans.values() for plan in plans)

    @property
    def contract(self) -> Contract:
        """Of the model, in the precision of the first backend's file."""
        return next(iter(self._files.values())).contract

    def result(self, check: Check) -> Result:
        """Return what a check came to; the first of a backend runs the backend."""
        return next(result for result in self.side(check.backend).results if result.check == check)

    def side(self, backend: str) -> Side:
        """Return everything of one backend."""
        if backend not in self._sides:
            self._sides[backend] = self._run(backend)
        return self._sides[backend]

    @property
    def is_complete(self) -> bool:
        """Whether every backend has been run."""
        return self._sides.keys() == self._files.keys()

    @property
    def reference(self) -> str:
        """What backends are compared with, once one has been."""
        precisions = sorted({each.precision for _, outputs in self._references.values() for each in outputs.values()})
        return f"PyTorch {' and '.join(precisions)} on {reference_device()}" if precisions else "none: no backend could run"

    def report(self) -> Parity:
        """Return the whole run."""
        sides = tuple(self.side(name) for name in self._files)
        sizes = tuple(dict.fromkeys(size for name in self._files for size in self._geometries(name)))
        return Parity(
            self._model.name, self.contract, self.reference, self.options.tolerance_factor, self.options.seed, sizes, sides,
            self.contract.header.versions,
        )  # fmt: skip

    def _geometries(self, backend: str) -> tuple[Geometry, ...]:
        return self._files[backend].geometries(self.options.ranges)

    def _run(self, backend: str) -> Side:
        file, plans = self._files[backend], self.plans[backend]
        artefact = self._model.name if file.path == Path() else str(file.path)
        if self._opener is None and (reason := _find_hindrance(backend)):
            return Side(backend, artefact, None, _fail_all(plans, reason))
        generate, references = self._compute_reference(file.contract, self._geometries(backend))
        self._progress(f"opening {artefact} with {backend}")
        try:
            session: Session | EngineSession
            if self._opener is not None:
                session = self._opener(backend, file)
            else:
                session = open_session(backend, file, self._geometries(backend), self._model.load)
            ran = describe_session(backend, session, file)
        except ShapecheckError as error:
            return Side(backend, artefact, None, _fail_all(plans, str(error)))
        try:
            actual, switched, seconds = self._compute(backend, session, plans, generate)
        finally:
            session.close()
        # PyTorch in the file's precision is loaded when something has to be explained, after the backend gave back its memory
        compute = LazyReference(self._model, file.contract)
        squares = {case: compute(generate(case)) for case in actual.keys() - next(iter(references.values())).reference.keys()}

        def evaluator(name: str) -> Evaluator:
            known = references[name]
            found = {case: outputs if isinstance(outputs, str) else outputs[name] for case, outputs in actual.items()}
            steps = [outputs if isinstance(outputs, str) else outputs[name] for outputs in switched]
            return Evaluator(
                file.contract,
                generate,
                replace(known, reference={**known.reference, **{case: outputs[name] for case, outputs in squares.items()}}),
                self.options.tolerance_factor,
                (lambda inputs: compute(inputs)[name]) if self.options.explain else None,
                found,
                steps,
                {other: sibling for other, sibling in references.items() if other != name},
            )

        evaluators = {name: evaluator(name) for name in file.outputs}
        results = tuple(self._evaluate(plan, evaluators, file, ran, seconds) for plan in _prefer_squares(plans, actual))
        compute.close()
        divergence, notes = self._search(backend, file, (generate, references), plans, results)
        return Side(backend, artefact, ran, results, divergence, notes)

    def _search(
        self, backend: str, file: ParityFile, known: _Reference, plans: Sequence[PlannedCheck], results: Sequence[Result]
    ) -> tuple[Divergence | None, tuple[str, ...]]:
        """Find where the first wrong image leaves PyTorch's.

        A backend of one's own is not searched, for it is no file, and no ControlNet, whose residuals are its values inside.
        """
        cases = {plan.check: plan.cases for plan in plans if plan.check.kind == "case"}
        wrong = [result for result in results if result.check in cases and result.status == "failed" and result.verdict]
        is_unet = self._model.role == "unet"
        if not wrong or file.graph is None or self._opener is not None or not self.options.explain or not is_unet:
            return None, ()
        self._progress("looking for the first value that is not PyTorch's")
        generate, references = known
        precision = references[OUTPUT].precision
        search = Search(self._model, file, generate, precision, self.options.tolerance_factor, self.options.folder)
        return search.find(cases[wrong[0].check][0], backend)

    def _evaluate(
        self,
        plan: PlannedCheck,
        evaluators: Mapping[str, Evaluator],
        file: ParityFile,
        ran: Ran,
        seconds: Mapping[ForwardCase, float],
    ) -> Result:
        if plan.check.kind in FILE_KINDS:
            return evaluate_file(plan.check, file, ran, self._weights.get(plan.check.backend))
        if plan.output and plan.output not in evaluators:
            return Result(plan.check, "failed", f"the file has no output for {plan.output}: it is left out")
        if plan.output or len(evaluators) == 1:
            result = evaluators[plan.output or next(iter(evaluators))].evaluate(plan, file.names)
        else:
            result = combine_results((name, each.evaluate(plan, file.names)) for name, each in evaluators.items())
        return replace(result, seconds=sum(seconds[case] for case in plan.cases[-1:]))

    def _compute_reference(self, contract: Contract, geometries: tuple[Geometry, ...]) -> _Reference:
        """Compute PyTorch's side for every backend whose file has this contract and these sizes."""
        key = contract, geometries
        if key not in self._references:
            alike = [name for name, file in self._files.items() if (file.contract, self._geometries(name)) == key]
            cases = list_cases([plan for name in alike for plan in self.plans[name]])
            generate = InputGenerator(contract, self.options.seed, self._emit)

            def look(module: nn.Module) -> None:
                for name in alike:
                    if any(plan.check.kind == "weights" for plan in self.plans[name]):
                        self._weights[name] = self._files[name].compare_weights(module)

            outputs = compute_reference(self._model, contract, cases, generate, self.options.reference, look, self._progress)
            self._references[key] = generate, outputs
        return self._references[key]

    def _compute(
        self, backend: str, session: Session | EngineSession, plans: Sequence[PlannedCheck], generate: InputGenerator
    ) -> tuple[dict[ForwardCase, Outputs | str], list[Outputs | str], dict[ForwardCase, float]]:
        """Return a backend's outputs: every call once, those of control switched first and apart; and the calls' seconds."""
        file, seconds = self._files[backend], dict[ForwardCase, float]()

        def compute(case: ForwardCase) -> Outputs | str:
            self._progress(f"computing with {backend}: {case}")
            values, began = generate(case), time.perf_counter()
            try:
                outputs = session({own: values[name].to(session.device) for name, own in file.names.items()})
                # a session may write into the same memory in the next call
                return {name: outputs[own].cpu().clone() for name, own in file.outputs.items()}
            except ShapecheckError as error:
                return str(error)
            finally:
                seconds[case] = time.perf_counter() - began

        switched = [compute(case) for plan in plans if plan.check.kind == "switch" for case in plan.cases]
        found = {case: compute(case) for case in list_cases(plans)}
        squares = {square_of(case) for case, outputs in found.items() if isinstance(outputs, str)}
        found |= {case: compute(case) for case in squares if case is not None and case not in found}
        return found, switched, seconds


def _prefer_squares(
    plans: Sequence[PlannedCheck], actual: Mapping[ForwardCase, Mapping[str, Tensor] | str]
) -> tuple[PlannedCheck, ...]:
    """Probe inputs and slots at a square size if calls of another cannot be run."""

    def choose(plan: PlannedCheck) -> PlannedCheck:
        cases = tuple(square_of(case) or case for case in plan.cases)
        is_stuck = plan.check.kind in ("input", "slot") and isinstance(actual[plan.cases[0]], str)
        return replace(plan, cases=cases) if is_stuck and actual.keys() >= set(cases) else plan

    return tuple(map(choose, plans))


def _find_hindrance(backend: str) -> str:
    """Return why a backend cannot run here; empty if it can, or if that shows when it is opened."""
    if backend in ("torch", "ort"):
        return ""
    known = doctor.backend(backend)
    return "" if known.runs else f"{known.name} cannot run here: {known.reason}" + (f"; {known.fix}" if known.fix else "")


def _fail_all(plans: Sequence[PlannedCheck], reason: str) -> tuple[Result, ...]:
    """Return the results of a backend that was asked for and does not run: one failure, and nothing else."""
    return tuple(
        Result(plan.check, "failed", reason)
        if plan.check.kind == "provider"
        else Result(plan.check, "not run", f"{plan.check.backend} does not run")
        for plan in plans
    )
