"""From what a user names to a model's configuration: preset, file, folder or hub id. Never weights, never code."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shapecheck import presets
from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.models import hub
from shapecheck.models.config_file import ADVICE, CLASSES, read_json, refuse_absurd
from shapecheck.models.config_file import ModelSource as ModelSource
from shapecheck.models.single_file import read_checkpoint
from shapecheck.presets import Kind

Locate = Callable[[str], Path | None]
"""From a file's place in a model, such as vae/config.json, to its path here; None if the model has none."""
_CLASS_OF: Mapping[Kind, str] = {"unet": "UNet2DConditionModel", "controlnet": "ControlNetModel", "adapter": "T2IAdapter"}
"""The class expected of each role, in messages and if a configuration names none."""
_PLACES: Mapping[Kind, tuple[str, ...]] = {
    "unet": ("unet/config.json", "config.json"),
    "controlnet": ("config.json", "controlnet/config.json"),
    "adapter": ("config.json", "adapter/config.json"),
}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
_HUB_ID = re.compile(r"(?=.{3,96}$)\w[\w.-]*/\w[\w.-]*", re.ASCII)


class OtherModelError(ShapecheckError):
    """The name stands for a model of another kind."""


def find(name: str, role: Kind, *, offline: bool = False) -> ModelSource:
    """Return the configuration that `name` stands for: a preset, else a path, else a hub id.

    For a ControlNet the name of a UNet preset is allowed and gives that UNet: its ControlNet is the implied one.
    Raises ShapecheckError saying what was looked for, what was found and what to do.
    """
    if name in presets.names():
        preset = presets.load(name)
        if preset.kind != role and (role, preset.kind) != ("controlnet", "unet"):
            raise OtherModelError(_describe_other_kind(name, preset.kind, role))
        notes = () if preset.verified else (f"preset {name} is unverified: `shapecheck presets` says where it was looked for",)
        class_name = _class_of(preset.config) or _CLASS_OF[preset.kind]
        return ModelSource(name, f"preset {name}", class_name, preset.config, None, preset.vae_factor, notes)
    if not name.strip():  # Path("") would be the current folder
        raise ShapecheckError(f"the name of the {role} is empty; {ADVICE}")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return _find_in_folder(path, name, role)
        if path.exists():
            return _find_in_file(path, name, role)
        if _HUB_ID.fullmatch(name) and path.suffix.lower() not in (".json", ".safetensors", *_PICKLES):
            return _find_on_hub(name, role, offline)
    except (OSError, RuntimeError) as error:  # no permission, too long a name, the home of nobody
        reason = getattr(error, "strerror", None) or error
        raise ShapecheckError(f"cannot read {one_line(name)}: {reason}; {ADVICE}") from None
    near = difflib.get_close_matches(name, presets.names(), n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}? Otherwise {ADVICE}" if near else ADVICE
    raise ShapecheckError(f"{one_line(name)} is not a preset, file, folder, or hub id of the form owner/name; {advice}")


def _find_in_folder(folder: Path, name: str, role: Kind) -> ModelSource:
    locate = partial(_file_in, folder)
    source = _read_first(_PLACES[role], locate, name, role, f"{folder}/")
    if source is None:
        raise ShapecheckError(f"looked for a {_CLASS_OF[role]} in {folder}: {_describe_folder(folder, role)}")
    if source.origin == f"{folder}/unet/config.json":
        return _add_parts(source, locate, folder)
    if role != "controlnet":
        return _add_vae_factor(source, folder)

    # MultiControlNetModel saves the ControlNets after the first beside its folder, as FOLDER_1, FOLDER_2, …
    first = Path(source.origin).parent
    real = Path(os.path.abspath(first))  # noqa: PTH100  # the name of "..", links left as they are
    around = first.parent if first.name == real.name else real.parent
    nets, notes = _read_controlnets(partial(_file_in, real.parent), around, name=real.name, start=1)
    if nets:
        notes = (*notes, f"{nets[0].name} lies beside {first} and is taken with it; {first}/config.json is the first alone")
    return replace(source, name=str(first), controlnets=nets, notes=(*source.notes, *notes))


def _find_in_file(path: Path, name: str, role: Kind) -> ModelSource:
    if path.name == "model_index.json":
        return _find_in_folder(path.parent, name, role)
    if not path.is_file():
        raise ShapecheckError(f"{path} is a pipe, a device or a socket, which are never opened; {ADVICE}")
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        start = file.read(4)
    pickled = suffix in _PICKLES or start.startswith(b"PK\x03\x04")
    if pickled or (start.startswith(b"\x80") and suffix != ".safetensors"):  # in a .safetensors file it begins a length
        raise ShapecheckError(
            f"{path} is a pickled checkpoint: opening it would run code it contains, so it is never opened; "
            "give the model's diffusers folder, its config.json or a .safetensors file"
        )
    if suffix != ".safetensors":
        return _add_vae_factor(_make_source(read_json(path), name, str(path), role, path.parent), path.parent)

    # weights: by the config.json they were saved with, else by the shapes in their header
    if re.fullmatch(r"diffusion_pytorch_model(\.\w+)?", path.stem) and _file_in(path.parent, "config.json"):
        source = _find_in_file(path.parent / "config.json", name, role)
        return replace(source, notes=(*source.notes, f"read from the config.json beside {path.name}, which was not opened"))
    if role == "adapter":
        raise ShapecheckError(f"{path}: a T2I-Adapter's configuration is not in its weights; give its folder or config.json")
    checkpoint = read_checkpoint(path, role, name)
    if checkpoint is None:
        raise OtherModelError(_describe_other_kind(str(path), "controlnet" if role == "unet" else "unet", role))
    refuse_absurd(checkpoint.config, str(path))
    return checkpoint


def _find_on_hub(name: str, role: Kind, offline: bool) -> ModelSource:
    locate = partial(hub.fetch, name, offline=offline)
    cached_first = sorted(_PLACES[role], key=lambda place: not hub.is_cached(name, place))
    source = _read_first(cached_first, locate, name, role, f"hub {name} ")
    if source is None:
        places = " and no ".join(_PLACES[role])
        raise ShapecheckError(f"looked for a {_CLASS_OF[role]} in hub repository {name}: it has no {places}; {ADVICE}")
    assumed = ""
    try:
        if source.origin.endswith(" unet/config.json"):
            assumed = f"{source.vae_factor} pixels per latent cell and no ControlNet in {name} are assumed"
            index = locate("model_index.json")
            parts = _list_parts(read_json(index)) if index else ["vae"]
            return _add_parts(source, lambda place: locate(place) if re.split("[/_]", place)[0] in parts else None, name)
        if source.origin.endswith(" controlnet/config.json"):
            assumed = f"no further ControlNet in {name} is assumed"
            source = replace(source, name=f"{name}/controlnet")
            nets, notes = _read_controlnets(locate, name, start=1)
            return replace(source, controlnets=nets, notes=(*source.notes, *notes))
    except hub.HubError as error:
        return replace(source, notes=(*source.notes, f"{assumed}: {error.reason}"))
    return source


def _read_first(places: Iterable[str], locate: Locate, name: str, role: Kind, origin: str) -> ModelSource | None:
    """Return the model of that role in the first place with one, or None. Raises OtherModelError if all are others."""
    other: OtherModelError | None = None
    for place in places:
        if path := locate(place):
            try:
                return _make_source(read_json(path), name, origin + place, role, path.parent)
            except OtherModelError as error:
                other = other or error
    if other:
        raise other
    return None


def _add_parts(source: ModelSource, locate: Locate, folder: Path | str) -> ModelSource:
    """Return a UNet's source with the VAE's factor and the ControlNets saved with it."""
    nets, notes = _read_controlnets(locate, folder)
    factor = _read_vae_factor(locate("vae/config.json"))
    return replace(source, vae_factor=factor, controlnets=nets, notes=(*source.notes, *notes))


def _add_vae_factor(source: ModelSource, folder: Path) -> ModelSource:
    vae = _file_in(folder, "vae/config.json") or _file_in(folder.absolute().parent, "vae/config.json")
    return replace(source, vae_factor=_read_vae_factor(vae))


def _read_controlnets(
    locate: Locate, folder: Path | str, *, name: str = "controlnet", start: int = 0
) -> tuple[tuple[ModelSource, ...], tuple[str, ...]]:
    """Return the ControlNets in `folder` called `name`, `name`_1, …, and notes of what was left out."""
    nets: list[ModelSource] = []
    for number in range(start, 32):
        subfolder = f"{name}_{number}" if number else name
        path = locate(f"{subfolder}/config.json")
        if path is None:
            break
        record = read_json(path)
        class_name = _class_of(record)
        if CLASSES.get(class_name or "") != "controlnet":
            return tuple(nets), (f"{path} is of class {class_name}, which is not supported yet: it was left out",)
        title = str(folder / subfolder) if isinstance(folder, Path) else f"{folder}/{subfolder}"
        nets.append(_make_source(record, title, str(path), "controlnet", path.parent))
    return tuple(nets), ()


def _read_vae_factor(path: Path | None) -> int:
    """Return the pixels per latent cell according to the VAE's config; 8 if there is none."""
    levels = read_json(path).get("block_out_channels") if path else None
    return 2 ** (len(levels) - 1) if isinstance(levels, list) and 1 <= len(levels) <= 8 else 8


def _file_in(folder: Path, place: str) -> Path | None:
    path = folder / place
    return path if path.is_file() else None


def _describe_folder(folder: Path, role: Kind) -> str:
    absent = f"no {' and no '.join(_PLACES[role])}"
    index = _file_in(folder, "model_index.json")
    if index is None:
        present = ", ".join(sorted(one_line(entry.name) for entry in folder.iterdir())[:8]) or "nothing"
        return f"{absent}, it holds {present}; {ADVICE}"
    record = read_json(index)
    parts = _list_parts(record)
    if role in parts:
        return f"{absent}, though its model_index.json lists a {role}: the copy is incomplete; download it again"
    pipeline = one_line(record.get("_class_name"))
    return f"{absent}; it is a {pipeline} with {one_line(', '.join(parts)) or 'no parts'}: no {role} among them; {ADVICE}"


def _list_parts(index: Mapping[str, Any]) -> list[str]:
    """Return the components that a model_index.json lists; those a pipeline does without are [null, null]."""
    return sorted(key for key, value in index.items() if isinstance(value, list) and any(value))


def _make_source(record: Mapping[str, Any], name: str, origin: str, role: Kind, folder: Path) -> ModelSource:
    """Return the source of a config that was read. Raises OtherModelError, saying what the config is, if it is another's."""
    class_name, named = _class_of(record), record.get("_class_name")
    expected = f"expected a {_CLASS_OF[role]}; {ADVICE}"
    if "shapecheck_contract" in record:
        raise OtherModelError(f"{origin} is a saved contract, not a model; read it with shapecheck.Contract.from_json")
    if class_name is None:
        models = record.get("architectures")
        model = models[0] if isinstance(models, list) and models else record.get("model_type")
        what = f"the config of a {one_line(model)}" if model else "not a diffusers config (no _class_name)"
        raise OtherModelError(f"{origin} is {what}; {expected}")
    kind = CLASSES.get(class_name)
    if kind is None:
        raise OtherModelError(f"{origin} is of class {class_name}, which is not supported yet; {expected}")
    if kind != role:
        raise OtherModelError(_describe_other_kind(origin, kind, role))
    refuse_absurd(record, origin)
    written = f"_class_name {one_line(named)}" if "_class_name" in record else "no _class_name"
    notes = (f"{written} in {origin}: taken for a {class_name} by its keys",) if named != class_name else ()
    return ModelSource(name, origin, class_name, record, folder, notes=notes)


def _class_of(record: Mapping[str, Any]) -> str | None:
    named = record.get("_class_name")
    # configs of union ControlNets older than diffusers' class for them name another
    if named is not None and not (named in ("ControlNetModel", "ControlNetModel_Union") and "num_control_type" in record):
        return one_line(named)
    if {"adapter_type", "channels"} <= record.keys():
        return "T2IAdapter"
    if not {"down_block_types", "block_out_channels", "cross_attention_dim"} <= record.keys():
        return None if named is None else one_line(named)
    if "num_control_type" in record:
        return "ControlNetUnionModel"
    return "UNet2DConditionModel" if "up_block_types" in record else "ControlNetModel"


def _describe_other_kind(origin: str, kind: Kind, role: Kind) -> str:
    if kind == "unet":
        expected = "a T2IAdapter" if role == "adapter" else "a ControlNet, or the name of a UNet preset"
        return f"{origin} is a UNet; --{role} takes {expected}"
    title = "ControlNet" if kind == "controlnet" else "T2I-Adapter"
    return f"{origin} is a {title}; name the UNet as MODEL and give this one with --{kind}"
