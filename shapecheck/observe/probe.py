"""The one way to a contract: take the models, watch them at several sizes, reconcile what was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from shapecheck.contract import Contract, ContractError, Geometry, Mismatch, ShapecheckError, Slot
from shapecheck.contract.naming import SHAPECHECK, is_feature
from shapecheck.models.model import (
    AdapterChoice,
    ControlNetChoice,
    Model,
    describe_controlnet,
    take_adapters,
    take_controlnet_alone,
    take_controlnets,
    take_unet,
)
from shapecheck.observe import causes
from shapecheck.observe.reconcile import Subject, derive_emitted, derive_slots, reconcile
from shapecheck.observe.runs import observe, observe_adapter, observe_call, observe_controlnet
from shapecheck.observe.trace import Trace
from shapecheck.progress import Progress, silent


def probe(
    model: str | nn.Module,
    controlnet: ControlNetChoice = None,
    *,
    adapter: AdapterChoice = None,
    geometry: Geometry | None = None,
    run: Callable[[], object] | None = None,
    offline: bool = False,
    vae_factor: int | None = None,
    progress: Progress = silent,
) -> Contract:
    """Observe a UNet and its ControlNet, and return the contract both agree on.

    `model` is a preset, a config.json, a diffusers folder, a .safetensors checkpoint, a hub id, or a live
    UNet2DConditionModel (or subclass) on any device. `controlnet` is one or several of the same, a MultiControlNetModel, or
    the name of a UNet preset (the ControlNet made for it); without it the ControlNet the UNet implies, and where diffusers
    cannot build that one, the UNet alone, which `contract.header.notes` then says. `adapter` is a T2I-Adapter, named or
    live, or True for the one the UNet implies; where its features are added the contract has `features`.

    `geometry` is one more size to observe, and the one at which disagreements are told (default: the model's native size).
    `run` is a call that drives the same live modules, such as a pipeline's: what reaches the UNet in it is observed too.
    `vae_factor` is the number of pixels a latent cell covers along each side, where the source does not say.

    Raises ContractError with every mismatch where they disagree, ShapecheckError where either cannot be had or run.
    Modules are left as they were: no hook remains, even when a forward raises.
    """
    unet, header, beside = take_unet(model, offline)
    nets, notes = take_controlnets(controlnet, unet, beside, offline)
    header = replace(
        header,
        controlnets=tuple(map(describe_controlnet, nets)),
        notes=(*header.notes, *notes),
        vae_factor=vae_factor or header.vae_factor,
    )
    traces, divisor = observe(unet, nets, geometry, progress)
    subject = Subject(type(unet.module).__name__, unet.inputs, unet.config, divisor, header)
    adapters: list[Model] = []
    if adapter is not None:
        adapters, subject, featured = _with_adapter(adapter, unet, nets, traces, subject, offline, progress)
        traces += featured
    seen, failure = observe_call(unet, nets, adapters, run) if run is not None else ([], None)
    if run is not None and failure is None and not seen:
        raise ShapecheckError("run() never called the UNet that was given to probe")
    shown = geometry or Geometry(1, *header.usual)
    contract = _judged(traces + seen, subject, unet, nets, adapters, shown)
    if failure is not None:
        raise failure
    return contract


def _with_adapter(
    choice: str | nn.Module | Literal[True],
    unet: Model,
    nets: Sequence[Model],
    traces: Sequence[Trace],
    subject: Subject,
    offline: bool,
    progress: Progress,
) -> tuple[list[Model], Subject, list[Trace]]:
    """The adapter, with what was seen of it; of those that the UNet may imply the first whose features all fit.

    Raises ShapecheckError where none of those fits.
    """
    header = subject.header
    adapters, notes = take_adapters(choice, unet, header.vae_factor, offline)
    mid = next((slot for slot in derive_slots(traces)[0] if slot.name == SHAPECHECK.mid), None)
    accepted = [trace.geometry for trace in traces if not trace.refused]
    for each in adapters:
        seen, divisor = observe_adapter(unet, nets, each, mid, accepted, subject.divisor, progress)
        if choice is True and reconcile(seen, subject)[1]:
            continue
        if divisor > subject.divisor:
            factor = divisor * header.vae_factor
            notes += (f"{each.name} takes images whose sides are multiples of {factor} pixels, {divisor} latent cells",)
        return [each], replace(subject, header=replace(header, adapter=each.name, notes=(*header.notes, *notes))), seen
    raise ShapecheckError(f"none of diffusers' T2I-Adapters has features that fit {unet.name}")


def _judged(
    traces: Sequence[Trace],
    subject: Subject,
    unet: Model,
    nets: Sequence[Model],
    adapters: Sequence[Model],
    shown: Geometry,
) -> Contract:
    """The contract; or ContractError with every mismatch and its likely cause."""
    contract, every = reconcile(traces, subject, at=shown)
    found = [each for each in every if not is_feature(each.where)]
    explained: list[Mismatch] = []
    for number, net in enumerate(nets):
        name = f"ControlNet {number + 1}" if len(nets) > 1 else ""
        inputs = tuple(replace(each, controlnet=name) for each in causes.compare_pipeline_inputs(unet.inputs, net.inputs))
        own = (*(each for each in found if each.controlnet == name), *inputs)
        explained += causes.add_causes(own, contract, derive_emitted(traces, number), net.inputs, net.config)
    if len(nets) != 1:
        explained += [each for each in found if not each.controlnet]
    unfit = [each for each in every if is_feature(each.where)]
    explained += causes.add_adapter_causes(unfit, contract, adapters[0].config) if adapters else unfit
    if not explained:
        return contract
    beside = " + ".join(each.name for each in (*nets, *adapters))
    raise ContractError(tuple(explained), subject=f"{unet.name} with {beside}", contract=contract)


def probe_controlnet(module: nn.Module) -> Contract:
    """Observe a ControlNet alone: what it takes, `conditioning_scale` included, and what it emits, as slots.

    A slot's `producer` is then the module that makes the residual, and nothing consumes it.
    Raises ShapecheckError where it does not run, or emits sizes no chain of halvings explains.
    """
    net, header = take_controlnet_alone(module)
    traces = observe_controlnet(net)
    makers = {residual.name: residual.module for residual in traces[0].emitted}
    table = derive_emitted(traces, 0)
    if unexplained := makers.keys() - table.keys():
        raise ShapecheckError(f"{net.name} emits sizes that no chain of halvings explains, at {min(unexplained)}")
    slots = tuple(
        Slot(name, shape, "pooled" if shape[2].symbol is None else "full", makers[name], "", ())
        for name, shape in table.items()
    )
    return Contract(type(module).__name__, net.inputs, slots, net.config, 1, header, role="controlnet")
