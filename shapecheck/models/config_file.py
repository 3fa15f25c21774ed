"""Reading one configuration file that anybody may have written: bounded, finite, fit to be printed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.files import read_text
from shapecheck.models import hub

ADVICE = "give a preset (`shapecheck presets`), a diffusers folder, its config.json or a hub id"


_DEEPEST = 8


_MOST_LEVELS = 12


_MOST_TRANSFORMERS = 1024
"""Levels × layers × transformer layers; SDXL's UNet has fewer than 100."""


_LARGEST_NUMBER = 2**24


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ShapecheckError on anything else, OSError where the file cannot be read."""
    not_text = f"{path} is not UTF-8 text, as a diffusers config.json is; {ADVICE}"
    too_large = f"{path} is larger than {hub.LARGEST_FILE} bytes: not a config.json; {ADVICE}"
    text = read_text(path, hub.LARGEST_FILE, too_large=too_large, not_text=not_text)
    try:
        record = json.loads(text, parse_constant=_finite, parse_float=_finite)
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # half a surrogate pair could never be printed again
        if _depth_exceeds(record, _DEEPEST):
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
    """Raise ShapecheckError where a configuration asks for a model that would only fill the memory."""
    for key, value in config.items():
        if (largest := max(_numbers(value), default=0)) > _LARGEST_NUMBER:
            raise ShapecheckError(f"{origin}: {one_line(key)} holds {largest:.3g}; more than {_LARGEST_NUMBER} is refused")
    levels = config.get("down_block_types", config.get("channels"))
    count = len(levels) if isinstance(levels, list) else 1
    layers = max(_numbers(config.get("layers_per_block", config.get("num_res_blocks"))), default=1)
    deepest = max(_numbers(config.get("transformer_layers_per_block")), default=1)
    if count > _MOST_LEVELS or count * layers * max(deepest, 1) > _MOST_TRANSFORMERS:
        raise ShapecheckError(
            f"{origin} asks for {count} levels of {layers} layers of {deepest} transformer layers; "
            f"more than {_MOST_LEVELS} levels or {_MOST_TRANSFORMERS} transformer layers in all are refused"
        )
    sizes = config.get("sample_size")
    if sizes is not None and (isinstance(sizes, bool) or min(_numbers(sizes), default=0) < 1):
        raise ShapecheckError(f"{origin}: sample_size is {one_line(sizes)}; expected a latent size, or height and width")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _depth_exceeds(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_depth_exceeds(each, levels - 1) for each in inner)


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value
