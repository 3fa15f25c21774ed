"""Messages of PyTorch, diffusers and ComfyUI about residuals that do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from shapecheck.explain import symptom as facts
from shapecheck.explain.symptom import ACTUAL, ACTUAL_DTYPE, ACTUAL_SHAPE, AXIS, EXPECTED, EXPECTED_DTYPE, EXPECTED_SHAPE


def _add_stride(symptom: facts.Symptom, match: re.Match[str]) -> facts.Symptom:
    """Add the stride of a size that torch.export prints as a formula."""
    halvings = match["expected"].count("//2")
    return symptom if symptom.expected is not None or halvings >= 16 else replace(symptom, stride=2**halvings)


def _count_axis(symptom: facts.Symptom, match: re.Match[str]) -> facts.Symptom:
    """Count the axis, which is printed from the last, from the first."""
    rank = max(len(symptom.actual_shape), len(symptom.expected_shape)) or 4
    return replace(symptom, axis=rank + int(match["axis"]))


def _add_matrices(symptom: facts.Symptom, match: re.Match[str]) -> facts.Symptom:
    """Add the shapes of text and weights: tokens × width, width × channels."""
    tokens, channels = facts.parse_size(match["tokens"]) or 0, facts.parse_size(match["channels"]) or 0
    return replace(symptom, expected_shape=(symptom.expected or 0, channels), actual_shape=(tokens, symptom.actual or 0))


def _add_reason(reason: str) -> Callable[[facts.Symptom, re.Match[str]], facts.Symptom]:
    return lambda symptom, match: replace(symptom, names=(reason,))


def _add_argument(symptom: facts.Symptom, match: re.Match[str]) -> facts.Symptom:
    return replace(symptom, names=match.group("who", "argument"))


_SIZES = "Sizes of tensors must match except"
_ON_DEVICE = r"torch\.cuda\.|torch\.(?!cuda)|MPS"
_torch = facts.MessagePattern
_diffusers = partial(facts.MessagePattern, source="diffusers")
PATTERNS = (
    # PyTorch, real tensors; under torch.export with formulas for sizes
    _torch("broadcast", "must match the size of tensor b",
           r"(?:The )?size of tensor a \((?P<expected>.{1,200}?)\) must match the size of tensor b \((?P<actual>.{1,200}?)\) "
           rf"at non-singleton dimension {AXIS}", _add_stride),
    _torch("concat", _SIZES,
           rf"{_SIZES} in dimension 1\. Expected(?: size)? {EXPECTED}(?: in dimension {AXIS})? but got(?: size)? {ACTUAL}"),
    _torch("concat", "Expected size ", rf"(?<!dimension \d\. )Expected size {EXPECTED} but got size {ACTUAL}"),
    _torch("concat", _SIZES, rf"{_SIZES} in dimension 1\. Got {EXPECTED} and {ACTUAL} in dimension \d"),
    _torch("attention", _SIZES,
           rf"{_SIZES} in dimension 2\. Expected(?: size)? (?P<expected>1)(?: in dimension 0)? but got(?: size)? {ACTUAL}"),
    _torch("rank", "same number of dimensions",
           r"Tensors must have same number of dimensions: got (?P<expected>\d) and (?P<actual>\d)"),
    _torch("norm", "and input of shape",
           r"(?:Expected weight to be a vector of size equal to the number of channels in input, but )?"
           rf"got weight of shape {EXPECTED_SHAPE} and input of shape {ACTUAL_SHAPE}"),
    _torch("groups", "divisible by num_groups",
           rf"divisible by num_groups, but got input of shape {ACTUAL_SHAPE} and num_groups=(?P<expected>\d{{1,9}})"),
    _torch("output", "the broadcast shape",
           rf"output with shape {EXPECTED_SHAPE} doesn't match the broadcast shape {ACTUAL_SHAPE}"),
    _torch("upsample", "with spatial dimensions of",
           rf"got input with spatial dimensions of {EXPECTED_SHAPE} and output size of torch\.Size\({ACTUAL_SHAPE}\)"),
    _torch("reshape", "is invalid for input of size",
           rf"shape '{EXPECTED_SHAPE}' is invalid for input of size (?P<actual>\d{{1,12}})"),
    _torch("index", "tuple index out of range"),
    # PyTorch, tensors without values
    _torch("broadcast", "to broadcast a dimension of length",
           rf"(?:Attempting to )?broadcast a dimension of length {ACTUAL} at (?P<axis>-\d)!"
           rf"(?: Mismatching argument at index 1 had torch\.Size\({ACTUAL_SHAPE}\); "
           rf"but expected shape should be broadcastable to {EXPECTED_SHAPE})?", _count_axis),
    _torch("rank", "Number of dimensions of tensors must match",
           r"Number of dimensions of tensors must match\. Expected (?P<expected>\d)-D tensors, but got (?P<actual>\d)-D"),
    # dtypes, text and latents
    _torch("dtype", "should be the same",
           rf"Input type \((?!{_ON_DEVICE}){ACTUAL_DTYPE}\) and (?:bias|weight) type \((?!{_ON_DEVICE}){EXPECTED_DTYPE}\) "
           "should be the same"),
    # older releases print the device too
    _torch("dtype", "should be the same",
           rf"Input type \((?P<device>{_ON_DEVICE}){ACTUAL_DTYPE}\) and (?:bias|weight) type "
           rf"\((?P=device)(?!cuda){EXPECTED_DTYPE}\) should be the same"),
    _torch("dtype", "expected scalar type", rf"expected scalar type {EXPECTED_DTYPE} but found {ACTUAL_DTYPE}"),
    _torch("dtype", "mixed dtype", rf"mixed dtype \(CPU\): expect parameter to have scalar type of {ACTUAL_DTYPE}"),
    _torch("dtype", "to have the same dtype",
           rf"expected m1 and m2 to have the same dtype, but got: {ACTUAL_DTYPE} != {EXPECTED_DTYPE}"),
    _torch("dtype", "must have the same dtype",
           rf"mat1 and mat2 must have the same dtype, but got {ACTUAL_DTYPE} and {EXPECTED_DTYPE}"),
    _torch("dtype", "to have the same type as",
           rf"to have the same type as tensor for argument #\d 'z'; but type {EXPECTED_DTYPE} does not equal {ACTUAL_DTYPE}"),
    _torch("text width", "shapes cannot be multiplied",
           rf"(?:mat1 and mat2|input and weight\.T) shapes cannot be multiplied \((?P<tokens>\d+)x{ACTUAL} and "
           rf"{EXPECTED}x(?P<channels>\d+)\)", _add_matrices),
    _torch("sample channels", "channels instead", rf"to have {EXPECTED} channels, but got {ACTUAL} channels instead"),
    _torch("value", "unsupported operand type(s) for +",
           r"unsupported operand type\(s\) for \+=?: '(?:Tensor|FakeTensor)' and '(?P<name>\w{1,60})'"),
    _diffusers("pop", "has no attribute 'pop'", r"'tuple' object has no attribute 'pop'"),
    _diffusers("deprecated", "Passing intrablock residual",
               r"Passing intrablock residual connections with `down_block_additional_residuals` is deprecated"),
    _diffusers("keyword", "keyword argument 'additional_residuals'",
               r"unexpected keyword argument 'additional_residuals'"),
    _diffusers("argument", "got an unexpected keyword argument",
               r"(?P<who>\w{1,80})(?:\.forward|\.__call__)?\(\) got an unexpected keyword argument "
               r"'(?P<argument>(?:down|mid)_(?:intra)?block_additional_residuals?)'", _add_argument),
    _diffusers("from_unet", "unknown mid_block_type", r"unknown mid_block_type : \w{1,60}", _add_reason("mid")),
    _diffusers("from_unet", "can't multiply sequence by", r"can't multiply sequence by non-int of type 'list'",
               _add_reason("layers")),
    _diffusers("from_unet", "cond_proj.weight",
               r'for TimestepEmbedding: Unexpected key\(s\) in state_dict: "cond_proj\.weight"', _add_reason("cond_proj")),
    _diffusers("from_unet", "`encoder_hid_dim` has to be",
               r"`encoder_hid_dim` has to be defined when `encoder_hid_dim_type` is set to ip_image_proj",
               _add_reason("adapter")),
    # ComfyUI prints the tensor that is added to, then the residual
    _torch("pair", "control could not be applied",
           rf"control could not be applied torch\.Size\({EXPECTED_SHAPE}\) torch\.Size\({ACTUAL_SHAPE}\)", source="ComfyUI"),
)  # fmt: skip
