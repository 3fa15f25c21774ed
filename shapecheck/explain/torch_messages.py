"""What PyTorch says of a failure, in the words of its CPU and CUDA kernels and in those of meta and fake tensors."""

from __future__ import annotations

from shapecheck.contract import Shape
from shapecheck.explain.simulate import Failure


def say_eager(failure: Failure) -> str:
    """The text of the exception where tensors are real. Empty where it is not known."""
    wanted, given = failure.wanted, failure.given
    match failure.kind:
        case "broadcast":
            a, b = failure.sizes
            return f"The size of tensor a ({a}) must match the size of tensor b ({b}) at non-singleton dimension {failure.axis}"
        case "concat":
            a, b = failure.sizes
            return (
                "Sizes of tensors must match except in dimension 1. "
                f"Expected size {a} but got size {b} for tensor number 1 in the list."
            )
        case "attention":
            return (
                "Sizes of tensors must match except in dimension 2. "
                f"Expected size 1 but got size {given[0]} for tensor number 1 in the list."
            )
        case "rank":
            return f"Tensors must have same number of dimensions: got {len(wanted)} and {len(given)}"
        case _:
            return _alike(failure)


def say_meta(failure: Failure) -> str:
    """The text of the exception where tensors have no values: on the meta device, under torch.export and torch.compile."""
    wanted, given = failure.wanted, failure.given
    match failure.kind:
        case "broadcast":
            return (
                f"Attempting to broadcast a dimension of length {failure.sizes[1]} at {failure.axis - _rank(failure)}! "
                f"Mismatching argument at index 1 had torch.Size({_listed(given)}); "
                f"but expected shape should be broadcastable to {_listed(merge_axes(failure))}"
            )
        case "concat":
            a, b = failure.sizes
            return (
                "Sizes of tensors must match except in dimension 1. "
                f"Expected {a} in dimension {failure.axis} but got {b} for tensor number 1 in the list"
            )
        case "attention":
            return (
                "Sizes of tensors must match except in dimension 2. "
                f"Expected 1 in dimension 0 but got {given[0]} for tensor number 1 in the list"
            )
        case "rank":
            return (
                f"Number of dimensions of tensors must match.  Expected {len(wanted)}-D tensors, "
                f"but got {len(given)}-D for tensor number 1 in the list"
            )
        case _:
            return _alike(failure)


def _alike(failure: Failure) -> str:
    """The texts that do not depend on whether tensors are real."""
    wanted, given = failure.wanted, failure.given
    match failure.kind:
        case "norm":
            return (
                "Expected weight to be a vector of size equal to the number of channels in input, "
                f"but got weight of shape {_listed(wanted)} and input of shape {_listed(given)}"
            )
        case "groups":
            return (
                "Expected number of channels in input to be divisible by num_groups, "
                f"but got input of shape {_listed(given)} and num_groups={wanted[0]}"
            )
        case "index":
            return "tuple index out of range"
        case "output":
            return f"output with shape {_listed(wanted)} doesn't match the broadcast shape {_listed(given)}"
        case "upsample":
            return (
                "Input and output must have the same number of spatial dimensions, "
                f"but got input with spatial dimensions of {_listed(wanted)} and output size of torch.Size({_listed(given)}). "
                "Please provide input tensor in (N, C, d1, d2, ...,dK) format and output size in (o1, o2, ...,oK) format."
            )
        case "reshape":
            return f"shape '{_listed(wanted)}' is invalid for input of size {given[0]}"
        case "keyword":
            return f"{failure.module}.forward() got an unexpected keyword argument 'additional_residuals'"
        case _:
            return ""


def merge_axes(failure: Failure) -> Shape:
    """The UNet's tensor as PyTorch tells it: the axes after the one that fails are broadcast already."""
    rank = _rank(failure)
    wanted, given = (((1,) * (rank - len(shape)) + shape) for shape in (failure.wanted, failure.given))
    return tuple(
        other if one == 1 and at > failure.axis else one for at, (one, other) in enumerate(zip(wanted, given, strict=True))
    )


def _rank(failure: Failure) -> int:
    return max(len(failure.wanted), len(failure.given))


def _listed(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
