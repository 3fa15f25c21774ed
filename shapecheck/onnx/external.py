"""Where the tensors lie that an ONNX file keeps in other files: nothing outside of its folder is believed or opened."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx.numpy_helper
from onnx import TensorProto

from shapecheck.contract import ShapecheckError
from shapecheck.contract.errors import one_line
from shapecheck.contract.naming import ONNX_NUMBERS
from shapecheck.models.safetensors import Stored
from shapecheck.models.weights import Embedded
from shapecheck.onnx import file as onnx_file

_DTYPES = {number: name for name, number in ONNX_NUMBERS.items()}


_CHUNK = 2**23


def external_tensors(path: Path) -> dict[str, Stored]:
    """Every initializer of an ONNX file that lies in another file, by name.

    Raises ShapecheckError where a file lies outside of the ONNX file's folder, or is missing or too short.
    """
    tensors = [each for each in onnx_file.load(path).graph.initializer if each.data_location == TensorProto.EXTERNAL]
    return {each.name: _stored(path, each) for each in tensors}


def tensors_of(path: Path) -> Mapping[str, Stored | Embedded]:
    """The weights of an ONNX file: those that lie in other files; where none does, every tensor in the file itself.

    What lies in the file beside weights that do not is part of the graph. Raises as `external_tensors` does.
    """
    if stored := external_tensors(path):
        return stored
    return {each.name: _embedded(path, each) for each in onnx_file.load(path).graph.initializer}


def file_digest(path: Path, progress: Callable[[int, int], object] = lambda done, total: None) -> str:
    """`sha256:…` of a file's bytes. `progress` is called with the bytes read and those to read."""
    try:
        total, done, found = path.stat().st_size, 0, hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
                done += len(chunk)
                progress(done, total)
    except OSError as error:
        raise ShapecheckError(f"cannot read {path}: {error.strerror or error}") from None
    return f"sha256:{found.hexdigest()}"


def _stored(path: Path, tensor: onnx.TensorProto) -> Stored:
    entries = {each.key: each.value for each in tensor.external_data}
    location, name = entries.get("location", ""), one_line(tensor.name)
    file = _inside(path, location, name)
    dtype = _DTYPES.get(tensor.data_type)
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
    if dtype is None or offset < 0 or offset + length > size:
        raise ShapecheckError(f"{path}: {one_line(location)} does not hold all of {name}; is the file cut short?")
    return Stored(file, offset, length, dtype, tuple(tensor.dims))


def _embedded(path: Path, tensor: onnx.TensorProto) -> Embedded:
    try:
        values = onnx.numpy_helper.to_array(tensor)
    except Exception as error:  # the file is the user's
        raise ShapecheckError(f"{path}: {one_line(tensor.name)} cannot be read ({one_line(error)}); export it again") from None
    return Embedded(values.tobytes(), _DTYPES.get(tensor.data_type, values.dtype.name), tuple(tensor.dims))


def _inside(path: Path, location: str, name: str) -> Path:
    """The file a location names. Raises ShapecheckError where that is not in or below the ONNX file's folder."""
    folder = path.absolute().parent
    steps = PurePosixPath(location)
    outside = not location or steps.is_absolute() or PureWindowsPath(location).drive or ".." in steps.parts
    file = folder / steps
    if outside or not file.resolve().is_relative_to(folder.resolve()):
        raise ShapecheckError(
            f"{path}: {name} lies in {one_line(location) or 'no file'}, outside of the ONNX file's folder; never opened: "
            "keep real files beside it (`hf download REPOSITORY --local-dir FOLDER` makes no links)"
        )
    return file
