"""Reading an ONNX file that anybody may have made: bounded, and without the weights that lie beside it."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from shapecheck.contract import ShapecheckError

if TYPE_CHECKING:
    import onnx


CONTRACT_KEY = "shapecheck.contract"
"""Key under which an exported file holds its contract, in its metadata_props."""


WEIGHTS_KEY = "shapecheck.weights"
"""Likewise `sha256:…` over the checkpoint that it was exported from; empty if it has no weights."""


_LARGEST = 2**31
"""Bytes: protobuf holds no more in one message."""


def size_of(path: Path) -> int:
    """Bytes of a file. Raises ShapecheckError where it is none, such as a pipe, which would never end; OSError without it."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ShapecheckError(f"{path} is no regular file; give a file: JSON, .onnx or an engine")
    return status.st_size


def load(path: Path) -> onnx.ModelProto:
    """The model in a file; tensors kept in other files are not touched. Raises ShapecheckError where it is no ONNX model."""
    import onnx  # not needed where only a contract's JSON is read

    try:
        if (size := size_of(path)) >= _LARGEST:
            raise ShapecheckError(f"{path} has {size / 2**30:.1f} GiB; no ONNX model is larger than 2 GiB")
        model = onnx.load(path, format="protobuf", load_external_data=False)  # whatever its name ends in
    except OSError as error:
        raise ShapecheckError(f"cannot read {path}: {error.strerror or error}") from None
    except ShapecheckError:
        raise
    except Exception as error:  # protobuf's own error class, or one of its parser's
        raise ShapecheckError(f"{path} is no ONNX model: {error}; export or download it again") from None
    if not model.graph.output:
        raise ShapecheckError(f"{path} is no ONNX model: it has no graph; is the file cut short?")
    return model
