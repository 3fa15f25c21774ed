"""The one way to a contract: take the models, watch them at several sizes, reconcile what was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from shapecheck.contract import Contract, ContractError, Geometry, Mismatch, ShapecheckError, Slot, Trace
from shapecheck.observe import causes
from shapecheck.observe.models import ControlNetChoice, Model, info, take_controlnet_alone, take_controlnets, take_unet
from shapecheck.observe.progress import Progress, silent
from shapecheck.observe.reconcile import Subject, emitted_table, reconcile, slot_name
from shapecheck.observe.runs import observe, observe_call, observe_controlnet


def probe(
    model: str | nn.Module,
    controlnet: ControlNetChoice = None,
    *,
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
    cannot build that one, the UNet alone, which `contract.header.notes` then says.

    `geometry` is one more size to observe, and the one at which disagreements are told (default: the model's native size).
    `run` is a call that drives the same live modules, such as a pipeline's: what reaches the UNet in it is observed too.
    `vae_factor` is the number of pixels a latent cell covers along each side, where the source does not say.

    Raises ContractError with every mismatch where the two disagree, ShapecheckError where either cannot be had or run.
    Modules are left as they were: no hook remains, even when a forward raises.
    """
    unet, header, beside = take_unet(model, offline)
    nets, notes = take_controlnets(controlnet, unet, beside, offline)
    header = replace(
        header,
        controlnets=tuple(map(info, nets)),
        notes=(*header.notes, *notes),
        vae_factor=vae_factor or header.vae_factor,
    )
    traces, divisor = observe(unet, nets, geometry, progress)
    seen, failure = observe_call(unet, nets, run) if run is not None else ([], None)
    if run is not None and failure is None and not seen:
        raise ShapecheckError("run() never called the UNet that was given to probe")
    subject = Subject(type(unet.module).__name__, unet.inputs, unet.config, divisor, header)
    shown = geometry or Geometry(1, *header.usual)
    contract = _judged(traces + seen, subject, unet, nets, shown)
    if failure is not None:
        raise failure
    return contract


def _judged(traces: Sequence[Trace], subject: Subject, unet: Model, nets: Sequence[Model], shown: Geometry) -> Contract:
    """The contract; or ContractError with every mismatch and its likely cause."""
    contract, found = reconcile(traces, subject, at=shown)
    explained: list[Mismatch] = []
    for number, net in enumerate(nets):
        name = f"ControlNet {number + 1}" if len(nets) > 1 else ""
        inputs = tuple(replace(each, controlnet=name) for each in causes.input_mismatches(unet.inputs, net.inputs))
        own = (*(each for each in found if each.controlnet == name), *inputs)
        explained += causes.explain(own, contract, emitted_table(traces, number), net.inputs, net.config)
    if len(nets) != 1:
        explained += [each for each in found if not each.controlnet]
    if not explained:
        return contract
    raise ContractError(tuple(explained), subject=f"{unet.name} with {' + '.join(net.name for net in nets)}", contract=contract)


def probe_controlnet(module: nn.Module) -> Contract:
    """Observe a ControlNet alone: what it takes, `conditioning_scale` included, and what it emits, as slots.

    A slot's `producer` is then the module that makes the residual, and nothing consumes it.
    Raises ShapecheckError where it does not run, or emits sizes no chain of halvings explains.
    """
    net, header = take_controlnet_alone(module)
    traces = observe_controlnet(net)
    emitted = {residual.index: residual for residual in traces[0].emitted}
    table = emitted_table(traces, 0)
    if unexplained := emitted.keys() - table.keys():
        raise ShapecheckError(f"{net.name} emits sizes that no chain of halvings explains, at residual {min(unexplained)}")
    slots = tuple(
        Slot(slot_name(index), shape, "pooled" if shape[2].symbol is None else "full", emitted[index].module, "", ())
        for index, shape in table.items()
    )
    return Contract(type(module).__name__, net.inputs, slots, net.config, 1, header, role="controlnet")
