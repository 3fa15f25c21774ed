"""The model to export or to compute with: its module on the meta device, and where its tensors are."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from shapecheck.contract import Contract, Role, ShapecheckError
from shapecheck.files import report_unreadable
from shapecheck.logs import silence_logger
from shapecheck.models import diffusers_models, lookup
from shapecheck.models.adapters import LiveTensor, is_adapted, read_state, remove_adapters
from shapecheck.models.calibration_record import Calibration
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.models.fp8_simulation import simulate_fp8
from shapecheck.models.patches import refuse_patches
from shapecheck.models.safetensors import TensorLocation, checkpoint_files, read_table
from shapecheck.models.weights import find_differing, match_tensors, require_linkable
from shapecheck.observe.probe import probe, probe_controlnet

_UNION = (
    "a ControlNetUnionModel is not exported: how many images it takes, and of which kinds, changes from call to call; run it "
    "in PyTorch beside the exported UNet, whose slots take its residuals"
)
Precision = Literal["auto", "float64", "float32"]
Stored = Mapping[str, TensorLocation]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to export: `module` is on the meta device, and any live weights stay where they are.

    `stored` says where the checkpoint's tensors lie; if it is None, `absent` says why there is no checkpoint.
    `live` has the tensors of a live module, with its LoRAs merged, and `source` is what a name stands for: one of the two is
    None.
    """

    module: nn.Module
    name: str
    origin: str
    role: Role
    stored: Stored | None
    absent: str = ""
    live: Mapping[str, LiveTensor] | None = None
    source: lookup.ModelSource | None = None
    notes: tuple[str, ...] = ()

    def contract(self, dtype: str, *, control: bool, adapter: bool = False) -> Contract:
        """Return the contract the file is written under: without slots if no control is requested, with an adapter's features.

        Casts the meta module.
        """
        with silence_logger("diffusers"):
            self.module.to(getattr(torch, dtype))
        vae_factor = self.source.vae_factor if self.source else 8
        if self.role == "controlnet":
            observed = probe_controlnet(self.module)
        else:
            observed = probe(self.module, adapter=True if adapter else None, vae_factor=vae_factor)
        notes = (*self.notes, *observed.header.notes)
        header = replace(observed.header, source=self.origin, vae_factor=vae_factor, notes=notes)
        return replace(observed, header=header, slots=observed.slots if control else ())

    def dtype(self, requested: str | None) -> str:
        """Return the requested precision, else that of the weights.

        Raises ShapecheckError if the weights have several, or are quantized.
        """
        tensors: Mapping[str, TensorLocation | LiveTensor] = self.live or self.stored or self.module.state_dict()
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
        if quantized := [dtype for dtype in dtypes if not dtype.startswith(("float", "bfloat")) or dtype.startswith("float8")]:
            raise ShapecheckError(f"{self.name} is quantized ({', '.join(quantized)}); export the unquantized checkpoint")
        if requested is not None:
            return requested
        if len(dtypes) > 1 or dtypes[0] not in ("float32", "float16", "bfloat16"):
            raise ShapecheckError(f"the weights of {self.name} are {' and '.join(dtypes)}: choose a precision with --dtype")
        return dtypes[0]

    def unlinkable(self, dtype: str, folder: Path) -> str:
        """Return why no ONNX file of that precision in that folder can point into the checkpoint, or nothing if one can."""
        if self.stored is None:
            return self.absent
        others = sorted({tensor.dtype for tensor in self.stored.values()} - {dtype})
        if others:
            return f"the checkpoint is {others[0]} and the graph {dtype}"
        if self.live and (merged := next((name for name, tensor in self.live.items() if is_adapted(tensor)), None)):
            return f"the live module has LoRAs beside its checkpoint, first on {merged}"
        if self.live and (changed := find_differing(self.stored, self.live)):
            return f"the live module differs from its checkpoint in {len(changed)} tensors, first {changed[0]} (a fused LoRA?)"
        try:
            require_linkable(self.stored.values(), folder)
        except ShapecheckError as error:
            return str(error)
        return ""

    def tensors(self, names: Iterable[str], *, linked: bool) -> dict[str, TensorLocation | LiveTensor]:
        """Return these parameters: from the live module unless `linked`, else from the checkpoint, else mere shapes."""
        checkpoint: Mapping[str, TensorLocation | LiveTensor] = self.module.state_dict() if self.stored is None else self.stored
        tensors = checkpoint if linked or self.live is None else self.live
        if missing := [name for name in names if name not in tensors]:
            raise ShapecheckError(f"{self.name} computes with tensors that are in no state dict: {', '.join(missing)}")
        return {name: tensors[name] for name in names}


def resolve_subject(model: str | Path | nn.Module, *, variant: str | None = None, offline: bool = False) -> Subject:
    """Return the model of that name, or a live one, ready to be traced. Raises ShapecheckError if there is none."""
    if isinstance(model, nn.Module):
        return _wrap_live(unwrap_compiled(model), variant)
    source = find_source(str(model), offline=offline)
    if source.tensors:
        raise ShapecheckError(
            f"{source.origin} is a single file without a configuration: `probe` reads its shapes, but what it computes with "
            "beside them is not in it. Give a diffusers folder; in Python this makes one, with a configuration from the hub: "
            f"diffusers.{source.class_name}.from_single_file({str(model)!r}).save_pretrained('FOLDER')"
        )
    if source.class_name == "ControlNetUnionModel":
        raise ShapecheckError(f"{source.origin}: {_UNION}")
    stored, absent = None, f"{source.origin} is a configuration without weights"
    if source.folder is not None:
        stored, absent = _read_checkpoint(source.folder, variant, source.origin)
    elif Path(model).is_dir():
        absent += f", and the folder of that name is ./{model}"
    module = diffusers_models.build(source)
    if stored is not None:
        stored = match_tensors(stored, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
    role: Role = "controlnet" if source.role == "controlnet" else "unet"
    notes = source.notes
    if role == "controlnet" and source.controlnets:
        notes += (f"the first of {1 + len(source.controlnets)} ControlNets that were saved together; export each",)
    origin = source.origin
    # Files are passed on: of a path no more is written into them than the model's own folder.
    if source.folder is not None and Path(origin).is_file():
        parts = source.folder.absolute().parts
        origin = "/".join(parts[-2:] if parts[-1] in ("unet", "controlnet") else parts[-1:])
    return Subject(module, source.name, origin, role, stored, absent, None, source, notes)


def find_source(model: str, *, offline: bool) -> lookup.ModelSource:
    """Return the source of a UNet, or of a ControlNet if the name stands for one."""
    try:
        return lookup.find(model, "unet", offline=offline)
    except ShapecheckError as error:
        try:
            return lookup.find(model, "controlnet", offline=offline)
        except ShapecheckError as other:
            raise (other if isinstance(error, lookup.OtherModelError) else error) from None


def _wrap_live(module: nn.Module, variant: str | None) -> Subject:
    name = type(module).__name__
    if isinstance(getattr(module, "contract", None), Contract):  # of diffusers' class, and without weights
        raise ShapecheckError(f"this {name} is an exported model already: give the PyTorch model, or its file")
    if diffusers_models.is_union(module):
        raise ShapecheckError(_UNION)
    if not (diffusers_models.is_unet(module) or diffusers_models.is_controlnet(module)):
        raise ShapecheckError(f"class {name} is not exported yet: expected a UNet2DConditionModel or a ControlNetModel")
    refuse_patches(module)
    role: Role = "controlnet" if diffusers_models.is_controlnet(module) else "unet"
    live: dict[str, LiveTensor] | None = read_state(module)
    stored, absent = None, f"the live {name} was not loaded from a folder"
    root = Path(str(getattr(module, "config", {}).get("_name_or_path") or ""))
    folder = next((folder for folder in (root, root / role) if (folder / "config.json").is_file()), None)
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        live, absent = None, f"the {name} has no values"
    elif root.name and folder is not None:
        try:
            stored, absent = _read_checkpoint(folder, variant, str(folder))
        except ShapecheckError as error:  # the module has its weights whatever became of the files
            absent = f"the live {name} was loaded from {folder}, which cannot be linked: {error}"
    return Subject(copy_to_meta(module), name, f"live {name}", role, stored, absent, live)


def _read_checkpoint(folder: Path, variant: str | None, origin: str) -> tuple[Stored | None, str]:
    """Return where the tensors in a folder lie, or why there are none."""
    with report_unreadable(f"the folder {folder}"):
        has_weights = any(entry.suffix in (".safetensors", ".bin") for entry in folder.iterdir())
    if not has_weights:
        fetch = "; `hf download REPOSITORY --local-dir FOLDER` fetches them" if origin.startswith("hub ") else ""
        return None, f"there are no weights beside {origin}{fetch}"
    return read_table(checkpoint_files(folder, variant=variant)), ""


def copy_to_meta(module: nn.Module) -> nn.Module:
    """Return a copy of a live module with its own forward and no memory for tensors, nor adapters such as LoRAs."""
    module = remove_adapters(unwrap_compiled(module))
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo).eval()


class TorchModel:
    """A model with its weights: a named one is loaded from its files each time, a live module stays as it is."""

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        calibration: Calibration | None = None,
        variant: str | None = None,
        offline: bool = False,
    ) -> None:
        subject = resolve_subject(model, variant=variant, offline=offline)
        if subject.stored is None and subject.live is None:
            raise ShapecheckError(f"no weights for {subject.name}: {subject.absent}; give a folder that holds them")
        self.name, self.role, self.calibration = subject.origin, subject.role, calibration
        self._model, self._variant, self._subject = model, variant, subject

    def contract(self, dtype: str, *, control: bool, adapter: bool = False) -> Contract:
        """Return the contract that a file of it has to keep."""
        return self._subject.contract(dtype, control=control, adapter=adapter)

    def dtype(self) -> str:
        return self._subject.dtype(None)

    def load(self, precision: str) -> nn.Module:
        """Return the model in that precision, in eval mode."""
        dtype = getattr(torch, precision)
        if isinstance(self._model, nn.Module):
            with silence_logger("diffusers"):
                return copy.deepcopy(unwrap_compiled(self._model)).to("cpu", dtype).eval()
        assert self._subject.source is not None
        return diffusers_models.load(self._subject.source, self._variant, dtype)

    def round(self, module: nn.Module, contract: Contract) -> None:
        """Turn a model in that precision into what a file of this contract computes: its calibrated layers are in fp8."""
        if self.calibration is not None:
            simulate_fp8(module, self.calibration.find_model(contract))

    def choose_reference(self, requested: Precision, parameters: int) -> str:
        """Return the precision to compute a reference in: float64 if twice the memory of float32 is free, else float32."""
        if requested != "auto":
            return requested
        free = measure_free_memory()
        if torch.cuda.is_available():
            free = min(free, torch.cuda.mem_get_info()[0])
        # A fifth more than the weights, and two gigabytes for everything else.
        return "float64" if parameters * 8 * 1.2 + 2e9 <= free else "float32"


def measure_free_memory() -> float:
    """Return the bytes of the machine's memory that are free, or would be if caches were dropped."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # systems other than Linux only say how much there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 if hasattr(os, "sysconf") else 0
