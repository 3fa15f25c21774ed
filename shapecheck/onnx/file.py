"""One ONNX file that anybody may have made: parsed once and bounded, without the weights that lie beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.files import report_unreadable, require_regular
from shapecheck.models.safetensors import TensorLocation
from shapecheck.models.weights import Embedded

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from shapecheck.onnx.reading import Reading


CONTRACT_KEY = "shapecheck.contract"
"""Key under which an exported file holds its contract, in its metadata_props."""


WEIGHTS_KEY = "shapecheck.weights"
"""Likewise `sha256:…` over the checkpoint that it was exported from; empty if it has no weights."""


LARGEST = 2**31
"""Bytes: protobuf holds no more in one message."""


_CHUNK = 2**23


_DTYPES = {"FLOAT": "float32", "DOUBLE": "float64"} | {
    name: name.lower() for name in ("FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "UINT8", "BOOL")
}
"""Of tensors in other files: their names in ONNX and in PyTorch."""


class OnnxFile:
    """What an ONNX file is asked, each answer found once and kept. Nothing is read before the first question.

    Every question but `size` and `digest` raises ShapecheckError if the file cannot be read or is no ONNX model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The model as the file has it. Shared by all who ask: never change it."""
        import onnx  # not needed where only a contract's JSON is read

        path = self.path
        with report_unreadable(path):
            if (size := require_readable(path)) >= LARGEST:
                raise ShapecheckError(f"{path} has {size / 2**30:.1f} GiB; no ONNX model is larger than 2 GiB")
            data = path.read_bytes()
        try:
            model = onnx.load_model_from_string(data, format="protobuf")  # whatever the file's name ends in
        except Exception as error:  # protobuf's own error class, or one of its parser's
            raise ShapecheckError(f"{path} is no ONNX model: {error}; export or download it again") from None
        if not model.graph.output:
            raise ShapecheckError(f"{path} is no ONNX model: it has no graph; is the file cut short?")
        return model

    @cached_property
    def reading(self) -> Reading:
        """The graph's inputs and outputs, and where each residual is added."""
        from shapecheck.onnx.reading import read_graph

        return read_graph(self.path, self.make_ir())

    def make_ir(self) -> ir.Model:
        """Return a model of one's own, sanitized. Raises ShapecheckError if the graph is not sound."""
        from shapecheck.onnx.sanitize import convert

        return convert(self.path, self.proto)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """What the exporter wrote of the file."""
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    @cached_property
    def computed_names(self) -> frozenset[str]:
        """The values that the nodes compute, without what lies in functions."""
        return frozenset(name for node in self.proto.graph.node for name in node.output)

    @cached_property
    def external_tensors(self) -> Mapping[str, TensorLocation]:
        """Every initializer that lies in another file, by name.

        Raises ShapecheckError if a file lies outside of the ONNX file's folder, or is missing or too short.
        """
        import onnx

        external = onnx.TensorProto.EXTERNAL
        tensors = [tensor for tensor in self.proto.graph.initializer if tensor.data_location == external]
        return {tensor.name: _locate(self.path, tensor) for tensor in tensors}

    @property
    def tensors(self) -> Mapping[str, TensorLocation | Embedded]:
        """The weights: those that lie in other files; if none does, every tensor in the file itself.

        What lies in the file beside weights that do not is part of the graph. Raises as `external_tensors` does.
        """
        return self.external_tensors or {
            tensor.name: _read_tensor(self.path, tensor) for tensor in self.proto.graph.initializer
        }

    @property
    def size(self) -> int:
        """Bytes of the model with all its weights."""
        return require_readable(self.path) + sum(tensor.nbytes for tensor in self.external_tensors.values())

    @cached_property
    def digest(self) -> str:
        """`sha256:…` of the file's bytes."""
        return file_digest(self.path)


def require_readable(path: Path) -> int:
    """Return the bytes of a file. Raises ShapecheckError if it is none, such as a pipe, which would never end; else OSError."""
    return require_regular(path, f"{path} is no regular file; give a file: JSON, .onnx or an engine")


def file_digest(path: Path, progress: Callable[[int, int], object] = lambda done, total: None) -> str:
    """Return `sha256:…` of a file's bytes. `progress` is called with the bytes read and those to read."""
    with report_unreadable(path), path.open("rb") as file:
        total, done, found = path.stat().st_size, 0, hashlib.sha256()
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            done += len(chunk)
            progress(done, total)
    return f"sha256:{found.hexdigest()}"


def _locate(path: Path, tensor: onnx.TensorProto) -> TensorLocation:
    """Return where a tensor lies; nothing outside of the ONNX file's folder is believed or opened."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, name = entries.get("location", ""), one_line(tensor.name)
    folder, steps = path.absolute().parent, PurePosixPath(location)
    file = folder / steps
    leaves = not location or steps.is_absolute() or PureWindowsPath(location).drive or ".." in steps.parts
    if leaves or not file.resolve().is_relative_to(folder.resolve()):
        raise ShapecheckError(
            f"{path}: {name} lies in {one_line(location) or 'no file'}, outside of the ONNX file's folder; never opened: "
            "keep real files beside it (`hf download REPOSITORY --local-dir FOLDER` makes no links)"
        )
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
    except ValueError:
        raise ShapecheckError(f"{path}: the place of {name} in {one_line(location)} is no number") from None
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ShapecheckError(
            f"{path} keeps its weights in {one_line(location)}: {error.strerror}; "
            "keep both together, or export with --weights copy"
        ) from None
    length = size - offset if length < 0 else length
    dtype = _DTYPES.get(_name_type(tensor))
    if dtype is None or offset < 0 or offset + length > size:
        raise ShapecheckError(f"{path}: {one_line(location)} does not hold all of {name}; is the file cut short?")
    return TensorLocation(file, offset, length, dtype, tuple(tensor.dims))


def _read_tensor(path: Path, tensor: onnx.TensorProto) -> Embedded:
    import onnx.numpy_helper

    try:
        values = onnx.numpy_helper.to_array(tensor)
    except Exception as error:  # the file is the user's
        raise ShapecheckError(f"{path}: {one_line(tensor.name)} cannot be read ({one_line(error)}); export it again") from None
    return Embedded(values.tobytes(), _DTYPES.get(_name_type(tensor), values.dtype.name), tuple(tensor.dims))


def _name_type(tensor: onnx.TensorProto) -> str:
    """Return ONNX's name of a tensor's type; empty for a number that stands for none."""
    import onnx

    kinds = onnx.TensorProto.DataType
    return kinds.Name(tensor.data_type) if tensor.data_type in kinds.values() else ""
