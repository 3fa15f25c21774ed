"""What a failed test has to do with residuals, where it has."""

from __future__ import annotations

import traceback

_UNET, _FORWARD = "unet_2d_condition.py", "forward"


def explanation(error: BaseException) -> str:
    """Slot, cause and change, where a UNet failed over its residuals or ONNX Runtime over an input that is a slot; else empty.

    Nothing is imported unless diffusers' UNet or ONNX Runtime is where the exception comes from.
    """
    from shapecheck.contract import ShapecheckError

    if isinstance(error, ShapecheckError):
        return ""  # it says so itself
    try:
        if _is_of_unet(error):
            from shapecheck.explain.explained import explained_traceback

            return str(explained_traceback(error) or "")
        return _of_input(str(error)) if type(error).__module__.startswith("onnxruntime") else ""
    except Exception as failure:  # the report of somebody's test must not be lost over ours
        return f"no explanation: {type(failure).__name__}: {failure}"


def _is_of_unet(error: BaseException) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code.co_name == _FORWARD and frame.f_code.co_filename.endswith(_UNET) for frame in frames)


def _of_input(text: str) -> str:
    from shapecheck import presets
    from shapecheck.explain.explain_text import explain_text
    from shapecheck.explain.residual_table import RequestedSize

    diagnosis = explain_text(text, presets.contracts(), RequestedSize())
    causes = [cause for reading in diagnosis.found for cause in reading.causes if cause.slots]
    return "\n".join(f"{', '.join(cause.slots[:4])}: {cause.told}\n  change: {cause.change}" for cause in causes)
