"""Choose what runs a pipeline: a backend that is requested, or the fastest, as it was measured before or is measured now."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from shapecheck import extras
from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.doctor import probes
from shapecheck.pipelines import measure
from shapecheck.pipelines.background import BackgroundBuild
from shapecheck.pipelines.candidates import (
    SHARES_WEIGHTS,
    Candidate,
    CandidateMaker,
    close_all,
    explain_failure,
    keep_in_torch,
    list_refusals,
)
from shapecheck.pipelines.contest import Contest
from shapecheck.pipelines.measured_record import (
    MeasuredRecord,
    Measurement,
    describe_choice,
    read_record,
    select_waiting,
    write_record,
)
from shapecheck.version import __version__

Refusals = tuple[tuple[str, str], ...]
_LIBRARIES = ("torch", "triton", "diffusers", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """The candidate to install, what does not run instead of it, and what is known and under way of the others."""

    candidate: Candidate
    refusals: Refusals = ()
    measured: tuple[Measurement, ...] = ()
    background: BackgroundBuild | None = None


def open_alone(
    maker: CandidateMaker,
    backend: str,
    unet: nn.Module,
    controlnets: Sequence[nn.Module],
    geometry: Geometry,
    *,
    aside: bool = True,
) -> Choice:
    """Return a pipeline in this backend, or in PyTorch with the reason, which is logged.

    With `aside` PyTorch's modules make room on the GPU, unless the backend computes with their weights.
    """
    device = next(unet.parameters()).device
    candidate = None
    try:
        candidate = maker.prepare(backend, unet, controlnets, aside=aside and backend not in SHARES_WEIGHTS)
        if backend == "torch-compile":
            # It is compiled now, and not while the first picture is drawn, where an error would be the user's.
            maker.progress("compiling")
            with torch.no_grad():
                inputs = measure.make_inputs(maker, unet, controlnets, geometry, drawn=False)
                inputs.play_frame(measure.get_models(candidate))
    except list_refusals(backend) as error:
        if candidate is not None:
            close_all(candidate.parts)
        refusal = (backend, explain_failure(error, device))
        _log.warning("%s does not run this UNet: %s", *refusal)
        return Choice(keep_in_torch(unet, controlnets), (refusal,))
    return Choice(candidate)


def choose_by_measuring(
    maker: CandidateMaker,
    unet: nn.Module,
    controlnets: Sequence[nn.Module],
    geometry: Geometry,
    budget: float | None,
    start: float,
) -> Choice:
    """Return the fastest backend that is right: as the folder has it, or by a contest, whose outcome is kept there.

    `budget` is the seconds from `start`, of `time.monotonic`, until the last candidate is to be ready.
    """
    models = (unet, *controlnets)
    device, key = next(unet.parameters()).device, describe_surroundings(maker, models, geometry)
    deadline = math.inf if budget is None else start + budget
    record = read_record(maker.folder, key)
    contest, waiting = Contest(maker, unet, controlnets, geometry), tuple[str, ...]()
    if record is not None:
        _log.info("measured before: %s", describe_choice(record.measurements))
        waiting = select_waiting(record, budget, lambda name: maker.is_made(name, models))
        choice = Choice(keep_in_torch(unet, controlnets))
        if record.winner != "torch":
            # PyTorch's modules are needed where something is measured beside them
            choice = open_alone(maker, record.winner, unet, controlnets, geometry, aside=not waiting)
        if choice.refusals:
            _log.warning("%s does not run any longer: all is measured again", record.winner)
            record = None
        else:
            contest = Contest(maker, unet, controlnets, geometry, record.measurements, choice.candidate)
    backends = maker.order_candidates(device, models) if record is None else waiting
    if backends:
        given = [budget] if record is None else [budget, record.budget]
        contest.run(backends, deadline)
        record = MeasuredRecord(tuple(key.items()), _take_largest(given), contest.measured)
        _keep_record(maker, record)
        _log.info("%s", describe_choice(record.measurements))
    assert record is not None  # there are candidates for every device
    refusals = tuple((one.backend, one.refusal or one.verdict) for one in record.measurements if not one.right)
    refusals = tuple(refusal for refusal in refusals if refusal[0] != "torch")
    return Choice(contest.champion, refusals, record.measurements, build_in_background(maker, models, record))


def describe_surroundings(maker: CandidateMaker, models: Sequence[nn.Module], geometry: Geometry) -> dict[str, str]:
    """Return all that a measurement depends on, as text by name."""
    first = next(models[0].parameters())
    place, driver = f"cpu, {torch.get_num_threads()} threads", dict[str, object]()
    if first.device.type == "cuda":
        place = torch.cuda.get_device_name(first.device)
        with suppress(OSError, RuntimeError):
            for facts in probes.driver():
                driver |= facts
    names, options = list[str](), sorted(maker.options.items())
    for model in models:
        try:
            names.append(maker.find_cache(model).path.stem)
        except ShapecheckError:  # it is not exported, and stays in PyTorch
            names.append(type(model).__name__)
    return {
        "models": ", ".join(names),
        "size": f"{geometry}, {geometry.tokens} tokens",
        "sizes": "; ".join(map(str, maker.sizes)),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": one_line(place),
        "driver": one_line(f"{driver.get('version', '')}"),
        # with "error" a ControlNet that cannot be exchanged is the candidate's failure
        "fallback": "error" if maker.strict else "log",
        "options": ", ".join([*(f"{name} {value}" for name, value in options), *["refittable"] * maker.refittable]),
        "versions": ", ".join(f"{name} {version}" for name, version in extras.list_versions(_LIBRARIES)),
        "shapecheck": __version__,
    }


def _take_largest(budgets: Sequence[float | None]) -> float | None:
    """Return the most time that any start was given: as much as there was, or seconds."""
    seconds = [float(budget) for budget in budgets if budget is not None]
    return max(seconds) if len(seconds) == len(budgets) else None


def _keep_record(maker: CandidateMaker, record: MeasuredRecord) -> None:
    try:
        write_record(maker.folder, record)
    except ShapecheckError as error:
        _log.warning("what was measured is not kept, so the next start measures again: %s", error)


def build_in_background(maker: CandidateMaker, models: Sequence[nn.Module], record: MeasuredRecord) -> BackgroundBuild | None:
    """Start to build the engines that TensorRT had no time for, if it had none."""
    waiting = any(one.backend == "trt" and one.waiting for one in record.measurements)
    if not waiting or maker.is_made("trt", models):
        return None

    def note_failure(failure: str) -> None:
        """Keep it, so that no later start begins it again."""
        refused = [
            replace(one, refusal=one_line(failure, longest=500), waiting=False) if one.backend == "trt" else one
            for one in record.measurements
        ]
        _keep_record(maker, replace(record, measurements=tuple(refused)))

    try:
        build = BackgroundBuild(maker, models, note_failure)
    except ShapecheckError as error:
        _log.warning("TensorRT's engines are not built in the background; budget=None builds them at once: %s", error)
        return None
    _log.info("TensorRT's engines are built in the background, at the lowest priority: the next start measures them")
    return build
