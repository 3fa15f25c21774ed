"""The ControlNets that a user names beside a file, and whether they fit its UNet."""

from __future__ import annotations

from collections.abc import Sequence

from shapecheck.contract import Contract, ContractError, Geometry, Mismatch, ShapecheckError
from shapecheck.models import lookup
from shapecheck.models.config_file import ModelSource, refuse_absurd
from shapecheck.progress import Progress


def find_misfits(
    contract: Contract,
    controlnets: Sequence[str],
    geometry: Geometry | None = None,
    *,
    offline: bool = False,
    progress: Progress,
) -> tuple[Mismatch, ...]:
    """Return every disagreement between the named ControlNets and the UNet of this contract, both built from configurations.

    Raises ShapecheckError if a ControlNet cannot be found, or the contract does not say which UNet it is of.
    """
    if contract.role != "unet":
        raise ShapecheckError("--controlnet: this file is itself a ControlNet; give the file of a UNet")
    if not contract.slots:
        cause = "it was exported with --no-control: a ControlNet has no effect"
        return (Mismatch("missing", "every slot", "no input for it", "one input a slot", cause=cause),)
    if "down_block_types" not in contract.config:
        raise ShapecheckError("--controlnet: it is not known which UNet this file is; name it with --model")
    for name in controlnets:
        lookup.find(name, "controlnet", offline=offline)
    config, origin = contract.config.to_json(), contract.header.source or contract.digest
    refuse_absurd(config, origin)
    progress("importing torch and diffusers")
    from shapecheck.models import diffusers_models
    from shapecheck.observe.probe import probe

    unet = diffusers_models.build(ModelSource("the file's UNet", origin, "UNet2DConditionModel", config))
    try:
        probe(unet, list(controlnets), geometry=geometry, offline=offline, progress=progress)
    except ContractError as error:
        return error.mismatches
    return ()
