"""Load a file, or a model by name, as what a pipeline takes in place of its UNet or ControlNet."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from shapecheck.artefact import resolve_contract
from shapecheck.contract import Contract, ShapecheckError
from shapecheck.files import make_folder
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.onnx.contract_metadata import contract_inside
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.foreign_inputs import TIMESTEP, adapt_timestep
from shapecheck.progress import silent
from shapecheck.runtime.call_gate import name_dtype
from shapecheck.runtime.compiled_session import CompiledSession
from shapecheck.runtime.contract_session import ContractSession
from shapecheck.runtime.dropin import DropIn, DropInSession
from shapecheck.runtime.dropin_controlnet import DropInControlNet
from shapecheck.runtime.dropin_saving import (
    Source,
    Stamp,
    find_beside_engine,
    find_in_onnx,
    find_live,
    find_named,
    require_unchanged,
    stamp_files,
)
from shapecheck.runtime.dropin_unet import DropInUNet
from shapecheck.runtime.engine_session import EngineSession
from shapecheck.runtime.onnx_session import PROVIDERS
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import profile_of
from shapecheck.tensorrt.record import is_engine
from shapecheck.tensorrt.size_ranges import parse_ranges

Backend = Literal["auto", "ort", "ort-cuda", "ort-trt", "trt", "torch", "torch-compile"]
_KINDS = {
    "onnx": ("an ONNX file", tuple(PROVIDERS)),
    "engine": ("an engine", ("trt",)),
    "model": ("a model in PyTorch", ("torch", "torch-compile")),
}
_log = logging.getLogger(__name__)


def load(
    artefact: str | Path | nn.Module,
    backend: Backend = "auto",
    *,
    contract: Contract | None = None,
    model: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    sizes: Sequence[str] = (),
    batch: Sequence[str] = ("1",),
    options: Mapping[str, str] | None = None,
    graphs: bool = False,
    finite: bool = True,
    own_outputs: bool = True,
    variant: str | None = None,
    cache: str | Path | None = None,
) -> DropIn:
    """Return a UNet or ControlNet for diffusers' pipelines and StreamDiffusion: `pipe.unet = shapecheck.load("unet.onnx")`.

    `artefact` is an ONNX file, an engine, or for `torch` and `torch-compile` a model: a diffusers folder, a hub id in the local
    cache, a live UNet2DConditionModel or ControlNetModel. `auto` runs an engine in TensorRT, a model in PyTorch, an ONNX file
    on the GPU if ONNX Runtime can, else on the CPU, which is logged. Any other backend runs, or raises.

    `contract`, or the name or folder of its `model`, is needed for an ONNX file that holds none, and for an engine without a
    record, which anybody may have built and under any names; of a model in PyTorch it saves observing it. `device` is `cpu`,
    `cuda`, `cuda:1`. `dtype` and `variant` are for a model in PyTorch. `torch-compile` compiles each size at its first call, in
    minutes; `cache` is a folder that keeps what was compiled, for the next start (it is run as a program is: let nobody else
    write there). `sizes` and `batch`, as for `shapecheck build`, and `options` for the provider are for `ort-trt` and
    `ort-cuda`; `graphs` replays calls as CUDA graphs, in TensorRT and ONNX Runtime on a GPU. `finite=False` lets NaN through,
    and on a GPU saves waiting for each image. With `own_outputs=False` a call writes over what the last one of that size
    returned: one allocation a size, for loops that keep no output (schedulers such as PNDM do).

    Raises ShapecheckError if the file, the contract or the backend is missing or does not run; ContractError if the file is
    not what its contract says.
    """
    arguments = {name: value for name, value in locals().items() if name != "artefact"}
    if backend not in get_args(Backend):
        raise ShapecheckError(f"no backend {backend!r}; known: {', '.join(get_args(Backend))}")
    kind = "model"
    if not isinstance(artefact, nn.Module):
        path = Path(artefact)
        kind = "onnx" if path.suffix.lower() == ".onnx" else "engine" if is_engine(path) else "model"
    if model is not None:
        if contract is not None or kind == "model":
            raise ShapecheckError("model= says which model a file is, instead of contract=")
        contract = resolve_contract(model, offline=True, controlnet=True, progress=silent)
    stamp = stamp_files(Path(artefact).absolute()) if not isinstance(artefact, nn.Module) else ()
    name, backends = _KINDS[kind]
    if backend != "auto" and backend not in backends:
        raise ShapecheckError(f"backend {backend} does not run {name}, {artefact!s:.200}: use {' or '.join(backends)}")
    if kind == "model":
        session: DropInSession = _open_module(artefact, backend, contract, device, dtype, variant, cache)
    elif kind == "engine":
        session = EngineSession.open(path, contract=contract, device=device, graphs=graphs)
    else:
        session = _open_onnx(
            path,
            backend,
            contract,
            device,
            sizes,
            batch,
            options,
            reuse=not own_outputs,
            graphs=graphs,
            named=model is not None,
        )
    kind_of_drop_in = DropInUNet if session.contract.role == "unet" else DropInControlNet
    drop_in = kind_of_drop_in(session, finite=finite, own_outputs=own_outputs)
    if kind == "model":
        arguments["contract"] = session.contract  # a copy is not observed once more
    drop_in.come_from(
        _find_source(artefact, kind, stamp, session.contract, model, variant),
        partial(_load_again, _make_absolute(artefact), stamp, **arguments),
    )
    return drop_in


def _load_again(artefact: str | Path | nn.Module, stamp: Stamp, **arguments: Any) -> DropIn:
    """Load what was loaded before. Raises ShapecheckError if it is another file now."""
    if stamp:
        require_unchanged(Path(str(artefact)), stamp)
    return load(artefact, **arguments)


def _find_source(
    artefact: str | Path | nn.Module, kind: str, stamp: Stamp, contract: Contract, model: str | None, variant: str | None
) -> Source:
    """Return where to look for the PyTorch model, when somebody saves it."""
    if isinstance(artefact, nn.Module):
        return partial(find_live, unwrap_compiled(artefact))
    if kind == "model":
        return partial(find_named, _make_absolute(artefact), variant, contract)
    if kind == "engine":
        return partial(find_beside_engine, Path(artefact), contract, model)
    return partial(find_in_onnx, Path(artefact).absolute(), stamp, contract, model)


def _make_absolute(artefact: str | Path | nn.Module) -> Any:
    """Return an artefact that is found from another working folder too."""
    return Path(artefact).absolute() if not isinstance(artefact, nn.Module) and Path(artefact).exists() else artefact


def _open_module(
    artefact: str | Path | nn.Module,
    backend: Backend,
    contract: Contract | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    variant: str | None,
    cache: str | Path | None,
) -> ContractSession | CompiledSession:
    from shapecheck.observe.subject import TorchModel, resolve_subject

    if isinstance(artefact, nn.Module):
        module, name = artefact.to(device, dtype) if device is not None or dtype is not None else artefact, ""
        if contract is None:
            contract = resolve_subject(module).contract(name_dtype(next(module.parameters()).dtype), control=True)
    else:
        named = TorchModel(artefact, variant=variant)
        precision = name_dtype(dtype) if dtype is not None else named.dtype()
        module, name = named.load(precision).to(device or "cpu"), named.name
        if contract is None:
            contract = named.contract(precision, control=True)
    if backend != "torch-compile":
        return ContractSession.of_module(module, contract, name)
    return CompiledSession(module, contract, name, cache=make_folder(Path(cache)) if cache is not None else None)


def _open_onnx(
    path: Path,
    backend: Backend,
    contract: Contract | None,
    device: torch.device | str | None,
    sizes: Sequence[str],
    batch: Sequence[str],
    options: Mapping[str, str] | None,
    *,
    reuse: bool,
    graphs: bool,
    named: bool,
) -> ContractSession:
    """Open an ONNX file; if a contract is that of a named model, in the precision of the file."""
    chosen: str = backend
    if backend == "auto":
        on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
        chosen = "ort-cuda" if on_gpu else "ort"
    graphs = graphs and chosen != "ort"
    place = torch.device(device) if device is not None else torch.device("cpu" if chosen == "ort" else "cuda")
    if (place.type == "cpu") != (chosen == "ort"):
        raise ShapecheckError(f"{chosen} does not run on {place}")
    file = OnnxFile(path)
    if not contract and not path.is_file():
        raise ShapecheckError(f"no ONNX file at {file}")
    known = contract or contract_inside(file)
    if known is None:
        raise ShapecheckError(
            f"{file} holds no contract: say which model it is with model=, such as model='sd15' or its folder; "
            f"`shapecheck check {file}` shows what can be seen in it"
        )
    if named:
        known = _adapt(known, file)
    if chosen == "ort-trt" and sizes:
        names = known.match_names([declared.name for declared in file.reading.inputs])  # the file's own
        ranges = parse_ranges(sizes, batch, vae_factor=known.header.vae_factor)
        profiles = profile_formats.make_provider_options([profile_of(known, sizes_of).renamed(names) for sizes_of in ranges])
        options = {**{key: str(value) for key, value in profiles.items()}, **(options or {})}
    del file  # with the weights in it, if it keeps them: ONNX Runtime reads them once more
    try:
        return ContractSession.open_onnx(
            path, known, backend=chosen, device=place.index or 0, options=options, reuse=reuse, graphs=graphs
        )
    except ShapecheckError as error:
        # a GPU that was requested is never exchanged for the CPU
        if backend != "auto" or chosen == "ort" or device is not None or graphs:
            raise
        _log.warning("%s runs on the CPU: %s", path, error)
        return ContractSession.open_onnx(path, known, reuse=reuse)


def _adapt(contract: Contract, file: OnnxFile) -> Contract:
    """Return a named model's contract in the types of a file, and with the timestep in its form."""
    declared = {tensor.name: tensor for tensor in file.reading.inputs}
    dtypes = {name: tensor.dtype for name, tensor in declared.items() if tensor.is_float}
    theirs = contract.match_names(dtypes)
    contract = contract.with_dtypes({name: dtypes[theirs[name]] for name in theirs if theirs[name] in dtypes})
    timestep = declared.get(theirs.get(TIMESTEP, ""))
    return contract if timestep is None else adapt_timestep(contract, timestep)
