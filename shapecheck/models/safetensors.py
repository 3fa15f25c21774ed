"""A checkpoint's .safetensors files: which they are, and where each tensor lies. No data is read, nothing is trusted."""

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

from shapecheck.contract import Shape, ShapecheckError, show
from shapecheck.contract.errors import one_line
from shapecheck.files import read_bytes, report_unreadable, require_regular
from shapecheck.models.config_file import read_json

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "U16": ("uint16", 2), "I16": ("int16", 2), "U32": ("uint32", 4),
    "I32": ("int32", 4), "U64": ("uint64", 8), "I64": ("int64", 8), "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4), "F64": ("float64", 8), "C64": ("complex64", 8),
}  # fmt: skip
"""From a dtype's name in safetensors to its name in PyTorch and its bytes."""
_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit
_MOST_DIMENSIONS = 64
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
    """Return the .safetensors files of the model in a diffusers folder: the shards its index lists, else the single file.

    A variant, such as fp16, is used only if it is requested. Raises ShapecheckError, saying what the folder holds, if the
    weights are not there, only pickled or incomplete, or if the index leads out of the folder.
    """
    with report_unreadable(f"the folder {folder}"):
        names = {entry.name for entry in folder.iterdir()}
    suffix = "" if variant is None else f".{variant}"
    single = f"{stem}{suffix}.safetensors"
    # diffusers wrote the index of a variant as the second before 0.32
    indexes = (f"{stem}.safetensors.index{suffix}.json", f"{stem}.safetensors{suffix}.index.json")
    index = next((folder / name for name in indexes if name in names), None)
    if index is None:
        if single in names:
            return (folder / single,)
        advice = _advise_instead(folder, names, stem, variant)
        raise ShapecheckError(f"{folder} holds no {single} and no {indexes[0]}; {advice}")

    # an index goes before a single file, as in diffusers
    try:
        too_large = f"{index} is too large to be an index of shards; {_DAMAGED}"
        with report_unreadable(index):
            record = _parse_json(read_bytes(index, 2**24, too_large=too_large))
        listed = record.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("weight_map does not name a file for each tensor")
    except ValueError as error:
        raise ShapecheckError(f"{index} is not an index of shards: {error}; {_DAMAGED}") from None
    shards = sorted(set(listed.values()))
    for shard in shards:
        if shard in ("", ".", "..") or not PurePosixPath(shard).name == PureWindowsPath(shard).name == shard:
            raise ShapecheckError(f"{index} lists {one_line(shard)!r}, which escapes the folder; none of its files is read")
    if missing := [shard for shard in shards if shard not in names]:
        stale = f", or delete the index if {single} is newer" if single in names else ""
        raise ShapecheckError(
            f"{index} lists {len(shards)} files, of which {len(missing)} are not there: "
            f"{one_line(', '.join(missing))}; download them{stale}"
        )
    return tuple(folder / shard for shard in shards)


def _advise_instead(folder: Path, names: set[str], stem: str, variant: str | None) -> str:
    """Return what a folder without the requested weights holds, and what to do."""
    choices = [f"`--variant {shlex.quote(name)}`" for name in _list_variants(names, stem, "safetensors")]
    if variant is not None and not names.isdisjoint((f"{stem}.safetensors", f"{stem}.safetensors.index.json")):
        choices.insert(0, "no `--variant` for the plain one")
    if choices:
        return f"choose one that is there: {one_line(', '.join(choices))}"
    pickle = re.compile(rf"{re.escape(stem)}(({_SHARD})?|\..+)\.bin")
    if not any(map(pickle.fullmatch, names)):
        present = one_line(", ".join(sorted(names)[:12])) or "nothing"
        return f"it holds {present}; give the folder in which save_pretrained wrote the model as .safetensors"

    pickled = _list_variants(names, stem, "bin")
    chosen = variant if variant in pickled else next(iter(pickled), None)
    try:
        class_name = read_json(folder / "config.json").get("_class_name")
    except (OSError, ShapecheckError):
        class_name = None
    # the name goes into code that the user may run, and anybody may have written it
    model = class_name if isinstance(class_name, str) and class_name.isidentifier() else "UNet2DConditionModel"
    option = f", variant={chosen!r}" if chosen else ""
    half = ", torch_dtype=torch.float16" if chosen == "fp16" else ""  # diffusers loads as float32 otherwise
    code = (
        f"import sys, torch; from diffusers import {model} as Model; "
        f"Model.from_pretrained(sys.argv[1], use_safetensors=False{option}{half}).save_pretrained(sys.argv[1]{option})"
    )
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return (
        "its weights are pickled, which shapecheck never opens: reading them can run code they contain. "
        f"If you trust their source, convert them: {join(['python', '-c', code, str(folder)])}"
    )


def _list_variants(names: Iterable[str], stem: str, suffix: str) -> list[str]:
    """Return the variants of the weights that a folder holds, in either spelling."""
    stem = re.escape(stem)
    forms = (
        rf"{stem}\.{suffix}\.index\.(.+)\.json",
        rf"{stem}\.{suffix}\.(.+)\.index\.json",
        rf"{stem}{_SHARD}\.(.+)\.{suffix}",
        rf"{stem}\.(.+?)(?:{_SHARD})?\.{suffix}",
    )
    matches = (re.fullmatch(form, name) for name in names for form in forms)
    return sorted({match[1] for match in matches if match})


def read_table(files: Iterable[Path]) -> dict[str, TensorLocation]:
    """Return every tensor in these .safetensors files by its name, in the order of their places.

    Enforces the rules of the format: one JSON object, known dtypes, sizes that fit the shapes, and tensors that cover the data
    from its first to its last byte without overlap or hole. Raises ShapecheckError naming file and tensor if one is broken.
    """
    table: dict[str, TensorLocation] = {}
    for file in files:
        header, start, size = _read_header(file)
        try:
            tensors = _locate_tensors(_parse_json(header), file, start, size)
        except ValueError as error:
            raise ShapecheckError(f"{file} is not a valid .safetensors file: {error}; {_DAMAGED}") from None
        for name in tensors.keys() & table.keys():
            raise ShapecheckError(
                f"{file}: tensor {one_line(name)} is in {table[name].file} too; give the files of one checkpoint"
            )
        table |= tensors
    return table


def _read_header(file: Path) -> tuple[bytes, int, int]:
    """Return the JSON of a file, the offset of its data, and its size in bytes."""
    with report_unreadable(file):
        require_regular(file, f"{file} is not a regular file: folders, pipes and devices are never opened")
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise ShapecheckError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`")
            if len(first) < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ShapecheckError(
                    f"{file} is not a valid .safetensors file: {size} bytes with a header of {length}, expected a header of "
                    f"2 to {_LONGEST_HEADER} that ends within the file; {_DAMAGED}"
                )
            return stream.read(length), 8 + length, size


def _parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object. Raises ValueError on anything else, on a key given twice and on fractions."""
    # SDXL's UNet has 20,000 values; 100 MB of `[],` would unfold until the memory is full.
    if sum(map(data.count, (b"[", b"{", b","))) > 1_000_000:
        raise ValueError("its JSON is too large to be a table of tensors")
    if not data.startswith(b"{"):
        raise ValueError("its JSON does not start with an object")
    try:
        record: dict[str, Any] = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_parse_int,
            parse_float=_refuse_fraction,
            parse_constant=_refuse_fraction,
        )
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            raise ValueError(f"{one_line(key)} is given twice")
        record[key] = value
    return record


def _parse_int(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{one_line(text, 24)} is larger than any file")
    return int(text)


def _refuse_fraction(text: str) -> int:
    raise ValueError(f"{one_line(text, 20)} is not a whole number")


def _locate_tensors(record: dict[str, Any], file: Path, start: int, size: int) -> dict[str, TensorLocation]:
    """Return the tensors of a header, whose data goes from `start` to `size`. Raises ValueError if one breaks a rule."""
    metadata = record.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of texts")
    tensors = {}
    for name, entry in record.items():
        try:
            name.encode("utf-8")  # half a surrogate pair could never be written to an ONNX file
            tensors[name] = _read_entry(entry, file, start)
        except ValueError as error:
            raise ValueError(f"tensor {one_line(name)}: {error}") from None
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))

    for name, tensor in tensors.items():
        if (end := tensor.offset + tensor.nbytes) > size:
            raise ValueError(f"tensor {one_line(name)} ends at byte {end}, the file at {size}")
    before = "the header"
    for name, tensor in tensors.items():
        if tensor.offset != start:
            fault = "overlaps" if tensor.offset < start else "leaves a hole behind"
            raise ValueError(f"tensor {one_line(name)} at byte {tensor.offset} {fault} {before}, which ends at byte {start}")
        start, before = start + tensor.nbytes, f"tensor {one_line(name)}"
    if start != size:
        raise ValueError(f"{size - start} bytes follow {before}, which ends at byte {start}")
    return tensors


def _read_entry(entry: object, file: Path, start: int) -> TensorLocation:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], _read_sizes(entry, "shape"), _read_sizes(entry, "data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {one_line(dtype, 20)} is not known; known are {', '.join(DTYPES)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets are {one_line(list(offsets))}, expected a begin and an end")
    name, itemsize = DTYPES[dtype]
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * itemsize != nbytes:
        raise ValueError(f"data_offsets span {nbytes} bytes, which is not the size of {name} {one_line(show(shape))}")
    return TensorLocation(file, start + offsets[0], nbytes, name, shape)


def _read_sizes(entry: Mapping[str, object], key: str) -> Shape:
    sizes = entry[key]
    if not isinstance(sizes, list) or len(sizes) > _MOST_DIMENSIONS:
        raise ValueError(f"{key} is not a list of at most {_MOST_DIMENSIONS} sizes")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
            raise ValueError(f"{key} holds a value that is not a size from 0 to 2^63-1")
    return tuple(sizes)
