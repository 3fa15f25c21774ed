"""What a failed test has to do with residuals."""

from __future__ import annotations

import traceback

_UNET, _FORWARD = "unet_2d_condition.py", "forward"


def explain_failure(error: BaseException) -> str:
    """Return slot, cause and change if a UNet failed over its residuals or ONNX Runtime over a slot; else an empty text.

    Nothing is imported unless diffusers' UNet or ONNX Runtime is where the exception comes from.
    """
    from shapecheck.contract import ShapecheckError

    if isinstance(error, ShapecheckError):
        return ""  # it says so itself
    try:
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        if any(code.co_name == _FORWARD and code.co_filename.endswith(_UNET) for code in codes):
            from shapecheck.explain.explained import explained_traceback

            return str(explained_traceback(error) or "")
        return _explain_input(str(error)) if type(error).__module__.startswith("onnxruntime") else ""
    except Exception as failure:  # the report of somebody's test must not be lost over ours
        return f"no explanation: {type(failure).__name__}: {failure}"


def _explain_input(text: str) -> str:
    from shapecheck import presets
    from shapecheck.explain.explain_text import explain_text
    from shapecheck.explain.residual_table import RequestedSize

    diagnosis = explain_text(text, presets.contracts(), RequestedSize())
    causes = [cause for reading in diagnosis.found for cause in reading.causes if cause.slots]
    return "\n".join(f"{', '.join(cause.slots[:4])}: {cause.told}\n  change: {cause.change}" for cause in causes)
