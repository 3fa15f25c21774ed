"""Compare what a file computes with PyTorch, slot by slot: the room, and the function of that name that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from shapecheck.parity.results import Parity


def parity(model: str | Path | nn.Module, **asked: Any) -> Parity:
    """Compare a model in PyTorch with files that were made of it: `parity("./sd15", onnx="./sd15/unet.onnx")`.

    Keywords are the fields of `ParityRequest`, which are named as the options of `shapecheck parity`: `onnx`, `engine`,
    `backends=("ort", "trt")`, `controlnet`, `sizes=("512x512:512x512:904x512",)`, `batch`, `seed`, … Returns the record of the
    run: `passes`, `sides`, and in each the results check by check. Raises ShapecheckError if nothing can be compared.
    """
    from shapecheck.parity.request import ParityRequest, create_run

    return create_run(ParityRequest(model, **asked)).report()
