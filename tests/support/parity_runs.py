"""The slots of the UNet that parity is tried on, `onnx_files.DEEP`; runs that share PyTorch's side, and what failed in one."""

from __future__ import annotations

from collections import Counter
from unittest import mock

from shapecheck.parity import reference, run
from shapecheck.parity.request import ParityRequest
from shapecheck.parity.results import Parity
from shapecheck.parity.run import ParityRun
from shapecheck.tensorrt.profiles import Range

NAMES = [f"down_block_residual_{index:02}" for index in range(8)] + ["mid_block_residual"]
SLOTS = [f"slot[{name}]" for name in NAMES]


_KNOWN: dict = {}


def run_side(request: ParityRequest, ranges: tuple[Range, ...], **given):
    """Run one backend; PyTorch's side, which is the same whatever is wrong with a file, is computed once."""
    (found,) = report(request, ranges, **given).sides
    return found


def report(request: ParityRequest, ranges: tuple[Range, ...], **given) -> Parity:
    """Return the report of the same."""

    def once(subject, contract, cases, generate, wanted, look, progress):
        key = (id(request.model), ranges, request.seed, given.get("emit"), contract, tuple(cases))
        if key not in _KNOWN:
            _KNOWN[key] = reference.compute_reference(subject, contract, cases, generate, wanted, look, progress)
        look(subject.load(contract.dtype))
        return _KNOWN[key]

    with mock.patch.object(run, "compute_reference", once):
        return ParityRun(request, ranges=ranges, **given).report()


def forget() -> None:
    """Forget PyTorch's side of all runs so far."""
    _KNOWN.clear()


def failed(found):
    return {str(each.check).removeprefix("ort/"): each.reason for each in found.failed}


def kinds(found):
    return Counter(each.check.kind for each in found.failed)
