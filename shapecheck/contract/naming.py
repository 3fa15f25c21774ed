"""The names of inputs, outputs and element types: our own, and those in files that others exported or read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shapecheck.contract.errors import ShapecheckError

IMAGE = "out_sample"
"""Our name of a UNet's output, as optimum and diffusers' own export call it."""


@dataclass(frozen=True, slots=True)
class Naming:
    """A naming scheme: a prefix and a zero-padded number for the down slots, one name for the mid slot; the rest of a file."""

    key: str
    prefix: str
    digits: int
    mid: str
    origin: str
    inputs: tuple[tuple[str, str], ...] = ()
    """Our name and theirs of each base input that they call otherwise."""
    image: str = IMAGE
    """What they call a UNet's output."""
    emits: Naming | None = None
    """The names of a ControlNet's outputs, if they are not those of the slots."""

    @property
    def outputs(self) -> Naming:
        """Return the scheme of a ControlNet's outputs."""
        return self.emits or self

    def down(self, index: int) -> str:
        return f"{self.prefix}{index:0{self.digits}d}"

    def names(self, downs: int) -> tuple[str, ...]:
        """Return the names of `downs` down slots and the mid slot, in slot order."""
        return (*map(self.down, range(downs)), self.mid)

    def index(self, name: str) -> int | None:
        """Return the number of a down slot, -1 for the mid slot, None for a name that is not of this scheme."""
        if name == self.mid:
            return -1
        match = re.fullmatch(re.escape(self.prefix) + r"([0-9]{1,4})", name)
        return int(match[1]) if match and name == self.down(int(match[1])) else None


FEATURE = "down_intrablock_residual_"
"""Prefix of the names of a T2I-Adapter's features, in every scheme: diffusers' `down_intrablock_additional_residuals`."""
SHAPECHECK = Naming("shapecheck", "down_block_residual_", 2, "mid_block_residual", "shapecheck")
SCHEMES = (
    SHAPECHECK,
    Naming(
        "streamdiffusion", "input_control_", 2, "input_control_middle", "StreamDiffusion's TensorRT UNet", image="latent",
        emits=Naming("streamdiffusion", "down_block_", 2, "mid_block", "StreamDiffusion's TensorRT ControlNet"),
    ),
    Naming(
        "comfyui", "output_control_", 1, "middle_control_0", "ComfyUI_TensorRT, pull request 90",
        (
            ("sample", "x"), ("timestep", "timesteps"), ("encoder_hidden_states", "context"), ("controlnet_cond", "hint"),
            ("text_embeds", "y"), ("time_ids", "y"),  # embedded and joined before the graph
        ),
        "h",
    ),
    Naming("optimum-neuron", "down_block_additional_residuals_", 1, "mid_block_additional_residual", "optimum-neuron"),
)  # fmt: skip


def name_residuals(output: Any) -> dict[str, Any]:
    """Return slot name → residual from a ControlNet's output or the pair (downs, mid); empty for anything else."""
    downs, mid = (getattr(output, name, None) for name in ("down_block_res_samples", "mid_block_res_sample"))
    if downs is None and isinstance(output, (list, tuple)) and len(output) == 2:
        downs, mid = output
    if not isinstance(downs, (list, tuple)):
        return {}
    return {SHAPECHECK.down(index): residual for index, residual in enumerate(downs)} | {SHAPECHECK.mid: mid}


_TORCH_NAMES = {"float": "float32", "double": "float64", "half": "float16", "bf16": "bfloat16"}
ONNX_NUMBERS = {
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11, "bfloat16": 16,
}  # fmt: skip
"""From PyTorch's name of an element type to ONNX's number."""


def torch_name(name: str) -> str:
    """Return PyTorch's name of an element type for its name in ONNX, ONNX Runtime or TensorRT: `FLOAT`, `double`, `HALF`."""
    return _TORCH_NAMES.get(name.lower(), name.lower())


def name_feature(index: int) -> str:
    """Return the name of a feature of a T2I-Adapter."""
    return f"{FEATURE}{index:02d}"


def is_feature(name: str) -> bool:
    """Return whether this is the name of a T2I-Adapter's feature."""
    return re.fullmatch(FEATURE + "[0-9]{2,4}", name) is not None


def find_scheme(key: str) -> Naming:
    """Return the scheme of that key. Raises ShapecheckError listing the known ones."""
    schemes = {naming.key: naming for naming in SCHEMES}
    if key not in schemes:
        raise ShapecheckError(f"no naming scheme {key!r}; known: {', '.join(schemes)}")
    return schemes[key]


def detect_scheme(names: Iterable[str]) -> Naming | None:
    """Return the scheme that names the most of these inputs after slots, or None if no scheme names any."""
    return _find_most_used(names, SCHEMES)


def detect_output_scheme(names: Iterable[str]) -> Naming | None:
    """Return the scheme that names the most of a ControlNet's outputs, or None if no scheme names any."""
    return _find_most_used(names, (*SCHEMES, *(scheme.emits for scheme in SCHEMES if scheme.emits is not None)))


def match_residuals(slots: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """Return slot → output of a ControlNet, all of them, by a scheme that they follow; empty if they follow none."""
    scheme = detect_output_scheme(outputs)
    names = scheme.names(len(slots) - 1) if scheme is not None else ()
    return dict(zip(slots, names, strict=True)) if set(names) == set(outputs) and names else {}


def find_ours(name: str) -> tuple[str, ...]:
    """Return our names of the base inputs that one of this name stands for in any scheme: two for one that joins two."""
    ours = tuple(own for scheme in SCHEMES for own, theirs in scheme.inputs if theirs == name)
    return ours or (name,)


def find_declared(name: str, declared: Collection[str]) -> str:
    """Return what a file that declares these inputs calls a base input of ours: that, or by a scheme if that stands for it."""
    theirs = (other for scheme in SCHEMES for own, other in scheme.inputs if own == name and find_ours(other) == (name,))
    return next((other for other in (name, *theirs) if other in declared), name)


def _find_most_used(names: Iterable[str], schemes: Sequence[Naming]) -> Naming | None:
    names = tuple(names)
    counts = {scheme: sum(scheme.index(name) is not None for name in names) for scheme in schemes}
    best = max(counts, key=lambda scheme: counts[scheme])
    return best if counts[best] else None


def residual_index(name: str) -> int | None:
    """Return the number of the slot that an input is named after, -1 for mid; None for any other name."""
    if is_feature(name):
        return None
    for scheme in SCHEMES:
        if (index := scheme.index(name)) is not None:
            return index
    # names of no known scheme: down_block_3, mid
    if re.search(r"mid_?block|middle|\bmid\b", name):
        return -1
    match = re.search(r"down\D{0,40}?(\d{1,3})$|(?:control|residual)\D{0,20}?(\d{1,3})$", name)
    return int(match[1] or match[2]) if match else None
