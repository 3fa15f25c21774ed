"""What ONNX Runtime, TensorRT, Polygraphy and StreamDiffusion's engines print when residuals do not fit."""

from __future__ import annotations

import re

from shapecheck.explain.pattern import DTYPE, NAME, SHAPE, Build, dtype, named, pattern, plain, several, shape_of, size_of
from shapecheck.explain.symptom import Symptom


def _ort_dimensions(match: re.Match[str]) -> Symptom:
    wrong = [
        (int(at), int(got), int(want))
        for at, got, want in re.findall(r"index: (\d) Got: (\d{1,9}) Expected: (\d{1,9})(?!\d)", match[2])
    ]
    last = max((at for at, _, _ in wrong), default=-1)
    given, wanted = ([-1] * (last + 1) for _ in range(2))
    for at, got, want in wrong:
        given[at], wanted[at] = got, want
    return Symptom(
        "dimensions", "ONNX Runtime", match[0], names=(match[1],), wanted_shape=tuple(wanted), given_shape=tuple(given)
    )


def _named_rank(source: str) -> Build:
    return lambda match: Symptom("dimensions", source, match[0], None, size_of(match[3]), size_of(match[2]), names=(match[1],))


def _ort_add(match: re.Match[str]) -> Symptom:
    name, method, small, large = match.groups()
    numbers = tuple(filter(None, (size_of(small), size_of(large))))
    return Symptom("unequal", "ONNX Runtime", match[0], 3 if method == "Init" else None, given_shape=numbers, names=(name,))


def _ort_concat(match: re.Match[str]) -> Symptom:
    name, axis, given, wanted = match.groups()  # the second operand, the skip, is told first
    return Symptom("concat", "ONNX Runtime", match[0], int(axis), size_of(wanted), size_of(given), names=(name,))


def _trt_static(match: re.Match[str]) -> Symptom:
    return Symptom(
        "dimensions", "TensorRT", match[0], names=(match[1],), given_shape=shape_of(match[2]), wanted_shape=shape_of(match[3])
    )


def _trt_range(match: re.Match[str]) -> Symptom:
    given, name, low, high = match.groups()
    return Symptom("range", "TensorRT", match[0], names=(name,), given_shape=shape_of(given), bounds=(low or "", high or ""))


def _trt_range_old(match: re.Match[str]) -> Symptom:
    shape, binding, axis, high, low, given = match.groups()
    return Symptom(
        "range",
        "TensorRT",
        match[0],
        int(axis),
        None,
        size_of(given),
        (),
        shape_of(shape),
        names=(binding,),
        bounds=(low, high),
    )


def _trt_profile(match: re.Match[str]) -> Symptom:
    name, axis, low, high, wanted = match.groups()
    return Symptom(
        "dimensions", "TensorRT", match[0], int(axis), size_of(wanted), size_of(low), names=(name,), bounds=(low, high)
    )


def _trt_concat(match: re.Match[str]) -> Symptom:
    axis, wanted, given = match.groups()
    return Symptom("concat", "TensorRT", match[0], int(axis), size_of(wanted), size_of(given))


def _negative(match: re.Match[str]) -> Symptom:
    return Symptom("missing", "StreamDiffusion", match[0], given_shape=shape_of(match[1]))


def _poly_shape(match: re.Match[str]) -> Symptom:
    name, given, wanted = match.groups()
    free = ", ".join(part if part.strip().isdigit() else "-1" for part in wanted.split(","))
    return Symptom(
        "dimensions", "Polygraphy", match[0], names=(name,), given_shape=shape_of(given), wanted_shape=shape_of(free)
    )


PATTERNS = (
    # ONNX Runtime
    pattern(
        rf"Got invalid dimensions for input: {NAME} for the following indices((?: index: \d Got: \d+ Expected: \d+){{1,8}})",
        _ort_dimensions,
        "Got invalid dimensions for input",
    ),
    pattern(rf"Invalid rank for input: {NAME} Got: (\d) Expected: (\d)", _named_rank("ONNX Runtime"), "Invalid rank for input"),
    pattern(
        rf"Unexpected input data type\. Actual: \(tensor\({DTYPE}\)\) ?, expected: \(tensor\({DTYPE}\)\)",
        dtype("ONNX Runtime", 1, 2),
        "Unexpected input data type",
    ),
    pattern(
        r"Required inputs \(\[([^\[\]]{1,4000})\]\) are missing from(?: the)? input feed",
        several("missing", "ONNX Runtime"),
        "are missing from",
    ),
    pattern(rf"Missing Input: {NAME}", named("missing", "ONNX Runtime"), "Missing Input: "),
    pattern(rf"Invalid (?:input name|Feed Input Name): ?{NAME}", named("unknown", "ONNX Runtime"), "Invalid "),
    pattern(rf"Failed to find NodeArg with name: {NAME} in", named("unknown", "ONNX Runtime"), "Failed to find NodeArg"),
    pattern(
        r"running (?:Add|Sum) node\. Name:'([^']{1,300})' Status Message: .{1,300}?BroadcastIterator::(\w{4,6})\(.{1,300}?"
        r"by a dimension other than 1\. (\d+) by (\d+)",
        _ort_add,
        "by a dimension other than 1",
    ),
    pattern(
        r"running Concat node\. Name:'([^']{1,300})' Status Message: .{1,300}?"
        r"Axis (\d) has mismatched dimensions of (\d+) and (\d+)",
        _ort_concat,
        "has mismatched dimensions of",
    ),
    # TensorRT, running
    pattern(
        rf"while setting input shape for {NAME}\. Set dimensions are {SHAPE}\. Expected dimensions are {SHAPE}",
        _trt_static,
        "while setting input shape for",
    ),
    pattern(
        rf"Set dimension {SHAPE} for tensor {NAME} does not satisfy any optimization profiles\.?"
        r"(?: Valid range for profile \d+: \[([-\d, ]{1,200})\]\.\.\[([-\d, ]{1,200})\])?",
        _trt_range,
        "does not satisfy any optimization profiles",
    ),
    pattern(
        rf"Supplied binding dimension {SHAPE} for (bindings\[\d+\]) exceed min ~ max range at index (\d), "
        r"maximum dimension in profile is (\d+), minimum dimension in profile is (\d+), but supplied dimension is (-?\d+)",
        _trt_range_old,
        "Supplied binding dimension",
    ),
    pattern(
        r"Runtime dimension does not satisfy any optimization profile",
        plain("range", "TensorRT"),
        "Runtime dimension does not satisfy",
    ),
    pattern(r"No valid profile found\. Please go to the TensorRT tab", plain("range", "TensorRT"), "No valid profile found"),
    pattern(
        rf"Address is not set for input tensor {NAME}", named("missing", "TensorRT"), "Address is not set for input tensor"
    ),
    pattern(
        rf"(?:Cannot|Can not) find binding of given name: {NAME}", named("unknown", "TensorRT"), "find binding of given name"
    ),
    pattern(rf"[Gg]iven invalid tensor name: {NAME}", named("unknown", "TensorRT"), "iven invalid tensor name"),
    # TensorRT, building
    pattern(
        rf"Dynamic input tensor {NAME} is missing dimensions in profile",
        named("missing", "TensorRT"),
        "is missing dimensions in profile",
    ),
    pattern(
        rf"Dimension mismatch for tensor {NAME} and profile \d+\. "
        r"At dimension axis (\d), profile has min=(\d+), opt=\d+, max=(\d+) but tensor has (\d+)",
        _trt_profile,
        "Dimension mismatch for tensor",
    ),
    pattern(
        r"axis (\d) dimensions must be equal for concatenation on axis 1\. "
        r"(?:Dimensions are|Condition '==' violated:) (\d+) (?:and|!=) (\d+)",
        _trt_concat,
        "dimensions must be equal for concatenation",
    ),
    # Polygraphy
    pattern(
        r"inputs were not found in input data: \{([^{}]{1,4000})\}",
        several("missing", "Polygraphy"),
        "were not found in input data",
    ),
    pattern(r"Extra inputs in input data: \{([^{}]{1,4000})\}", several("unknown", "Polygraphy"), "Extra inputs in input data"),
    pattern(
        r"Invalid inputs were provided to the optimization profile: \{([^{}]{1,4000})\}",
        several("unknown", "Polygraphy"),
        "provided to the optimization profile",
    ),
    pattern(
        rf"Input tensor: {NAME} \| Received incompatible shape: \(([-\d, ]{{1,200}})\)\. "
        r"Note: Expected a shape compatible with: BoundedShape\(\[(.{1,200}?)\]",
        _poly_shape,
        "Received incompatible shape",
    ),
    pattern(
        rf"Input tensor: {NAME} \| Received unexpected dtype: {DTYPE}\. Note: Expected type: {DTYPE}",
        lambda match: Symptom("dtype", "Polygraphy", match[0], names=(match[1],), bounds=(match[2], match[3])),
        "Received unexpected dtype",
    ),
    # StreamDiffusion's engines
    pattern(r"create tensor with negative dimension -1: \[([-\d, ]{1,100})\]", _negative, "with negative dimension -1"),
    pattern(
        r"KeyError: '((?:input|output|middle)_control\w{0,60}|"
        r"(?:down|mid)_block\w{0,60}?(?:residuals?|samples?|_\d{1,3})(?:_\d{1,3})?)'",
        named("unknown", "StreamDiffusion"),
        "KeyError: '",
    ),
)
