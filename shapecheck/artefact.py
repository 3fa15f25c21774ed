"""A contract from anything: its JSON, an ONNX file, an engine's record, or a model that is observed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shapecheck import presets
from shapecheck.contract import Contract, ShapecheckError
from shapecheck.files import read_text, report_unreadable
from shapecheck.onnx.contract_metadata import _ADVICE, _LARGEST_JSON, _LONGEST_BLANK, _read, contract_inside
from shapecheck.onnx.file import CONTRACT_KEY, OnnxFile, require_readable
from shapecheck.progress import Progress
from shapecheck.tensorrt.record import is_engine, record_of


def read_contract(path: str | Path) -> Contract:
    """The contract in a JSON file, in an ONNX file's metadata, or beside an engine (`unet.plan` → `unet.plan.shapecheck.json`).

    Reads no weights and no external data. Raises ShapecheckError, naming the file, where there is no contract in it.
    """
    path = Path(path)
    file = record_of(path) if is_engine(path) else path
    with report_unreadable(file):
        if file != path and not file.exists():
            raise ShapecheckError(
                f"{path} has no {file.name} beside it, where an engine's contract is kept; copy both together, or {_ADVICE}"
            )
    with report_unreadable(file, "; give a file: JSON, .onnx or an engine"):
        require_readable(file)
        with file.open("rb") as opened:
            start = opened.read(_LONGEST_BLANK)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        return _from_json(file)
    contract = contract_inside(OnnxFile(file))
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
        require_readable(path)
        with path.open("rb") as file:
            return b'"shapecheck_contract"' in file.read(_LARGEST_JSON)
    except (OSError, ValueError):
        return False


def _from_json(path: Path) -> Contract:
    with report_unreadable(path):
        text = read_text(
            path,
            _LARGEST_JSON,
            too_large=f"{path} is larger than {_LARGEST_JSON >> 20} MiB: no contract; {_ADVICE}",
            not_text=f"{path} is not UTF-8 text, as a contract is; {_ADVICE}",
        )
    try:
        record: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShapecheckError(f"{path} is not valid JSON: {error}; is it cut short? Otherwise {_ADVICE}") from None
    inner = record.get("contract") if "shapecheck_contract" not in record else None
    return _read(path, lambda: Contract.from_json(inner) if isinstance(inner, str) else Contract.from_value(inner or record))


def resolve_contract(model: str, *, offline: bool = False, progress: Progress) -> Contract:
    """The contract of a preset or a file that holds one, else that of a model observed now.

    Raises ShapecheckError where there is neither.
    """
    if model in presets.contracts():
        return presets.contract(model)
    if may_hold_contract(Path(model)):
        return read_contract(model)
    from shapecheck.observe.request import Request, run_probe

    return run_probe(Request(model), offline=offline, progress=progress).contract
