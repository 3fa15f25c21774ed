"""One ONNX file, which may be hostile: parsed once, within bounds, without the weights beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.naming import ONNX_NUMBERS
from shapecheck.files import report_unreadable, require_regular
from shapecheck.models.safetensors import TensorLocation
from shapecheck.models.weights import Embedded

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from shapecheck.onnx.reading import Reading

CONTRACT_KEY = "shapecheck.contract"
"""Key of the contract in the metadata_props of an exported file."""
WEIGHTS_KEY = "shapecheck.weights"
"""Key of `sha256:…` over the checkpoint that was exported; empty if it has no weights."""
COMPUTATION_KEY = "shapecheck.computation"
"""Key of `sha256:…` over all that decides the graph beside the weights; empty if that cannot be described."""
GRAPH_KEY = "shapecheck.graph"
"""Key of `sha256:…` over the graph as it was exported: what another tool rewrote, or folded weights in, is not it."""
FP8_KEY = "shapecheck.fp8"
"""Key of the number of layers in fp8, in a file that has some."""
LARGEST = 2**31
"""Bytes of one protobuf message at most."""
_DTYPES = {number: dtype for dtype, number in ONNX_NUMBERS.items()}


class OnnxFile:
    """An ONNX file, parsed when one of its properties is first used, and kept as long as this object.

    All but `size` and `digest`, which do not parse the graph alone, raise ShapecheckError if it is not an ONNX model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """Return the model as it is in the file. All callers share it: never change it."""
        import onnx  # not needed to read a contract's JSON

        path = self.path
        with report_unreadable(path):
            if (size := require_readable(path)) >= LARGEST:
                raise ShapecheckError(f"{path} has {size / 2**30:.1f} GiB; no ONNX model is larger than 2 GiB")
            data = path.read_bytes()
        try:
            model = onnx.load_model_from_string(data, format="protobuf")  # whatever the file's name ends in
        except Exception as error:  # protobuf's own error class, or one of its parser's
            raise ShapecheckError(f"{path} is not an ONNX model: {error}; export or download it again") from None
        if not model.graph.output:
            raise ShapecheckError(f"{path} is not an ONNX model: it has no graph; is the file cut short?")
        return model

    @cached_property
    def reading(self) -> Reading:
        from shapecheck.onnx.reading import read_graph

        return read_graph(self.path, self.make_ir())

    def make_ir(self) -> ir.Model:
        """Return a new sanitized model, which the caller may change. Raises ShapecheckError if the graph is not sound."""
        from shapecheck.onnx.sanitize import convert

        return convert(self.path, self.proto)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        return {entry.key: entry.value for entry in self.proto.metadata_props}

    @cached_property
    def computed_names(self) -> frozenset[str]:
        """Return the names of the values that nodes outside functions compute."""
        return frozenset(name for node in self.proto.graph.node for name in node.output)

    @cached_property
    def external_tensors(self) -> Mapping[str, TensorLocation]:
        """Return every initializer with its data in another file, by name.

        Raises ShapecheckError if a file lies outside of the ONNX file's folder, or is missing or too short.
        """
        import onnx

        external = onnx.TensorProto.EXTERNAL
        tensors = [tensor for tensor in self.proto.graph.initializer if tensor.data_location == external]
        return {tensor.name: _locate(self.path, tensor) for tensor in tensors}

    @property
    def tensors(self) -> Mapping[str, TensorLocation | Embedded]:
        """Return the weights: those in other files, or else every tensor of the file. Raises like `external_tensors`."""
        import onnx.numpy_helper

        if self.external_tensors:  # what is in the file then, such as constants, is part of the graph
            return self.external_tensors
        weights = {}
        for tensor in self.proto.graph.initializer:
            try:
                values = onnx.numpy_helper.to_array(tensor)
            except Exception as error:  # the file is the user's
                reason = f"{one_line(tensor.name)} cannot be read ({one_line(error)})"
                raise ShapecheckError(f"{self.path}: {reason}; export it again") from None
            dtype = _DTYPES.get(tensor.data_type, values.dtype.name)
            weights[tensor.name] = Embedded(values.tobytes(), dtype, tuple(tensor.dims))
        return weights

    @property
    def weight_names(self) -> frozenset[str]:
        """Return the names of `tensors`, whether or not their files are there."""
        return _find_weights(self.proto)

    @property
    def size(self) -> int:
        """Return the bytes of the file with all its weights."""
        return require_readable(self.path) + sum(tensor.nbytes for tensor in self.external_tensors.values())

    @cached_property
    def digest(self) -> str:
        return file_digest(self.path)


def digest_graph(model: onnx.ModelProto) -> str:
    """Return `sha256:…` of nodes, constants, inputs and outputs, and of the weights' names and forms: not of their values."""
    graph, weights, digest = model.graph, _find_weights(model), hashlib.sha256()
    for tensor in graph.initializer:
        form = f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode()
        digest.update(form if tensor.name in weights else tensor.SerializeToString(deterministic=True))
    for part in (*graph.node, *graph.input, *graph.output, *model.functions, *model.opset_import):
        digest.update(part.SerializeToString(deterministic=True))
    return f"sha256:{digest.hexdigest()}"


def _find_weights(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of the tensors in other files; of all initializers if there are none."""
    import onnx

    tensors = model.graph.initializer
    external = frozenset(tensor.name for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL)
    return external or frozenset(tensor.name for tensor in tensors)


def require_readable(path: Path) -> int:
    """Return the size of a file in bytes. Raises ShapecheckError for a folder or a pipe, which may never end; else OSError."""
    return require_regular(path, f"{path} is not a regular file; give a file: JSON, .onnx or an engine")


def file_digest(path: Path, progress: Callable[[int, int], object] = lambda done, total: None) -> str:
    """Return `sha256:…` of a file's bytes. `progress` is called with the bytes read and their total."""
    with report_unreadable(path), path.open("rb") as file:
        total, done, digest = path.stat().st_size, 0, hashlib.sha256()
        while chunk := file.read(2**23):
            digest.update(chunk)
            done += len(chunk)
            progress(done, total)
    return f"sha256:{digest.hexdigest()}"


def _locate(path: Path, tensor: onnx.TensorProto) -> TensorLocation:
    """Return where a tensor's data is. Nothing outside the ONNX file's folder is trusted or opened."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, name = entries.get("location", ""), one_line(tensor.name)
    folder, steps = path.absolute().parent, PurePosixPath(location)
    file = folder / steps
    escapes = not location or steps.is_absolute() or PureWindowsPath(location).drive or ".." in steps.parts
    if escapes or not file.resolve().is_relative_to(folder.resolve()):
        raise ShapecheckError(
            f"{path}: {name} lies in {one_line(location) or 'no file'}, outside of the ONNX file's folder; never opened: "
            "keep real files beside it (`hf download REPOSITORY --local-dir FOLDER` makes no links)"
        )
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
    except ValueError:
        raise ShapecheckError(f"{path}: the offset or length of {name} in {one_line(location)} is not a number") from None
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ShapecheckError(
            f"{path} keeps its weights in {one_line(location)}: {error.strerror}; "
            "keep both together, or export with --weights copy"
        ) from None
    length = size - offset if length < 0 else length
    dtype = _DTYPES.get(tensor.data_type)
    if dtype is None or offset < 0 or offset + length > size:
        raise ShapecheckError(f"{path}: {one_line(location)} does not hold all of {name}; is the file cut short?")
    return TensorLocation(file, offset, length, dtype, tuple(tensor.dims))
