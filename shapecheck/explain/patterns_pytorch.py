"""What PyTorch, diffusers and ComfyUI print when residuals do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from shapecheck.explain.pattern import (
    AXIS,
    GIVEN,
    GIVEN_DTYPE,
    GIVEN_SHAPE,
    WANTED,
    WANTED_DTYPE,
    WANTED_SHAPE,
    parse_size,
    pattern,
)
from shapecheck.explain.symptom import Symptom


def _add_stride(symptom: Symptom, match: re.Match[str]) -> Symptom:
    """Read the stride of a size that torch.export tells as a formula."""
    halvings = match["wanted"].count("//2")
    return symptom if symptom.wanted is not None or halvings >= 16 else replace(symptom, stride=2**halvings)


def _count_axis(symptom: Symptom, match: re.Match[str]) -> Symptom:
    """Count the axis, which is told from the last, from the first."""
    rank = max(len(symptom.given_shape), len(symptom.wanted_shape)) or 4
    return replace(symptom, axis=rank + int(match["axis"]))


def _add_matrices(symptom: Symptom, match: re.Match[str]) -> Symptom:
    """Add the shapes of text and weights: tokens × width, width × channels."""
    tokens, channels = parse_size(match["tokens"]) or 0, parse_size(match["channels"]) or 0
    return replace(symptom, wanted_shape=(symptom.wanted or 0, channels), given_shape=(tokens, symptom.given or 0))


def _name(reason: str) -> Callable[[Symptom, re.Match[str]], Symptom]:
    return lambda symptom, match: replace(symptom, names=(reason,))


def _add_argument(symptom: Symptom, match: re.Match[str]) -> Symptom:
    return replace(symptom, names=match.group("who", "argument"))


_SIZES = "Sizes of tensors must match except"


_ON_DEVICE = r"torch\.cuda\.|torch\.(?!cuda)|MPS"


PATTERNS = (
    # PyTorch, real tensors; under torch.export with formulas for sizes
    pattern(
        "broadcast", "PyTorch", "must match the size of tensor b",
        r"(?:The )?size of tensor a \((?P<wanted>.{1,200}?)\) must match the size of tensor b \((?P<given>.{1,200}?)\) "
        rf"at non-singleton dimension {AXIS}", _add_stride,
    ),
    pattern(
        "concat", "PyTorch", _SIZES,
        rf"{_SIZES} in dimension 1\. Expected(?: size)? {WANTED}(?: in dimension {AXIS})? but got(?: size)? {GIVEN}",
    ),
    pattern("concat", "PyTorch", "Expected size ", rf"(?<!dimension \d\. )Expected size {WANTED} but got size {GIVEN}"),
    pattern("concat", "PyTorch", _SIZES, rf"{_SIZES} in dimension 1\. Got {WANTED} and {GIVEN} in dimension \d"),
    pattern(
        "attention", "PyTorch", _SIZES,
        rf"{_SIZES} in dimension 2\. Expected(?: size)? (?P<wanted>1)(?: in dimension 0)? but got(?: size)? {GIVEN}",
    ),
    pattern(
        "rank", "PyTorch", "same number of dimensions",
        r"Tensors must have same number of dimensions: got (?P<wanted>\d) and (?P<given>\d)",
    ),
    pattern(
        "norm", "PyTorch", "and input of shape",
        r"(?:Expected weight to be a vector of size equal to the number of channels in input, but )?"
        rf"got weight of shape {WANTED_SHAPE} and input of shape {GIVEN_SHAPE}",
    ),
    pattern(
        "groups", "PyTorch", "divisible by num_groups",
        rf"divisible by num_groups, but got input of shape {GIVEN_SHAPE} and num_groups=(?P<wanted>\d{{1,9}})",
    ),
    pattern(
        "output", "PyTorch", "the broadcast shape",
        rf"output with shape {WANTED_SHAPE} doesn't match the broadcast shape {GIVEN_SHAPE}",
    ),
    pattern(
        "upsample", "PyTorch", "with spatial dimensions of",
        rf"got input with spatial dimensions of {WANTED_SHAPE} and output size of torch\.Size\({GIVEN_SHAPE}\)",
    ),
    pattern(
        "reshape", "PyTorch", "is invalid for input of size",
        rf"shape '{WANTED_SHAPE}' is invalid for input of size (?P<given>\d{{1,12}})",
    ),
    pattern("index", "PyTorch", "tuple index out of range"),
    # PyTorch, tensors without values
    pattern(
        "broadcast", "PyTorch", "to broadcast a dimension of length",
        rf"(?:Attempting to )?broadcast a dimension of length {GIVEN} at (?P<axis>-\d)!"
        rf"(?: Mismatching argument at index 1 had torch\.Size\({GIVEN_SHAPE}\); "
        rf"but expected shape should be broadcastable to {WANTED_SHAPE})?", _count_axis,
    ),
    pattern(
        "rank", "PyTorch", "Number of dimensions of tensors must match",
        r"Number of dimensions of tensors must match\. Expected (?P<wanted>\d)-D tensors, but got (?P<given>\d)-D",
    ),
    # dtypes, text and latents
    pattern(
        "dtype", "PyTorch", "should be the same",
        rf"Input type \((?!{_ON_DEVICE}){GIVEN_DTYPE}\) and (?:bias|weight) type \((?!{_ON_DEVICE}){WANTED_DTYPE}\) "
        "should be the same",
    ),
    pattern(  # of older releases, which name the device too
        "dtype", "PyTorch", "should be the same",
        rf"Input type \((?P<device>{_ON_DEVICE}){GIVEN_DTYPE}\) and (?:bias|weight) type "
        rf"\((?P=device)(?!cuda){WANTED_DTYPE}\) should be the same",
    ),
    pattern("dtype", "PyTorch", "expected scalar type", rf"expected scalar type {WANTED_DTYPE} but found {GIVEN_DTYPE}"),
    pattern(
        "dtype", "PyTorch", "mixed dtype", rf"mixed dtype \(CPU\): expect parameter to have scalar type of {GIVEN_DTYPE}"
    ),
    pattern(
        "dtype", "PyTorch", "to have the same dtype",
        rf"expected m1 and m2 to have the same dtype, but got: {GIVEN_DTYPE} != {WANTED_DTYPE}",
    ),
    pattern(
        "dtype", "PyTorch", "must have the same dtype",
        rf"mat1 and mat2 must have the same dtype, but got {GIVEN_DTYPE} and {WANTED_DTYPE}",
    ),
    pattern(
        "dtype", "PyTorch", "to have the same type as",
        rf"to have the same type as tensor for argument #\d 'z'; but type {WANTED_DTYPE} does not equal {GIVEN_DTYPE}",
    ),
    pattern(
        "text width", "PyTorch", "shapes cannot be multiplied",
        rf"(?:mat1 and mat2|input and weight\.T) shapes cannot be multiplied \((?P<tokens>\d+)x{GIVEN} and "
        rf"{WANTED}x(?P<channels>\d+)\)", _add_matrices,
    ),
    pattern("sample channels", "PyTorch", "channels instead", rf"to have {WANTED} channels, but got {GIVEN} channels instead"),
    # diffusers
    pattern("pop", "diffusers", "has no attribute 'pop'", r"'tuple' object has no attribute 'pop'"),
    pattern(
        "deprecated", "diffusers", "Passing intrablock residual",
        r"Passing intrablock residual connections with `down_block_additional_residuals` is deprecated",
    ),
    pattern(
        "keyword", "diffusers", "keyword argument 'additional_residuals'",
        r"unexpected keyword argument 'additional_residuals'",
    ),
    pattern(
        "argument", "diffusers", "got an unexpected keyword argument",
        r"(?P<who>\w{1,80})(?:\.forward|\.__call__)?\(\) got an unexpected keyword argument "
        r"'(?P<argument>(?:down|mid)_(?:intra)?block_additional_residuals?)'", _add_argument,
    ),
    pattern(
        "value", "PyTorch", "unsupported operand type(s) for +",
        r"unsupported operand type\(s\) for \+=?: '(?:Tensor|FakeTensor)' and '(?P<name>\w{1,60})'",
    ),
    pattern(
        "from_unet", "diffusers", "unknown mid_block_type", r"unknown mid_block_type : \w{1,60}", _name("mid")
    ),
    pattern(
        "from_unet", "diffusers", "can't multiply sequence by", r"can't multiply sequence by non-int of type 'list'",
        _name("layers"),
    ),
    pattern(
        "from_unet", "diffusers", "cond_proj.weight",
        r'for TimestepEmbedding: Unexpected key\(s\) in state_dict: "cond_proj\.weight"', _name("cond_proj"),
    ),
    pattern(
        "from_unet", "diffusers", "`encoder_hid_dim` has to be",
        r"`encoder_hid_dim` has to be defined when `encoder_hid_dim_type` is set to ip_image_proj",
        _name("adapter"),
    ),
    # ComfyUI: what is added to, what was given
    pattern(
        "pair", "ComfyUI", "control could not be applied",
        rf"control could not be applied torch\.Size\({WANTED_SHAPE}\) torch\.Size\({GIVEN_SHAPE}\)",
    ),
)  # fmt: skip
