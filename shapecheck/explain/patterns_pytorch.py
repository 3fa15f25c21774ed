"""What PyTorch, diffusers and ComfyUI print when residuals do not fit."""

from __future__ import annotations

import re

from shapecheck.explain.pattern import DTYPE, SHAPE, Build, dtype, pattern, plain, shape_of, shapes, size_of, sizes
from shapecheck.explain.symptom import Symptom


def _broadcast(match: re.Match[str]) -> Symptom:
    wanted, given, axis = match.groups()
    halvings = wanted.count("//2")
    stride = None if size_of(wanted) is not None else 2**halvings if halvings < 16 else None
    return Symptom("broadcast", "PyTorch", match[0], int(axis), size_of(wanted), size_of(given), stride=stride)


def _broadcast_meta(match: re.Match[str]) -> Symptom:
    length, axis, given, wanted = match.groups()
    given_shape, wanted_shape = shape_of(given or ""), shape_of(wanted or "")
    rank = max(len(given_shape), len(wanted_shape)) or 4
    return Symptom("broadcast", "PyTorch", match[0], rank + int(axis), None, size_of(length), wanted_shape, given_shape)


def _concat(match: re.Match[str]) -> Symptom:
    wanted, axis, given = match.groups()
    return Symptom("concat", "PyTorch", match[0], int(axis) if axis else None, size_of(wanted), size_of(given))


def _groups(match: re.Match[str]) -> Symptom:
    return Symptom("groups", "PyTorch", match[0], wanted=size_of(match[2]), given_shape=shape_of(match[1]))


def _multiplied(match: re.Match[str]) -> Symptom:
    """Text by a layer's weights: tokens × width, width × channels."""
    tokens, given, wanted, channels = map(size_of, match.groups())
    return Symptom(
        "text width", "PyTorch", match[0], None, wanted, given, (wanted or 0, channels or 0), (tokens or 0, given or 0)
    )


def _from_unet(what: str) -> Build:
    return lambda match: Symptom("from_unet", "diffusers", match[0], names=(what,))


_ON_DEVICE = r"torch\.cuda\.|torch\.(?!cuda)|MPS"


PATTERNS = (
    # PyTorch, real tensors; under torch.export with formulas for sizes
    pattern(
        r"(?:The )?size of tensor a \((.{1,200}?)\) must match the size of tensor b \((.{1,200}?)\) "
        r"at non-singleton dimension (\d)",
        _broadcast,
        "must match the size of tensor b",
    ),
    pattern(
        r"Sizes of tensors must match except in dimension 1\. "
        r"Expected(?: size)? (\d+)(?: in dimension (\d))? but got(?: size)? (\d+)",
        _concat,
        "Sizes of tensors must match except",
    ),
    pattern(r"(?<!dimension \d\. )Expected size (\d+)() but got size (\d+)", _concat, "Expected size "),
    pattern(
        r"Sizes of tensors must match except in dimension 1\. Got (\d+)() and (\d+) in dimension \d",
        _concat,
        "Sizes of tensors must match except",
    ),
    pattern(
        r"Sizes of tensors must match except in dimension 2\. "
        r"Expected(?: size)? (1)(?: in dimension 0)? but got(?: size)? (\d+)",
        sizes("attention", "PyTorch"),
        "Sizes of tensors must match except",
    ),
    pattern(
        r"Tensors must have same number of dimensions: got (\d) and (\d)",
        sizes("rank", "PyTorch"),
        "same number of dimensions",
    ),
    pattern(
        r"(?:Expected weight to be a vector of size equal to the number of channels in input, but )?"
        rf"got weight of shape {SHAPE} and input of shape {SHAPE}",
        shapes("norm", "PyTorch"),
        "and input of shape",
    ),
    pattern(
        rf"divisible by num_groups, but got input of shape {SHAPE} and num_groups=(\d{{1,9}})",
        _groups,
        "divisible by num_groups",
    ),
    pattern(
        rf"output with shape {SHAPE} doesn't match the broadcast shape {SHAPE}",
        shapes("output", "PyTorch"),
        "the broadcast shape",
    ),
    pattern(
        rf"got input with spatial dimensions of {SHAPE} and output size of torch\.Size\({SHAPE}\)",
        shapes("upsample", "PyTorch"),
        "with spatial dimensions of",
    ),
    pattern(
        rf"shape '{SHAPE}' is invalid for input of size (\d{{1,12}})",
        lambda match: Symptom("reshape", "PyTorch", match[0], given=size_of(match[2]), wanted_shape=shape_of(match[1])),
        "is invalid for input of size",
    ),
    pattern(r"tuple index out of range", plain("index", "PyTorch"), "tuple index out of range"),
    # PyTorch, tensors without values
    pattern(
        r"(?:Attempting to )?broadcast a dimension of length (\d+) at (-\d)!"
        rf"(?: Mismatching argument at index 1 had torch\.Size\({SHAPE}\); "
        rf"but expected shape should be broadcastable to {SHAPE})?",
        _broadcast_meta,
        "to broadcast a dimension of length",
    ),
    pattern(
        r"Number of dimensions of tensors must match\. Expected (\d)-D tensors, but got (\d)-D",
        sizes("rank", "PyTorch"),
        "Number of dimensions of tensors must match",
    ),
    # dtypes, text and latents
    pattern(
        rf"Input type \((?!{_ON_DEVICE}){DTYPE}\) and (?:bias|weight) type \((?!{_ON_DEVICE}){DTYPE}\) should be the same",
        dtype("PyTorch", 1, 2),
        "should be the same",
    ),
    pattern(  # of older releases, which name the device too
        rf"Input type \(({_ON_DEVICE}){DTYPE}\) and (?:bias|weight) type \(\1(?!cuda){DTYPE}\) should be the same",
        dtype("PyTorch", 2, 3),
        "should be the same",
    ),
    pattern(rf"expected scalar type {DTYPE} but found {DTYPE}", dtype("PyTorch", 2, 1), "expected scalar type"),
    pattern(rf"mixed dtype \(CPU\): expect parameter to have scalar type of {DTYPE}", dtype("PyTorch", 1, 0), "mixed dtype"),
    pattern(
        rf"expected m1 and m2 to have the same dtype, but got: {DTYPE} != {DTYPE}",
        dtype("PyTorch", 1, 2),
        "to have the same dtype",
    ),
    pattern(
        rf"mat1 and mat2 must have the same dtype, but got {DTYPE} and {DTYPE}",
        dtype("PyTorch", 1, 2),
        "must have the same dtype",
    ),
    pattern(
        rf"to have the same type as tensor for argument #\d 'z'; but type {DTYPE} does not equal {DTYPE}",
        dtype("PyTorch", 2, 1),
        "to have the same type as",
    ),
    pattern(
        r"(?:mat1 and mat2|input and weight\.T) shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)",
        _multiplied,
        "shapes cannot be multiplied",
    ),
    pattern(r"to have (\d+) channels, but got (\d+) channels instead", sizes("sample channels", "PyTorch"), "channels instead"),
    # diffusers
    pattern(r"'tuple' object has no attribute 'pop'", plain("pop", "diffusers"), "has no attribute 'pop'"),
    pattern(
        r"Passing intrablock residual connections with `down_block_additional_residuals` is deprecated",
        plain("deprecated", "diffusers"),
        "Passing intrablock residual",
    ),
    pattern(
        r"unexpected keyword argument 'additional_residuals'",
        plain("keyword", "diffusers"),
        "keyword argument 'additional_residuals'",
    ),
    pattern(
        r"(\w{1,80})(?:\.forward|\.__call__)?\(\) got an unexpected keyword argument "
        r"'((?:down|mid)_(?:intra)?block_additional_residuals?)'",
        lambda match: Symptom("argument", "diffusers", match[0], names=(match[1], match[2])),
        "got an unexpected keyword argument",
    ),
    pattern(
        r"unsupported operand type\(s\) for \+=?: '(?:Tensor|FakeTensor)' and '(\w{1,60})'",
        lambda match: Symptom("value", "PyTorch", match[0], names=(match[1],)),
        "unsupported operand type(s) for +",
    ),
    pattern(r"unknown mid_block_type : \w{1,60}", _from_unet("mid"), "unknown mid_block_type"),
    pattern(r"can't multiply sequence by non-int of type 'list'", _from_unet("layers"), "can't multiply sequence by"),
    pattern(
        r'for TimestepEmbedding: Unexpected key\(s\) in state_dict: "cond_proj\.weight"',
        _from_unet("cond_proj"),
        "cond_proj.weight",
    ),
    pattern(
        r"`encoder_hid_dim` has to be defined when `encoder_hid_dim_type` is set to ip_image_proj",
        _from_unet("adapter"),
        "`encoder_hid_dim` has to be",
    ),
    # ComfyUI: what is added to, what was given
    pattern(
        rf"control could not be applied torch\.Size\({SHAPE}\) torch\.Size\({SHAPE}\)",
        shapes("pair", "ComfyUI"),
        "control could not be applied",
    ),
)
