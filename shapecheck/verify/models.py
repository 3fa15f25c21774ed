"""What a user names beside a file: the model it should be, and the ControlNets it should fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shapecheck import presets
from shapecheck.build import artefact
from shapecheck.contract import Contract, ContractError, Geometry, Mismatch, ShapecheckError
from shapecheck.observe import configs
from shapecheck.observe.configfile import refuse_absurd
from shapecheck.observe.configs import ModelSource
from shapecheck.observe.progress import Progress


def contract_of(model: str, *, offline: bool = False, progress: Progress) -> Contract:
    """The contract of a preset or a file that holds one, else that of a model observed now.

    Raises ShapecheckError where there is neither.
    """
    if model in presets.contracts():
        return presets.contract(model)
    if artefact.may_hold_contract(Path(model)):
        return artefact.read_contract(model)
    from shapecheck.observe.request import Request, carry_out

    return carry_out(Request(model), offline=offline, progress=progress).contract


def misfits(
    contract: Contract,
    controlnets: Sequence[str],
    geometry: Geometry | None = None,
    *,
    offline: bool = False,
    progress: Progress,
) -> tuple[Mismatch, ...]:
    """Every disagreement between the named ControlNets and the UNet of this contract, both built from configurations.

    Raises ShapecheckError where a ControlNet cannot be had, or the contract does not say which UNet it is of.
    """
    if contract.role != "unet":
        raise ShapecheckError("--controlnet: this file is itself a ControlNet; ask of a UNet's whether it fits")
    if not contract.slots:
        cause = "it was exported with --no-control: what a ControlNet gives has no effect"
        return (Mismatch("missing", "every slot", "no input for it", "one input a slot", cause=cause),)
    if "down_block_types" not in contract.config:
        raise ShapecheckError("--controlnet: it is not known which UNet this file is; name it with --model")
    for name in controlnets:
        configs.find(name, "controlnet", offline=offline)
    config, origin = contract.config.to_json(), contract.header.source or contract.digest
    refuse_absurd(config, origin)
    progress("importing torch and diffusers")
    from shapecheck.observe import sources
    from shapecheck.observe.probe import probe

    unet = sources.build(ModelSource("the file's UNet", origin, "UNet2DConditionModel", config))
    try:
        probe(unet, list(controlnets), geometry=geometry, offline=offline, progress=progress)
    except ContractError as error:
        return error.mismatches
    return ()
