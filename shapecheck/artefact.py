"""A contract from anything: its JSON, an ONNX file, an engine's record, or a model that is observed."""

from __future__ import annotations

import json
from pathlib import Path

from shapecheck import presets
from shapecheck.contract import Contract, ShapecheckError
from shapecheck.files import read_text, report_unreadable
from shapecheck.onnx.contract_metadata import PROBE_ADVICE, contract_inside, parse_untrusted
from shapecheck.onnx.file import CONTRACT_KEY, OnnxFile, require_readable
from shapecheck.progress import Progress
from shapecheck.tensorrt.record import is_engine, record_of

_LARGEST_JSON = 16 * 2**20


def read_contract(path: str | Path) -> Contract:
    """Return the contract in a JSON file, in an ONNX file's metadata, or beside an engine.

    Beside `unet.plan` that is `unet.plan.shapecheck.json`. Reads no weights and no external data. Raises ShapecheckError,
    naming the file, if there is no contract in it.
    """
    path = Path(path)
    file = record_of(path) if is_engine(path) else path
    with report_unreadable(file, "; give a file: JSON, .onnx or an engine"):
        if file != path and not file.exists():
            raise ShapecheckError(
                f"{path} has no {file.name} beside it, where an engine's contract is kept; copy both together, "
                f"or {PROBE_ADVICE}"
            )
        require_readable(file)
        with file.open("rb") as opened:
            start = opened.read(64)  # a JSON file may begin with blanks
    if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
        contract = contract_inside(OnnxFile(file))
        if contract is None:
            raise ShapecheckError(
                f"{file} holds no contract (no metadata {CONTRACT_KEY!r}): shapecheck did not export it; "
                f"`shapecheck check {file}` says what can be seen in it"
            )
        return contract
    with report_unreadable(file):
        too_large = f"{file} is larger than {_LARGEST_JSON >> 20} MiB: not a contract; {PROBE_ADVICE}"
        not_text = f"{file} is not UTF-8 text, as a contract is; {PROBE_ADVICE}"
        text = read_text(file, _LARGEST_JSON, too_large=too_large, not_text=not_text)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShapecheckError(f"{file} is not valid JSON: {error}; is it cut short? Otherwise {PROBE_ADVICE}") from None
    # An engine's record holds the contract as a value, older ones as text.
    inner = record.get("contract") if "shapecheck_contract" not in record else None
    if inner is not None:
        text = inner if isinstance(inner, str) else json.dumps(inner)
    return parse_untrusted(file, lambda: Contract.from_json(text))


def may_hold_contract(path: Path) -> bool:
    """Return whether a file is one that `read_contract` is for, rather than a model's config.json.

    Raises ShapecheckError if it is neither a file nor a folder: nothing may wait for a pipe.
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


def resolve_contract(model: str, *, offline: bool = False, controlnet: bool = False, progress: Progress) -> Contract:
    """Return the contract of a preset or a file that holds one, else that of a model observed now.

    With `controlnet` that may be a ControlNet too. Raises ShapecheckError if there is neither.
    """
    if model in presets.contracts():
        return presets.contract(model)
    if may_hold_contract(Path(model)):
        return read_contract(model)
    from shapecheck.models.lookup import OtherModelError
    from shapecheck.observe.request import ProbeRequest, run_probe
    from shapecheck.observe.subject import resolve_subject

    try:
        return run_probe(ProbeRequest(model), offline=offline, progress=progress).contract
    except OtherModelError:
        if not controlnet:
            raise
        return resolve_subject(model, offline=offline).contract("float32", control=True)
