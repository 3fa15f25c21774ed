"""Messages of ONNX Runtime, TensorRT, Polygraphy and StreamDiffusion's engines about residuals that do not fit."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from shapecheck.explain import symptom as facts
from shapecheck.explain.symptom import ACTUAL, ACTUAL_DTYPE, ACTUAL_SHAPE, AXIS, EXPECTED, EXPECTED_DTYPE, EXPECTED_SHAPE, NAME


def _add_indices(symptom: facts.Symptom, match: re.Match[str]) -> facts.Symptom:
    """Add the sizes of the axes that ONNX Runtime lists, and -1 for the others."""
    sizes = re.findall(r"index: (\d) Got: (\d{1,9}) Expected: (\d{1,9})(?!\d)", match["indices"])
    wrong = [tuple(map(int, numbers)) for numbers in sizes]
    count = max((axis for axis, _, _ in wrong), default=-1) + 1
    actual, expected = [-1] * count, [-1] * count
    for axis, got, needed in wrong:
        actual[axis], expected[axis] = got, needed
    return replace(symptom, expected_shape=tuple(expected), actual_shape=tuple(actual))


def _add_unequal(symptom: facts.Symptom, match: re.Match[str]) -> facts.Symptom:
    """Add two sizes, either of which may be the UNet's; the method of ONNX Runtime shows if they are of the last axis."""
    numbers = tuple(filter(None, map(facts.parse_size, match.group("small", "large"))))
    return replace(symptom, axis=3 if match["method"] == "Init" else None, actual_shape=numbers)


def _add_lowest(symptom: facts.Symptom, match: re.Match[str]) -> facts.Symptom:
    return replace(symptom, actual=facts.parse_size(match["low"]))


def _add_bounded(symptom: facts.Symptom, match: re.Match[str]) -> facts.Symptom:
    sizes = [size if size.strip().isdigit() else "-1" for size in match["bounded"].split(",")]
    return replace(symptom, expected_shape=facts.parse_shape(", ".join(sizes)))


_RUNNING = r"node\. Name:'(?P<name>[^']{1,300})' Status Message: .{1,300}?"
_LISTED = r"\{(?P<names>[^{}]{1,4000})\}"
_RANGE = r": \[(?P<low>[-\d, ]{1,200})\]\.\.\[(?P<high>[-\d, ]{1,200})\]"
_ort, _trt, _polygraphy, _stream = (
    partial(facts.MessagePattern, source=source) for source in ("ONNX Runtime", "TensorRT", "Polygraphy", "StreamDiffusion")
)
PATTERNS = (
    _ort("dimensions", "Got invalid dimensions for input",
         rf"Got invalid dimensions for input: {NAME} for the following indices"
         r"(?P<indices>(?: index: \d Got: \d+ Expected: \d+){1,8})", _add_indices),
    _ort("dimensions", "Invalid rank for input",
         rf"Invalid rank for input: {NAME} Got: (?P<actual>\d) Expected: (?P<expected>\d)"),
    _ort("dtype", "Unexpected input data type",
         rf"Unexpected input data type\. Actual: \(tensor\({ACTUAL_DTYPE}\)\) ?, expected: \(tensor\({EXPECTED_DTYPE}\)\)"),
    _ort("missing", "are missing from",
         r"Required inputs \(\[(?P<names>[^\[\]]{1,4000})\]\) are missing from(?: the)? input feed"),
    _ort("missing", "Missing Input: ", f"Missing Input: {NAME}"),
    _ort("unknown", "Invalid ", f"Invalid (?:input name|Feed Input Name): ?{NAME}"),
    _ort("unknown", "Failed to find NodeArg", f"Failed to find NodeArg with name: {NAME} in"),
    _ort("unequal", "by a dimension other than 1",
         rf"running (?:Add|Sum) {_RUNNING}BroadcastIterator::(?P<method>\w{{4,6}})\(.{{1,300}}?"
         r"by a dimension other than 1\. (?P<small>\d+) by (?P<large>\d+)", _add_unequal),
    # the second operand, the skip, is printed first
    _ort("concat", "has mismatched dimensions of",
         rf"running Concat {_RUNNING}Axis {AXIS} has mismatched dimensions of {ACTUAL} and {EXPECTED}"),
    # TensorRT, running
    _trt("dimensions", "while setting input shape for",
         rf"while setting input shape for {NAME}\. Set dimensions are {ACTUAL_SHAPE}\. "
         rf"Expected dimensions are {EXPECTED_SHAPE}"),
    _trt("range", "does not satisfy any optimization profiles",
         rf"Set dimension {ACTUAL_SHAPE} for tensor {NAME} does not satisfy any optimization profiles\.?"
         rf"(?: Valid range for profile \d+{_RANGE})?"),
    _trt("range", "Supplied binding dimension",
         rf"Supplied binding dimension {ACTUAL_SHAPE} for (?P<name>bindings\[\d+\]) exceed min ~ max range at index {AXIS}, "
         r"maximum dimension in profile is (?P<high>\d+), minimum dimension in profile is (?P<low>\d+), "
         r"but supplied dimension is (?P<actual>-?\d+)"),
    _trt("range", "Runtime dimension does not satisfy", r"Runtime dimension does not satisfy any optimization profile"),
    _trt("range", "No valid profile found", r"No valid profile found\. Please go to the TensorRT tab"),
    _trt("missing", "Address is not set for input tensor", f"Address is not set for input tensor {NAME}"),
    _trt("unknown", "find binding of given name", f"(?:Cannot|Can not) find binding of given name: {NAME}"),
    _trt("unknown", "iven invalid tensor name", f"[Gg]iven invalid tensor name: {NAME}"),
    # TensorRT, building
    _trt("missing", "is missing dimensions in profile", f"Dynamic input tensor {NAME} is missing dimensions in profile"),
    _trt("dimensions", "Dimension mismatch for tensor",
         rf"Dimension mismatch for tensor {NAME} and profile \d+\. At dimension axis {AXIS}, "
         rf"profile has min=(?P<low>\d+), opt=\d+, max=(?P<high>\d+) but tensor has {EXPECTED}", _add_lowest),
    _trt("concat", "dimensions must be equal for concatenation",
         rf"axis {AXIS} dimensions must be equal for concatenation on axis 1\. "
         rf"(?:Dimensions are|Condition '==' violated:) {EXPECTED} (?:and|!=) {ACTUAL}"),
    _polygraphy("missing", "were not found in input data", f"inputs were not found in input data: {_LISTED}"),
    _polygraphy("unknown", "Extra inputs in input data", f"Extra inputs in input data: {_LISTED}"),
    _polygraphy("unknown", "provided to the optimization profile",
                f"Invalid inputs were provided to the optimization profile: {_LISTED}"),
    _polygraphy("dimensions", "Received incompatible shape",
                rf"Input tensor: {NAME} \| Received incompatible shape: \((?P<actual_shape>[-\d, ]{{1,200}})\)\. "
                r"Note: Expected a shape compatible with: BoundedShape\(\[(?P<bounded>.{1,200}?)\]", _add_bounded),
    _polygraphy("dtype", "Received unexpected dtype",
                rf"Input tensor: {NAME} \| Received unexpected dtype: {ACTUAL_DTYPE}\. Note: Expected type: {EXPECTED_DTYPE}"),
    _stream("missing", "with negative dimension -1",
            r"create tensor with negative dimension -1: \[(?P<actual_shape>[-\d, ]{1,100})\]"),
    _stream("unknown", "KeyError: '",
            r"KeyError: '(?P<name>(?:input|output|middle)_control\w{0,60}|"
            r"(?:down|mid)_block\w{0,60}?(?:residuals?|samples?|_\d{1,3})(?:_\d{1,3})?)'"),
)  # fmt: skip
