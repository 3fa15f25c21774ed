"""A contract from anything: its JSON, an ONNX file, an engine's record, or a model that is observed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shapecheck import presets
from shapecheck.contract import Contract, ShapecheckError
from shapecheck.onnx import file as onnx_file
from shapecheck.onnx.contract_metadata import _ADVICE, _LARGEST_JSON, _LONGEST_BLANK, _read, contract_inside
from shapecheck.onnx.file import CONTRACT_KEY
from shapecheck.progress import Progress
from shapecheck.tensorrt.record import is_engine, record_of


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
            f"{file} holds no contract (no metadata {CONTRACT_KEY!r}): shapecheck did not export it; "
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
    return _read(path, lambda: Contract.from_json(inner) if isinstance(inner, str) else Contract.from_value(inner or record))


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


def contract_of(model: str, *, offline: bool = False, progress: Progress) -> Contract:
    """The contract of a preset or a file that holds one, else that of a model observed now.

    Raises ShapecheckError where there is neither.
    """
    if model in presets.contracts():
        return presets.contract(model)
    if may_hold_contract(Path(model)):
        return read_contract(model)
    from shapecheck.observe.request import Request, carry_out

    return carry_out(Request(model), offline=offline, progress=progress).contract
