"""From what a user names to a model's configuration: preset, file, folder or hub id. Never weights, never code."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from shapecheck import presets
from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.models import hub, single_file
from shapecheck.models.config_file import ADVICE, read_json, refuse_absurd
from shapecheck.models.single_file import CheckpointTensor
from shapecheck.presets import Kind

Locate = Callable[[str], Path | None]
"""From a file's place in a model, such as vae/config.json, to where it lies here; None where the model has none."""


_CLASSES: Mapping[str, Kind] = {
    "UNet2DConditionModel": "unet",
    "ControlNetModel": "controlnet",
    "ControlNetUnionModel": "controlnet",
    "T2IAdapter": "adapter",
}


_CLASS_OF: Mapping[Kind, str] = {"unet": "UNet2DConditionModel", "controlnet": "ControlNetModel", "adapter": "T2IAdapter"}
"""What is expected of each role, in messages and where nothing else is said."""


_UNION_BEFORE_DIFFUSERS = ("ControlNetModel", "ControlNetModel_Union")
"""What the configs of union ControlNets name that are older than diffusers' class for them."""


_PLACES: Mapping[Kind, tuple[str, ...]] = {
    "unet": ("unet/config.json", "config.json"),
    "controlnet": ("config.json", "controlnet/config.json"),
    "adapter": ("config.json", "adapter/config.json"),
}


_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


_HUB_ID = re.compile(r"(?=.{3,96}$)\w[\w.-]*/\w[\w.-]*", re.ASCII)


_MOST_CONTROLNETS = 32


class OtherModelError(ShapecheckError):
    """There is a model under that name, and it is another kind of model."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's configuration and where it was found."""

    name: str
    """What the user called it."""
    origin: str
    """Where the configuration was read."""
    class_name: str
    config: Mapping[str, Any] = field(repr=False)
    folder: Path | None = None
    """Where the configuration lies on this machine, and the weights if they are here."""
    vae_factor: int = 8
    notes: tuple[str, ...] = ()
    controlnets: tuple[ModelSource, ...] = ()
    """Of a UNet: the ControlNets in the same model folder. Of a ControlNet: the further ones saved with it."""
    tensors: Mapping[str, CheckpointTensor] = field(default_factory=dict, repr=False)
    """Where the configuration was read off a checkpoint's header: the tensors that the model must have, by their names."""

    @property
    def role(self) -> Kind:
        """What the class is to the other one."""
        return _CLASSES[self.class_name]


def find(name: str, role: Kind, *, offline: bool = False) -> ModelSource:
    """The configuration `name` stands for: a preset, else a path, else a hub id.

    For a ControlNet the name of a UNet preset is allowed and gives that UNet: its ControlNet is the implied one.
    Raises ShapecheckError saying what was looked for, what was found and what to do.
    """
    if name in presets.names():
        return _from_preset(name, role)
    if not name.strip():  # Path("") would be the current folder
        raise ShapecheckError(f"the name of the {role} is empty; {ADVICE}")
    try:
        return _from_outside(name, role, offline)
    except (OSError, RuntimeError) as error:  # no permission, too long a name, the home of nobody
        reason = getattr(error, "strerror", None) or error
        raise ShapecheckError(f"cannot read {one_line(name)}: {reason}; {ADVICE}") from None


def _from_outside(name: str, role: Kind, offline: bool) -> ModelSource:
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path, name, role)
    if path.exists():
        return _from_file(path, name, role)
    if _HUB_ID.fullmatch(name) and path.suffix.lower() not in (".json", ".safetensors", *_PICKLES):
        return _from_hub(name, role, offline)
    near = difflib.get_close_matches(name, presets.names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? Otherwise {ADVICE}" if near else ADVICE
    raise ShapecheckError(f"{one_line(name)} is no preset, no file or folder, and no hub id of the form owner/name; {hint}")


def _from_preset(name: str, role: Kind) -> ModelSource:
    preset = presets.load(name)
    if preset.kind != role and (role, preset.kind) != ("controlnet", "unet"):  # a UNet stands for the ControlNet it implies
        what = {"unet": "UNet", "controlnet": "ControlNet", "adapter": "T2I-Adapter"}[preset.kind]
        option = "as MODEL" if preset.kind == "unet" else f"as --{preset.kind} {name}"
        wanted = "name the UNet as MODEL and give this one" if role == "unet" else "give this one"
        raise OtherModelError(f"{name} is a {what}; {wanted} {option}")
    notes = () if preset.verified else (f"preset {name} is unverified: `shapecheck presets` says where it was looked for",)
    class_name = _class_of(preset.config) or _CLASS_OF[preset.kind]
    return ModelSource(name, f"preset {name}", class_name, preset.config, None, preset.vae_factor, notes)


def _from_folder(folder: Path, name: str, role: Kind) -> ModelSource:
    locate = partial(_file_in, folder)
    source = _first(_PLACES[role], locate, name, role, f"{folder}/")
    if source is None:
        raise ShapecheckError(_nothing_in(folder, role))
    if source.origin == f"{folder}/unet/config.json":
        return _with_company(source, locate, folder)
    if role == "controlnet":
        return _with_further(source, Path(source.origin).parent)
    return _with_vae_near(source, folder)


def _from_file(path: Path, name: str, role: Kind) -> ModelSource:
    if path.name == "model_index.json":
        return _from_folder(path.parent, name, role)
    _refuse_pickles(path)
    if path.suffix.lower() == ".safetensors":
        return _from_checkpoint(path, name, role)
    return _with_vae_near(_source(read_json(path), name, str(path), role, path.parent), path.parent)


def _from_checkpoint(path: Path, name: str, role: Kind) -> ModelSource:
    """The source of a single file of weights: by the config.json it was saved with, else by the shapes in its header."""
    if re.fullmatch(r"diffusion_pytorch_model(\.\w+)?", path.stem) and _file_in(path.parent, "config.json"):
        source = _from_file(path.parent / "config.json", name, role)
        return replace(source, notes=(*source.notes, f"read from the config.json beside {path.name}, which was not opened"))
    if role == "adapter":
        raise ShapecheckError(f"{path}: a T2I-Adapter's configuration is not told from weights; give its folder or config.json")
    read = single_file.read_checkpoint(path, role)
    if read is None:
        raise OtherModelError(
            _wrong_class({"_class_name": _CLASS_OF["controlnet" if role == "unet" else "unet"]}, str(path), role)
        )
    refuse_absurd(read.config, str(path))
    return ModelSource(name, str(path), _CLASS_OF[role], read.config, None, read.vae_factor, read.notes, tensors=read.tensors)


def _from_hub(name: str, role: Kind, offline: bool) -> ModelSource:
    locate = partial(hub.fetch, name, offline=offline)
    here_first = sorted(_PLACES[role], key=lambda place: not hub.is_cached(name, place))
    source = _first(here_first, locate, name, role, f"hub {name} ")
    if source is None:
        looked = " and no ".join(_PLACES[role])
        raise ShapecheckError(f"looked for a {_CLASS_OF[role]} in hub repository {name}: it has no {looked}; {ADVICE}")
    assumed = ""
    try:
        if source.origin.endswith(" unet/config.json"):
            assumed = f"{source.vae_factor} pixels a latent cell and no ControlNet in {name} are assumed"
            index = locate("model_index.json")
            parts = _parts(read_json(index)) if index else ["vae"]
            return _with_company(source, lambda place: locate(place) if re.split("[/_]", place)[0] in parts else None, name)
        if source.origin.endswith(" controlnet/config.json"):
            assumed = f"no further ControlNet in {name} is assumed"
            source = replace(source, name=f"{name}/controlnet")
            nets, notes = _saved_together(locate, name, first=1)
            return replace(source, controlnets=nets, notes=(*source.notes, *notes))
    except hub.HubError as error:
        return replace(source, notes=(*source.notes, f"{assumed}: {error.reason}"))
    return source


def _first(places: Iterable[str], locate: Locate, name: str, role: Kind, origin: str) -> ModelSource | None:
    """The first place with a model of that role, or None. Raises ShapecheckError where only other models are there."""
    wrong = ""
    for place in places:
        path = locate(place)
        if path is None:
            continue
        record = read_json(path)
        if _role_of(record) == role:
            return _source(record, name, origin + place, role, path.parent)
        wrong = wrong or _wrong_class(record, origin + place, role)
    if wrong:
        raise OtherModelError(wrong)
    return None


def _with_company(source: ModelSource, locate: Locate, folder: Path | str) -> ModelSource:
    """With the VAE's factor, and the ControlNets saved with it."""
    nets, notes = _saved_together(locate, folder)
    factor = _vae_factor(locate("vae/config.json"))
    return replace(source, vae_factor=factor, controlnets=nets, notes=(*source.notes, *notes))


def _with_further(source: ModelSource, folder: Path) -> ModelSource:
    """With the ControlNets that MultiControlNetModel saved after this one: FOLDER_1, FOLDER_2, … beside FOLDER."""
    whole = Path(os.path.abspath(folder))  # noqa: PTH100  # the name of "..", links left as they are
    around = folder.parent if folder.name == whole.name else whole.parent
    nets, notes = _saved_together(partial(_file_in, whole.parent), around, name=whole.name, first=1)
    if nets:
        notes = (*notes, f"{nets[0].name} lies beside {folder} and is taken with it; {folder}/config.json is the first alone")
    return replace(source, name=str(folder), controlnets=nets, notes=(*source.notes, *notes))


def _saved_together(
    locate: Locate, folder: Path | str, *, name: str = "controlnet", first: int = 0
) -> tuple[tuple[ModelSource, ...], tuple[str, ...]]:
    """The ControlNets that lie in `folder` as `name`, `name`_1, …, and what was left out."""
    nets: list[ModelSource] = []
    for number in range(first, _MOST_CONTROLNETS):
        subfolder = f"{name}_{number}" if number else name
        path = locate(f"{subfolder}/config.json")
        if path is None:
            break
        record = read_json(path)
        if _role_of(record) != "controlnet":
            return tuple(nets), (f"{path} is of class {_class_of(record)}, which is not read yet: it was left out",)
        title = str(folder / subfolder) if isinstance(folder, Path) else f"{folder}/{subfolder}"
        nets.append(_source(record, title, str(path), "controlnet", path.parent))
    return tuple(nets), ()


def _with_vae_near(source: ModelSource, folder: Path) -> ModelSource:
    beside = _file_in(folder.absolute().parent, "vae/config.json")
    return replace(source, vae_factor=_vae_factor(_file_in(folder, "vae/config.json") or beside))


def _vae_factor(path: Path | None) -> int:
    """Pixels a latent cell covers, read off the VAE's config; 8 where there is none."""
    levels = read_json(path).get("block_out_channels") if path else None
    return 2 ** (len(levels) - 1) if isinstance(levels, list) and 1 <= len(levels) <= 8 else 8


def _file_in(folder: Path, place: str) -> Path | None:
    path = folder / place
    return path if path.is_file() else None


def _nothing_in(folder: Path, role: Kind) -> str:
    looked = f"looked for a {_CLASS_OF[role]} in {folder}: no {' and no '.join(_PLACES[role])}"
    index = _file_in(folder, "model_index.json")
    if index is None:
        present = ", ".join(sorted(one_line(entry.name) for entry in folder.iterdir())[:8]) or "nothing"
        return f"{looked}, it holds {present}; {ADVICE}"
    record = read_json(index)
    parts = _parts(record)
    if role in parts:
        return f"{looked}, though its model_index.json lists a {role}: the copy is incomplete; download it again"
    kind = one_line(record.get("_class_name"))
    return f"{looked}; it is a {kind} with {one_line(', '.join(parts)) or 'no parts'}: no {role} among them; {ADVICE}"


def _parts(index: Mapping[str, Any]) -> list[str]:
    """The components a model_index.json lists; those a pipeline does without are [null, null]."""
    return sorted(key for key, value in index.items() if isinstance(value, list) and any(value))


def _refuse_pickles(path: Path) -> None:
    if not path.is_file():
        raise ShapecheckError(f"{path} is a pipe, a device or a socket, which are never opened; {ADVICE}")
    with path.open("rb") as file:
        start = file.read(4)
    pickled = path.suffix.lower() in _PICKLES or start.startswith(b"PK\x03\x04")
    if pickled or (start.startswith(b"\x80") and path.suffix.lower() != ".safetensors"):  # there it begins a length
        raise ShapecheckError(
            f"{path} is a pickled checkpoint: opening it would run code it contains, so it is never opened; "
            "give the model's diffusers folder, its config.json or a .safetensors file"
        )


def _source(record: Mapping[str, Any], name: str, origin: str, role: Kind, folder: Path) -> ModelSource:
    """The source of a config that was read. Raises ShapecheckError where it is another model's."""
    class_name = _class_of(record)
    if class_name is None or _role_of(record) != role:
        raise OtherModelError(_wrong_class(record, origin, role))
    refuse_absurd(record, origin)
    named = record.get("_class_name")
    given = f"_class_name {one_line(named)}" if "_class_name" in record else "no _class_name"
    guessed = (f"{given} in {origin}: taken for a {class_name} by its keys",) if named != class_name else ()
    return ModelSource(name, origin, class_name, record, folder, notes=guessed)


def _class_of(record: Mapping[str, Any]) -> str | None:
    """The class a config names, or that its keys tell."""
    named = record.get("_class_name")
    if named is not None and not (named in _UNION_BEFORE_DIFFUSERS and "num_control_type" in record):
        return one_line(named)
    if {"adapter_type", "channels"} <= record.keys():
        return "T2IAdapter"
    if not {"down_block_types", "block_out_channels", "cross_attention_dim"} <= record.keys():
        return None if named is None else one_line(named)
    if "num_control_type" in record:
        return "ControlNetUnionModel"
    return "UNet2DConditionModel" if "up_block_types" in record else "ControlNetModel"


def _role_of(record: Mapping[str, Any]) -> Kind | None:
    """What a config's class is to the other one; None where it is neither."""
    return _CLASSES.get(_class_of(record) or "")


def _wrong_class(record: Mapping[str, Any], origin: str, role: Kind) -> str:
    """Say what a config is that is not of the role that was asked for."""
    if "shapecheck_contract" in record:
        return f"{origin} is a saved contract, not a model; read it with shapecheck.Contract.from_json"
    takes = "--controlnet takes a ControlNet, or the name of a UNet preset"
    if role == "adapter":
        takes = "--adapter takes a T2IAdapter"
    others = {
        "controlnet": "a ControlNet; name the UNet as MODEL and give this one with --controlnet",
        "adapter": "a T2I-Adapter; name the UNet as MODEL and give this one with --adapter",
        "unet": f"a UNet; {takes}",
    }
    if (other := _role_of(record)) is not None:
        return f"{origin} is {others[other]}"
    if (found := _class_of(record)) is not None:
        return f"{origin} is of class {found}, which is not read yet; expected a {_CLASS_OF[role]}; {ADVICE}"
    kinds = record.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else record.get("model_type")
    what = f"the config of a {one_line(kind)}" if kind else "no diffusers config (no _class_name)"
    return f"{origin} is {what}; expected a {_CLASS_OF[role]}; {ADVICE}"
