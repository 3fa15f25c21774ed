"""A checkpoint's .safetensors files: which they are, and where each tensor lies. No data is read, nothing is believed."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from shapecheck.contract import ShapecheckError
from shapecheck.contract.dims import Shape, show
from shapecheck.contract.errors import one_line
from shapecheck.files import report_unreadable, require_regular
from shapecheck.models.config_file import read_json

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""From a dtype's name in safetensors to its name in PyTorch and its bytes."""


_LONGEST_HEADER = 100_000_000  # as the safetensors library has it


_MOST_VALUES = 1_000_000
"""JSON values in one file; SDXL's UNet has 20,000. What 100 MB of `[],` unfold to would fill the memory."""


_MOST_DIMENSIONS = 64


_LARGEST = 2**63 - 1


_LONGEST_INDEX = 2**24


_SHARD = r"-\d{5}-of-\d{5}"


_DAMAGED = "is the download cut short or the file damaged? Fetch it again"


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """One tensor in a file."""

    file: Path
    offset: int
    """Of its first byte, counted from the start of the file."""
    nbytes: int
    dtype: str
    """The name in PyTorch: float32, bfloat16, int64, …"""
    shape: Shape


def checkpoint_files(folder: Path, stem: str = "diffusion_pytorch_model", variant: str | None = None) -> tuple[Path, ...]:
    """The .safetensors files of the model in a diffusers folder: the shards its index lists, else the single file.

    A variant, such as fp16, is taken only where it is asked for. Raises ShapecheckError, saying what the folder holds, where
    that one is not there, only pickled, incomplete, or where its index leads out of the folder.
    """
    with report_unreadable(f"the folder {folder}"):
        names = {entry.name for entry in folder.iterdir()}
    single, indexes = _spellings(stem, variant)
    index = next((name for name in indexes if name in names), None)
    if index is not None:  # first, as in diffusers
        return _shards(folder / index, names, single)
    if single in names:
        return (folder / single,)
    raise ShapecheckError(f"{folder} holds no {single} and no {indexes[0]}; {_advise_instead(folder, names, stem, variant)}")


def _spellings(stem: str, variant: str | None) -> tuple[str, tuple[str, ...]]:
    """The name of the single file, and of the index: as diffusers writes it, and as it wrote it for a variant before 0.32."""
    if variant is None:
        return f"{stem}.safetensors", (f"{stem}.safetensors.index.json",)
    indexes = (f"{stem}.safetensors.index.{variant}.json", f"{stem}.safetensors.{variant}.index.json")
    return f"{stem}.{variant}.safetensors", indexes


def _shards(index: Path, names: set[str], single: str) -> tuple[Path, ...]:
    try:
        with report_unreadable(index), index.open("rb") as file:
            record = _parse_json(file.read(_LONGEST_INDEX + 1), _LONGEST_INDEX)
        listed = record.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("weight_map does not give a file to each tensor")
    except ValueError as error:
        raise ShapecheckError(f"{index} is no index of shards: {error}; {_DAMAGED}") from None
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


def _advise_instead(folder: Path, names: set[str], stem: str, variant: str | None) -> str:
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
        return _advise_conversion(folder, variant if variant in pickled else next(iter(pickled), None))
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


def _advise_conversion(folder: Path, variant: str | None) -> str:
    try:
        name = read_json(folder / "config.json").get("_class_name")
    except (OSError, ShapecheckError):
        name = None
    model = name if isinstance(name, str) and name.isidentifier() else "UNet2DConditionModel"
    chosen = f", variant={variant!r}" if variant else ""
    half = ", torch_dtype=torch.float16" if variant == "fp16" else ""  # diffusers loads as float32 otherwise
    code = (
        f"import sys, torch; from diffusers import {model} as Model; "
        f"Model.from_pretrained(sys.argv[1], use_safetensors=False{chosen}{half}).save_pretrained(sys.argv[1]{chosen})"
    )
    quoted = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return (
        "its weights are pickled, which shapecheck never opens: reading them can run code they contain. "
        f"If you trust where they come from, convert them: {quoted(['python', '-c', code, str(folder)])}"
    )


def read_table(files: Iterable[Path]) -> dict[str, TensorLocation]:
    """Every tensor in these .safetensors files, in the order of its place, by its name.

    The rules of the format are held: one JSON object, known dtypes, sizes that fit the shapes, and tensors that cover the data
    from its first to its last byte without overlap or hole. Raises ShapecheckError naming file and tensor where one is broken.
    """
    table: dict[str, TensorLocation] = {}
    for file in files:
        header, start, size = _read_header(file)
        try:
            found = _located(_parse_json(header), file, start, size)
        except ValueError as error:
            raise ShapecheckError(f"{file} is no valid .safetensors file: {error}; {_DAMAGED}") from None
        for name in found.keys() & table.keys():
            raise ShapecheckError(
                f"{file}: tensor {one_line(name)} is in {table[name].file} too; give the files of one checkpoint"
            )
        table |= found
    return table


def _read_header(file: Path) -> tuple[bytes, int, int]:
    """The JSON of a file, where the data starts, and the size of the file."""
    with report_unreadable(file):
        require_regular(file, f"{file} is no regular file: folders, pipes and devices are never opened")
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise ShapecheckError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`")
            if len(first) < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ShapecheckError(
                    f"{file} is no valid .safetensors file: {size} bytes with a header of {length}, expected a header of "
                    f"2 to {_LONGEST_HEADER} that ends within the file; {_DAMAGED}"
                )
            return stream.read(length), 8 + length, size


def _parse_json(data: bytes, longest: int = _LONGEST_HEADER) -> dict[str, Any]:
    """Return the JSON object. Raises ValueError on anything else, on a key given twice and on fractions."""
    if len(data) > longest or sum(map(data.count, (b"[", b"{", b","))) > _MOST_VALUES:
        raise ValueError("its JSON is too large to be a table of tensors")
    if not data.startswith(b"{"):
        raise ValueError("its JSON does not start with an object")
    try:
        record = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_no_fraction,
            parse_constant=_no_fraction,
        )
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    assert isinstance(record, dict)
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"{one_line(key)} is given twice")
        record[key] = value
    return record


def _whole(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{one_line(text, 24)} is larger than any file")
    return int(text)


def _no_fraction(text: str) -> int:
    raise ValueError(f"{one_line(text, 20)} is no whole number")


def _located(record: dict[str, Any], file: Path, start: int, size: int) -> dict[str, TensorLocation]:
    """The tensors of a header. Raises ValueError naming the one that breaks a rule of the format."""
    metadata = record.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no table of texts")
    tensors = {}
    for name, entry in record.items():
        try:
            name.encode("utf-8")  # half a surrogate pair could never be written to an ONNX file
            tensors[name] = _read_entry(entry, file, start)
        except ValueError as error:
            raise ValueError(f"tensor {one_line(name)}: {error}") from None
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_cover(tensors, start, size)
    return tensors


def _read_entry(entry: object, file: Path, start: int) -> TensorLocation:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], _sizes(entry, "shape"), _sizes(entry, "data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {one_line(dtype, 20)} is not known; known are {', '.join(DTYPES)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets are {one_line(list(offsets))}, expected a begin and an end")
    name, itemsize = DTYPES[dtype]
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * itemsize != nbytes:
        raise ValueError(f"data_offsets leave {nbytes} bytes, {name} {one_line(show(shape))} takes another number")
    return TensorLocation(file, start + offsets[0], nbytes, name, shape)


def _sizes(entry: Mapping[str, object], key: str) -> Shape:
    sizes = entry[key]
    if not isinstance(sizes, list) or len(sizes) > _MOST_DIMENSIONS:
        raise ValueError(f"{key} is no list of at most {_MOST_DIMENSIONS} sizes")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _LARGEST:
            raise ValueError(f"{key} holds something else than sizes from 0 to 2^63-1")
    return tuple(sizes)


def _check_cover(tensors: Mapping[str, TensorLocation], start: int, size: int) -> None:
    """Raise ValueError unless each tensor begins where the one before it ends, from `start` to the end of the file."""
    beyond = next((name for name, each in tensors.items() if each.offset + each.nbytes > size), None)
    if beyond is not None:
        end = tensors[beyond].offset + tensors[beyond].nbytes
        raise ValueError(f"tensor {one_line(beyond)} ends at byte {end}, the file at {size}")
    before = "the header"
    for name, each in tensors.items():
        if each.offset != start:
            fault = "overlaps" if each.offset < start else "leaves a hole behind"
            raise ValueError(f"tensor {one_line(name)} at byte {each.offset} {fault} {before}, which ends at byte {start}")
        start, before = start + each.nbytes, f"tensor {one_line(name)}"
    if start != size:
        raise ValueError(f"{size - start} bytes follow {before}, which ends at byte {start}")
