"""From a text to symptoms: what PyTorch, ONNX Runtime, TensorRT, Polygraphy and diffusers print when residuals do not fit.

Every pattern is looked for around fixed words and no further, so that megabytes of anything are read in well under a second.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from shapecheck.contract import Shape
from shapecheck.faults import place
from shapecheck.faults.symptom import Symptom, SymptomKind

_LONGEST = 2**20
"""Characters that are looked at: so many from the start and as many from the end."""
_MOST = 64
"""Symptoms of one sort that are looked at: a log may repeat one thousands of times."""
_AROUND = 4_500
"""Characters around the words that give a symptom away."""
_NOISE = re.compile(r"\x1b\[[0-9;]{0,20}[A-Za-z]|^[EWI][0-9]{4} [0-9:.]{5,20} +[0-9]+ [^\]\n]{1,200}\] ?", re.MULTILINE)
_SPACES = re.compile(r"\s+")
_SHAPE = r"[\[(]([-\d, ]{1,200})[\])]"
_NAME = r"([\w./:-]{1,200}\w)"


class _Pattern(NamedTuple):
    marker: str
    """Words that must be there, looked for first."""
    regex: re.Pattern[str]
    build: Callable[[re.Match[str]], Symptom]


def symptoms(text: str) -> tuple[Symptom, ...]:
    """Everything the text says that this tool knows the meaning of, in the order of the text, each once."""
    flat = flattened(text)
    found: list[tuple[int, Symptom]] = []
    for pattern in _PATTERNS:
        found += [(match.start(), _placed(pattern.build(match), match, flat)) for match in _matches(pattern, flat)]
    found.sort(key=lambda pair: pair[0])
    told: dict[Symptom, Symptom] = {}
    for _, symptom in found:
        told.setdefault(replace(symptom, line="", stage=None), symptom)  # one exception is often told twice
    return tuple(told.values())


def _placed(symptom: Symptom, match: re.Match[str], text: str) -> Symptom:
    return replace(symptom, stage=place.stage(text, match.start(), match.end()))


def _matches(pattern: _Pattern, text: str) -> Iterator[re.Match[str]]:
    """The pattern around each occurrence of its marker; every search begins and ends near it."""
    at = done = 0
    for _ in range(_MOST):
        at = text.find(pattern.marker, at)
        if at < 0:
            return
        match = pattern.regex.search(text, max(done, at - _AROUND), at + _AROUND)
        if match and match.end() > at:
            yield match
            done = match.end()
        at = max(done, at + len(pattern.marker))


def flattened(text: str) -> str:
    """On one line, without colours and log prefixes, the middle of what is absurdly long left out."""
    if len(text) > 2 * _LONGEST:
        text = f"{text[:_LONGEST]} … {text[-_LONGEST:]}"
    return _SPACES.sub(" ", _NOISE.sub("", text))


def _size(text: str) -> int | None:
    """A size, as far as it is one that a tensor may have."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _shape(text: str) -> Shape:
    """The sizes of a shape, -1 for one that is free; nothing where one is no number."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(re.fullmatch(r"-?\d{1,9}", part) for part in parts) or len(parts) > 8:
        return ()
    return tuple(map(int, parts))


def _names(text: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"'([^']{1,200})'", text), key=_numbered))


def _numbered(name: str) -> tuple[object, ...]:
    """Names by the numbers in them: down_block_2 before down_block_10."""
    return tuple((int(part[:9]), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def _broadcast(match: re.Match[str]) -> Symptom:
    wanted, given, axis = match.groups()
    halvings = wanted.count("//2")
    stride = None if _size(wanted) is not None else 2**halvings if halvings < 16 else None
    return Symptom("broadcast", "PyTorch", match[0], int(axis), _size(wanted), _size(given), stride=stride)


def _broadcast_meta(match: re.Match[str]) -> Symptom:
    length, axis, given, wanted = match.groups()
    given_shape, wanted_shape = _shape(given or ""), _shape(wanted or "")
    rank = max(len(given_shape), len(wanted_shape), 4)
    return Symptom("broadcast", "PyTorch", match[0], rank + int(axis), None, _size(length), wanted_shape, given_shape)


def _concat(match: re.Match[str]) -> Symptom:
    wanted, axis, given = match.groups()
    return Symptom("concat", "PyTorch", match[0], int(axis) if axis else None, _size(wanted), _size(given))


def _sizes(kind: SymptomKind, source: str) -> Callable[[re.Match[str]], Symptom]:
    """Two sizes: the model's own, what was given."""
    return lambda match: Symptom(kind, source, match[0], None, _size(match[1]), _size(match[2]))


def _shapes(kind: SymptomKind, source: str) -> Callable[[re.Match[str]], Symptom]:
    """Two shapes: the model's own, what was given."""
    return lambda match: Symptom(
        kind,
        source,
        match[0],
        wanted_shape=_shape(match[1]),
        given_shape=_shape(match[2]),
    )


def _groups(match: re.Match[str]) -> Symptom:
    return Symptom("groups", "PyTorch", match[0], wanted=_size(match[2]), given_shape=_shape(match[1]))


def _plain(kind: SymptomKind, source: str) -> Callable[[re.Match[str]], Symptom]:
    return lambda match: Symptom(kind, source, match[0])


def _dtype(source: str, given: int, wanted: int) -> Callable[[re.Match[str]], Symptom]:
    """The groups that hold the dtype given and the one wanted; 0 for none."""
    return lambda match: Symptom(
        "dtype", source, match[0], bounds=(match[given] if given else "", match[wanted] if wanted else "")
    )


def _named(kind: SymptomKind, source: str) -> Callable[[re.Match[str]], Symptom]:
    return lambda match: Symptom(kind, source, match[0], names=(match[1],))


def _several(kind: SymptomKind, source: str) -> Callable[[re.Match[str]], Symptom]:
    return lambda match: Symptom(kind, source, match[0], names=_names(match[1]))


def _from_unet(what: str) -> Callable[[re.Match[str]], Symptom]:
    return lambda match: Symptom("from_unet", "diffusers", match[0], names=(what,))


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


def _named_rank(source: str) -> Callable[[re.Match[str]], Symptom]:
    return lambda match: Symptom("dimensions", source, match[0], None, _size(match[3]), _size(match[2]), names=(match[1],))


def _ort_add(match: re.Match[str]) -> Symptom:
    name, method, small, large = match.groups()
    numbers = tuple(filter(None, (_size(small), _size(large))))
    return Symptom("unequal", "ONNX Runtime", match[0], 3 if method == "Init" else None, given_shape=numbers, names=(name,))


def _ort_concat(match: re.Match[str]) -> Symptom:
    name, axis, given, wanted = match.groups()  # the second operand, the skip, is told first
    return Symptom("concat", "ONNX Runtime", match[0], int(axis), _size(wanted), _size(given), names=(name,))


def _trt_static(match: re.Match[str]) -> Symptom:
    return Symptom(
        "dimensions", "TensorRT", match[0], names=(match[1],), given_shape=_shape(match[2]), wanted_shape=_shape(match[3])
    )


def _trt_range(match: re.Match[str]) -> Symptom:
    given, name, low, high = match.groups()
    return Symptom("range", "TensorRT", match[0], names=(name,), given_shape=_shape(given), bounds=(low or "", high or ""))


def _trt_range_old(match: re.Match[str]) -> Symptom:
    shape, binding, axis, high, low, given = match.groups()
    return Symptom(
        "range", "TensorRT", match[0], int(axis), None, _size(given), (), _shape(shape), names=(binding,), bounds=(low, high)
    )


def _trt_profile(match: re.Match[str]) -> Symptom:
    name, axis, low, opt, high, wanted = match.groups()
    del opt
    return Symptom("dimensions", "TensorRT", match[0], int(axis), _size(wanted), _size(low), names=(name,), bounds=(low, high))


def _trt_concat(match: re.Match[str]) -> Symptom:
    axis, wanted, given = match.groups()
    return Symptom("concat", "TensorRT", match[0], int(axis), _size(wanted), _size(given))


def _negative(match: re.Match[str]) -> Symptom:
    return Symptom("missing", "StreamDiffusion", match[0], given_shape=_shape(match[1]))


def _poly_shape(match: re.Match[str]) -> Symptom:
    name, given, wanted = match.groups()
    free = ", ".join(part if part.strip().isdigit() else "-1" for part in wanted.split(","))
    return Symptom("dimensions", "Polygraphy", match[0], names=(name,), given_shape=_shape(given), wanted_shape=_shape(free))


def _pattern(regex: str, build: Callable[[re.Match[str]], Symptom], marker: str) -> _Pattern:
    return _Pattern(marker, re.compile(regex), build)


_DTYPE = r"([\w.:]{1,40}\w)"
_PATTERNS = (
    # PyTorch, real tensors; under torch.export with formulas for sizes
    _pattern(
        r"(?:The )?size of tensor a \((.{1,200}?)\) must match the size of tensor b \((.{1,200}?)\) "
        r"at non-singleton dimension (\d)",
        _broadcast,
        "must match the size of tensor b",
    ),
    _pattern(
        r"Sizes of tensors must match except in dimension 1\. "
        r"Expected(?: size)? (\d+)(?: in dimension (\d))? but got(?: size)? (\d+)",
        _concat,
        "Sizes of tensors must match except",
    ),
    _pattern(r"(?<!dimension \d\. )Expected size (\d+)() but got size (\d+)", _concat, "Expected size "),
    _pattern(
        r"Sizes of tensors must match except in dimension 1\. Got (\d+)() and (\d+) in dimension \d",
        _concat,
        "Sizes of tensors must match except",
    ),
    _pattern(
        r"Tensors must have same number of dimensions: got (\d) and (\d)",
        _sizes("rank", "PyTorch"),
        "same number of dimensions",
    ),
    _pattern(
        r"(?:Expected weight to be a vector of size equal to the number of channels in input, but )?"
        rf"got weight of shape {_SHAPE} and input of shape {_SHAPE}",
        _shapes("norm", "PyTorch"),
        "and input of shape",
    ),
    _pattern(
        rf"divisible by num_groups, but got input of shape {_SHAPE} and num_groups=(\d{{1,9}})",
        _groups,
        "divisible by num_groups",
    ),
    _pattern(
        rf"output with shape {_SHAPE} doesn't match the broadcast shape {_SHAPE}",
        _shapes("output", "PyTorch"),
        "the broadcast shape",
    ),
    _pattern(
        rf"got input with spatial dimensions of {_SHAPE} and output size of torch\.Size\({_SHAPE}\)",
        _shapes("upsample", "PyTorch"),
        "with spatial dimensions of",
    ),
    _pattern(r"tuple index out of range", _plain("index", "PyTorch"), "tuple index out of range"),
    # PyTorch, tensors without values
    _pattern(
        r"(?:Attempting to )?broadcast a dimension of length (\d+) at (-\d)!"
        rf"(?: Mismatching argument at index 1 had torch\.Size\({_SHAPE}\); "
        rf"but expected shape should be broadcastable to {_SHAPE})?",
        _broadcast_meta,
        "to broadcast a dimension of length",
    ),
    _pattern(
        r"Number of dimensions of tensors must match\. Expected (\d)-D tensors, but got (\d)-D",
        _sizes("rank", "PyTorch"),
        "Number of dimensions of tensors must match",
    ),
    # dtypes, text and latents
    _pattern(
        rf"Input type \({_DTYPE}\) and (?:bias|weight) type \({_DTYPE}\) should be the same",
        _dtype("PyTorch", 1, 2),
        "should be the same",
    ),
    _pattern(rf"expected scalar type {_DTYPE} but found {_DTYPE}", _dtype("PyTorch", 2, 1), "expected scalar type"),
    _pattern(rf"mixed dtype \(CPU\): expect parameter to have scalar type of {_DTYPE}", _dtype("PyTorch", 1, 0), "mixed dtype"),
    _pattern(
        rf"expected m1 and m2 to have the same dtype, but got: {_DTYPE} != {_DTYPE}",
        _dtype("PyTorch", 1, 2),
        "to have the same dtype",
    ),
    _pattern(
        rf"mat1 and mat2 must have the same dtype, but got {_DTYPE} and {_DTYPE}",
        _dtype("PyTorch", 1, 2),
        "must have the same dtype",
    ),
    _pattern(
        rf"to have the same type as tensor for argument #\d 'z'; but type {_DTYPE} does not equal {_DTYPE}",
        _dtype("PyTorch", 2, 1),
        "to have the same type as",
    ),
    _pattern(
        r"(?:mat1 and mat2|input and weight\.T) shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)",
        lambda match: Symptom("text width", "PyTorch", match[0], None, _size(match[2]), _size(match[1])),
        "shapes cannot be multiplied",
    ),
    _pattern(
        r"to have (\d+) channels, but got (\d+) channels instead", _sizes("sample channels", "PyTorch"), "channels instead"
    ),
    # diffusers
    _pattern(r"'tuple' object has no attribute 'pop'", _plain("pop", "diffusers"), "has no attribute 'pop'"),
    _pattern(
        r"Passing intrablock residual connections with `down_block_additional_residuals` is deprecated",
        _plain("deprecated", "diffusers"),
        "Passing intrablock residual",
    ),
    _pattern(
        r"unexpected keyword argument 'additional_residuals'",
        _plain("keyword", "diffusers"),
        "keyword argument 'additional_residuals'",
    ),
    _pattern(r"unknown mid_block_type : \w{1,60}", _from_unet("mid"), "unknown mid_block_type"),
    _pattern(r"can't multiply sequence by non-int of type 'list'", _from_unet("layers"), "can't multiply sequence by"),
    _pattern(
        r'for TimestepEmbedding: Unexpected key\(s\) in state_dict: "cond_proj\.weight"',
        _from_unet("cond_proj"),
        "cond_proj.weight",
    ),
    _pattern(
        r"`encoder_hid_dim` has to be defined when `encoder_hid_dim_type` is set to ip_image_proj",
        _from_unet("adapter"),
        "`encoder_hid_dim` has to be",
    ),
    # ComfyUI: what is added to, what was given
    _pattern(
        rf"control could not be applied torch\.Size\({_SHAPE}\) torch\.Size\({_SHAPE}\)",
        _shapes("pair", "ComfyUI"),
        "control could not be applied",
    ),
    # ONNX Runtime
    _pattern(
        rf"Got invalid dimensions for input: {_NAME} for the following indices((?: index: \d Got: \d+ Expected: \d+){{1,8}})",
        _ort_dimensions,
        "Got invalid dimensions for input",
    ),
    _pattern(
        rf"Invalid rank for input: {_NAME} Got: (\d) Expected: (\d)", _named_rank("ONNX Runtime"), "Invalid rank for input"
    ),
    _pattern(
        rf"Unexpected input data type\. Actual: \(tensor\({_DTYPE}\)\) ?, expected: \(tensor\({_DTYPE}\)\)",
        _dtype("ONNX Runtime", 1, 2),
        "Unexpected input data type",
    ),
    _pattern(
        r"Required inputs \(\[([^\[\]]{1,4000})\]\) are missing from(?: the)? input feed",
        _several("missing", "ONNX Runtime"),
        "are missing from",
    ),
    _pattern(rf"Missing Input: {_NAME}", _named("missing", "ONNX Runtime"), "Missing Input: "),
    _pattern(rf"Invalid (?:input name|Feed Input Name): ?{_NAME}", _named("unknown", "ONNX Runtime"), "Invalid "),
    _pattern(rf"Failed to find NodeArg with name: {_NAME} in", _named("unknown", "ONNX Runtime"), "Failed to find NodeArg"),
    _pattern(
        r"running (?:Add|Sum) node\. Name:'([^']{1,300})' Status Message: .{1,300}?BroadcastIterator::(\w{4,6})\(.{1,300}?"
        r"by a dimension other than 1\. (\d+) by (\d+)",
        _ort_add,
        "by a dimension other than 1",
    ),
    _pattern(
        r"running Concat node\. Name:'([^']{1,300})' Status Message: .{1,300}?"
        r"Axis (\d) has mismatched dimensions of (\d+) and (\d+)",
        _ort_concat,
        "has mismatched dimensions of",
    ),
    # TensorRT, running
    _pattern(
        rf"while setting input shape for {_NAME}\. Set dimensions are {_SHAPE}\. Expected dimensions are {_SHAPE}",
        _trt_static,
        "while setting input shape for",
    ),
    _pattern(
        rf"Set dimension {_SHAPE} for tensor {_NAME} does not satisfy any optimization profiles\.?"
        r"(?: Valid range for profile \d+: \[([-\d, ]{1,200})\]\.\.\[([-\d, ]{1,200})\])?",
        _trt_range,
        "does not satisfy any optimization profiles",
    ),
    _pattern(
        rf"Supplied binding dimension {_SHAPE} for (bindings\[\d+\]) exceed min ~ max range at index (\d), "
        r"maximum dimension in profile is (\d+), minimum dimension in profile is (\d+), but supplied dimension is (-?\d+)",
        _trt_range_old,
        "Supplied binding dimension",
    ),
    _pattern(
        r"Runtime dimension does not satisfy any optimization profile",
        _plain("range", "TensorRT"),
        "Runtime dimension does not satisfy",
    ),
    _pattern(r"No valid profile found", _plain("range", "TensorRT"), "No valid profile found"),
    _pattern(
        rf"Address is not set for input tensor {_NAME}", _named("missing", "TensorRT"), "Address is not set for input tensor"
    ),
    _pattern(
        rf"(?:Cannot|Can not) find binding of given name: {_NAME}", _named("unknown", "TensorRT"), "find binding of given name"
    ),
    _pattern(rf"[Gg]iven invalid tensor name: {_NAME}", _named("unknown", "TensorRT"), "iven invalid tensor name"),
    # TensorRT, building
    _pattern(
        rf"Dynamic input tensor {_NAME} is missing dimensions in profile",
        _named("missing", "TensorRT"),
        "is missing dimensions in profile",
    ),
    _pattern(
        rf"Dimension mismatch for tensor {_NAME} and profile \d+\. "
        r"At dimension axis (\d), profile has min=(\d+), opt=(\d+), max=(\d+) but tensor has (\d+)",
        _trt_profile,
        "Dimension mismatch for tensor",
    ),
    _pattern(
        r"axis (\d) dimensions must be equal for concatenation on axis 1\. "
        r"(?:Dimensions are|Condition '==' violated:) (\d+) (?:and|!=) (\d+)",
        _trt_concat,
        "dimensions must be equal for concatenation",
    ),
    # Polygraphy
    _pattern(
        r"inputs were not found in input data: \{([^{}]{1,4000})\}",
        _several("missing", "Polygraphy"),
        "were not found in input data",
    ),
    _pattern(
        r"Extra inputs in input data: \{([^{}]{1,4000})\}", _several("unknown", "Polygraphy"), "Extra inputs in input data"
    ),
    _pattern(
        r"Invalid inputs were provided to the optimization profile: \{([^{}]{1,4000})\}",
        _several("unknown", "Polygraphy"),
        "provided to the optimization profile",
    ),
    _pattern(
        rf"Input tensor: {_NAME} \| Received incompatible shape: \(([-\d, ]{{1,200}})\)\. "
        r"Note: Expected a shape compatible with: BoundedShape\(\[(.{1,200}?)\]",
        _poly_shape,
        "Received incompatible shape",
    ),
    _pattern(
        rf"Input tensor: {_NAME} \| Received unexpected dtype: {_DTYPE}\. Note: Expected type: {_DTYPE}",
        lambda match: Symptom("dtype", "Polygraphy", match[0], names=(match[1],), bounds=(match[2], match[3])),
        "Received unexpected dtype",
    ),
    # StreamDiffusion's engines
    _pattern(r"create tensor with negative dimension -1: \[([-\d, ]{1,100})\]", _negative, "with negative dimension -1"),
    _pattern(
        r"KeyError: '((?:input_control|output_control|down_block|middle_control|mid_block)\w{1,60})'",
        _named("unknown", "StreamDiffusion"),
        "KeyError: '",
    ),
)
