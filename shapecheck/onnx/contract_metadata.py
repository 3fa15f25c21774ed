"""Reading a contract back from what was made with it: its JSON, an ONNX file, the file beside an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.onnx.file import CONTRACT_KEY, OnnxFile

_LARGEST_JSON = 16 * 2**20


_LONGEST_BLANK = 64


_LONGEST_LINE = 2000


_ADVICE = "`shapecheck probe MODEL --format json` writes a contract"


def contract_inside(file: OnnxFile) -> Contract | None:
    """Return the contract in an ONNX file, or None. Raises ShapecheckError if it is damaged, or there is no such file."""
    if CONTRACT_KEY not in file.metadata:
        return None
    return _read(file.path, lambda: Contract.from_json(file.metadata[CONTRACT_KEY]))


def _read(path: Path, read: Callable[[], Contract]) -> Contract:
    """Return the contract that `read` gives, fit to be shown, or raise ShapecheckError naming the file."""
    try:
        contract = read()
    except ShapecheckError as error:
        raise ShapecheckError(f"{path}: {one_line(error, _LONGEST_LINE)}") from None
    names = [contract.class_name]  # what reports show besides the header
    names += [text for entry in contract.inputs for text in (entry.name, entry.dtype, entry.argument)]
    names += [text for slot in contract.residuals for text in (slot.name, slot.producer, slot.up_block)]
    if forged := next((name for name in names if not name.isprintable()), None):
        raise ShapecheckError(f"{path}: an edited contract: {one_line(forged)} is no name; {_ADVICE}")
    return make_printable(contract)


def make_printable(contract: Contract) -> Contract:
    """Return the contract with one line a text in its header, which anybody may have written and reports show."""
    header = contract.header
    printable = replace(
        header,
        source=one_line(header.source, _LONGEST_LINE),
        controlnets=tuple(
            replace(net, source=one_line(net.source), class_name=one_line(net.class_name)) for net in header.controlnets
        ),
        handover=tuple(one_line(text, _LONGEST_LINE) for text in header.handover),
        notes=tuple(one_line(text, _LONGEST_LINE) for text in header.notes),
        versions=tuple((one_line(package), one_line(release)) for package, release in header.versions),
    )
    return replace(contract, header=printable)
