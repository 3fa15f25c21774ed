"""The headers of .safetensors files: where each tensor lies, of which shape. No data is read, nothing is believed."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapecheck.contract import ShapecheckError
from shapecheck.contract.dims import Shape, show
from shapecheck.observe.configfile import one_line

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
DAMAGED = "is the download cut short or the file damaged? Fetch it again"
"""What to do about a file that breaks the rules of its format."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file."""

    file: Path
    offset: int
    """Of its first byte, counted from the start of the file."""
    nbytes: int
    dtype: str
    """The name in PyTorch: float32, bfloat16, int64, …"""
    shape: Shape


def read_table(files: Iterable[Path]) -> dict[str, Stored]:
    """Every tensor in these .safetensors files, in the order of its place, by its name.

    The rules of the format are held: one JSON object, known dtypes, sizes that fit the shapes, and tensors that cover the data
    from its first to its last byte without overlap or hole. Raises ShapecheckError naming file and tensor where one is broken.
    """
    table: dict[str, Stored] = {}
    for file in files:
        header, start, size = _read_header(file)
        try:
            found = _located(parsed(header), file, start, size)
        except ValueError as error:
            raise ShapecheckError(f"{file} is no valid .safetensors file: {error}; {DAMAGED}") from None
        for name in found.keys() & table.keys():
            raise ShapecheckError(
                f"{file}: tensor {one_line(name)} is in {table[name].file} too; give the files of one checkpoint"
            )
        table |= found
    return table


def _read_header(file: Path) -> tuple[bytes, int, int]:
    """The JSON of a file, where the data starts, and the size of the file."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ShapecheckError(f"{file} is no regular file: folders, pipes and devices are never opened")
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise ShapecheckError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`")
            if len(first) < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ShapecheckError(
                    f"{file} is no valid .safetensors file: {size} bytes with a header of {length}, expected a header of "
                    f"2 to {_LONGEST_HEADER} that ends within the file; {DAMAGED}"
                )
            return stream.read(length), 8 + length, size
    except OSError as error:
        raise ShapecheckError(f"cannot read {file}: {error.strerror or error}") from None


def parsed(data: bytes, longest: int = _LONGEST_HEADER) -> dict[str, Any]:
    """The JSON object. Raises ValueError on anything else, on a key given twice and on fractions."""
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


def _located(record: dict[str, Any], file: Path, start: int, size: int) -> dict[str, Stored]:
    """The tensors of a header. Raises ValueError naming the one that breaks a rule of the format."""
    metadata = record.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no table of texts")
    tensors = {}
    for name, entry in record.items():
        try:
            name.encode("utf-8")  # half a surrogate pair could never be written to an ONNX file
            tensors[name] = _stored(entry, file, start)
        except ValueError as error:
            raise ValueError(f"tensor {one_line(name)}: {error}") from None
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_cover(tensors, start, size)
    return tensors


def _stored(entry: object, file: Path, start: int) -> Stored:
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
    return Stored(file, start + offsets[0], nbytes, name, shape)


def _sizes(entry: Mapping[str, object], key: str) -> Shape:
    sizes = entry[key]
    if not isinstance(sizes, list) or len(sizes) > _MOST_DIMENSIONS:
        raise ValueError(f"{key} is no list of at most {_MOST_DIMENSIONS} sizes")
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _LARGEST:
            raise ValueError(f"{key} holds something else than sizes from 0 to 2^63-1")
    return tuple(sizes)


def _check_cover(tensors: Mapping[str, Stored], start: int, size: int) -> None:
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
