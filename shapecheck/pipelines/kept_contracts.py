"""Contracts of live models, observed once and kept in the folder of a pipeline's files: observing them takes seconds."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from torch import nn

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.files import atomic_write, read_text
from shapecheck.models.adapters import remove_adapters
from shapecheck.models.computation import describe_computation
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.observe.probe import probe
from shapecheck.observe.subject import copy_to_meta, resolve_subject
from shapecheck.progress import Progress, silent
from shapecheck.version import __version__

_LARGEST = 2**22
_log = logging.getLogger(__name__)


def find_joint_contract(
    folder: Path, unet: nn.Module, controlnets: Sequence[nn.Module], progress: Progress = silent
) -> Contract:
    """Return the contract of a UNet, and require that these ControlNets, or the one it implies, fit it.

    Raises ContractError if one does not.
    """

    def observe() -> Contract:
        progress("observing the contract")
        return probe(copy_to_meta(unet), [copy_to_meta(net) for net in controlnets] or None)

    return _find(folder, "together", (unet, *controlnets), observe)


def find_own_contract(folder: Path, model: nn.Module) -> Contract:
    """Return the contract that a file of a UNet or ControlNet has to keep. Raises ShapecheckError if it cannot be exported."""

    def observe() -> Contract:
        subject = resolve_subject(model)
        return subject.contract(subject.dtype(None), control=True)

    return _find(folder, "alone", (model,), observe)


def _find(folder: Path, how: str, models: Sequence[nn.Module], observe: Callable[[], Contract]) -> Contract:
    """Return what models that compute the same were found to be before, or what is observed now, which is kept."""
    computations = [describe_computation(remove_adapters(unwrap_compiled(model))) for model in models]
    if any(computation.unseen for computation in computations):
        return observe()
    makers = [f"shapecheck {__version__}", *(f"{name} {version(name)}" for name in ("torch", "diffusers"))]
    key = json.dumps([how, makers, [computation.digest for computation in computations]])
    path = folder / f"contract-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        try:
            text = read_text(path, _LARGEST, too_large=f"{path} is too large", not_text=f"{path} is not text")
            return Contract.from_json(text)
        except (ShapecheckError, OSError) as error:
            _log.warning("%s cannot be read, so the model is observed again: %s", path, error)
    contract = observe()
    try:
        with atomic_write(path) as partial:
            partial.write_text(contract.to_json(), encoding="utf-8")
    except ShapecheckError as error:
        _log.warning("the contract is not kept, so the next start observes it again: %s", error)
    return contract
