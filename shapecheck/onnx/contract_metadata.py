"""Reading a contract back from what was made with it: its JSON, an ONNX file, the file beside an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.records import Header
from shapecheck.onnx import file as onnx_file
from shapecheck.onnx.file import CONTRACT_KEY

_LARGEST_JSON = 16 * 2**20


_LONGEST_BLANK = 64


_LONGEST_LINE = 2000


_ADVICE = "`shapecheck probe MODEL --format json` writes a contract"


def contract_inside(path: Path) -> Contract | None:
    """The contract in an ONNX file, None where there is none. Raises ShapecheckError where it is damaged, or no such file."""
    return contract_within(path, {each.key: each.value for each in onnx_file.load(path).metadata_props})


def contract_within(path: Path, metadata: Mapping[str, str]) -> Contract | None:
    """The contract in an ONNX file's metadata; None where there is none, ShapecheckError where it is damaged."""
    return _read(path, lambda: Contract.from_json(metadata[CONTRACT_KEY])) if CONTRACT_KEY in metadata else None


def _read(path: Path, read: Callable[[], Contract]) -> Contract:
    """Return the contract that `read` gives, fit to be shown, or raise ShapecheckError naming the file."""
    try:
        contract = read()
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
