"""Which .safetensors files hold the weights of the model in a diffusers folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from shapecheck.contract import ShapecheckError
from shapecheck.observe.configfile import one_line, read_json
from shapecheck.observe.safetensors_header import DAMAGED, parsed

_LONGEST_INDEX = 2**24
_SHARD = r"-\d{5}-of-\d{5}"


def checkpoint_files(folder: Path, stem: str = "diffusion_pytorch_model", variant: str | None = None) -> tuple[Path, ...]:
    """The .safetensors files of the model in a diffusers folder: the shards its index lists, else the single file.

    A variant, such as fp16, is taken only where it is asked for. Raises ShapecheckError, saying what the folder holds, where
    that one is not there, only pickled, incomplete, or where its index leads out of the folder.
    """
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise ShapecheckError(f"cannot read the folder {folder}: {error.strerror or error}") from None
    single, indexes = _spellings(stem, variant)
    index = next((name for name in indexes if name in names), None)
    if index is not None:  # first, as in diffusers
        return _shards(folder / index, names, single)
    if single in names:
        return (folder / single,)
    raise ShapecheckError(f"{folder} holds no {single} and no {indexes[0]}; {_instead(folder, names, stem, variant)}")


def _spellings(stem: str, variant: str | None) -> tuple[str, tuple[str, ...]]:
    """The name of the single file, and of the index: as diffusers writes it, and as it wrote it for a variant before 0.32."""
    if variant is None:
        return f"{stem}.safetensors", (f"{stem}.safetensors.index.json",)
    indexes = (f"{stem}.safetensors.index.{variant}.json", f"{stem}.safetensors.{variant}.index.json")
    return f"{stem}.{variant}.safetensors", indexes


def _shards(index: Path, names: set[str], single: str) -> tuple[Path, ...]:
    try:
        with index.open("rb") as file:
            record = parsed(file.read(_LONGEST_INDEX + 1), _LONGEST_INDEX)
        listed = record.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("weight_map does not give a file to each tensor")
    except OSError as error:
        raise ShapecheckError(f"cannot read {index}: {error.strerror or error}") from None
    except ValueError as error:
        raise ShapecheckError(f"{index} is no index of shards: {error}; {DAMAGED}") from None
    shards = sorted(set(listed.values()))
    for shard in shards:
        if shard in ("", ".", "..") or not PurePosixPath(shard).name == PureWindowsPath(shard).name == shard:
            raise ShapecheckError(f"{index} lists {one_line(shard)!r}, which escapes the folder: no file of it is read")
    if missing := [shard for shard in shards if shard not in names]:
        stale = f", or delete the index, if {single} is the later one" if single in names else ""
        raise ShapecheckError(
            f"{index} lists {len(shards)} files, of which {len(missing)} are not there: "
            f"{one_line(', '.join(missing))}; download them{stale}"
        )
    return tuple(index.parent / shard for shard in shards)


def _instead(folder: Path, names: set[str], stem: str, variant: str | None) -> str:
    """What a folder without the wanted weights has, and what to do."""
    single, indexes = _spellings(stem, None)
    choices = [f"`--variant {shlex.quote(each)}`" for each in _variants(names, stem, "safetensors")]
    if variant is not None and not names.isdisjoint((single, *indexes)):
        choices.insert(0, "no `--variant` for the plain one")
    if choices:
        return f"choose one that is there: {one_line(', '.join(choices))}"
    kinds = (rf"{re.escape(stem)}({_SHARD})?\.bin", rf"{re.escape(stem)}\..+\.bin")
    if any(re.fullmatch(kind, name) for name in names for kind in kinds):
        pickled = _variants(names, stem, "bin")
        return _conversion(folder, variant if variant in pickled else next(iter(pickled), None))
    present = one_line(", ".join(sorted(names)[:12])) or "nothing"
    return f"it holds {present}; give the folder in which save_pretrained wrote the model as .safetensors"


def _variants(names: Iterable[str], stem: str, suffix: str) -> list[str]:
    """The variants of which a folder holds weights, in both spellings."""
    stem = re.escape(stem)
    forms = (
        rf"{stem}\.{suffix}\.index\.(.+)\.json",
        rf"{stem}\.{suffix}\.(.+)\.index\.json",
        rf"{stem}{_SHARD}\.(.+)\.{suffix}",
        rf"{stem}\.(.+?)(?:{_SHARD})?\.{suffix}",
    )
    found = (re.fullmatch(form, name) for name in names for form in forms)
    return sorted({match[1] for match in found if match})


def _conversion(folder: Path, variant: str | None) -> str:
    chosen = f", variant={variant!r}" if variant else ""
    half = ", torch_dtype=torch.float16" if variant == "fp16" else ""  # diffusers loads as float32 otherwise
    code = (
        f"import sys, torch; from diffusers import {_class_in(folder)} as Model; "
        f"Model.from_pretrained(sys.argv[1], use_safetensors=False{chosen}{half}).save_pretrained(sys.argv[1]{chosen})"
    )
    quoted = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return (
        "its weights are pickled, which shapecheck never opens: reading them can run code they contain. "
        f"If you trust where they come from, convert them: {quoted(['python', '-c', code, str(folder)])}"
    )


def _class_in(folder: Path) -> str:
    try:
        name = read_json(folder / "config.json").get("_class_name")
    except (OSError, ShapecheckError):
        name = None
    return name if isinstance(name, str) and name.isidentifier() else "UNet2DConditionModel"
