"""Messages of PyTorch, diffusers and ComfyUI about residuals that do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from shapecheck.explain import symptom as facts
from shapecheck.explain.symptom import AXIS, GIVEN, GIVEN_DTYPE, GIVEN_SHAPE, WANTED, WANTED_DTYPE, WANTED_SHAPE, Symptom


def _add_stride(symptom: Symptom, match: re.Match[str]) -> Symptom:
    """Add the stride of a size that torch.export prints as a formula."""
    halvings = match["wanted"].count("//2")
    return symptom if symptom.wanted is not None or halvings >= 16 else replace(symptom, stride=2**halvings)


def _count_axis(symptom: Symptom, match: re.Match[str]) -> Symptom:
    """Count the axis, which is printed from the last, from the first."""
    rank = max(len(symptom.given_shape), len(symptom.wanted_shape)) or 4
    return replace(symptom, axis=rank + int(match["axis"]))


def _add_matrices(symptom: Symptom, match: re.Match[str]) -> Symptom:
    """Add the shapes of text and weights: tokens × width, width × channels."""
    tokens, channels = facts.parse_size(match["tokens"]) or 0, facts.parse_size(match["channels"]) or 0
    return replace(symptom, wanted_shape=(symptom.wanted or 0, channels), given_shape=(tokens, symptom.given or 0))


def _add_reason(reason: str) -> Callable[[Symptom, re.Match[str]], Symptom]:
    return lambda symptom, match: replace(symptom, names=(reason,))


def _add_argument(symptom: Symptom, match: re.Match[str]) -> Symptom:
    return replace(symptom, names=match.group("who", "argument"))


_SIZES = "Sizes of tensors must match except"
_ON_DEVICE = r"torch\.cuda\.|torch\.(?!cuda)|MPS"
_torch = facts.MessagePattern
_diffusers = partial(facts.MessagePattern, source="diffusers")
PATTERNS = (
    # PyTorch, real tensors; under torch.export with formulas for sizes
    _torch("broadcast", "must match the size of tensor b",
           r"(?:The )?size of tensor a \((?P<wanted>.{1,200}?)\) must match the size of tensor b \((?P<given>.{1,200}?)\) "
           rf"at non-singleton dimension {AXIS}", _add_stride),
    _torch("concat", _SIZES,
           rf"{_SIZES} in dimension 1\. Expected(?: size)? {WANTED}(?: in dimension {AXIS})? but got(?: size)? {GIVEN}"),
    _torch("concat", "Expected size ", rf"(?<!dimension \d\. )Expected size {WANTED} but got size {GIVEN}"),
    _torch("concat", _SIZES, rf"{_SIZES} in dimension 1\. Got {WANTED} and {GIVEN} in dimension \d"),
    _torch("attention", _SIZES,
           rf"{_SIZES} in dimension 2\. Expected(?: size)? (?P<wanted>1)(?: in dimension 0)? but got(?: size)? {GIVEN}"),
    _torch("rank", "same number of dimensions",
           r"Tensors must have same number of dimensions: got (?P<wanted>\d) and (?P<given>\d)"),
    _torch("norm", "and input of shape",
           r"(?:Expected weight to be a vector of size equal to the number of channels in input, but )?"
           rf"got weight of shape {WANTED_SHAPE} and input of shape {GIVEN_SHAPE}"),
    _torch("groups", "divisible by num_groups",
           rf"divisible by num_groups, but got input of shape {GIVEN_SHAPE} and num_groups=(?P<wanted>\d{{1,9}})"),
    _torch("output", "the broadcast shape",
           rf"output with shape {WANTED_SHAPE} doesn't match the broadcast shape {GIVEN_SHAPE}"),
    _torch("upsample", "with spatial dimensions of",
           rf"got input with spatial dimensions of {WANTED_SHAPE} and output size of torch\.Size\({GIVEN_SHAPE}\)"),
    _torch("reshape", "is invalid for input of size",
           rf"shape '{WANTED_SHAPE}' is invalid for input of size (?P<given>\d{{1,12}})"),
    _torch("index", "tuple index out of range"),
    # PyTorch, tensors without values
    _torch("broadcast", "to broadcast a dimension of length",
           rf"(?:Attempting to )?broadcast a dimension of length {GIVEN} at (?P<axis>-\d)!"
           rf"(?: Mismatching argument at index 1 had torch\.Size\({GIVEN_SHAPE}\); "
           rf"but expected shape should be broadcastable to {WANTED_SHAPE})?", _count_axis),
    _torch("rank", "Number of dimensions of tensors must match",
           r"Number of dimensions of tensors must match\. Expected (?P<wanted>\d)-D tensors, but got (?P<given>\d)-D"),
    # dtypes, text and latents
    _torch("dtype", "should be the same",
           rf"Input type \((?!{_ON_DEVICE}){GIVEN_DTYPE}\) and (?:bias|weight) type \((?!{_ON_DEVICE}){WANTED_DTYPE}\) "
           "should be the same"),
    # older releases print the device too
    _torch("dtype", "should be the same",
           rf"Input type \((?P<device>{_ON_DEVICE}){GIVEN_DTYPE}\) and (?:bias|weight) type "
           rf"\((?P=device)(?!cuda){WANTED_DTYPE}\) should be the same"),
    _torch("dtype", "expected scalar type", rf"expected scalar type {WANTED_DTYPE} but found {GIVEN_DTYPE}"),
    _torch("dtype", "mixed dtype", rf"mixed dtype \(CPU\): expect parameter to have scalar type of {GIVEN_DTYPE}"),
    _torch("dtype", "to have the same dtype",
           rf"expected m1 and m2 to have the same dtype, but got: {GIVEN_DTYPE} != {WANTED_DTYPE}"),
    _torch("dtype", "must have the same dtype",
           rf"mat1 and mat2 must have the same dtype, but got {GIVEN_DTYPE} and {WANTED_DTYPE}"),
    _torch("dtype", "to have the same type as",
           rf"to have the same type as tensor for argument #\d 'z'; but type {WANTED_DTYPE} does not equal {GIVEN_DTYPE}"),
    _torch("text width", "shapes cannot be multiplied",
           rf"(?:mat1 and mat2|input and weight\.T) shapes cannot be multiplied \((?P<tokens>\d+)x{GIVEN} and "
           rf"{WANTED}x(?P<channels>\d+)\)", _add_matrices),
    _torch("sample channels", "channels instead", rf"to have {WANTED} channels, but got {GIVEN} channels instead"),
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
           rf"control could not be applied torch\.Size\({WANTED_SHAPE}\) torch\.Size\({GIVEN_SHAPE}\)", source="ComfyUI"),
)  # fmt: skip
