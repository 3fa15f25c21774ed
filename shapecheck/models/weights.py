"""A checkpoint's weights without loading them: fitted to a model, linked where they lie, copied, compared."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from shapecheck.contract import Shape, ShapecheckError, show
from shapecheck.contract.errors import one_line
from shapecheck.files import atomic_write, report_unreadable
from shapecheck.models.safetensors import TensorLocation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shapecheck.models.adapters import LiveTensor

_ALIGNMENT = 64
_CHUNK = 2**23  # bytes held at a time
_MOST_SHOWN = 10
_MOST_THREADS = 8
_ORIGINAL = "this is an original checkpoint: convert it with diffusers' from_single_file and save_pretrained"
_ADVICE: Mapping[str, str] = {
    "lora": "this is a LoRA: give the model it was made for, or that model with the LoRA fused",
    "model.diffusion_model.": _ORIGINAL,
    "control_model.": _ORIGINAL,
    ".proj_attn.": "these are names of old diffusers versions: from_pretrained and save_pretrained once write today's",
    "": "are config.json and weights of the same model, and is nothing of the checkpoint missing?",
}
"""From a part of a surplus name to the advice it calls for."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A tensor that lies in the ONNX file itself."""

    data: bytes
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return len(self.data)


def match_tensors(
    table: Mapping[str, TensorLocation], expected: Mapping[str, Shape], *, ignore: Collection[str] = ()
) -> dict[str, TensorLocation]:
    """Return the tensors that `expected` names, in its order. Names in `ignore` may be in the table besides.

    Raises ShapecheckError that lists everything missing, surplus or of another shape.
    """
    missing = [name for name in expected if name not in table]
    surplus = [name for name in table if name not in expected and name not in ignore]
    misshapen = [
        f"{name} is {show(table[name].shape)}, expected {show(shape)}"
        for name, shape in expected.items()
        if name in table and table[name].shape != tuple(shape)
    ]
    if not (missing or surplus or misshapen):
        return {name: table[name] for name in expected}
    files = list(dict.fromkeys(str(tensor.file) for tensor in table.values()))
    more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
    lines = [f"the weights in {files[0] if files else 'no file'}{more} do not fit the model:"]
    for title, names in (("missing", missing), ("not in the model", surplus), ("of another shape", misshapen)):
        if names:
            rest = f", and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
            lines.append(f"  {len(names)} {title}: {', '.join(map(one_line, names[:_MOST_SHOWN]))}{rest}")
    advice = next(advice for part, advice in _ADVICE.items() if not part or any(part in name for name in surplus))
    raise ShapecheckError("\n".join([*lines, f"  {advice}"]))


def require_linkable(stored: Iterable[TensorLocation], onnx_folder: Path) -> None:
    """Raise ShapecheckError, saying where it would work, unless an ONNX file in that folder can point to these tensors.

    ONNX Runtime refuses weights outside of the file's own folder, onnx.checker also links of either kind on the way to them.
    """
    files = list(dict.fromkeys(tensor.file for tensor in stored))
    for file in files:
        _check_linkable(file, file.parent)
    for file in files:
        try:
            _check_linkable(file, onnx_folder)
        except ShapecheckError as error:
            common = Path(os.path.commonpath([path.parent.absolute() for path in files]))
            raise ShapecheckError(f"{error}; an output that works is {common / 'model.onnx'}") from None


def format_location(stored: TensorLocation, onnx_folder: Path) -> str:
    """Return the file as an ONNX file in that folder names it: relative, with `/`. Raises ShapecheckError if not below it."""
    return _find_inside(stored.file, onnx_folder).as_posix()


def _check_linkable(file: Path, onnx_folder: Path) -> None:
    """Raise ShapecheckError unless an ONNX file in that folder can point to the file."""
    try:
        inside = _find_inside(file, onnx_folder)
        for step in (onnx_folder / inside, *(onnx_folder / parent for parent in inside.parents[:-1])):
            if step.is_symlink():
                refusal = f"{step} is a symbolic link, which the ONNX runtime and onnx.checker refuse"
                real = file.resolve()
                if real.name == file.name:
                    raise ShapecheckError(f"{refusal}; name the model by its real folder, {real.parent}, and write there")
                # the hub's cache is links to blobs
                advice = "from the hub, `hf download REPOSITORY --local-dir FOLDER` gives real files"
                raise ShapecheckError(f"{refusal}; {advice}")
        if not file.is_file():
            raise ShapecheckError(f"{file} is not a regular file, and an ONNX file can point to nothing else")
        if (count := file.stat().st_nlink) > 1:
            raise ShapecheckError(f"{file} has {count} names (hard links), which onnx.checker refuses; make a copy of its own")
    except OSError as error:
        raise ShapecheckError(f"cannot read {error.filename or file}: {error.strerror or error}") from None


def _find_inside(file: Path, onnx_folder: Path) -> PurePath:
    """Return the way from the folder to the file, through the folder's own names. Raises ShapecheckError if there is none."""
    path = file.absolute()
    if ".." in path.parts:  # its meaning depends on links before it
        path = path.parent.resolve() / path.name
    for parent in path.parents:
        if parent.exists() and parent.samefile(onnx_folder):
            return path.relative_to(parent)
    raise ShapecheckError(f"{file} is not in or below {onnx_folder}, and ONNX Runtime reads weights from nowhere else")


def copy_tensors(
    source: Mapping[str, TensorLocation | LiveTensor | Embedded],
    dtype: str | None,
    target: Path,
    progress: Callable[[int, int], object],
    *,
    outdated: Path | None = None,
    written: Callable[[Mapping[str, TensorLocation]], object] = lambda locations: None,
) -> dict[str, TensorLocation]:
    """Write the tensors one after the other to `target`, replacing a file there, and return the location of each.

    `outdated` is a file that reads `target` as it was: it is removed when every byte is written, so that no crash leaves it
    beside tensors that are not its own. Before that `written` is called with where the tensors are until then.

    Floating tensors are converted to `dtype`, by the name PyTorch gives it; None keeps each as it is. `target` appears when it
    is whole; on any failure nothing new is left. `progress` is called with the bytes written and those to write. Memory: a
    few chunks of 8 MiB; one tensor at a time is copied if a live one is not contiguous.

    Raises ShapecheckError if a source cannot be read, or the target not written.
    """
    if not target.parent.is_dir() or target.is_dir():
        reason = "it is a folder" if target.is_dir() else f"no folder {target.parent}"
        raise ShapecheckError(f"cannot write {target}: {reason}")
    for file in {value.file for value in source.values() if isinstance(value, TensorLocation)}:
        if target.exists() and target.samefile(file):
            raise ShapecheckError(f"cannot write {target}: it is the checkpoint itself; choose another output")
    placed = plan_layout(source, dtype, target)
    done, total = 0, sum(location.nbytes for location in placed.values())
    with atomic_write(target) as partial:
        try:
            with partial.open("wb") as output:
                progress(done, total)
                for name, value in source.items():
                    output.write(bytes(placed[name].offset - output.tell()))
                    for chunk in read_chunks(value):
                        done += output.write(_raw(chunk.to(_parse_dtype(placed[name].dtype))))
                        progress(done, total)
            written({name: replace(location, file=partial) for name, location in placed.items()})
            if outdated is not None:
                outdated.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ShapecheckError(f"cannot write {target}: {error.strerror}; it needs {total / 1e9:.2f} GB") from error
            raise
    return placed


def plan_layout(
    source: Mapping[str, TensorLocation | LiveTensor | Embedded], dtype: str | None, target: Path
) -> dict[str, TensorLocation]:
    """Return the location of each tensor in the file that `copy_tensors` writes."""
    if dtype is not None and not _parse_dtype(dtype).is_floating_point:
        raise ShapecheckError(f"{dtype} is not a floating dtype to convert weights to; give float32, float16 or bfloat16")
    placed, offset = {}, 0
    for name, value in source.items():
        kind = _parse_dtype(_dtype_name(value))
        if dtype is not None and kind.is_floating_point:
            kind = _parse_dtype(dtype)
        offset += -offset % _ALIGNMENT
        nbytes = math.prod(value.shape) * kind.itemsize
        placed[name] = TensorLocation(target, offset, nbytes, str(kind).removeprefix("torch."), tuple(value.shape))
        offset += nbytes
    return placed


def digest(
    weights: Mapping[str, TensorLocation | LiveTensor | Embedded],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> str:
    """Return the identity of weights: sha256 over names, dtypes, shapes and bytes, however they are kept and ordered.

    `progress` is called with the bytes read and those to read. Needs torch for live tensors only.
    """
    state, done = hashlib.sha256(), 0
    total = sum(value.nbytes for value in weights.values())
    for name in sorted(weights):
        value = weights[name]
        state.update(json.dumps([name, _dtype_name(value), list(value.shape)]).encode() + b"\n")
        for chunk in _read(value) if isinstance(value, (TensorLocation, Embedded)) else map(_raw, read_chunks(value)):
            state.update(chunk)
            done += chunk.nbytes
            progress(done, total)
    return f"sha256:{state.hexdigest()}"


def digest_live(tensors: Mapping[str, LiveTensor], progress: Callable[[int, int], object] = lambda done, total: None) -> str:
    """Return another identity of weights in memory, made by several threads: sha256 over the `digest` of each tensor."""
    import torch

    live = [value if isinstance(value, torch.Tensor) else next(value.layer.parameters()) for value in tensors.values()]
    for device in {tensor.device for tensor in live if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # the threads read on streams of their own
    names, done, total = sorted(tensors), 0, sum(tensor.nbytes for tensor in tensors.values())
    state = hashlib.sha256()
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        for name, part in zip(names, pool.map(lambda name: digest({name: tensors[name]}), names), strict=True):
            state.update(part.encode())
            done += tensors[name].nbytes
            progress(done, total)
    return f"sha256:{state.hexdigest()}"


def find_differing(stored: Mapping[str, TensorLocation], live: Mapping[str, LiveTensor]) -> tuple[str, ...]:
    """Return the names whose live tensor is not the file's, bit by bit, dtype and shape included, or is on one side only."""
    names = dict.fromkeys((*live, *stored))
    return tuple(name for name in names if not (name in live and name in stored and is_equal(stored[name], live[name])))


def is_equal(stored: TensorLocation | Embedded, live: LiveTensor) -> bool:
    """Return whether a live tensor is the file's, dtype and shape included: bit by bit, or by value if embedded in ONNX."""
    import torch

    _parse_dtype(stored.dtype)  # which refuses one that this PyTorch does not know
    if stored.dtype != _dtype_name(live) or stored.shape != tuple(live.shape):
        return False
    by_value = isinstance(stored, Embedded)  # exporters that rewrite values may turn -0.0 into 0.0
    return all(
        torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) or (by_value and torch.equal(ours, theirs))
        for ours, theirs in zip(read_chunks(stored), read_chunks(live), strict=True)
    )


def read_chunks(value: TensorLocation | Embedded | LiveTensor) -> Iterator[Tensor]:
    """Yield the elements in order, flat, on the CPU, at most 8 MiB at a time. A chunk lives until the next is yielded."""
    import torch

    if isinstance(value, (TensorLocation, Embedded)):
        dtype = _parse_dtype(value.dtype)
        yield from (torch.frombuffer(data, dtype=dtype) for data in _read(value))
        return
    if not isinstance(value, torch.Tensor):
        value = value.merge()
    if value.is_meta:
        raise ShapecheckError("the module is on the meta device: its tensors have no values to write or compare")
    flat = value.detach().reshape(-1)
    step = _CHUNK // flat.element_size()
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        # from a GPU several times faster into memory that is pinned, which PyTorch keeps for the next chunk
        yield torch.empty_like(part, device="cpu", pin_memory=True).copy_(part) if part.is_cuda else part.cpu()


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


def _parse_dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ShapecheckError(f"{one_line(name)} is not a dtype of this PyTorch ({torch.__version__})")
    return dtype


def _dtype_name(value: TensorLocation | LiveTensor | Embedded) -> str:
    return value.dtype if isinstance(value.dtype, str) else str(value.dtype).removeprefix("torch.")
