"""Records of calibration: the largest magnitude that went into each layer of a pipeline's models, kept as JSON.

float8 (e4m3fn) keeps three bits of every number whatever its size, down to a hundred-thousandth of the largest. So the largest
magnitude is all that has to be known of a tensor, and one outlier costs the others nothing, as it would in int8. A scale is a
power of two: dividing by it is exact in every precision, and what is twice as large as anything that was seen may still fit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shapecheck.contract import Contract, ShapecheckError
from shapecheck.contract.json_codec import POSITIVE, TextFormat, decode_record, encode, refuse_unprintable
from shapecheck.contract.records import Role
from shapecheck.files import read_text, report_unreadable

LARGEST_CODE = 448.0
"""The largest number of float8 e4m3fn."""
_LEAST_EXPONENT, _LARGEST_EXPONENT = -14, 15
"""Of a scale: those that float16 has with all its bits."""
_LARGEST_FILE = 16 * 2**20
_FORMAT = TextFormat(
    "shapecheck_calibration", "a calibration", "shapecheck.calibrate", "calibrate the pipeline again", _LARGEST_FILE
)
_KEPT = re.compile(
    r"(?:.+\.)?(?:conv_in|conv_out|conv_shortcut|time_embedding|time_emb_proj|add_embedding|class_embedding|encoder_hid_proj"
    r"|controlnet_cond_embedding|controlnet_down_blocks|controlnet_mid_block)(?:\..+)?"
)
"""Layers that are never in fp8: the first and the last, whose few channels carry the latent; what embeds time, class and added
conditions, small and felt everywhere; shortcuts, which no activation has calmed. So do NVIDIA's recipes for Stable Diffusion.
Of a ControlNet also what reads its image, and the convolutions that make its residuals."""
_STEP = 16
"""Channels that the GPU's fp8 kernels take at once; a layer that has no multiple of them would be slower in fp8."""
_MOST_TAPS = 32
"""TensorRT has no fp8 kernels for larger filters."""


@dataclass(frozen=True, slots=True)
class CalibratedModel:
    """One model, or several of one architecture: each magnitude is then the largest of all of them."""

    role: Role
    name: str
    """Its class."""
    contract: str
    """Digest of its contract without dtypes and slots: one calibration serves every precision that it is exported in."""
    layers: tuple[tuple[str, float], ...]
    """By the path of a layer: the largest magnitude that went into it. Without those that got nothing but zeros."""

    def choose_scales(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Return the scale of what goes into each layer that is to be in fp8; `shapes` has the weights' by their layers.

        A layer stays in the model's own precision if it is numerically delicate, or too narrow for fp8 kernels.
        """
        return {
            name: choose_scale(magnitude)
            for name, magnitude in self.layers
            if name in shapes and not _KEPT.fullmatch(name) and _is_wide(shapes[name])
        }


@dataclass(frozen=True, slots=True)
class Calibration:
    """The largest magnitudes in the UNet and the ControlNets of a pipeline while it drew pictures of these prompts."""

    models: tuple[CalibratedModel, ...]
    prompts: int = field(metadata=POSITIVE)
    """Their number."""
    calls: int = field(metadata=POSITIVE)
    """Of the UNet."""
    versions: tuple[tuple[str, str], ...]

    def find_model(self, contract: Contract) -> CalibratedModel:
        """Return what was seen of the model of a contract. Raises ShapecheckError if it was not in the pipeline."""
        digest = digest_model(contract)
        for model in self.models:
            if model.contract == digest:
                return model
        seen = ", ".join(f"{model.name} {model.contract[:15]}…" for model in self.models)
        raise ShapecheckError(
            f"the calibration is of other models than this {contract.class_name} ({digest[:15]}…): {seen}; "
            "calibrate the pipeline that holds it, with the diffusers release in use"
        )

    def to_json(self) -> str:
        """Return it as text, to be kept in a file."""
        return json.dumps({_FORMAT.key: _FORMAT.schema, **encode(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read `to_json`'s text. Raises ShapecheckError on anything else, such as magnitudes that no scale can stand for."""
        record = _FORMAT.parse(text)
        try:
            calibration: Calibration = decode_record(cls, record)
            for model in calibration.models:
                refuse_unprintable([model.name, model.contract, *(name for name, _ in model.layers)])
                if wrong := [name for name, magnitude in model.layers if not 0 < magnitude < math.inf]:
                    raise ValueError(f"{wrong[0]}: the magnitude is not a positive number")
            digests = [model.contract for model in calibration.models]
            if not digests or len(set(digests)) != len(digests):
                raise ValueError("models: none, or one is there twice")
        except (ValueError, RecursionError) as error:
            raise ShapecheckError(f"a damaged calibration: {error!s:.200}") from None
        return calibration


def read_calibration(given: Calibration | str | Path) -> Calibration:
    """Return a calibration, read if a file of it is given. Raises ShapecheckError naming the file if that cannot be done."""
    if isinstance(given, Calibration):
        return given
    path = Path(given)
    with report_unreadable(path):
        text = read_text(path, _LARGEST_FILE, too_large=f"{path} is too large", not_text=f"{path} is not text")
    try:
        return Calibration.from_json(text)
    except ShapecheckError as error:
        raise ShapecheckError(f"{path}: {error}") from None


def digest_model(contract: Contract) -> str:
    """Return the digest of a contract without what differs from export to export of one model: dtypes, slots, features."""
    return replace(contract, inputs=(), slots=(), features=()).digest


def choose_scale(magnitude: float) -> float:
    """Return the least power of two by which a tensor of this largest magnitude fits into float8."""
    exponent = math.ceil(math.log2(magnitude / LARGEST_CODE)) if magnitude > 0 else _LEAST_EXPONENT
    return 2.0 ** min(max(exponent, _LEAST_EXPONENT), _LARGEST_EXPONENT)


def _is_wide(shape: Sequence[int]) -> bool:
    """Return whether GPUs have fp8 kernels for a weight: (out, in) or (out, in / groups, height, width)."""
    return all(channels % _STEP == 0 for channels in shape[:2]) and math.prod(shape[2:]) <= _MOST_TAPS
