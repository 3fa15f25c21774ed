"""A checkpoint's weights without loading them: fitted to a model, linked where they lie, copied, compared."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO

from shapecheck.contract import ShapecheckError
from shapecheck.contract.dims import Shape, show
from shapecheck.contract.errors import one_line
from shapecheck.files import atomic_write, report_unreadable
from shapecheck.models.safetensors import TensorLocation

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_CHUNK = 2**23
"""Bytes held at a time."""


ALIGNMENT = 64


_SHOWN = 10


_ANOTHER = "are config.json and weights of the same model, and is nothing of the checkpoint missing?"


_SIGNS: Mapping[str, str] = {
    "lora": "this is a LoRA: give the model it was made for, or that model with the LoRA fused",
    "model.diffusion_model.": "this is an original checkpoint: convert it with diffusers' from_single_file and save_pretrained",
    "control_model.": "this is an original checkpoint: convert it with diffusers' from_single_file and save_pretrained",
    ".proj_attn.": "these are names of old diffusers versions: from_pretrained and save_pretrained once write today's",
}
"""What a name that is not wanted says about the file."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A tensor that lies in the ONNX file itself."""

    data: bytes
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return len(self.data)


def match_tensors(
    table: Mapping[str, TensorLocation], wanted: Mapping[str, Shape], *, ignore: Collection[str] = ()
) -> dict[str, TensorLocation]:
    """The tensors `wanted` names, in its order. Names in `ignore` may be in the table without being wanted.

    Raises ShapecheckError that tells all that is missing, extra or of another shape.
    """
    missing = [name for name in wanted if name not in table]
    extra = [name for name in table if name not in wanted and name not in ignore]
    misshapen = [
        f"{name} is {show(table[name].shape)}, the model wants {show(shape)}"
        for name, shape in wanted.items()
        if name in table and table[name].shape != tuple(shape)
    ]
    if not (missing or extra or misshapen):
        return {name: table[name] for name in wanted}
    files = list(dict.fromkeys(str(each.file) for each in table.values()))
    more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
    lines = [
        f"the weights in {files[0] if files else 'no file'}{more} do not fit the model:",
    ]
    for what, names in (("missing", missing), ("not in the model", extra), ("of another shape", misshapen)):
        rest = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines += [f"  {len(names)} {what}: {', '.join(map(one_line, names[:_SHOWN]))}{rest}"] if names else []
    advice = next((advice for sign, advice in _SIGNS.items() if any(sign in name for name in extra)), _ANOTHER)
    raise ShapecheckError("\n".join([*lines, f"  {advice}"]))


def require_linkable(stored: Iterable[TensorLocation], onnx_folder: Path) -> None:
    """Raise ShapecheckError, saying where it would work, unless an ONNX file in that folder can point to these tensors.

    ONNX Runtime refuses weights outside of the file's own folder, onnx.checker also links of either kind on the way to them.
    """
    files = list(dict.fromkeys(each.file for each in stored))
    if obstacles := [told for file in files if (told := _obstacle(file, file.parent))]:
        raise ShapecheckError(obstacles[0])
    for file in files:
        if obstacle := _obstacle(file, onnx_folder):
            place = Path(os.path.commonpath([each.parent.absolute() for each in files]))
            raise ShapecheckError(f"{obstacle}; an output that works is {place / 'model.onnx'}")


def format_location(stored: TensorLocation, onnx_folder: Path) -> str:
    """The file as an ONNX file in that folder names it: relative, with `/`. Raises ShapecheckError where it is not below."""
    inside = _inside(stored.file, onnx_folder)
    if inside is None:
        raise ShapecheckError(_outside(stored.file, onnx_folder))
    return inside.as_posix()


def _obstacle(file: Path, onnx_folder: Path) -> str:
    """Why an ONNX file in that folder cannot point to the file; empty where it can."""
    try:
        inside = _inside(file, onnx_folder)
        if inside is None:
            return _outside(file, onnx_folder)
        steps = [onnx_folder / inside, *(onnx_folder / parent for parent in inside.parents[:-1])]
        link = next((step for step in steps if step.is_symlink()), None)
        if link is not None:
            return _linked(link, file)
        if not file.is_file():
            return f"{file} is no regular file, and an ONNX file can point to nothing else"
        if (count := file.stat().st_nlink) > 1:
            return f"{file} has {count} names (hard links), which onnx.checker refuses; a copy of its own serves"
    except OSError as error:
        return f"cannot read {error.filename or file}: {error.strerror or error}"
    return ""


def _outside(file: Path, onnx_folder: Path) -> str:
    return f"{file} is not in or below {onnx_folder}, and ONNX Runtime reads weights from nowhere else"


def _linked(link: Path, file: Path) -> str:
    told = f"{link} is a symbolic link, which the ONNX runtime and onnx.checker refuse"
    real = file.resolve()
    if real.name == file.name:
        return f"{told}; name the model by its real folder, {real.parent}, and write there"
    return f"{told}; from the hub, `hf download REPOSITORY --local-dir FOLDER` gives real files"  # its cache is links to blobs


def _inside(file: Path, onnx_folder: Path) -> PurePath | None:
    """The way from the folder to the file, through the folder's own names; None where there is none."""
    place = file.absolute()
    if ".." in place.parts:  # what it means depends on links before it
        place = place.parent.resolve() / place.name
    own = next((parent for parent in place.parents if parent.exists() and parent.samefile(onnx_folder)), None)
    return None if own is None else place.relative_to(own)


def copy_tensors(
    source: Mapping[str, TensorLocation | Tensor],
    dtype: str | None,
    target: Path,
    progress: Callable[[int, int], object],
    *,
    outdated: Path | None = None,
) -> dict[str, TensorLocation]:
    """Write the tensors one after the other to `target`, and tell where each lies. A file there before is replaced.

    `outdated` is a file that reads `target` as it was: it is removed when every byte is written, so that no crash leaves it
    beside tensors that are not its own.

    Floating tensors are converted to `dtype`, by the name PyTorch gives it; None keeps each as it is. `target` appears when it
    is whole; on any failure nothing new is left. `progress` is called with the bytes written and those to write. Memory: a
    few chunks of 8 MiB; one tensor at a time is copied where a live one is not contiguous.

    Raises ShapecheckError where a source cannot be read, or the target not written.
    """
    _refuse_target(target, source)
    placed = plan_layout(source, dtype, target)
    total = sum(each.nbytes for each in placed.values())
    with atomic_write(target) as partial:
        try:
            with partial.open("wb") as file:
                _write(file, source, placed, lambda done: progress(done, total))
            if outdated is not None:
                outdated.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ShapecheckError(f"cannot write {target}: {error.strerror}; it takes {total / 1e9:.2f} GB") from error
            raise
    return placed


def _write(
    file: BinaryIO,
    source: Mapping[str, TensorLocation | Tensor],
    placed: Mapping[str, TensorLocation],
    progress: Callable[[int], object],
) -> None:
    done = 0
    progress(done)
    for name, value in source.items():
        file.write(bytes(placed[name].offset - file.tell()))
        for chunk in _chunks(value):
            done += file.write(_raw(chunk.to(_dtype(placed[name].dtype))))
            progress(done)


def _refuse_target(target: Path, source: Mapping[str, TensorLocation | Tensor]) -> None:
    if not target.parent.is_dir() or target.is_dir():
        raise ShapecheckError(f"cannot write {target}: {'it is a folder' if target.is_dir() else f'no folder {target.parent}'}")
    for file in {each.file for each in source.values() if isinstance(each, TensorLocation)}:
        if target.exists() and target.samefile(file):
            raise ShapecheckError(f"cannot write {target}: it is the checkpoint itself; choose another output")


def plan_layout(source: Mapping[str, TensorLocation | Tensor], dtype: str | None, target: Path) -> dict[str, TensorLocation]:
    """Where each tensor will lie in the file that `copy_tensors` writes."""
    if dtype is not None and not _dtype(dtype).is_floating_point:
        raise ShapecheckError(f"{dtype} is no floating dtype to convert weights to; give float32, float16 or bfloat16")
    placed, offset = {}, 0
    for name, value in source.items():
        own = _dtype_of(value)
        kind = _dtype(dtype) if dtype is not None and own.is_floating_point else own
        shape = tuple(value.shape)
        offset += -offset % ALIGNMENT
        nbytes = math.prod(shape) * kind.itemsize
        placed[name] = TensorLocation(target, offset, nbytes, _name_of(kind), shape)
        offset += nbytes
    return placed


def digest(
    weights: Mapping[str, TensorLocation | Tensor | Embedded], progress: Callable[[int, int], object] = lambda done, total: None
) -> str:
    """The identity of weights: sha256 over names, dtypes, shapes and bytes, wherever they are kept and in whatever order.

    `progress` is called with the bytes read and those to read. Needs torch for live tensors only.
    """
    found, done = hashlib.sha256(), 0
    total = sum(value.nbytes for value in weights.values())
    for name in sorted(weights):
        value = weights[name]
        dtype = value.dtype if isinstance(value.dtype, str) else _name_of(value.dtype)
        found.update(json.dumps([name, dtype, list(value.shape)]).encode() + b"\n")
        for chunk in _read(value) if isinstance(value, (TensorLocation, Embedded)) else map(_raw, _chunks(value)):
            found.update(chunk)
            done += chunk.nbytes
            progress(done, total)
    return f"sha256:{found.hexdigest()}"


def find_differing(stored: Mapping[str, TensorLocation], live: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names whose live tensor is not the file's, bit by bit, dtype and shape included; those of one side only too."""
    one_sided = [name for name in stored if name not in live]
    changed = [name for name, tensor in live.items() if name not in stored or not is_equal(stored[name], tensor)]
    return tuple(changed + one_sided)


def is_equal(stored: TensorLocation | Embedded, live: Tensor) -> bool:
    """Return whether a live tensor is the file's, bit by bit, dtype and shape included."""
    import torch

    if getattr(torch, stored.dtype, None) != live.dtype or stored.shape != tuple(live.shape):
        return False
    pairs = zip(_chunks(stored), _chunks(live), strict=True)
    return all(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) for ours, theirs in pairs)


def _chunks(value: TensorLocation | Embedded | Tensor) -> Iterator[Tensor]:
    """The elements in order, flat, on the CPU, at most 8 MiB at a time. A chunk lives until the next is taken."""
    import torch

    if isinstance(value, (TensorLocation, Embedded)):
        dtype = _dtype(value.dtype)
        yield from (torch.frombuffer(data, dtype=dtype) for data in _read(value))
        return
    if value.is_meta:
        raise ShapecheckError("the module is on the meta device: its tensors have no values to write or compare")
    flat = value.detach().reshape(-1)
    step = _CHUNK // flat.element_size()
    yield from (flat[start : start + step].cpu() for start in range(0, flat.numel(), step))


def _read(stored: TensorLocation | Embedded) -> Iterator[memoryview]:
    if isinstance(stored, Embedded):
        yield from (memoryview(bytearray(stored.data[start : start + _CHUNK])) for start in range(0, stored.nbytes, _CHUNK))
        return
    buffer = memoryview(bytearray(min(_CHUNK, stored.nbytes)))
    with report_unreadable(stored.file), stored.file.open("rb") as file:
        file.seek(stored.offset)
        for start in range(0, stored.nbytes, _CHUNK):
            part = buffer[: stored.nbytes - start]
            if file.readinto(part) != len(part):
                raise ShapecheckError(f"{stored.file} was cut short after its header was read; is it still being written?")
            yield part


def _raw(chunk: Tensor) -> memoryview:
    import torch

    return chunk.view(torch.uint8).numpy().data


def _dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ShapecheckError(f"{one_line(name)} is no dtype of this PyTorch ({torch.__version__})")
    return found


def _dtype_of(value: TensorLocation | Tensor) -> torch.dtype:
    return _dtype(value.dtype) if isinstance(value, TensorLocation) else value.dtype


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
