"""Running the models under observation: at every size that is needed, and as a user's own call drives them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shapecheck.contract import Geometry, Shape, ShapecheckError, Slot
from shapecheck.models.inputs import build_zero_arguments
from shapecheck.models.model import Model
from shapecheck.observe import sizes
from shapecheck.observe.record import Recorder, record
from shapecheck.observe.trace import Trace
from shapecheck.progress import Progress

_PROBES_GIVEN = 256
"""Residuals of one cell given to a UNet that is asked alone: more than any UNet has slots."""
_LARGEST_DIVISOR = 2**6

Residuals = tuple[list[Tensor], Tensor]


def observe(unet: Model, nets: Sequence[Model], geometry: Geometry | None, progress: Progress) -> tuple[list[Trace], int]:
    """Traces at every size needed to know each halving, at `geometry` too, and the divisor the UNet's sizes need.

    Raises ShapecheckError where a model runs at no size.
    """
    halvings = len(unet.config["down_block_types"]) - 1
    wanted = [*sizes.list_survey_sizes(halvings), *(sizes.odd_geometry(level) for level in range(3, halvings))]
    if geometry is not None:
        wanted.append(geometry)
    traces = []
    with torch.no_grad(), record(unet.module, [net.module for net in nets]) as recorder:
        for number, each in enumerate(wanted, start=1):
            progress(f"observing {unet.name} at {each} ({number} of {len(wanted)})")
            traces.append(_observe_at(unet, nets, each, recorder))
        if not any(trace.refused for trace in traces):
            return traces, 1
        divisor, seen = _find_divisor(unet, nets, halvings, recorder, progress)
    return traces + seen, divisor


def observe_call(
    unet: Model, nets: Sequence[Model], adapters: Sequence[Model], call: Callable[[], object]
) -> tuple[list[Trace], Exception | None]:
    """What a call of the user's does with the same modules, each different UNet call once, and what it raised."""
    failure: Exception | None = None
    with record(unet.module, [net.module for net in nets], [each.module for each in adapters]) as recorder:
        try:
            call()
        except Exception as error:  # the caller decides whether a mismatch explains it
            failure = error
    return list(dict.fromkeys(recorder.traces)), failure


def observe_adapter(
    unet: Model,
    nets: Sequence[Model],
    adapter: Model,
    mid: Slot | None,
    accepted: Sequence[Geometry],
    allowed: int,
    progress: Progress,
) -> tuple[list[Trace], int]:
    """What the UNet does with an adapter's features, and the divisor that the adapter's sizes need, in latent cells.

    The UNet is observed at the sizes it has `accepted`, multiples of `allowed`, and at others that the adapter takes.

    `mid` is the slot after the mid block, where a feature is added only if it is of that very shape. `nets` are not run,
    and the adapter is counted after them. Raises ShapecheckError where the adapter runs at no size.
    """
    halvings = len(unet.config["down_block_types"]) - 1
    traces = []
    with torch.no_grad(), record(unet.module, [net.module for net in nets], [adapter.module]) as recorder:
        divisor, count = _adapter_divisor(adapter, halvings)
        wanted = [*accepted, *(sizes.list_coarse_sizes(max(divisor, allowed), halvings) if divisor > 1 else ())]
        for number, each in enumerate(dict.fromkeys(wanted), start=1):
            progress(f"observing {adapter.name} at {each} ({number} of {len(wanted)})")
            traces.append(_observe_features_at(unet, adapter, each, _feature_probes(unet, each, count, mid), recorder))
    return traces, divisor


def observe_controlnet(net: Model) -> list[Trace]:
    """What a ControlNet alone emits, at the sizes a UNet would be observed at."""
    traces = []
    for geometry in sizes.list_survey_sizes(len(net.config["down_block_types"]) - 1):
        with torch.no_grad(), record(torch.nn.Identity(), [net.module]) as recorder:
            _run_controlnet(net, geometry)
        traces.append(Trace(geometry, recorder.take_emitted()))
    return traces


def _find_divisor(
    unet: Model, nets: Sequence[Model], halvings: int, recorder: Recorder, progress: Progress
) -> tuple[int, list[Trace]]:
    """The smallest power of two whose multiples the UNet accepts, and the traces that show it."""
    easiest = _observe_at(unet, nets, Geometry(2, _LARGEST_DIVISOR, 2 * _LARGEST_DIVISOR), recorder)
    seen = [easiest]
    divisor = 2
    while not easiest.refused and divisor <= _LARGEST_DIVISOR:
        progress(f"{unet.name} refuses some sizes; trying multiples of {divisor}")
        tried = [_observe_at(unet, nets, each, recorder) for each in sizes.list_multiples(divisor, halvings)]
        seen += tried
        if not any(trace.refused for trace in tried):
            return divisor, seen
        divisor *= 2
    raise ShapecheckError(f"{unet.name} does not run at any size that was tried; the last error: {seen[-1].refused}")


def _observe_at(unet: Model, nets: Sequence[Model], geometry: Geometry, recorder: Recorder) -> Trace:
    """One run of everything. Where the ControlNets' residuals do not fit, the UNet is asked alone what it adds."""
    recorder.take_emitted()  # what a run that failed has left
    try:
        given = [_run_controlnet(net, geometry) for net in nets]
    except ShapecheckError as error:
        if refused := _run_unet_alone(unet, geometry, recorder).refused:  # then the ControlNet is not to blame
            raise ShapecheckError(f"{unet.name} does not run at {geometry}: {refused}") from error
        raise
    trace = None
    if given and (summed := _summed(given)) is not None:
        trace = _run_unet(unet, geometry, summed, recorder)
        if not trace.refused and len(trace.adds) == len(trace.arrived):
            return trace
    emitted = trace.emitted if trace else recorder.take_emitted()
    alone = _run_unet_alone(unet, geometry, recorder)
    if trace is not None and not alone.adds:  # a UNet that refuses surplus residuals: what it did with the real ones counts
        return trace
    return replace(alone, emitted=emitted, arrived=(), misunderstood=trace.misunderstood if trace else ())


def _run_unet_alone(unet: Model, geometry: Geometry, recorder: Recorder) -> Trace:
    """What the UNet adds when it is given more residuals than it takes, each of one cell, which fits any skip."""
    probes = [torch.zeros((1, 1, 1, 1), device=unet.device, dtype=unet.dtype) for _ in range(_PROBES_GIVEN)]
    return _run_unet(unet, geometry, (probes[1:], probes[0]), recorder)


def _run_controlnet(net: Model, geometry: Geometry) -> Residuals:
    try:
        downs, mid = net.module(**build_zero_arguments(net.inputs, geometry, net.device), return_dict=False)
    except Exception as error:  # a user's module may raise anything; the fault is told with where it came from
        raise ShapecheckError(f"{net.name} does not run at {geometry}: {type(error).__name__}: {error}") from error
    return list(downs), mid


def _run_unet(unet: Model, geometry: Geometry, given: Residuals, recorder: Recorder) -> Trace:
    downs, mid = given
    return _call_unet(unet, geometry, recorder, down_block_additional_residuals=downs, mid_block_additional_residual=mid)


def _call_unet(unet: Model, geometry: Geometry, recorder: Recorder, **given: object) -> Trace:
    arguments, before = build_zero_arguments(unet.inputs, geometry, unet.device), len(recorder.traces)
    with contextlib.suppress(Exception):  # a refusal is an observation: its text is in the trace
        unet.module(**arguments, **given)
    return recorder.traces[before:][-1]


def _adapter_divisor(adapter: Model, halvings: int) -> tuple[int, int]:
    """The smallest power of two whose multiples the adapter accepts, in latent cells, and how many features it gives."""
    divisor, failure = 1, ""
    while divisor <= _LARGEST_DIVISOR:
        try:
            counts = [len(_run_adapter(adapter, each)) for each in sizes.list_coarse_sizes(divisor, halvings)]
            return divisor, counts[0]
        except Exception as error:  # a user's module may raise anything
            divisor, failure = 2 * divisor, f"{type(error).__name__}: {error}"
    raise ShapecheckError(f"{adapter.name} does not run at any size that was tried; the last error: {failure}")


def _observe_features_at(unet: Model, adapter: Model, geometry: Geometry, probes: list[Tensor], recorder: Recorder) -> Trace:
    """One run with the adapter. Where its features do not fit, or it refuses the size, the UNet is asked alone what it adds."""
    recorder.take_emitted()
    trace = None
    with contextlib.suppress(Exception):  # it refuses the size: at others it does not
        features = _run_adapter(adapter, geometry)
        trace = _call_unet(unet, geometry, recorder, down_intrablock_additional_residuals=list(features))
    if trace is not None and not trace.refused and len(trace.adds) == len(trace.arrived):
        return trace
    recorder.take_emitted()
    alone = _call_unet(unet, geometry, recorder, down_intrablock_additional_residuals=probes)
    if trace is None:
        return replace(alone, arrived=())
    return replace(alone, emitted=trace.emitted, arrived=(), misunderstood=trace.misunderstood) if alone.adds else trace


def _feature_probes(unet: Model, geometry: Geometry, count: int, mid: Slot | None) -> list[Tensor]:
    """As many features as the UNet can take of `count`: one cell each, which fits any skip, but whole for the mid block."""
    blocks = len(unet.config["down_block_types"])
    shapes: list[Shape] = [(1, 1, 1, 1)] * min(count, blocks)
    if count > blocks and mid is not None:
        shapes.append(replace(mid, spatial="full").shape_at(geometry))
    return [torch.zeros(shape, device=unet.device, dtype=unet.dtype) for shape in shapes]


def _run_adapter(adapter: Model, geometry: Geometry) -> Sequence[Tensor]:
    (image,) = adapter.inputs
    features: Sequence[Tensor] = adapter.module(
        torch.zeros(image.shape_at(geometry), dtype=adapter.dtype, device=adapter.device)
    )
    return features


def _summed(given: Sequence[Residuals]) -> Residuals | None:
    """The sum of several ControlNets' residuals, as MultiControlNetModel makes it; None where they cannot be summed."""
    downs, mid = given[0]
    for more, more_mid in given[1:]:
        if len(more) != len(downs):
            return None
        try:
            downs, mid = [left + right for left, right in zip(downs, more, strict=True)], mid + more_mid
        except RuntimeError:
            return None
    return downs, mid
