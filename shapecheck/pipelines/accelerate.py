"""Exchange a pipeline's UNet in one call: observe it, export it, build it for the first backend that runs, and put it in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import nn

from shapecheck import doctor, extras
from shapecheck.contract import ShapecheckError
from shapecheck.files import make_folder
from shapecheck.observe.probe import probe
from shapecheck.observe.subject import copy_to_meta
from shapecheck.pipelines.export_cache import ExportCache
from shapecheck.pipelines.unet_owner import UNetOwners
from shapecheck.progress import Progress, silent
from shapecheck.runtime.dropin import DropIn
from shapecheck.runtime.load import load
from shapecheck.tensorrt import profile_formats
from shapecheck.tensorrt.profiles import Profile, profile_of
from shapecheck.tensorrt.size_ranges import parse_ranges

Backend = Literal["auto", "trt", "rtx", "ort-trt", "ort-cuda", "ort"]
Refusals = tuple[tuple[str, str], ...]
_log = logging.getLogger(__name__)


class AccelerationError(ShapecheckError):
    """None of the requested backends runs the UNet. `refusals` holds each backend with its reason."""

    def __init__(self, refusals: Refusals) -> None:
        self.refusals = refusals
        super().__init__("\n".join(["the UNet stays in PyTorch", *(f"  {name}: {reason}" for name, reason in refusals)]))


class Accelerated:
    """The result of `accelerate`. Call it, or leave its `with` block, to put the PyTorch UNet back.

    `backend` is the one that runs, and `artefact` its ONNX file or engine: `torch` and None if the UNet is in PyTorch.
    `unet` is what the pipeline calls. `refusals` holds the backends tried before, each with its reason.
    """

    def __init__(self, owners: UNetOwners, backend: str, unet: nn.Module, artefact: Path | None, refusals: Refusals) -> None:
        self.backend, self.unet, self.artefact, self.refusals = backend, unet, artefact, refusals
        self._owners = owners

    def __call__(self) -> None:
        """Put the PyTorch UNet back where it was, on its device, and close the session. Calling again is fine."""
        if not isinstance(self.unet, DropIn):
            return
        dropin, self.unet, self.backend, self.artefact = self.unet, self._owners.unet, "torch", None
        if not self._owners.replace_unet(dropin, self.unet):
            _log.warning("the UNet that accelerate put in was exchanged meanwhile: what is there now stays")
        device = dropin.device
        dropin.close()
        self.unet.to(device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self()


def accelerate(
    pipe_or_stream: Any,
    engine_dir: str | Path,
    backend: Backend = "auto",
    *,
    sizes: Sequence[str] = (),
    batch: Sequence[str] = (),
    fallback: Literal["log", "error"] = "log",
    graphs: bool = False,
    finite: bool = True,
    own_outputs: bool = True,
    progress: Progress = silent,
) -> Accelerated:
    """Exchange the UNet of a diffusers pipeline or a StreamDiffusion for one that is exported, and built, from it.

    The UNet is observed together with the pipeline's ControlNets. It is exported into the folder `engine_dir`, or found there
    by its contract and weights; for TensorRT it is built for `sizes` and `batch`, as for `shapecheck build` (by default the
    model's own size and a batch of 1 to 2; for a stream the size and batch that it was made for). It then takes the place of
    the PyTorch UNet, which on a GPU waits in the CPU's memory. ControlNets stay as they are. Call the result to undo all this.

    `auto` tries TensorRT, then ONNX Runtime on CUDA, then stays with PyTorch; every step down is logged as a warning with its
    reason. Any other backend is tried alone. `fallback="error"` raises if the UNet would stay in PyTorch. `graphs`, `finite`
    and `own_outputs` are those of `load`.

    Raises ContractError if UNet and ControlNets do not fit each other; AccelerationError as above; ShapecheckError if the
    pipeline, a size or the folder is not one, or the UNet cannot be exchanged. The pipeline is then as it was.
    """
    if backend not in get_args(Backend) or fallback not in ("log", "error"):
        raise ShapecheckError(f"backend is one of {', '.join(get_args(Backend))}, and fallback log or error")
    owners, folder = UNetOwners(pipe_or_stream), make_folder(Path(engine_dir))
    progress("observing the contract")
    contract = probe(copy_to_meta(owners.unet), [copy_to_meta(net) for net in owners.controlnets] or None)
    (width, height), usual_batch = contract.header.usual_px, "1:2:2"
    if owners.frame is not None:
        width, height, number = owners.frame
        usual_batch = f"{number}"
    ranges = parse_ranges(sizes or [f"{width}x{height}"], batch or [usual_batch], vae_factor=contract.header.vae_factor)
    profiles = tuple(profile_of(contract, size_range) for size_range in ranges)

    files = ExportCache(owners.unet, folder, progress)
    device = next(owners.unet.parameters()).device
    open_file = partial(load, device=device, graphs=graphs, finite=finite, own_outputs=own_outputs)
    ladder: tuple[Backend, ...] = ("trt", "ort-cuda") if backend == "auto" else (backend,)
    refusals: Refusals = ()
    for name in ladder:
        try:
            dropin, artefact = _open_session(owners.unet, files, name, profiles, open_file)
        except (ShapecheckError, ModuleNotFoundError, torch.OutOfMemoryError) as error:
            reason = extras.explain_missing(error, "it") if isinstance(error, ModuleNotFoundError) else error
            refusals += ((name, str(reason)),)
            _log.warning("%s does not run this UNet: %s", *refusals[-1])
            continue
        owners.replace_unet(owners.unet, dropin)
        _log.info("%s runs the UNet: %s", name, artefact)
        return Accelerated(owners, name, dropin, artefact, refusals)
    if fallback == "error":
        raise AccelerationError(refusals)
    _log.warning("nothing faster runs here: the UNet stays in PyTorch")
    return Accelerated(owners, "torch", owners.unet, None, refusals)


def _open_session(
    unet: nn.Module, files: ExportCache, backend: Backend, profiles: Sequence[Profile], open_file: Callable[..., DropIn]
) -> tuple[DropIn, Path]:
    """Return the UNet in that backend, and its file. If this raises, the PyTorch UNet is back on its device."""
    device = next(unet.parameters()).device
    if (device.type == "cuda") != (backend != "ort"):
        place = "the CPU" if backend == "ort" else "a GPU"
        raise ShapecheckError(f"it runs on {place} and the UNet is on {device}: move the pipeline first, with pipe.to(…)")
    # An export takes minutes: tell before it what cannot run.
    if not files.is_exported and not (status := doctor.backend(backend)).runs:
        raise ShapecheckError("; ".join(f"{gap.problem} ({gap.fix})" for gap in status.gaps))
    artefact = files.export_onnx()
    try:
        # The GPU's memory is for the session that takes its place.
        unet.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if backend == "trt" or backend == "rtx":
            artefact = files.build_engine(backend, profiles)
            return open_file(artefact, "trt"), artefact
        if backend == "ort-trt":
            with files.keep_engine(profile_formats.make_provider_options(profiles)) as options:
                return open_file(artefact, backend, options=options), artefact
        return open_file(artefact, backend), artefact
    except BaseException:
        unet.to(device)
        raise
