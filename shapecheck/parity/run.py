"""A parity run: one model in PyTorch beside the files that were made of it, check by check."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from shapecheck import doctor
from shapecheck.contract import Contract, Geometry, ShapecheckError
from shapecheck.contract.size_request import SizeRequest
from shapecheck.doctor.environment import check_known
from shapecheck.observe.subject import TorchModel
from shapecheck.parity.artefacts import ParityFile, evaluate_file, read_files
from shapecheck.parity.cases import EmitResiduals, ForwardCase, InputGenerator
from shapecheck.parity.evaluate import FP8_PSNR, Evaluator, evaluate_outputs
from shapecheck.parity.explain import square_of
from shapecheck.parity.metrics import find_room, reference_device
from shapecheck.parity.plan import FILE_KINDS, PlannedCheck, list_cases, plan_checks
from shapecheck.parity.reference import LazyReference, Outputs, ReferenceOutputs, choose_call, compute_reference
from shapecheck.parity.request import ParityRequest
from shapecheck.parity.results import Check, Divergence, Parity, Ran, Result, Side
from shapecheck.parity.runners import BackendSession, describe_session, open_session
from shapecheck.parity.search import search_file
from shapecheck.progress import Progress, silent
from shapecheck.runtime.engine_session import EngineSession
from shapecheck.runtime.torch_session import OUTPUT
from shapecheck.tensorrt.profiles import Range
from shapecheck.tensorrt.size_ranges import request_ranges

_Reference = tuple[InputGenerator, dict[str, ReferenceOutputs]]


class ParityRun:
    """A run that computes what its checks need when the first of them is requested, once for all of them.

    `ranges` are the sizes to run at, or a request that leaves some to the file: an engine's own profiles, else small sizes that
    it takes. `emit` makes the residuals
    of a real ControlNet; `opener` opens a backend of one's own. `plan` lists the checks of a backend. Without `explain` nothing
    is computed to find out why an output differs, and where. Raises ShapecheckError if a file or the model cannot be read.
    """

    def __init__(
        self,
        request: ParityRequest,
        *,
        ranges: tuple[Range, ...] | SizeRequest = (),
        emit: EmitResiduals | None = None,
        progress: Progress = silent,
        opener: Callable[[str, ParityFile], BackendSession] | None = None,
        plan: Callable[[Contract, str, Sequence[Geometry]], tuple[PlannedCheck, ...]] = plan_checks,
        explain: bool = True,
    ) -> None:
        check_known(request.what_runs)
        self.request, self._emit, self._progress = request, emit, progress
        self._requested = ranges if isinstance(ranges, SizeRequest) else request_ranges(ranges)
        self._opener, self._plan, self._explain = opener, plan, explain
        progress(f"reading {request.model if isinstance(request.model, str | Path) else 'the model'}")
        self._model = TorchModel(
            request.model, calibration=request.calibration, variant=request.variant, offline=request.offline
        )
        if emit is not None and self._model.role == "controlnet":
            raise ShapecheckError(f"{self._model.name} is a ControlNet and takes no residuals: --controlnet is for UNets")
        self._files = read_files(request, self._model, self._requested)
        if request.calibration is not None:
            for file in self._files.values():
                request.calibration.find_model(file.contract)  # or it says that the calibration is of another model
        self._references: dict[tuple[Contract, tuple[Geometry, ...]], _Reference] = {}
        self._weights: dict[str, str | None] = {}
        self._sides: dict[str, Side] = {}

    @cached_property
    def plans(self) -> Mapping[str, tuple[PlannedCheck, ...]]:
        """Return every check of every backend, known before anything runs."""
        return {
            name: tuple(
                plan
                for plan in self._plan(file.contract, name, self._geometries(name))
                if plan.check.kind not in file.unshown and not (plan.check.kind == "rounding" and self.request.calibration)
            )
            for name, file in self._files.items()
        }

    @property
    def checks(self) -> tuple[Check, ...]:
        return tuple(plan.check for plans in self.plans.values() for plan in plans)

    @property
    def contract(self) -> Contract:
        """Return the contract of the model, in the precision of the first backend's file."""
        return next(iter(self._files.values())).contract

    def result(self, check: Check) -> Result:
        """Return the result of a check; the first of a backend runs the backend."""
        return next(result for result in self.side(check.backend).results if result.check == check)

    def side(self, backend: str) -> Side:
        if backend not in self._sides:
            self._sides[backend] = self._run(backend)
        return self._sides[backend]

    @property
    def is_complete(self) -> bool:
        return self._sides.keys() == self._files.keys()

    @property
    def reference(self) -> str:
        """Describe what backends are compared with, once one has been."""
        precisions = {known.precision for _, references in self._references.values() for known in references.values()}
        if not precisions:
            return "none: no backend could run"
        return f"PyTorch {' and '.join(sorted(precisions))} on {reference_device()}"

    def report(self) -> Parity:
        sides = tuple(self.side(name) for name in self._files)
        sizes = tuple(dict.fromkeys(size for name in self._files for size in self._geometries(name)))
        requested = str(self.request.model) if isinstance(self.request.model, str | Path) else ""
        return Parity(
            self._model.name, self.contract, self.reference, self.request.tolerance_factor, self.request.seed, sizes, sides,
            self.contract.header.versions, FP8_PSNR[self.contract.role] if self.request.calibration is not None else None,
            requested,
        )  # fmt: skip

    def _geometries(self, backend: str) -> tuple[Geometry, ...]:
        return self._files[backend].geometries(self._requested)

    def _run(self, backend: str) -> Side:
        file, plans = self._files[backend], self.plans[backend]
        artefact = self._model.name if file.path == Path() else str(file.path)
        # Of these two it shows when they are opened.
        if self._opener is None and backend not in ("torch", "ort") and not (known := doctor.backend(backend)).runs:
            fix = f"; {known.fix}" if known.fix else ""
            return Side(backend, artefact, None, _fail_all(plans, f"{known.name} cannot run here: {known.reason}{fix}"))
        generate, references = self._compute_reference(file.contract, self._geometries(backend))
        plans = tuple(
            replace(plan, cases=tuple(choose_call(case, references) if case.perturbed else case for case in plan.cases))
            for plan in plans
        )
        self._progress(f"opening {artefact} with {backend}")
        try:
            session: BackendSession | EngineSession
            if self._opener is not None:
                session = self._opener(backend, file)
            else:
                session = open_session(backend, file, self._geometries(backend), self._model)
            ran = describe_session(backend, session, file)
        except (ShapecheckError, torch.OutOfMemoryError) as error:
            return Side(backend, artefact, None, _fail_all(plans, str(error)))
        try:
            actual, switched, seconds = self._compute(backend, session, plans, generate)
        finally:
            session.close()

        # PyTorch in the file's precision is loaded when something has to be explained, after the backend gave back its memory.
        compute = LazyReference(self._model, file.contract, self._progress)
        unknown = actual.keys() - next(iter(references.values())).reference.keys() if self._explain else ()
        squares = {case: compute(generate(case)) for case in unknown}

        def create_evaluator(name: str) -> Evaluator:
            known = references[name]
            return Evaluator(
                file.contract,
                generate,
                replace(known, reference={**known.reference, **{case: outputs[name] for case, outputs in squares.items()}}),
                self.request.tolerance_factor,
                (lambda inputs: compute(inputs)[name]) if self._explain else None,
                {case: outputs if isinstance(outputs, str) else outputs[name] for case, outputs in actual.items()},
                [outputs if isinstance(outputs, str) else outputs[name] for outputs in switched],
                {other: sibling for other, sibling in references.items() if other != name},
                self.request.calibration is not None,
                find_room(backend, file.contract.dtype),
            )

        evaluators = {name: create_evaluator(name) for name in file.outputs}
        results = []
        for number, plan in enumerate(settled := _prefer_squares(plans, actual), 1):
            self._progress(f"judging, check {number} of {len(settled)}: {plan.check}")
            results.append(self._evaluate(plan, evaluators, file, ran, seconds))
        compute.close()
        divergence, notes = self._search(backend, generate, references, results)
        if (room := find_room(backend, file.contract.dtype)) > 1:
            allowed = f"{room * self.request.tolerance_factor:g} times PyTorch's own error are allowed"
            notes = (f"TensorRT sums products in {file.contract.dtype} where that is faster: {allowed}", *notes)
        notes = (*file.notes, *file.describe_limits(self._requested), *notes)
        return Side(backend, artefact, ran, tuple(results), divergence, notes)

    def _compute_reference(self, contract: Contract, geometries: tuple[Geometry, ...]) -> _Reference:
        """Compute PyTorch's side once for every backend whose file has this contract and these sizes."""
        key = contract, geometries
        if key not in self._references:
            alike = [name for name, file in self._files.items() if (file.contract, self._geometries(name)) == key]
            cases = list_cases([plan for name in alike for plan in self.plans[name]])
            strength = max((self._files[name].taken_strength for name in alike), key=lambda each: each != 1)
            generate = InputGenerator(contract, self.request.seed, self._emit, strength)

            def look(module: nn.Module) -> None:
                for name in alike:
                    compare = self._files[name].compare_weights
                    if name not in self._weights and compare and any(plan.check.kind == "weights" for plan in self.plans[name]):
                        self._progress(f"comparing the weights of {name}")
                        self._weights[name] = compare(module)

            precision = self.request.reference
            try:
                outputs = compute_reference(self._model, contract, cases, generate, precision, look, self._progress)
            except torch.OutOfMemoryError as error:
                less = "smaller sizes take less, and so does float32 as the reference"
                raise ShapecheckError(f"the GPU's memory does not suffice for PyTorch's side; {less}: {error}") from None
            self._references[key] = generate, outputs
        return self._references[key]

    def _compute(
        self, backend: str, session: BackendSession | EngineSession, plans: Sequence[PlannedCheck], generate: InputGenerator
    ) -> tuple[dict[ForwardCase, Outputs | str], list[Outputs | str], dict[ForwardCase, float]]:
        """Return a backend's outputs: every call once, those of control switched first and apart; and the calls' seconds."""
        file, seconds = self._files[backend], dict[ForwardCase, float]()
        switching = [case for plan in plans if plan.check.kind == "switch" for case in plan.cases]
        calls, numbers = list_cases(plans), itertools.count(1)
        total = len(switching) + len(calls)

        def compute(case: ForwardCase) -> Outputs | str:
            self._progress(f"computing with {backend}, call {next(numbers)} of {total}: {case}")
            given, began = file.give(generate, case), time.perf_counter()
            values = {own: given[name] for name, own in file.names.items()} | {own: given[own] for own in file.joins}
            try:
                outputs = session({own: value.to(session.device) for own, value in values.items()})
                # a session may write into the same memory in the next call
                return {name: outputs[own].cpu().clone() for name, own in file.outputs.items()}
            except (ShapecheckError, torch.OutOfMemoryError) as error:
                return str(error)
            finally:
                seconds[case] = time.perf_counter() - began

        switched = [compute(case) for case in switching]
        actual = {case: compute(case) for case in calls}
        squares = dict.fromkeys(square_of(case) for case, outputs in actual.items() if isinstance(outputs, str))
        extra = [case for case in squares if case is not None and case not in actual]
        total += len(extra)
        actual |= {case: compute(case) for case in extra}
        return actual, switched, seconds

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
            result = evaluate_outputs(plan, evaluators, file.names)
        return replace(result, seconds=sum(seconds[case] for case in plan.cases[-1:]))

    def _search(
        self, backend: str, generate: InputGenerator, references: Mapping[str, ReferenceOutputs], results: Sequence[Result]
    ) -> tuple[Divergence | None, tuple[str, ...]]:
        """Find where the first wrong image leaves PyTorch's, and notes on the search.

        Only files are searched, and UNets: the residuals of a ControlNet are its values inside.
        """
        file, is_unet = self._files[backend], self._model.role == "unet"
        wrong = {result.check for result in results if result.status == "failed" and result.verdict}
        cases = [plan.cases[0] for plan in self.plans[backend] if plan.check in wrong and plan.check.kind == "case"]
        if not cases or file.graph is None or self._opener is not None or not self._explain or not is_unet:
            return None, ()
        self._progress("looking for the first value that is not PyTorch's")
        factor = self.request.tolerance_factor * find_room(backend, file.contract.dtype)
        return search_file(
            self._model, file, generate, cases[0], backend, references[OUTPUT].precision,
            tolerance_factor=factor, folder=self.request.folder,
        )  # fmt: skip


def _prefer_squares(
    plans: Sequence[PlannedCheck], actual: Mapping[ForwardCase, Mapping[str, Tensor] | str]
) -> tuple[PlannedCheck, ...]:
    """Probe inputs and slots at a square size if calls of another cannot be run."""
    preferred = []
    for plan in plans:
        cases = tuple(square_of(case) or case for case in plan.cases)
        is_stuck = plan.check.kind in ("input", "slot") and isinstance(actual[plan.cases[0]], str)
        preferred.append(replace(plan, cases=cases) if is_stuck and actual.keys() >= set(cases) else plan)
    return tuple(preferred)


def _fail_all(plans: Sequence[PlannedCheck], reason: str) -> tuple[Result, ...]:
    """Return the results of a backend that was requested and does not run: one failure, and nothing else."""
    return tuple(
        Result(plan.check, "failed", reason)
        if plan.check.kind == "provider"
        else Result(plan.check, "not run", f"{plan.check.backend} does not run")
        for plan in plans
    )
