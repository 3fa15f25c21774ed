"""Save a pipeline whose UNet is a session: the PyTorch model that it was made from, found before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline, ModelMixin

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.models.config_file import ModelSource
from shapecheck.models.diffusers_models import build
from shapecheck.models.safetensors import TensorLocation
from shapecheck.models.weights import Embedded, read_chunks
from shapecheck.onnx.file import OnnxFile

Source = Callable[[], Callable[[], ModelMixin]]
"""Finds a PyTorch model, or raises ShapecheckError with the reason; what it returns loads the model."""

Stamp = tuple[tuple[str, int, int], ...]
"""Names, sizes and times of files."""


def find_nothing() -> NoReturn:
    """Raise ShapecheckError: it is a session that somebody opened."""
    raise ShapecheckError("its session was not opened by shapecheck.load")


def find_live(model: ModelMixin) -> Callable[[], ModelMixin]:
    """Return what returns a live model. Raises ShapecheckError if it has no values any more."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ShapecheckError("its weights have no values: they are on the meta device")
    return lambda: model


def find_named(model: str | Path, variant: str | None, contract: Contract) -> Callable[[], ModelMixin]:
    """Return what loads a folder or a hub id in the contract's precision. Raises ShapecheckError if it has no weights."""
    from shapecheck.observe.subject import TorchModel

    return partial(TorchModel(model, variant=variant, offline=True).load, contract.dtype)


def stamp_files(path: Path) -> Stamp:
    """Return what tells whether a file, or the weights beside it, were written since. Nothing for what is no file."""
    files = [file for file in (path, path.with_name(f"{path.name}.data")) if file.is_file()]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def require_unchanged(path: Path, stamp: Stamp) -> None:
    """Raise ShapecheckError if a file is gone, or another than that which was loaded."""
    if stamp_files(path) != stamp:
        raise ShapecheckError(f"{path} was changed or moved since it was loaded: load it again")


def find_in_onnx(path: Path, stamp: Stamp, contract: Contract, model: str | None) -> Callable[[], ModelMixin]:
    """Return what reads the weights out of an ONNX file, which our exporter keeps under their names, else `find_named`."""
    try:
        require_unchanged(path, stamp)
        return partial(_load_weights, *_find_weights(path, contract))
    except ShapecheckError:
        if model is None:
            raise
        return find_named(model, None, contract)


def find_beside_engine(path: Path, contract: Contract, model: str | None) -> Callable[[], ModelMixin]:
    """Return what loads the model that was named when an engine was loaded. Raises ShapecheckError if none was."""
    if model is None:
        raise ShapecheckError(f"the engine {path} holds its weights under no names")
    return find_named(model, None, contract)


def _find_weights(path: Path, contract: Contract) -> tuple[ModelMixin, dict[str, TensorLocation | Embedded]]:
    built: Any = build(ModelSource(contract.class_name, str(path), contract.class_name, contract.config.to_json()))
    module: ModelMixin = built
    found, stored = dict[str, TensorLocation | Embedded](), OnnxFile(path).tensors
    for name, value in module.state_dict().items():
        tensor = stored.get(name)
        if tensor is None or tensor.shape != tuple(value.shape) or tensor.dtype != contract.dtype:
            raise ShapecheckError(f"{path} does not hold all weights under their names: no {name} in {contract.dtype}")
        found[name] = tensor
    return module, found


def _load_weights(module: ModelMixin, found: dict[str, TensorLocation | Embedded]) -> ModelMixin:
    state = {name: torch.cat([part.clone() for part in read_chunks(tensor)]) for name, tensor in found.items()}
    state = {name: value.reshape(found[name].shape) for name, value in state.items()}
    module.load_state_dict(state, assign=True)
    return module.eval()


def ask_before_saving() -> None:
    """Let every pipeline ask its drop-ins, before it writes a file, whether they can be saved.

    diffusers writes one component after the other and asks none before: what cannot be saved would leave a folder half
    written, or spoil the one that it is saved over. No component knows its pipeline; so this is diffusers' own method, with a
    question before it. A pipeline without drop-ins does what it did.
    """
    save = DiffusionPipeline.save_pretrained
    if getattr(save, "asks_dropins", False):
        return

    @wraps(save)
    def save_pretrained(pipe: DiffusionPipeline, *arguments: Any, **options: Any) -> Any:
        for component in vars(pipe).values():
            for part in getattr(component, "nets", [component]) if isinstance(component, torch.nn.Module) else ():
                if hasattr(part, "require_savable"):
                    part.require_savable()
        return save(pipe, *arguments, **options)

    save_pretrained.asks_dropins = True  # type: ignore[attr-defined]
    DiffusionPipeline.save_pretrained = save_pretrained
