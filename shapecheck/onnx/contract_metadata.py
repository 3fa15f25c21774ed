"""The contract in an ONNX file's metadata, which anybody may have written: read, and made fit to be shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.onnx.file import CONTRACT_KEY, OnnxFile

PROBE_ADVICE = "`shapecheck probe MODEL --format json` writes a contract"
_LONGEST_LINE = 2000


def contract_inside(file: OnnxFile) -> Contract | None:
    """Return the contract in an ONNX file, or None. Raises ShapecheckError if it is damaged, or there is no such file."""
    if CONTRACT_KEY not in file.metadata:
        return None
    return parse_untrusted(file.path, lambda: Contract.from_json(file.metadata[CONTRACT_KEY]))


def parse_untrusted(path: Path, parse: Callable[[], Contract]) -> Contract:
    """Return the contract that `parse` reads, fit to be shown, or raise ShapecheckError naming the file."""
    try:
        contract = parse()
    except ShapecheckError as error:
        raise ShapecheckError(f"{path}: {one_line(error, _LONGEST_LINE)}") from None
    names = [contract.class_name]  # what reports show besides the header
    names += [text for base in contract.inputs for text in (base.name, base.dtype, base.argument)]
    names += [text for slot in contract.residuals for text in (slot.name, slot.producer, slot.up_block)]
    if forged := next((name for name in names if not name.isprintable()), None):
        raise ShapecheckError(f"{path}: an edited contract: {one_line(forged)} is not a name; {PROBE_ADVICE}")
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
