"""PyTorch's message for a failure, in the words of its CPU and CUDA kernels and in those of meta and fake tensors."""

from __future__ import annotations

from collections.abc import Mapping

from shapecheck.contract import Shape
from shapecheck.explain.simulate import Failure, FailureKind

_CONCAT = "Sizes of tensors must match except in dimension"
_BY_VALUES: Mapping[FailureKind, tuple[str, str]] = {
    "broadcast": (
        "The size of tensor a ({a}) must match the size of tensor b ({b}) at non-singleton dimension {axis}",
        (
            "Attempting to broadcast a dimension of length {b} at {axis_from_last}! "
            "Mismatching argument at index 1 had torch.Size({given}); but expected shape should be broadcastable to {merged}"
        ),
    ),
    "concat": (
        _CONCAT + " 1. Expected size {a} but got size {b} for tensor number 1 in the list.",
        _CONCAT + " 1. Expected {a} in dimension {axis} but got {b} for tensor number 1 in the list",
    ),
    "attention": (
        _CONCAT + " 2. Expected size 1 but got size {given_first} for tensor number 1 in the list.",
        _CONCAT + " 2. Expected 1 in dimension 0 but got {given_first} for tensor number 1 in the list",
    ),
    "rank": (
        "Tensors must have same number of dimensions: got {wanted_rank} and {given_rank}",
        (
            "Number of dimensions of tensors must match.  Expected {wanted_rank}-D tensors, "
            "but got {given_rank}-D for tensor number 1 in the list"
        ),
    ),
}
"""The texts for tensors with values, and for those without."""
_ALIKE: Mapping[FailureKind, str] = {
    "norm": "Expected weight to be a vector of size equal to the number of channels in input, "
    "but got weight of shape {wanted} and input of shape {given}",
    "groups": "Expected number of channels in input to be divisible by num_groups, "
    "but got input of shape {given} and num_groups={wanted_first}",
    "index": "tuple index out of range",
    "output": "output with shape {wanted} doesn't match the broadcast shape {given}",
    "upsample": "Input and output must have the same number of spatial dimensions, "
    "but got input with spatial dimensions of {wanted} and output size of torch.Size({given}). "
    "Please provide input tensor in (N, C, d1, d2, ...,dK) format and output size in (o1, o2, ...,oK) format.",
    "reshape": "shape '{wanted}' is invalid for input of size {given_first}",
    "keyword": "{module}.forward() got an unexpected keyword argument 'additional_residuals'",
}


def say_eager(failure: Failure) -> str:
    """Return the text of the exception that real tensors raise; empty if it is not known."""
    return _fill_in(failure, 0)


def say_meta(failure: Failure) -> str:
    """Return the text that tensors without values raise: on the meta device, under torch.export and torch.compile."""
    return _fill_in(failure, 1)


def _fill_in(failure: Failure, number: int) -> str:
    text = _BY_VALUES[failure.kind][number] if failure.kind in _BY_VALUES else _ALIKE.get(failure.kind, "")
    wanted, given = failure.wanted, failure.given
    a, b = failure.sizes
    return text.format(
        a=a,
        b=b,
        axis=failure.axis,
        axis_from_last=failure.axis - max(len(wanted), len(given)),
        merged=list(merge_axes(failure)),
        module=failure.module,
        wanted=list(wanted),
        given=list(given),
        wanted_first=wanted[0],
        given_first=given[0] if given else "",
        wanted_rank=len(wanted),
        given_rank=len(given),
    )


def merge_axes(failure: Failure) -> Shape:
    """Return the UNet's tensor as PyTorch prints it: the axes after the one that fails are broadcast already."""
    return tuple(theirs if own == 1 and axis > failure.axis else own for axis, (own, theirs) in enumerate(failure.aligned))
