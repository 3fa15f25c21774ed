"""Exchange a pipeline's UNet and ControlNets in one call: for the backend that is requested, or the fastest that is right."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from torch import nn

from shapecheck.contract import Geometry, ShapecheckError
from shapecheck.files import make_folder
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.models.patches import describe_patches
from shapecheck.pipelines.candidates import (
    SHARES_WEIGHTS,
    Candidate,
    CandidateMaker,
    Running,
    close_all,
    keep_in_torch,
)
from shapecheck.pipelines.choose import Choice, Refusals, choose_by_measuring, open_alone
from shapecheck.pipelines.compiled_vae import compile_decoder, find_decoder
from shapecheck.pipelines.kept_contracts import find_joint_contract
from shapecheck.pipelines.measured_record import describe_choice, describe_measurements
from shapecheck.pipelines.model_owners import ModelOwners, refuse_repeated
from shapecheck.progress import Progress, silent
from shapecheck.runtime.dropin import DropIn
from shapecheck.runtime.gpu import free_memory
from shapecheck.tensorrt.size_ranges import parse_ranges

Backend = Literal["auto", "torch-compile", "trt", "rtx", "ort-trt", "ort-cuda", "ort"]
_log = logging.getLogger(__name__)


class AccelerationError(ShapecheckError):
    """Something would stay in PyTorch. `refusals` holds each backend that does not run it, with its reason."""

    def __init__(self, refusals: Refusals, what: str) -> None:
        self.refusals = refusals
        super().__init__("\n".join([what, *(f"  {name}: {reason}" for name, reason in refusals)]))


class Accelerated:
    """The result of `accelerate`. Call it, or leave its `with` block, to put the PyTorch modules back.

    `backend` is the one that runs, and `artefact` the UNet's ONNX file or engine: `torch` and None if the UNet is in PyTorch.
    `unet` is what the pipeline calls, and `controlnets` says of each ControlNet what runs it, in what file, or why it stays in
    PyTorch. `refusals` holds the backends that were tried and do not run, each with its reason; `measured` what `auto` found
    out about each, which `str()` shows as a table.
    """

    def __init__(self, owners: ModelOwners, maker: CandidateMaker, choice: Choice) -> None:
        self.refusals, self.measured = choice.refusals, choice.measured
        self._owners, self._maker, self._candidate, self._background = owners, maker, choice.candidate, choice.background
        self._undo_vae: Callable[[], None] = _do_nothing

    @property
    def backend(self) -> str:
        return self._candidate.backend

    @property
    def unet(self) -> nn.Module:
        return self._candidate.unet.module

    @property
    def artefact(self) -> Path | None:
        return self._candidate.unet.artefact

    @property
    def controlnets(self) -> tuple[Running, ...]:
        return self._candidate.controlnets

    @property
    def pending(self) -> tuple[str, ...]:
        """Return the backends that are being built in the background now, to be measured at the next start."""
        return ("trt",) if self._background is not None and self._background.is_running else ()

    def replace_controlnets(self, nets: nn.Module | Sequence[nn.Module]) -> None:
        """Exchange the ControlNets, and leave the UNet as it is: the new ones run in the same backend, from the same folder.

        `nets` is a ControlNet, a MultiControlNetModel, or a list for a pipeline that holds several. One that runs already is
        kept. Raises ContractError if one does not fit the UNet, ShapecheckError if the pipeline cannot hold them; all is then
        as it was. Undoing puts the new ones back in PyTorch.
        """
        new_nets = getattr(nets, "nets", [nets] if isinstance(nets, nn.Module) else nets)
        if not self._maker.options["own_outputs"]:
            refuse_repeated(new_nets)
        known = {part.torch: part for part in self.controlnets}
        find_joint_contract(self._maker.folder, self._candidate.unet.torch, new_nets)
        parts, device = list[Running](), getattr(getattr(self.unet, "engine", self.unet), "device", None)
        try:
            for net in new_nets:
                if net in known or self.backend == "torch":
                    parts.append(known.get(net, Running("torch", net, net)))
                    continue
                aside = self.backend not in SHARES_WEIGHTS
                parts.append(self._maker.open_controlnet(self.backend, net.to(device), aside=aside))
            self._owners.set_controlnets(nets, [part.module for part in parts])
        except BaseException:
            close_all([part for part in parts if part.torch not in known])
            raise
        for part in self.controlnets:
            if part not in parts:
                part.close()  # its PyTorch module stays where it is: nothing calls it
        free_memory()
        self._candidate = replace(self._candidate, controlnets=tuple(parts))

    def __call__(self) -> None:
        """Put the PyTorch modules back where they were, on their device, and close the sessions. Calling again is fine."""
        self._undo_vae()
        self._undo_vae = _do_nothing
        if self.backend == "torch":
            return
        candidate = self._candidate
        self._candidate = keep_in_torch(candidate.unet.torch, [part.torch for part in candidate.controlnets])
        exchanged = [part for part in candidate.controlnets if isinstance(part.module, DropIn)]
        # a list: all are put back, whatever became of the others
        is_back = [self._owners.replace_unet(candidate.unet.module, candidate.unet.torch)]
        is_back += [self._owners.replace_controlnet(part.module, part.torch) for part in exchanged]
        for noun, is_ours in zip(["UNet", *["ControlNet"] * len(exchanged)], is_back, strict=True):
            if not is_ours:
                _log.warning("the %s that accelerate put in was exchanged meanwhile: what is there now stays", noun)
        close_all(candidate.parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self()

    def __str__(self) -> str:
        nets = [part.backend for part in self.controlnets]
        lines = [f"UNet: {self.backend}" + (f"; ControlNets: {', '.join(nets)}" if nets else "")]
        lines += describe_measurements(self.measured) or [f"{name:<14} {reason}" for name, reason in self.refusals]
        return "\n".join(lines + [f"{name} is built in the background, for the next start" for name in self.pending])


def accelerate(
    pipe_or_stream: Any,
    engine_dir: str | Path,
    backend: Backend = "auto",
    *,
    sizes: Sequence[str] = (),
    batch: Sequence[str] = (),
    controlnets: bool = True,
    vae: bool = False,
    budget: float | None = 120.0,
    fallback: Literal["log", "error"] = "log",
    graphs: bool = False,
    finite: bool = True,
    own_outputs: bool = True,
    refittable: bool = False,
    progress: Progress = silent,
) -> Accelerated:
    """Exchange the UNet and the ControlNets of a diffusers pipeline or a StreamDiffusion for faster ones made from them.

    They are observed together, exported into the folder `engine_dir` or found there by their weights, or compiled; for
    TensorRT they are built for `sizes` and `batch`, as for `shapecheck build` (by default the model's own size and a batch of
    1 to 2; for a stream the size and batch that it was made for). PyTorch's modules then wait in the CPU's memory, unless the
    backend computes with their weights. A ControlNet that cannot be exchanged stays in PyTorch, which is logged, and
    `controlnets=False` leaves all of them. `vae` compiles the VAE's decoder too. Call the result to undo all this.

    `auto` measures: what runs here (on a GPU torch-compile, TensorRT, ONNX Runtime; on the CPU ONNX Runtime and torch-compile)
    is checked against PyTorch in float32 and timed beside PyTorch, at the usual size of the first of `sizes`; the fastest that
    is right is taken, and PyTorch stays where it is the fastest. What was measured is kept in the folder: the next start
    measures nothing. `budget` bounds the first start, in seconds: what is not expected to be ready in time is not begun, and
    TensorRT's engines are then built in the background, for the next start; None waits for everything. Any other backend is
    tried alone and not measured.

    To exchange LoRAs or other weights, undo, change the PyTorch modules, and call this again: where the folder holds the same
    graph, only weights are written anew, in seconds; and with `refittable` TensorRT's engines, which may be slower then.

    `fallback="error"` raises if a model would stay in PyTorch. `graphs`, `finite` and `own_outputs` are those of `load`.

    Raises ContractError if UNet and ControlNets do not fit each other; AccelerationError as above; ShapecheckError if the
    pipeline, a size or the folder is not one. The pipeline is then as it was.
    """
    if backend not in get_args(Backend) or fallback not in ("log", "error"):
        raise ShapecheckError(f"backend is one of {', '.join(get_args(Backend))}, and fallback log or error")
    if budget is not None and not budget >= 0:
        raise ShapecheckError(f"budget is in seconds, from 0 on, or None: got {budget!r}")
    start = time.monotonic()
    owners, folder = ModelOwners(pipe_or_stream), make_folder(Path(engine_dir))
    if controlnets and not own_outputs:
        owners.refuse_repeated_controlnets()
    if vae:
        find_decoder(owners.vae)
    options = {"graphs": graphs, "finite": finite, "own_outputs": own_outputs}
    models = map(unwrap_compiled, (owners.unet, *owners.controlnets))
    if fallback == "log" and (patches := "; ".join(filter(None, map(describe_patches, models)))):
        _log.warning("UNet and ControlNets stay in PyTorch: %s", patches)
        choice = Choice(keep_in_torch(owners.unet, owners.controlnets), ((backend, patches),))
        return Accelerated(owners, CandidateMaker(folder, (), options, progress, contracts={}, strict=False), choice)
    contract = find_joint_contract(folder, owners.unet, owners.controlnets, progress)
    (width, height), usual_batch = contract.header.usual_px, "1:2:2"
    if owners.frame is not None:
        width, height, number = owners.frame
        usual_batch = f"{number}"
    factor = contract.header.vae_factor
    ranges = parse_ranges(sizes or [f"{width}x{height}"], batch or [usual_batch], vae_factor=factor)
    geometry = ranges[0].opt

    contracts, strict = {owners.unet: contract}, fallback == "error"
    maker = CandidateMaker(folder, ranges, options, progress, contracts=contracts, strict=strict, refittable=refittable)
    maker.make_profiles(owners.unet)  # a size that the model refuses is told before anything is made
    choice = _choose(owners, maker, backend, geometry, (budget, start), controlnets=controlnets)
    if choice.candidate.backend == "torch":
        if fallback == "error":
            raise AccelerationError(choice.refusals, describe_choice(choice.measured))
        _log.warning("%s", describe_choice(choice.measured))
    _install(owners, choice.candidate)
    done = Accelerated(owners, maker, choice)
    if vae:
        done._undo_vae = compile_decoder(owners.vae, geometry)
    return done


def _choose(
    owners: ModelOwners,
    maker: CandidateMaker,
    backend: str,
    geometry: Geometry,
    limits: tuple[float | None, float],
    *,
    controlnets: bool,
) -> Choice:
    """Return what is to run the pipeline, with every ControlNet in its place. `limits` are the budget and its beginning."""
    obstacles = {net: maker.find_obstacle(net) if controlnets else "controlnets=False" for net in owners.controlnets}
    kept = {net: Running("torch", net, net, reason=reason) for net, reason in obstacles.items() if reason}
    if controlnets and kept:
        reasons = tuple((backend, part.reason) for part in kept.values())
        if maker.strict:
            raise AccelerationError(reasons, "a ControlNet stays in PyTorch")
        for _, reason in reasons:
            _log.warning("a ControlNet stays in PyTorch: %s", reason)
    nets = [net for net in obstacles if net not in kept]
    if backend == "auto":
        choice = choose_by_measuring(maker, owners.unet, nets, geometry, *limits)
    else:
        choice = open_alone(maker, backend, owners.unet, nets, geometry)
    parts = kept | {part.torch: part for part in choice.candidate.controlnets}
    return replace(choice, candidate=replace(choice.candidate, controlnets=tuple(parts[net] for net in obstacles)))


def _install(owners: ModelOwners, candidate: Candidate) -> None:
    """Put a candidate into the pipeline; PyTorch modules that it does not compute with leave the GPU's memory to it."""
    if candidate.backend == "torch":
        return
    moved = [part.torch.to("cpu") for part in candidate.parts if part.backend not in SHARES_WEIGHTS]
    if moved:
        free_memory()
    owners.replace_unet(candidate.unet.torch, candidate.unet.module)
    _log.info("%s runs the UNet%s", candidate.backend, f": {candidate.unet.artefact}" if candidate.unet.artefact else "")
    for number, part in enumerate(candidate.controlnets, 1):
        if part.backend != "torch":
            owners.replace_controlnet(part.torch, part.module)
            _log.info("%s runs ControlNet %d%s", part.backend, number, f": {part.artefact}" if part.artefact else "")


def _do_nothing() -> None:
    pass
