"""A model's configuration as it was found, and the reading of a file that anybody may have written: bounded and finite."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shapecheck.contract import Shape, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.files import read_text
from shapecheck.models import hub
from shapecheck.presets import Kind

ADVICE = "give a preset (`shapecheck presets`), a diffusers folder, its config.json or a hub id"
CLASSES: Mapping[str, Kind] = {
    "UNet2DConditionModel": "unet",
    "ControlNetModel": "controlnet",
    "ControlNetUnionModel": "controlnet",
    "T2IAdapter": "adapter",
}
_MOST_LEVELS = 12
_MOST_TRANSFORMERS = 1024
"""Levels × layers × transformer layers; SDXL's UNet has fewer than 100."""
_LARGEST_NUMBER = 2**24


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor as a file has it."""

    name: str
    """The file's own name for it."""
    shape: Shape


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's configuration and where it was found."""

    name: str
    """As the user wrote it."""
    origin: str
    """The place where the configuration was read."""
    class_name: str
    config: Mapping[str, Any] = field(repr=False)
    folder: Path | None = None
    """The folder of the configuration on this machine, and of the weights if they are here."""
    vae_factor: int = 8
    notes: tuple[str, ...] = ()
    controlnets: tuple[ModelSource, ...] = ()
    """Of a UNet: the ControlNets in the same model folder. Of a ControlNet: the further ones saved with it."""
    tensors: Mapping[str, CheckpointTensor] = field(default_factory=dict, repr=False)
    """If the configuration was read off a checkpoint's header: the tensors that the model must have, by their names."""

    @property
    def role(self) -> Kind:
        return CLASSES[self.class_name]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ShapecheckError on anything else, OSError if the file cannot be read."""
    not_text = f"{path} is not UTF-8 text, as a diffusers config.json is; {ADVICE}"
    too_large = f"{path} is larger than {hub.LARGEST_FILE} bytes: not a config.json; {ADVICE}"
    text = read_text(path, hub.LARGEST_FILE, too_large=too_large, not_text=not_text)
    try:
        record = json.loads(text, parse_constant=_parse_finite, parse_float=_parse_finite)
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # half a surrogate pair could never be printed again
        if _exceeds_depth(record, 8):
            raise RecursionError
    except UnicodeError:
        raise ShapecheckError(not_text) from None
    except RecursionError:
        raise ShapecheckError(f"{path} is nested too deeply to be a config.json; {ADVICE}") from None
    except ValueError as error:
        raise ShapecheckError(f"{path} is not valid JSON: {error}; is the file cut short? Otherwise {ADVICE}") from None
    if not isinstance(record, dict):
        raise ShapecheckError(f"{path} holds a JSON {type(record).__name__}, not the object a config.json is; {ADVICE}")
    return record


def refuse_absurd(config: Mapping[str, Any], origin: str) -> None:
    """Raise ShapecheckError if a configuration describes a model that would only fill the memory."""
    for key, value in config.items():
        if (largest := max(_list_numbers(value), default=0)) > _LARGEST_NUMBER:
            raise ShapecheckError(f"{origin}: {one_line(key)} holds {largest:.3g}; more than {_LARGEST_NUMBER} is refused")
    levels = config.get("down_block_types", config.get("channels"))
    count = len(levels) if isinstance(levels, list) else 1
    layers = max(_list_numbers(config.get("layers_per_block", config.get("num_res_blocks"))), default=1)
    deepest = max(_list_numbers(config.get("transformer_layers_per_block")), default=1)
    if count > _MOST_LEVELS or count * layers * max(deepest, 1) > _MOST_TRANSFORMERS:
        raise ShapecheckError(
            f"{origin} describes {count} levels of {layers} layers of {deepest} transformer layers; "
            f"more than {_MOST_LEVELS} levels or {_MOST_TRANSFORMERS} transformer layers in all are refused"
        )
    sizes = config.get("sample_size")
    if sizes is not None and (isinstance(sizes, bool) or min(_list_numbers(sizes), default=0) < 1):
        raise ShapecheckError(f"{origin}: sample_size is {one_line(sizes)}; expected a latent size, or height and width")


def _parse_finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _exceeds_depth(value: Any, levels: int) -> bool:
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_exceeds_depth(member, levels - 1) for member in members)


def _list_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for member in value:
            yield from _list_numbers(member)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value
