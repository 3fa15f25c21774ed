"""What ONNX Runtime, TensorRT, Polygraphy and StreamDiffusion's engines print when residuals do not fit."""

from __future__ import annotations

import re
from dataclasses import replace

from shapecheck.explain.pattern import (
    AXIS,
    GIVEN,
    GIVEN_DTYPE,
    GIVEN_SHAPE,
    NAME,
    WANTED,
    WANTED_DTYPE,
    WANTED_SHAPE,
    parse_shape,
    parse_size,
    pattern,
)
from shapecheck.explain.symptom import Symptom


def _add_indices(symptom: Symptom, match: re.Match[str]) -> Symptom:
    """Add the sizes of the axes that ONNX Runtime lists; -1 for those it does not."""
    found = re.findall(r"index: (\d) Got: (\d{1,9}) Expected: (\d{1,9})(?!\d)", match["indices"])
    wrong = [tuple(map(int, numbers)) for numbers in found]
    count = max((axis for axis, _, _ in wrong), default=-1) + 1
    given, wanted = [-1] * count, [-1] * count
    for axis, actual, expected in wrong:
        given[axis], wanted[axis] = actual, expected
    return replace(symptom, wanted_shape=tuple(wanted), given_shape=tuple(given))


def _add_unequal(symptom: Symptom, match: re.Match[str]) -> Symptom:
    """Add two sizes of which nobody says whose is whose; the last axis is told by the place in ONNX Runtime."""
    numbers = tuple(filter(None, map(parse_size, match.group("small", "large"))))
    return replace(symptom, axis=3 if match["method"] == "Init" else None, given_shape=numbers)


def _add_lowest(symptom: Symptom, match: re.Match[str]) -> Symptom:
    return replace(symptom, given=parse_size(match["low"]))


def _add_bounded(symptom: Symptom, match: re.Match[str]) -> Symptom:
    parts = match["bounded"].split(",")
    return replace(symptom, wanted_shape=parse_shape(", ".join(part if part.strip().isdigit() else "-1" for part in parts)))


_ORT, _TRT, _POLYGRAPHY, _STREAM = "ONNX Runtime", "TensorRT", "Polygraphy", "StreamDiffusion"


_RUNNING = r"node\. Name:'(?P<name>[^']{1,300})' Status Message: .{1,300}?"


_LISTED = r"\{(?P<names>[^{}]{1,4000})\}"


_RANGE = r": \[(?P<low>[-\d, ]{1,200})\]\.\.\[(?P<high>[-\d, ]{1,200})\]"


PATTERNS = (
    # ONNX Runtime
    pattern(
        "dimensions", _ORT, "Got invalid dimensions for input",
        rf"Got invalid dimensions for input: {NAME} for the following indices"
        r"(?P<indices>(?: index: \d Got: \d+ Expected: \d+){1,8})", _add_indices,
    ),
    pattern(
        "dimensions", _ORT, "Invalid rank for input",
        rf"Invalid rank for input: {NAME} Got: (?P<given>\d) Expected: (?P<wanted>\d)",
    ),
    pattern(
        "dtype", _ORT, "Unexpected input data type",
        rf"Unexpected input data type\. Actual: \(tensor\({GIVEN_DTYPE}\)\) ?, expected: \(tensor\({WANTED_DTYPE}\)\)",
    ),
    pattern(
        "missing", _ORT, "are missing from",
        r"Required inputs \(\[(?P<names>[^\[\]]{1,4000})\]\) are missing from(?: the)? input feed",
    ),
    pattern("missing", _ORT, "Missing Input: ", f"Missing Input: {NAME}"),
    pattern("unknown", _ORT, "Invalid ", f"Invalid (?:input name|Feed Input Name): ?{NAME}"),
    pattern("unknown", _ORT, "Failed to find NodeArg", f"Failed to find NodeArg with name: {NAME} in"),
    pattern(
        "unequal", _ORT, "by a dimension other than 1",
        rf"running (?:Add|Sum) {_RUNNING}BroadcastIterator::(?P<method>\w{{4,6}})\(.{{1,300}}?"
        r"by a dimension other than 1\. (?P<small>\d+) by (?P<large>\d+)", _add_unequal,
    ),
    pattern(  # the second operand, the skip, is told first
        "concat", _ORT, "has mismatched dimensions of",
        rf"running Concat {_RUNNING}Axis {AXIS} has mismatched dimensions of {GIVEN} and {WANTED}",
    ),
    # TensorRT, running
    pattern(
        "dimensions", _TRT, "while setting input shape for",
        rf"while setting input shape for {NAME}\. Set dimensions are {GIVEN_SHAPE}\. Expected dimensions are {WANTED_SHAPE}",
    ),
    pattern(
        "range", _TRT, "does not satisfy any optimization profiles",
        rf"Set dimension {GIVEN_SHAPE} for tensor {NAME} does not satisfy any optimization profiles\.?"
        rf"(?: Valid range for profile \d+{_RANGE})?",
    ),
    pattern(
        "range", _TRT, "Supplied binding dimension",
        rf"Supplied binding dimension {GIVEN_SHAPE} for (?P<name>bindings\[\d+\]) exceed min ~ max range at index {AXIS}, "
        r"maximum dimension in profile is (?P<high>\d+), minimum dimension in profile is (?P<low>\d+), "
        r"but supplied dimension is (?P<given>-?\d+)",
    ),
    pattern(
        "range", _TRT, "Runtime dimension does not satisfy", r"Runtime dimension does not satisfy any optimization profile"
    ),
    pattern("range", _TRT, "No valid profile found", r"No valid profile found\. Please go to the TensorRT tab"),
    pattern("missing", _TRT, "Address is not set for input tensor", f"Address is not set for input tensor {NAME}"),
    pattern("unknown", _TRT, "find binding of given name", f"(?:Cannot|Can not) find binding of given name: {NAME}"),
    pattern("unknown", _TRT, "iven invalid tensor name", f"[Gg]iven invalid tensor name: {NAME}"),
    # TensorRT, building
    pattern(
        "missing", _TRT, "is missing dimensions in profile", f"Dynamic input tensor {NAME} is missing dimensions in profile"
    ),
    pattern(
        "dimensions", _TRT, "Dimension mismatch for tensor",
        rf"Dimension mismatch for tensor {NAME} and profile \d+\. At dimension axis {AXIS}, "
        rf"profile has min=(?P<low>\d+), opt=\d+, max=(?P<high>\d+) but tensor has {WANTED}", _add_lowest,
    ),
    pattern(
        "concat", _TRT, "dimensions must be equal for concatenation",
        rf"axis {AXIS} dimensions must be equal for concatenation on axis 1\. "
        rf"(?:Dimensions are|Condition '==' violated:) {WANTED} (?:and|!=) {GIVEN}",
    ),
    # Polygraphy
    pattern("missing", _POLYGRAPHY, "were not found in input data", f"inputs were not found in input data: {_LISTED}"),
    pattern("unknown", _POLYGRAPHY, "Extra inputs in input data", f"Extra inputs in input data: {_LISTED}"),
    pattern(
        "unknown", _POLYGRAPHY, "provided to the optimization profile",
        f"Invalid inputs were provided to the optimization profile: {_LISTED}",
    ),
    pattern(
        "dimensions", _POLYGRAPHY, "Received incompatible shape",
        rf"Input tensor: {NAME} \| Received incompatible shape: \((?P<given_shape>[-\d, ]{{1,200}})\)\. "
        r"Note: Expected a shape compatible with: BoundedShape\(\[(?P<bounded>.{1,200}?)\]", _add_bounded,
    ),
    pattern(
        "dtype", _POLYGRAPHY, "Received unexpected dtype",
        rf"Input tensor: {NAME} \| Received unexpected dtype: {GIVEN_DTYPE}\. Note: Expected type: {WANTED_DTYPE}",
    ),
    # StreamDiffusion's engines
    pattern(
        "missing", _STREAM, "with negative dimension -1",
        r"create tensor with negative dimension -1: \[(?P<given_shape>[-\d, ]{1,100})\]",
    ),
    pattern(
        "unknown", _STREAM, "KeyError: '",
        r"KeyError: '(?P<name>(?:input|output|middle)_control\w{0,60}|"
        r"(?:down|mid)_block\w{0,60}?(?:residuals?|samples?|_\d{1,3})(?:_\d{1,3})?)'",
    ),
)  # fmt: skip
