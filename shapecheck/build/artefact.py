"""Reading a contract back from what was made with it: its JSON, an ONNX file, the file beside an engine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shapecheck.build import onnx_file
from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.engine_files import is_engine, record_of
from shapecheck.contract.metadata import CONTRACT
from shapecheck.contract.records import Header
from shapecheck.observe.configfile import one_line

_LARGEST_JSON = 16 * 2**20
_LONGEST_BLANK = 64
_LONGEST_LINE = 2000
_ADVICE = "`shapecheck probe MODEL --format json` writes a contract"


def read_contract(path: str | Path) -> Contract:
    """The contract in a JSON file, in an ONNX file's metadata, or beside an engine (`unet.plan` → `unet.plan.shapecheck.json`).

    Reads no weights and no external data. Raises ShapecheckError, naming the file, where there is no contract in it.
    """
    path = Path(path)
    file = _sidecar(path) if is_engine(path) else path
    if _is_json(file):
        return _from_json(file)
    contract = contract_inside(file)
    if contract is None:
        raise ShapecheckError(
            f"{file} holds no contract (no metadata {CONTRACT!r}): shapecheck did not export it; "
            f"`shapecheck check {file}` tells what can be seen in it"
        )
    return contract


def may_hold_contract(path: Path) -> bool:
    """Whether a file is one that `read_contract` is for, rather than a model's config.json.

    Raises ShapecheckError where it is neither a file nor a folder: nothing may wait for a pipe.
    """
    if path.suffix.lower() == ".onnx" or is_engine(path):
        return True
    try:
        if path.is_dir():
            return False
        onnx_file.size_of(path)
        with path.open("rb") as file:
            return b'"shapecheck_contract"' in file.read(_LARGEST_JSON)
    except (OSError, ValueError):
        return False


def contract_inside(path: Path) -> Contract | None:
    """The contract in an ONNX file, None where there is none. Raises ShapecheckError where it is damaged, or no such file."""
    return contract_within(path, {each.key: each.value for each in onnx_file.load(path).metadata_props})


def contract_within(path: Path, metadata: Mapping[str, str]) -> Contract | None:
    """The contract in an ONNX file's metadata; None where there is none, ShapecheckError where it is damaged."""
    return _parsed(path, metadata[CONTRACT]) if CONTRACT in metadata else None


def _sidecar(engine: Path) -> Path:
    beside = record_of(engine)
    try:
        found = beside.exists()
    except OSError as error:
        raise ShapecheckError(f"cannot read {beside}: {error.strerror or error}") from None
    if not found:
        raise ShapecheckError(
            f"{engine} has no {beside.name} beside it, where an engine's contract is kept; copy both together, or {_ADVICE}"
        )
    return beside


def _is_json(path: Path) -> bool:
    """Whether the file begins as a JSON object does."""
    try:
        onnx_file.size_of(path)
        with path.open("rb") as file:
            return file.read(_LONGEST_BLANK).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    except OSError as error:
        raise ShapecheckError(f"cannot read {path}: {error.strerror or error}; give a file: JSON, .onnx or an engine") from None


def _from_json(path: Path) -> Contract:
    text = _text_in(path)
    try:
        record: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShapecheckError(f"{path} is not valid JSON: {error}; is it cut short? Otherwise {_ADVICE}") from None
    inner = record.get("contract") if "shapecheck_contract" not in record else None
    if inner is not None:
        text = inner if isinstance(inner, str) else json.dumps(inner)
    return _parsed(path, text)


def _text_in(path: Path) -> str:
    """The text of a file that holds a contract. Raises ShapecheckError where it is too large, or no text."""
    try:
        onnx_file.size_of(path)
        with path.open("rb") as file:
            data = file.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise ShapecheckError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > _LARGEST_JSON:
        raise ShapecheckError(f"{path} is larger than {_LARGEST_JSON >> 20} MiB: no contract; {_ADVICE}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeError:
        raise ShapecheckError(f"{path} is not UTF-8 text, as a contract is; {_ADVICE}") from None


def _parsed(path: Path, text: str) -> Contract:
    try:
        contract = Contract.from_json(text)
    except ShapecheckError as error:
        raise ShapecheckError(f"{path}: {one_line(error, _LONGEST_LINE)}") from None
    for name in _names(contract):
        if not name.isprintable():
            raise ShapecheckError(f"{path}: an edited contract: {one_line(name)} is no name; {_ADVICE}")
    return printable(contract)


def printable(contract: Contract) -> Contract:
    """The contract with a header that reports can show: one line a text."""
    return replace(contract, header=_printable(contract.header))


def _names(contract: Contract) -> Iterator[str]:
    """What reports show of a contract besides its header."""
    yield contract.class_name
    for each in contract.inputs:
        yield from (each.name, each.dtype, each.argument)
    for slot in contract.residuals:
        yield from (slot.name, slot.producer, slot.up_block)


def _printable(header: Header) -> Header:
    """Anybody may have written it, and reports show it: one line a text."""

    def lines(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(one_line(text, _LONGEST_LINE) for text in texts)

    return replace(
        header,
        source=one_line(header.source, _LONGEST_LINE),
        controlnets=tuple(
            replace(each, source=one_line(each.source), class_name=one_line(each.class_name)) for each in header.controlnets
        ),
        handover=lines(header.handover),
        notes=lines(header.notes),
        versions=tuple((one_line(package), one_line(release)) for package, release in header.versions),
    )
