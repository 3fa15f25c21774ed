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
            "Mismatching argument at index 1 had torch.Size({actual}); but expected shape should be broadcastable to {merged}"
        ),
    ),
    "concat": (
        _CONCAT + " 1. Expected size {a} but got size {b} for tensor number 1 in the list.",
        _CONCAT + " 1. Expected {a} in dimension {axis} but got {b} for tensor number 1 in the list",
    ),
    "attention": (
        _CONCAT + " 2. Expected size 1 but got size {actual[0]} for tensor number 1 in the list.",
        _CONCAT + " 2. Expected 1 in dimension 0 but got {actual[0]} for tensor number 1 in the list",
    ),
    "rank": (
        "Tensors must have same number of dimensions: got {expected_rank} and {actual_rank}",
        (
            "Number of dimensions of tensors must match.  Expected {expected_rank}-D tensors, "
            "but got {actual_rank}-D for tensor number 1 in the list"
        ),
    ),
}
"""The texts for tensors with values, and for those without."""
_ALIKE: Mapping[FailureKind, str] = {
    "norm": "Expected weight to be a vector of size equal to the number of channels in input, "
    "but got weight of shape {expected} and input of shape {actual}",
    "groups": "Expected number of channels in input to be divisible by num_groups, "
    "but got input of shape {actual} and num_groups={expected[0]}",
    "index": "tuple index out of range",
    "output": "output with shape {expected} doesn't match the broadcast shape {actual}",
    "upsample": "Input and output must have the same number of spatial dimensions, "
    "but got input with spatial dimensions of {expected} and output size of torch.Size({actual}). "
    "Please provide input tensor in (N, C, d1, d2, ...,dK) format and output size in (o1, o2, ...,oK) format.",
    "reshape": "shape '{expected}' is invalid for input of size {actual[0]}",
    "keyword": "{module}.forward() got an unexpected keyword argument 'additional_residuals'",
}


def format_message(failure: Failure, *, meta: bool = False) -> str:
    """Return the text of the exception that PyTorch raises; empty if it is not known.

    `meta`: for tensors without values, on the meta device and under torch.export and torch.compile.
    """
    text = _BY_VALUES[failure.kind][meta] if failure.kind in _BY_VALUES else _ALIKE.get(failure.kind, "")
    expected, actual = list(failure.expected), list(failure.actual)
    return text.format(
        a=failure.sizes[0],
        b=failure.sizes[1],
        axis=failure.axis,
        axis_from_last=failure.axis - max(len(expected), len(actual)),
        merged=list(merge_axes(failure)),
        module=failure.module,
        expected=expected,
        actual=actual,
        expected_rank=len(expected),
        actual_rank=len(actual),
    )


def merge_axes(failure: Failure) -> Shape:
    """Return the UNet's tensor as PyTorch prints it: the axes after the one that fails are broadcast already."""
    return tuple(theirs if ours == 1 and axis > failure.axis else ours for axis, (ours, theirs) in enumerate(failure.aligned))
