"""What is exported: a module on the meta device, and where its tensors are."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from shapecheck.contract import Contract, Role, ShapecheckError
from shapecheck.files import report_unreadable
from shapecheck.models import diffusers_models, lookup
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.models.safetensors import TensorLocation, checkpoint_files, read_table
from shapecheck.models.weights import find_differing, match_tensors, require_linkable
from shapecheck.observe.probe import probe, probe_controlnet
from shapecheck.progress import silence_logger

PRECISIONS = frozenset(("float32", "float16", "bfloat16"))


_UNION = (
    "a ControlNetUnionModel is not exported: how many images it takes, and of which kinds, changes from call to call; run it "
    "in PyTorch beside the exported UNet, whose slots take what it gives"
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to export."""

    module: nn.Module
    """On the meta device; any live weights stay where they are."""
    name: str
    origin: str
    vae_factor: int
    role: Role
    stored: Mapping[str, TensorLocation] | None
    """Where the checkpoint's tensors lie; None where there is no checkpoint."""
    live: Mapping[str, Tensor] | None
    """The tensors of a live module; None for a model that was named."""
    absent: str = ""
    """Why there is no checkpoint."""
    notes: tuple[str, ...] = ()

    def contract(self, dtype: str, *, control: bool, adapter: bool = False) -> Contract:
        """The contract the file is written under: without slots where no control is wanted, with features for an adapter.

        Casts the meta module.
        """
        with silence_logger("diffusers"):
            self.module.to(getattr(torch, dtype))
        if self.role == "controlnet":
            observed = probe_controlnet(self.module)
        else:
            observed = probe(self.module, adapter=True if adapter else None, vae_factor=self.vae_factor)
        notes = (*self.notes, *observed.header.notes)
        header = replace(observed.header, source=self.origin, vae_factor=self.vae_factor, notes=notes)
        return replace(observed, header=header, slots=observed.slots if control else ())

    def dtype(self, wanted: str | None) -> str:
        """The wanted precision, else that of the weights. Raises ShapecheckError where they have several, or are quantised."""
        tensors: Mapping[str, TensorLocation | Tensor] = self.live or self.stored or self.module.state_dict()
        found = sorted({str(each.dtype).removeprefix("torch.") for each in tensors.values()})
        if quantised := [each for each in found if not each.startswith(("float", "bfloat")) or each.startswith("float8")]:
            raise ShapecheckError(f"the weights of {self.name} are quantised to {', '.join(quantised)}: give those before")
        if wanted is not None:
            return wanted
        if len(found) > 1 or not PRECISIONS.issuperset(found):
            raise ShapecheckError(f"the weights of {self.name} are of {' and '.join(found)}: choose a precision with --dtype")
        return found[0]

    def unlinkable(self, dtype: str, folder: Path) -> str:
        """Why no ONNX file of that precision in that folder can point into the checkpoint; empty where one can."""
        if self.stored is None:
            return self.absent
        others = sorted({each.dtype for each in self.stored.values()} - {dtype})
        if others:
            return f"the checkpoint is {others[0]} and the graph {dtype}"
        if self.live and (changed := find_differing(self.stored, self.live)):
            return f"the live module differs from its checkpoint in {len(changed)} tensors, first {changed[0]} (a fused LoRA?)"
        try:
            require_linkable(self.stored.values(), folder)
        except ShapecheckError as error:
            return str(error)
        return ""

    def tensors(self, names: Iterable[str], *, linked: bool) -> dict[str, TensorLocation | Tensor]:
        """What these parameters hold: in the checkpoint, in the live module where that counts, else no more than shapes."""
        checkpoint: Mapping[str, TensorLocation | Tensor] = self.module.state_dict() if self.stored is None else self.stored
        every = checkpoint if linked or self.live is None else self.live
        if lost := [name for name in names if name not in every]:
            raise ShapecheckError(f"{self.name} computes with tensors that are in no state dict: {', '.join(lost)}")
        return {name: every[name] for name in names}


def resolve_subject(model: str | Path | nn.Module, *, variant: str | None = None, offline: bool = False) -> Subject:
    """The model of that name, or a live one, ready to be traced. Raises ShapecheckError where it cannot be had."""
    if isinstance(model, nn.Module):
        return _take_live(model, variant)
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
    if source.folder is None and Path(model).is_dir():
        absent += f", and the folder of that name is ./{model}"
    if source.folder is not None:
        stored, absent = _stored_in(source.folder, variant, source.origin)
    module = diffusers_models.build(source)
    if stored is not None:
        stored = match_tensors(stored, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
    notes = source.notes
    if source.role == "controlnet" and source.controlnets:
        notes += (f"the first of {1 + len(source.controlnets)} ControlNets that were saved together; export each",)
    role: Role = "controlnet" if source.role == "controlnet" else "unet"
    return Subject(module, source.name, _place(source), source.vae_factor, role, stored, None, absent, notes)


def find_source(model: str, *, offline: bool) -> lookup.ModelSource:
    """The source of a UNet, or of a ControlNet where that is what the name stands for."""
    try:
        return lookup.find(model, "unet", offline=offline)
    except ShapecheckError as error:
        try:
            return lookup.find(model, "controlnet", offline=offline)
        except ShapecheckError as other:
            raise (other if isinstance(error, lookup.OtherModelError) else error) from None


def _place(source: lookup.ModelSource) -> str:
    """What the file says of where it came from: no more of a path than the model's own folder, for files are passed on."""
    if source.folder is None or not Path(source.origin).is_file():
        return source.origin
    parts = source.folder.absolute().parts
    return "/".join(parts[-2:] if parts[-1] in ("unet", "controlnet") else parts[-1:])


def _take_live(module: nn.Module, variant: str | None) -> Subject:
    module = unwrap_compiled(module)
    name = type(module).__name__
    if diffusers_models.is_union(module):
        raise ShapecheckError(_UNION)
    if not (diffusers_models.is_unet(module) or diffusers_models.is_controlnet(module)):
        raise ShapecheckError(f"class {name} is not exported yet: expected a UNet2DConditionModel or a ControlNetModel")
    live = dict(module.state_dict())
    if any(tensor.is_meta for tensor in live.values()):
        return Subject(copy_to_meta(module), name, f"live {name}", 8, _role(module), None, None, f"the {name} has no values")
    stored, absent = _origin_of(module, variant)
    return Subject(copy_to_meta(module), name, f"live {name}", 8, _role(module), stored, live, absent)


def _origin_of(module: nn.Module, variant: str | None) -> tuple[Mapping[str, TensorLocation] | None, str]:
    """The checkpoint that a live module was loaded from, as far as that can be known, or why none is taken."""
    root = Path(str(getattr(module, "config", {}).get("_name_or_path") or ""))
    folder = next((each for each in (root, root / _role(module)) if (each / "config.json").is_file()), None)
    if not root.name or folder is None:
        return None, f"the live {type(module).__name__} was not loaded from a folder"
    try:
        return _stored_in(folder, variant, str(folder))
    except ShapecheckError as error:  # the module has its weights whatever became of the files
        return None, f"the live {type(module).__name__} was loaded from {folder}, which cannot be linked: {error}"


def _role(module: nn.Module) -> Role:
    return "controlnet" if diffusers_models.is_controlnet(module) else "unet"


def _stored_in(folder: Path, variant: str | None, origin: str) -> tuple[Mapping[str, TensorLocation] | None, str]:
    with report_unreadable(f"the folder {folder}"):
        has_weights = any(entry.suffix in (".safetensors", ".bin") for entry in folder.iterdir())
    if not has_weights:
        fetch = "; `hf download REPOSITORY --local-dir FOLDER` fetches them" if origin.startswith("hub ") else ""
        return None, f"there are no weights beside {origin}{fetch}"
    return read_table(checkpoint_files(folder, variant=variant)), ""


def copy_to_meta(module: nn.Module) -> nn.Module:
    """A copy of a live module with its own forward and no memory for tensors."""
    module = unwrap_compiled(module)
    memo = {id(each): _meta_like(each) for each in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo).eval()


def _meta_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


Precision = Literal["auto", "float64", "float32"]


_ROOM = 1.2


_PROCESS = 2e9
"""Bytes that must be free besides the weights."""


class TorchModel:
    """A model with its weights: named, and then loaded from its files each time, or a live module, which stays as it is."""

    def __init__(self, model: str | Path | nn.Module, *, variant: str | None = None, offline: bool = False) -> None:
        self._variant = variant
        self._subject = resolve_subject(model, variant=variant, offline=offline)
        if self._subject.stored is None and self._subject.live is None:
            raise ShapecheckError(f"no weights for {self._subject.name}: {self._subject.absent}; give a folder that holds them")
        self._live = unwrap_compiled(model) if isinstance(model, nn.Module) else None
        self._source = None if self._live is not None else find_source(str(model), offline=offline)

    @property
    def name(self) -> str:
        """As reports call it."""
        return self._subject.origin

    @property
    def role(self) -> Role:
        """Whether it is a UNet or a ControlNet."""
        return self._subject.role

    def contract(self, dtype: str, *, control: bool, adapter: bool = False) -> Contract:
        """Return what a file of it has to take and give."""
        return self._subject.contract(dtype, control=control, adapter=adapter)

    def dtype(self) -> str:
        """Return the precision of the weights."""
        return self._subject.dtype(None)

    def load(self, precision: str) -> nn.Module:
        """Return the model in that precision, in eval mode."""
        if self._source is not None:
            return diffusers_models.load(self._source, self._variant, getattr(torch, precision))
        assert self._live is not None
        with silence_logger("diffusers"):
            return copy.deepcopy(self._live).to("cpu", getattr(torch, precision)).eval()

    def choose_reference(self, wanted: Precision, parameters: int) -> str:
        """Return float64 if twice the memory of float32 is free, else float32."""
        if wanted != "auto":
            return wanted
        return "float64" if parameters * 8 * _ROOM + _PROCESS <= _available_memory() else "float32"


def _available_memory() -> float:
    """Return the bytes of memory that are free, or would be if caches were dropped."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return pages * (os.sysconf("SC_PAGE_SIZE") if pages else 0) / 2
