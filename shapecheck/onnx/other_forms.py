"""Files that are right and of another form than a UNet with a slot for each residual: said in one sentence, not as faults."""

from __future__ import annotations

from shapecheck.contract import Mismatch, show
from shapecheck.onnx.findings import Case

_MEND = "export it with one input a slot and latents of batch×channels×h×w, as `shapecheck export` does"

_SEVERAL = 3
"""A tensor that is added at so many places, where slots are missing, holds the residuals of several."""
_MOST_CHANNELS = 16


def find_other_form(case: Case) -> Mismatch | None:
    """Return what makes a file no UNet with slots, of which all that is wrong would follow; None if it is one."""
    roles, matching = case.roles, case.matching
    if roles.is_controlnet:
        return None
    sample, channels = roles.sample, dict(case.contract.input_rules).get("sample", ())[1:2]
    dims = sample.dims if sample is not None else None
    if sample is not None and dims and len(dims) == 4 and _is_channels_last(dims, channels[0].scale if channels else None):
        expected = show(case.contract.input_rules["sample"]) if channels else "batch×channels×h×w"
        cause = f"its channels are last, so that no pipeline's latents fit; {_MEND}"
        return Mismatch("channels", sample.name, str(sample), expected, cause=cause)
    is_lacking = case.itself or any(tensor is None for _, tensor in matching.slots)
    for tensor in (*roles.base, *roles.added) if is_lacking else ():
        if tensor != sample and len({add.rank for add in tensor.adds}) >= _SEVERAL:
            cause = f"it holds several residuals in one tensor, and so has no slots; {_MEND}"
            places = f"{tensor}, added at {len(tensor.adds)} places"
            return Mismatch("surplus", tensor.name, places, "an input for each slot", cause=cause)
    rows = {
        shape[0] / geometry.batch
        for tensor in roles.slots
        for add in tensor.adds[:1]
        for geometry, shape in case.sweep.measured(add.skip).items()
    }
    if rows == {2.0} and sample is not None:
        cause = f"it doubles the batch and guides inside: its image is no UNet's, and `parity` cannot compare it; {_MEND}"
        return Mismatch("batch", sample.name, "twice its rows inside", "as many rows as latents", cause=cause)
    return None


def _is_channels_last(dims: tuple[int | str | None, ...], channels: int | None) -> bool:
    """Return whether latents of these dimensions are (batch, height, width, channels), `channels` if that is known."""
    if channels is not None:
        return dims[1] != channels == dims[3]
    return not isinstance(dims[1], int) and isinstance(dims[3], int) and dims[3] <= _MOST_CHANNELS
