"""The one way to a contract: build or take the models, watch them at several sizes, reconcile what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.contract import (
    Config, Contract, ContractError, ControlNetInfo, Geometry, Header, Input, Mismatch, ShapecheckError, Trace,
)  # fmt: skip
from shapecheck.observe import causes, configs, sizes, sources
from shapecheck.observe.inputs import call_arguments, controlnet_inputs, unet_inputs
from shapecheck.observe.reconcile import Subject, emitted_table, reconcile
from shapecheck.observe.record import record

_TOKENS_GIVEN = 256
_LARGEST_DIVISOR = 2**7

Progress = Callable[[str], None]
ControlNetChoice = str | nn.Module | Sequence[str | nn.Module] | None


@dataclass(frozen=True, slots=True)
class _Model:
    """A module under observation, and what is read off it."""

    module: nn.Module
    name: str
    inputs: tuple[Input, ...]

    @property
    def config(self) -> Config:
        return Config(self.module.config)  # type: ignore[arg-type]  # a diffusers FrozenDict

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def probe(
    model: str | nn.Module,
    controlnet: ControlNetChoice = None,
    *,
    geometry: Geometry | None = None,
    run: Callable[[], object] | None = None,
    offline: bool = False,
    vae_factor: int | None = None,
    progress: Progress = lambda step: None,
) -> Contract:
    """Observe a UNet and its ControlNet, and return the contract both agree on.

    `model` is a preset, a config.json, a diffusers folder, a hub id, or a live UNet2DConditionModel (or subclass) on any
    device. `controlnet` is one or several of the same, a MultiControlNetModel, or the name of a UNet preset (the ControlNet
    made for it); without it the ControlNet the UNet implies, and where diffusers cannot build that one, the UNet alone,
    which `contract.header.notes` then says.

    `geometry` is one more size to observe, and the one at which disagreements are told (default: the model's native size).
    `run` is a call that drives the live modules, such as a pipeline's: what reaches the UNet in it is observed too.

    Raises ContractError with every mismatch where the two disagree, ShapecheckError where either cannot be had or run.
    Modules are left as they were: no hook remains, even when a forward raises.
    """
    unet, header = _take_unet(model, offline)
    nets, notes = _take_controlnets(controlnet, model, unet, offline)
    notes = (*header.notes, *notes, *filter(None, (_own_latents(unet, net) for net in nets)))
    infos = tuple(map(_info, nets))
    header = replace(header, controlnets=infos, notes=notes, vae_factor=vae_factor or header.vae_factor)
    traces, divisor = _observe(unet, nets, geometry, progress)
    if run is not None:
        traces += _observe_run(unet, nets, run)
    subject = Subject(type(unet.module).__name__, unet.inputs, unet.config, divisor, header)
    shown = geometry or Geometry(1, *(header.native or (64, 64)))
    return _judged(traces, subject, unet, nets, shown)


def _judged(traces: list[Trace], subject: Subject, unet: _Model, nets: Sequence[_Model], shown: Geometry) -> Contract:
    """The contract, or every mismatch with its likely cause."""
    found: tuple[Mismatch, ...] = ()
    try:
        contract = reconcile(traces, subject, at=shown)
    except ContractError as error:
        assert error.contract is not None
        contract, found = error.contract, error.mismatches
    found = (*found, *(each for net in nets for each in causes.input_mismatches(unet.inputs, net.inputs)))
    if not found:
        return contract
    if len(nets) == 1:
        found = causes.explain(found, contract, emitted_table(traces, 0), nets[0].inputs, nets[0].config)
    names = " + ".join(net.name for net in nets)
    raise ContractError(found, subject=f"{unet.name} with {names}", contract=contract)


# the models


def _take_unet(model: str | nn.Module, offline: bool) -> tuple[_Model, Header]:
    if isinstance(model, str):
        source = configs.find(model, "unet", offline=offline)
        module = sources.build(source)
        notes = (*source.notes, *_ignored(source))
        header = Header(source=source.origin, vae_factor=source.vae_factor, notes=notes)
    else:
        module, source = getattr(model, "_orig_mod", model), None
        header = Header(source=f"live {type(module).__name__}")
    if not hasattr(module, "config"):
        raise ShapecheckError(f"a {type(module).__name__} has no config: expected a UNet2DConditionModel or a subclass of it")
    config: Mapping[str, Any] = module.config  # type: ignore[assignment]
    if "up_block_types" not in config or "cross_attention_dim" not in config:
        raise ShapecheckError(f"a {type(module).__name__} is no conditional UNet: expected a UNet2DConditionModel")
    name = source.name if source else type(module).__name__
    versions = tuple((package, version(package)) for package in ("diffusers", "torch"))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    header = replace(header, native=_native(config.get("sample_size")), parameters=parameters, versions=versions)
    return _Model(module, name, unet_inputs(config, _dtype(module))), header


def _take_controlnets(
    choice: ControlNetChoice, model: str | nn.Module, unet: _Model, offline: bool
) -> tuple[list[_Model], tuple[str, ...]]:
    """The ControlNets to observe, and what the reader must know of the choice."""
    if choice is None and isinstance(model, str):
        choice = [sources.build(each) for each in configs.find(model, "unet", offline=offline).controlnets] or None
    if choice is None:
        try:
            implied = sources.implied_controlnet(unet.module)
        except ShapecheckError as error:
            return [], (f"UNet side alone: {error}",)
        return [_controlnet(implied, f"the ControlNet {unet.name} implies")], ()
    if isinstance(choice, nn.Module) and hasattr(choice, "nets"):
        choice = list(choice.nets)
    several = [choice] if isinstance(choice, (str, nn.Module)) else list(choice)
    return [_take_controlnet(each, offline) for each in several], ()


def _take_controlnet(choice: str | nn.Module, offline: bool) -> _Model:
    if not isinstance(choice, str):
        return _controlnet(getattr(choice, "_orig_mod", choice), type(choice).__name__)
    source = configs.find(choice, "controlnet", offline=offline)
    module = sources.build(source)
    if source.role == "unet":
        return _controlnet(sources.implied_controlnet(module), f"the ControlNet of {choice}")
    return _controlnet(module, choice)


def _controlnet(module: nn.Module, name: str) -> _Model:
    config: Any = getattr(module, "config", {})
    if "conditioning_embedding_out_channels" not in config:
        raise ShapecheckError(f"a {type(module).__name__} is no ControlNetModel, the only kind of ControlNet read so far")
    return _Model(module, name, controlnet_inputs(config, _dtype(module)))


def _info(net: _Model) -> ControlNetInfo:
    config = net.config
    return ControlNetInfo(
        net.name,
        type(net.module).__name__,
        config["in_channels"],
        config.get("cross_attention_dim"),
        config["global_pool_conditions"],
    )


def _own_latents(unet: _Model, net: _Model) -> str:
    """Inpainting and edit UNets take more latent channels than the ControlNets used with them, which is no fault."""
    takes, wants = net.config["in_channels"], unet.config["in_channels"]
    if takes == wants:
        return ""
    return f"{net.name} takes {takes} latent channels and the UNet {wants}: the pipeline must give each its own"


def _ignored(source: configs.ModelSource) -> tuple[str, ...]:
    keys = sources.ignored_keys(source)
    return (f"diffusers ignores these keys of {source.origin}: {', '.join(keys)}",) if keys else ()


def _native(sample_size: Any) -> tuple[int, int] | None:
    if isinstance(sample_size, int):
        return sample_size, sample_size
    return tuple(sample_size) if isinstance(sample_size, (list, tuple)) and len(sample_size) == 2 else None


def _dtype(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")


# the runs


def _observe(unet: _Model, nets: Sequence[_Model], geometry: Geometry | None, progress: Progress) -> tuple[list[Trace], int]:
    """Traces at every size needed to know each halving, and the divisor the UNet's sizes need."""
    halvings = len(unet.config["down_block_types"]) - 1
    wanted = [*sizes.survey(halvings), *(sizes.odd_at(level) for level in range(3, halvings))]
    if geometry is not None:
        wanted.append(geometry)
    traces = []
    for number, each in enumerate(wanted, start=1):
        progress(f"observing {each} ({number} of {len(wanted)})")
        traces.append(_observe_at(unet, nets, each))
    refused = [trace for trace in traces if trace.refused]
    if not refused:
        return traces, 1
    divisor, seen = _divisor(unet, nets, progress)
    if divisor is None:
        raise ShapecheckError(f"{unet.name} does not run at any size that was tried; the last error: {seen[-1].refused}")
    return traces + seen, divisor


def _divisor(unet: _Model, nets: Sequence[_Model], progress: Progress) -> tuple[int | None, list[Trace]]:
    """The smallest power of two whose multiples the UNet accepts, and the traces that show it."""
    divisor, seen = 2, []
    while divisor <= _LARGEST_DIVISOR:
        progress(f"some sizes are refused; trying multiples of {divisor}")
        tried = [_observe_at(unet, nets, each) for each in sizes.multiples_of(divisor)]
        seen += tried
        if not any(trace.refused for trace in tried):
            return divisor, seen
        divisor *= 2
    return None, seen


def _observe_at(unet: _Model, nets: Sequence[_Model], geometry: Geometry) -> Trace:
    """One run of everything. Where the ControlNets' residuals do not fit, the UNet is asked alone what it adds."""
    emitted = []
    with torch.no_grad(), record(unet.module, [net.module for net in nets]) as recorder:
        given = [_run_controlnet(net, geometry) for net in nets]
        if given and _have_one_shape(given):
            downs, mid = _summed(given)
            trace = _run_unet(unet, geometry, downs, mid, recorder)
            if not trace.refused and len(trace.adds) == len(trace.arrived) == len(trace.emitted) // len(nets):
                return trace
            emitted = list(trace.emitted)
        else:
            emitted = list(recorder.take_emitted())
        tokens = [torch.zeros((1, 1, 1, 1), device=unet.device, dtype=_torch_dtype(unet)) for _ in range(_TOKENS_GIVEN)]
        alone = _run_unet(unet, geometry, tokens[1:], tokens[0], recorder)
    return replace(alone, emitted=tuple(emitted), arrived=())


def _run_controlnet(net: _Model, geometry: Geometry) -> tuple[list[Tensor], Tensor]:
    try:
        downs, mid = net.module(**call_arguments(net.inputs, geometry, net.device), return_dict=False)
    except Exception as error:  # a user's module may raise anything; the fault is told with where it came from
        raise ShapecheckError(f"{net.name} does not run at {geometry}: {type(error).__name__}: {error}") from error
    return list(downs), mid


def _run_unet(unet: _Model, geometry: Geometry, downs: list[Tensor], mid: Tensor, recorder: Any) -> Trace:
    try:
        unet.module(
            **call_arguments(unet.inputs, geometry, unet.device),
            down_block_additional_residuals=downs,
            mid_block_additional_residual=mid,
        )
    except Exception:  # noqa: BLE001  # what was raised is in the trace: a refusal is an observation
        pass
    trace: Trace = recorder.traces[-1]
    return trace


def _have_one_shape(given: Sequence[tuple[list[Tensor], Tensor]]) -> bool:
    """Whether several ControlNets' residuals can be summed."""
    return len({(tuple(down.shape for down in downs), mid.shape) for downs, mid in given}) == 1


def _summed(given: Sequence[tuple[list[Tensor], Tensor]]) -> tuple[list[Tensor], Tensor]:
    """The sum of several ControlNets' residuals, as MultiControlNetModel makes it."""
    downs, mid = given[0]
    for more, more_mid in given[1:]:
        downs, mid = [left + right for left, right in zip(downs, more, strict=True)], mid + more_mid
    return downs, mid


def _observe_run(unet: _Model, nets: Sequence[_Model], run: Callable[[], object]) -> list[Trace]:
    """What a call of the user's does with the same modules; each different UNet call once."""
    failure: Exception | None = None
    with record(unet.module, [net.module for net in nets]) as recorder:
        try:
            run()
        except Exception as error:  # noqa: BLE001  # raised again below unless a mismatch explains it
            failure = error
    traces = list(dict.fromkeys(recorder.traces))
    if failure is not None and not traces:
        raise failure
    if not traces:
        raise ShapecheckError("run() never called the UNet that was given")
    return traces


def _torch_dtype(model: _Model) -> torch.dtype:
    return next(model.module.parameters()).dtype
