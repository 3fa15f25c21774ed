"""The one way to a contract: take the models, watch them at several sizes, reconcile what was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from shapecheck.contract import (
    Contract,
    ContractError,
    ControlNetInfo,
    Geometry,
    Mismatch,
    ShapecheckError,
    Slot,
)
from shapecheck.contract.naming import SHAPECHECK, is_feature
from shapecheck.models import model as models
from shapecheck.models.model import AdapterChoice, ControlNetChoice, Model
from shapecheck.observe import causes
from shapecheck.observe.reconcile import derive_emitted, derive_slots, reconcile
from shapecheck.observe.runs import ControlNetError, observe, observe_adapter, observe_call, observe_controlnet
from shapecheck.observe.trace import Trace
from shapecheck.progress import Progress, silent


def describe_controlnet(net: Model) -> ControlNetInfo:
    """Return the entry of a ControlNet in a contract's header."""
    config = net.config
    pooled = bool(config.get("global_pool_conditions"))
    return ControlNetInfo(net.name, type(net.module).__name__, config["in_channels"], config.get("cross_attention_dim"), pooled)


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
    the name of a UNet preset (the ControlNet made for it); without it the ControlNet the UNet implies, and if diffusers
    cannot build that one, the UNet alone, which `contract.header.notes` then says. `adapter` is a T2I-Adapter, named or
    live, or True for the one the UNet implies; the contract then has `features`, the places where they are added.

    `geometry` is one more size to observe, and the one at which disagreements are reported (default: the model's native
    size). `run` is a call that drives the same live modules, such as a pipeline's: what reaches the UNet in it is observed
    too. `vae_factor` is the number of pixels a latent cell covers along each side, if the source does not say.

    Raises ContractError with every mismatch if they disagree, ShapecheckError if either cannot be found or run.
    Modules are left as they were: no hook remains, even when a forward raises.
    """
    unet, header, beside = models.take_unet(model, offline)
    nets, notes = models.take_controlnets(controlnet, unet, beside, offline)
    try:
        traces, divisor = observe(unet, nets, geometry, progress)
    except ControlNetError as error:
        if controlnet is not None or beside:
            raise
        # diffusers builds one for every UNet, and those of other families than Stable Diffusion's take inputs that it does not
        nets, notes = [], (f"UNet side alone: {error}",)
        traces, divisor = observe(unet, nets, geometry, progress)
    header = replace(
        header,
        controlnets=tuple(map(describe_controlnet, nets)),
        notes=(*header.notes, *notes),
        vae_factor=vae_factor or header.vae_factor,
    )
    slotless = Contract(type(unet.module).__name__, unet.inputs, (), unet.config, divisor, header)
    adapters: list[Model] = []
    if adapter is not None:
        adapters, slotless, feature_traces = _observe_any_adapter(adapter, unet, nets, traces, slotless, offline, progress)
        traces += feature_traces
    failure = None
    if run is not None:
        call_traces, failure = observe_call(unet, nets, adapters, run)
        if failure is None and not call_traces:
            raise ShapecheckError("run() never called the UNet that was given to probe")
        traces += call_traces
    contract = _require_agreement(traces, slotless, unet, nets, adapters, geometry or Geometry(1, *header.usual))
    if failure is not None:
        raise failure
    return contract


def _observe_any_adapter(
    choice: str | nn.Module | Literal[True],
    unet: Model,
    nets: Sequence[Model],
    traces: Sequence[Trace],
    slotless: Contract,
    offline: bool,
    progress: Progress,
) -> tuple[list[Model], Contract, list[Trace]]:
    """Observe the adapter, or the first whose features all fit of those that the UNet may imply, and note it in the header.

    Raises ShapecheckError if none of those fits.
    """
    header = slotless.header
    adapters, notes = models.take_adapters(choice, unet, header.vae_factor, offline)
    mid = next((slot for slot in derive_slots(traces)[0] if slot.name == SHAPECHECK.mid), None)
    accepted = [trace.geometry for trace in traces if not trace.refused]
    for adapter in adapters:
        feature_traces, divisor = observe_adapter(unet, nets, adapter, mid, accepted, slotless.divisor, progress)
        if choice is True and reconcile(feature_traces, slotless)[1]:
            continue
        if divisor > slotless.divisor:
            factor = divisor * header.vae_factor
            notes += (f"{adapter.name} takes images whose sides are multiples of {factor} pixels, {divisor} latent cells",)
        header = replace(header, adapter=adapter.name, notes=(*header.notes, *notes))
        return [adapter], replace(slotless, header=header), feature_traces
    raise ShapecheckError(f"none of diffusers' T2I-Adapters has features that fit {unet.name}")


def _require_agreement(
    traces: Sequence[Trace], slotless: Contract, unet: Model, nets: Sequence[Model], adapters: Sequence[Model], at: Geometry
) -> Contract:
    """Return the contract, or raise ContractError with every mismatch and its likely cause."""
    contract, mismatches = reconcile(traces, slotless, at=at)
    residuals = [mismatch for mismatch in mismatches if not is_feature(mismatch.where)]
    features = [mismatch for mismatch in mismatches if is_feature(mismatch.where)]
    explained: list[Mismatch] = []
    for number, net in enumerate(nets):
        name = f"ControlNet {number + 1}" if len(nets) > 1 else ""
        inputs = (replace(mismatch, controlnet=name) for mismatch in causes.compare_pipeline_inputs(unet.inputs, net.inputs))
        own = [*(mismatch for mismatch in residuals if mismatch.controlnet == name), *inputs]
        explained += causes.add_causes(own, contract, derive_emitted(traces, number), net.inputs, net.config)
    if len(nets) != 1:
        explained += [mismatch for mismatch in residuals if not mismatch.controlnet]
    explained += causes.add_adapter_causes(features, contract, adapters[0].config) if adapters else features
    if explained:
        names = " + ".join(model.name for model in (*nets, *adapters))
        raise ContractError(tuple(explained), subject=f"{unet.name} with {names}", contract=contract)
    return contract


def probe_controlnet(module: nn.Module) -> Contract:
    """Observe a ControlNet alone: its inputs, `conditioning_scale` included, and what it emits, as slots.

    A slot's `producer` is then the module that makes the residual, and nothing consumes it.
    Raises ShapecheckError if it does not run, or emits sizes that no chain of halvings explains.
    """
    net, header = models.take_controlnet_alone(module)
    traces = observe_controlnet(net)
    makers = {residual.name: residual.module for residual in traces[0].emitted}
    rules = derive_emitted(traces, 0)
    if unexplained := makers.keys() - rules.keys():
        raise ShapecheckError(f"{net.name} emits sizes that no chain of halvings explains, at {min(unexplained)}")
    slots = tuple(
        Slot(name, rule, "pooled" if rule[2].symbol is None else "full", makers[name], "", ()) for name, rule in rules.items()
    )
    return Contract(type(module).__name__, net.inputs, slots, net.config, 1, header, role="controlnet")
