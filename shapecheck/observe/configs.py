"""From what a user names to a model's configuration: preset, file, folder or hub id. Never weights, never code."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from shapecheck import presets
from shapecheck.contract import ShapecheckError
from shapecheck.observe import hub

Role = Literal["unet", "controlnet"]

LARGEST_CONFIG = 2**20
"""Bytes; a diffusers config.json has a few thousand."""

_CLASSES: Mapping[str, Role] = {"UNet2DConditionModel": "unet", "ControlNetModel": "controlnet"}
_PLACES: Mapping[Role, tuple[str, ...]] = {
    "unet": ("unet/config.json", "config.json"),
    "controlnet": ("config.json", "controlnet/config.json"),
}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's configuration and where it was found."""

    name: str
    """What the user called it."""
    origin: str
    """Where the configuration was read."""
    class_name: str
    config: Mapping[str, Any] = field(repr=False)
    vae_factor: int = 8
    notes: tuple[str, ...] = ()
    controlnets: tuple[ModelSource, ...] = ()
    """ControlNets that lie in the same model folder."""

    @property
    def role(self) -> Role:
        return _CLASSES[self.class_name]


def find(name: str, role: Role, *, offline: bool = False) -> ModelSource:
    """The configuration `name` stands for: a preset, else a path, else a hub id.

    For a ControlNet the name of a UNet preset is allowed and gives that UNet: its ControlNet is the implied one.
    Raises ShapecheckError saying what was looked for, what was found and what to do.
    """
    if name in presets.names():
        return _from_preset(name, role)
    path = Path(name).expanduser()
    if path.exists():
        return _from_folder(path, name, role) if path.is_dir() else _from_file(path, name, role)
    if _HUB_ID.fullmatch(name) and path.suffix.lower() not in (".json", ".safetensors", *_PICKLES):
        return _from_hub(name, role, offline)
    near = difflib.get_close_matches(name, presets.names(), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; `shapecheck presets` lists the presets"
    raise ShapecheckError(f"{name!r} is no preset, no file or folder, and no hub id of the form owner/name{hint}")


def _from_preset(name: str, role: Role) -> ModelSource:
    preset = presets.load(name)
    if role == "unet" and preset.kind == "controlnet":
        raise ShapecheckError(f"{name} is a ControlNet; name the UNet as MODEL and give this one as --controlnet {name}")
    notes = () if preset.verified else (f"preset {name} is unverified: {preset.checked}",)
    class_name = "UNet2DConditionModel" if preset.kind == "unet" else "ControlNetModel"
    return ModelSource(name, f"preset {name}", class_name, preset.config, preset.vae_factor, notes)


def _from_folder(folder: Path, name: str, role: Role) -> ModelSource:
    for place in _PLACES[role]:
        path = folder / place
        if path.is_file() and (place != "config.json" or not _is_other_role(path, role)):
            found = _checked(_read_json(path), name, str(path), role)
            if role == "controlnet":
                return found
            return replace(found, vae_factor=_vae_factor(path), controlnets=_neighbours(folder, name))
    raise ShapecheckError(_nothing_in(folder, role))


def _is_other_role(path: Path, role: Role) -> bool:
    """Whether a folder's own config.json is a model of the other kind, while the wanted one lies in a subfolder."""
    wanted = path.parent / role / "config.json"
    return wanted.is_file() and _CLASSES.get(str(_read_json(path).get("_class_name"))) != role


def _nothing_in(folder: Path, role: Role) -> str:
    looked = " and ".join(_PLACES[role])
    index = folder / "model_index.json"
    if index.is_file():
        parts = sorted(key for key, value in _read_json(index).items() if isinstance(value, list))
        return f"{folder} is a {_read_json(index).get('_class_name')} with {', '.join(parts)}: no {role} among them"
    present = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    return f"no {looked} in {folder} (it holds {present}); give a diffusers folder or a config.json"


def _neighbours(folder: Path, name: str) -> tuple[ModelSource, ...]:
    """The ControlNets saved with a pipeline: controlnet/, controlnet_1/, …, as MultiControlNetModel saves them."""
    found = []
    for subfolder in ("controlnet", *(f"controlnet_{number}" for number in range(1, 32))):
        path = folder / subfolder / "config.json"
        if not path.is_file():
            break
        found.append(_checked(_read_json(path), f"{name}/{subfolder}", str(path), "controlnet"))
    return tuple(found)


def _from_file(path: Path, name: str, role: Role) -> ModelSource:
    if path.name == "model_index.json":
        return _from_folder(path.parent, name, role)
    with path.open("rb") as file:
        start = file.read(8)
    if path.suffix.lower() in _PICKLES or start.startswith((b"PK\x03\x04", b"\x80")):
        raise ShapecheckError(
            f"{path} is a pickled checkpoint: opening it would run code it contains, so it is never opened; "
            "give the model's diffusers folder or its config.json"
        )
    if path.suffix.lower() == ".safetensors":
        raise ShapecheckError(
            f"{path} holds weights without a configuration; give the diffusers folder it belongs to, or its config.json"
        )
    source = _checked(_read_json(path), name, str(path), role)
    return replace(source, vae_factor=_vae_factor(path))


def _from_hub(name: str, role: Role, offline: bool) -> ModelSource:
    for place in _PLACES[role]:
        path = hub.fetch(name, place, offline=offline)
        if path is None:
            continue
        record = _read_json(path)
        if role == "controlnet" and _CLASSES.get(str(record.get("_class_name"))) == "unet":
            continue
        vae = hub.fetch(name, "vae/config.json", offline=offline) if place.startswith("unet/") else None
        factor = _factor_of(_read_json(vae)) if vae else 8
        return replace(_checked(record, name, f"hub {name} {place}", role), vae_factor=factor)
    raise ShapecheckError(f"hub repository {name} has no {' and no '.join(_PLACES[role])}")


def _vae_factor(config: Path) -> int:
    """Pixels a latent cell covers, read off the VAE's config beside the UNet's; 8 where there is none."""
    for folder in (config.parent.parent, config.parent):
        path = folder / "vae" / "config.json"
        if path.is_file():
            return _factor_of(_read_json(path))
    return 8


def _factor_of(vae: Mapping[str, Any]) -> int:
    levels = vae.get("block_out_channels")
    return 2 ** (len(levels) - 1) if isinstance(levels, list) and 1 <= len(levels) <= 8 else 8


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_CONFIG + 1)
    except OSError as error:
        raise ShapecheckError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > LARGEST_CONFIG:
        raise ShapecheckError(f"{path} is larger than {LARGEST_CONFIG} bytes: not a config.json")
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise ShapecheckError(f"{path} is not text: expected a diffusers config.json") from None
    except RecursionError:
        raise ShapecheckError(f"{path} is nested too deeply to be a config.json") from None
    except ValueError as error:
        raise ShapecheckError(f"{path} is not valid JSON: {error}; is the file cut short?") from None
    if not isinstance(record, dict):
        raise ShapecheckError(f"{path} holds a JSON {type(record).__name__}, not the object a config.json is")
    return record


def _checked(record: Mapping[str, Any], name: str, origin: str, role: Role) -> ModelSource:
    """The source of a config that was read, once its class is known to be the wanted one."""
    class_name = record.get("_class_name")
    if "shapecheck_contract" in record:
        raise ShapecheckError(f"{origin} is a saved contract, not a model; read it with shapecheck.Contract.from_json")
    if class_name is None and (guess := _class_by_keys(record)):
        return ModelSource(name, origin, guess, record, notes=(f"no _class_name in {origin}: taken for a {guess} by its keys",))
    if isinstance(class_name, str) and _CLASSES.get(class_name) == role:
        return ModelSource(name, origin, class_name, record)
    raise ShapecheckError(_wrong_class(record, origin, role))


def _class_by_keys(record: Mapping[str, Any]) -> str | None:
    if not {"down_block_types", "block_out_channels", "cross_attention_dim"} <= record.keys():
        return None
    return "UNet2DConditionModel" if "up_block_types" in record else "ControlNetModel"


def _wrong_class(record: Mapping[str, Any], origin: str, role: Role) -> str:
    wanted = next(name for name, its_role in _CLASSES.items() if its_role == role)
    class_name = record.get("_class_name")
    if class_name is None:
        kind = (record.get("architectures") or [record.get("model_type")]) if isinstance(record, dict) else None
        what = (
            f"the config of a {kind[0]}"
            if isinstance(kind, list) and kind and kind[0]
            else "no diffusers config (no _class_name)"
        )
        return f"{origin} is {what}; expected a {wanted}"
    if _CLASSES.get(str(class_name)) == "controlnet":
        return f"{origin} is a ControlNet; name the UNet as MODEL and give this one with --controlnet"
    if _CLASSES.get(str(class_name)) == "unet":
        return f"{origin} is a UNet; --controlnet takes a {wanted}, or the name of a UNet preset"
    return f"{origin} is a {class_name}, which is not read yet; expected a {wanted}"
