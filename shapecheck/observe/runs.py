"""Running the models under observation: at every size that is needed, and as a user's own call drives them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor

from shapecheck.contract import Geometry, Shape, ShapecheckError, Slot
from shapecheck.models.forward_call import build_residual_arguments
from shapecheck.models.inputs import build_zero_arguments
from shapecheck.models.model import Model
from shapecheck.observe import sizes
from shapecheck.observe.record import Recorder, record
from shapecheck.observe.trace import Trace
from shapecheck.progress import Progress

_ONE_CELL: Shape = (1, 1, 1, 1)
_DIVISORS = (1, 2, 4, 8, 16, 32, 64)


class ControlNetError(ShapecheckError):
    """A ControlNet does not run."""


def observe(unet: Model, nets: Sequence[Model], geometry: Geometry | None, progress: Progress) -> tuple[list[Trace], int]:
    """Return traces at every size needed to know each halving, and at `geometry`, and the divisor that the UNet's sizes need.

    Raises ShapecheckError if a model runs at no size.
    """
    halvings = len(unet.config["down_block_types"]) - 1
    geometries = [*sizes.list_survey_sizes(halvings), *map(sizes.odd_geometry, range(3, halvings))]
    if geometry is not None:
        geometries.append(geometry)
    traces = []
    with torch.no_grad(), record(unet.module, [net.module for net in nets]) as recorder:
        for number, at in enumerate(geometries, start=1):
            progress(f"observing {unet.name} at {at} ({number} of {len(geometries)})")
            traces.append(_observe_at(unet, nets, at, recorder))
        if not any(trace.refused for trace in traces):
            return traces, 1
        # The divisor is the smallest whose multiples the UNet accepts; if it refuses one of the largest too, no size helps.
        traces.append(_observe_at(unet, nets, Geometry(2, _DIVISORS[-1], 2 * _DIVISORS[-1]), recorder))
        for divisor in _DIVISORS[1:] if not traces[-1].refused else ():
            progress(f"{unet.name} refuses some sizes; trying multiples of {divisor}")
            multiples = sizes.list_multiples(divisor, halvings)
            traces += [_observe_at(unet, nets, multiple, recorder) for multiple in multiples]
            if not any(trace.refused for trace in traces[-len(multiples) :]):
                return traces, divisor
    raise ShapecheckError(f"{unet.name} does not run at any size that was tried; the last error: {traces[-1].refused}")


def observe_call(
    unet: Model, nets: Sequence[Model], adapters: Sequence[Model], call: Callable[[], object]
) -> tuple[list[Trace], Exception | None]:
    """Return each different UNet call that a call of the user's makes with the same modules, and what it raised."""
    failure: Exception | None = None
    with record(unet.module, [net.module for net in nets], [adapter.module for adapter in adapters]) as recorder:
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
    """Return what the UNet does with an adapter's features, and the divisor that the adapter's sizes need, in latent cells.

    The UNet is observed at the sizes it has `accepted`, multiples of `allowed`, and at others that the adapter takes.

    `mid` is the slot after the mid block, where a feature is added only if it is of that very shape. `nets` are not run,
    and the adapter is counted after them. Raises ShapecheckError if the adapter runs at no size.
    """
    blocks = len(unet.config["down_block_types"])
    traces = []
    with torch.no_grad(), record(unet.module, [net.module for net in nets], [adapter.module]) as recorder:
        divisor, count = _find_adapter_divisor(adapter, blocks - 1)
        coarse = sizes.list_coarse_sizes(max(divisor, allowed), blocks - 1) if divisor > 1 else ()
        for number, geometry in enumerate(dict.fromkeys((*accepted, *coarse)), start=1):
            progress(f"observing {adapter.name} at {geometry} ({number} of {len(accepted) + len(coarse)})")
            recorder.take_emitted()
            trace = None
            with contextlib.suppress(Exception):  # it refuses this size: others it does not
                trace = _call_unet(unet, geometry, recorder, features=_run_adapter(adapter, geometry))
            # One cell fits any skip, but for the mid block a feature must be whole.
            shapes = [_ONE_CELL] * min(count, blocks)
            if count > blocks and mid is not None:
                shapes.append(replace(mid, spatial="full").shape_at(geometry))
            alone = partial(_call_with_probes, unet, geometry, recorder, features=shapes)
            traces.append(_complete(trace, recorder, alone))
    return traces, divisor


def observe_controlnet(net: Model) -> list[Trace]:
    """Return what a ControlNet alone emits, at the sizes a UNet would be observed at."""
    traces = []
    for geometry in sizes.list_survey_sizes(len(net.config["down_block_types"]) - 1):
        with torch.no_grad(), record(torch.nn.Identity(), [net.module]) as recorder:
            _run_controlnet(net, geometry)
        traces.append(Trace(geometry, recorder.take_emitted()))
    return traces


def _observe_at(unet: Model, nets: Sequence[Model], geometry: Geometry, recorder: Recorder) -> Trace:
    """Run everything once. If the ControlNets' residuals do not fit, see what the UNet adds when it is run alone."""
    recorder.take_emitted()  # left by a run that failed
    # More residuals than any UNet has slots, each of one cell, which fits any skip.
    alone = partial(_call_with_probes, unet, geometry, recorder, residuals=[_ONE_CELL] * 256)
    try:
        emitted = [_run_controlnet(net, geometry) for net in nets]
    except ControlNetError as error:
        if refused := alone().refused:  # then the ControlNet is not to blame
            raise ShapecheckError(f"{unet.name} does not run at {geometry}: {refused}") from error
        raise
    summed: list[Tensor] = []
    # Several ControlNets' residuals are summed as MultiControlNetModel does it, if their number and shapes allow.
    with contextlib.suppress(RuntimeError, ValueError):
        summed = [reduce(add, residuals) for residuals in zip(*emitted, strict=True)]
    return _complete(_call_unet(unet, geometry, recorder, summed) if summed else None, recorder, alone)


def _complete(trace: Trace | None, recorder: Recorder, run_alone: Callable[[], Trace]) -> Trace:
    """Return the trace if every residual reached an addition, else that of the UNet run alone, with what was emitted."""
    if trace is not None and not trace.refused and len(trace.adds) == len(trace.arrived):
        return trace
    emitted = trace.emitted if trace else recorder.take_emitted()
    alone = run_alone()
    if trace is not None and not alone.adds:  # a UNet that refuses surplus residuals: what it did with the real ones counts
        return trace
    return replace(alone, emitted=emitted, arrived=(), misunderstood=trace.misunderstood if trace else alone.misunderstood)


def _call_unet(
    unet: Model, geometry: Geometry, recorder: Recorder, residuals: Sequence[Tensor] = (), features: Sequence[Tensor] = ()
) -> Trace:
    arguments = build_zero_arguments(unet.inputs, geometry, unet.device) | build_residual_arguments(residuals, features)
    before = len(recorder.traces)
    with contextlib.suppress(Exception):  # a refusal is an observation: its text is in the trace
        unet.module(**arguments)
    return recorder.traces[before:][-1]


def _call_with_probes(
    unet: Model, geometry: Geometry, recorder: Recorder, *, residuals: Sequence[Shape] = (), features: Sequence[Shape] = ()
) -> Trace:
    """Run the UNet with zeros of these shapes, to see what it adds."""
    probes = (
        [torch.zeros(shape, device=unet.device, dtype=unet.dtype) for shape in shapes] for shapes in (residuals, features)
    )
    return _call_unet(unet, geometry, recorder, *probes)


def _run_controlnet(net: Model, geometry: Geometry) -> list[Tensor]:
    try:
        downs, mid = net.module(**build_zero_arguments(net.inputs, geometry, net.device), return_dict=False)
    except Exception as error:  # a user's module may raise anything; the message says where it came from
        raise ControlNetError(f"{net.name} does not run at {geometry}: {type(error).__name__}: {error}") from error
    return [*downs, mid]


def _run_adapter(adapter: Model, geometry: Geometry) -> Sequence[Tensor]:
    (image,) = adapter.inputs
    zeros = torch.zeros(image.shape_at(geometry), dtype=adapter.dtype, device=adapter.device)
    return adapter.module(zeros)  # type: ignore[no-any-return]


def _find_adapter_divisor(adapter: Model, halvings: int) -> tuple[int, int]:
    """Return the smallest power of two whose multiples the adapter accepts, in latent cells, and the number of features."""
    failure = ""
    for divisor in _DIVISORS:
        try:
            counts = [len(_run_adapter(adapter, geometry)) for geometry in sizes.list_coarse_sizes(divisor, halvings)]
            return divisor, counts[0]
        except Exception as error:  # a user's module may raise anything
            failure = f"{type(error).__name__}: {error}"
    raise ShapecheckError(f"{adapter.name} does not run at any size that was tried; the last error: {failure}")
