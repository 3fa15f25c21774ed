"""Refuse by name what a program switched on in a live model that no exported graph can hold, with the call that undoes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from shapecheck.contract import ShapecheckError

_FREEU = ("s1", "s2", "b1", "b2")
_LISTS = ("down_blocks", "up_blocks", "attentions", "resnets", "transformer_blocks", "downsamplers", "upsamplers")
_PROCESSORS = {
    "Sliced": "attention slicing is on: pipe.disable_attention_slicing()",
    "IPAdapter": "an IP-Adapter is loaded, whose image embeddings and scale are no inputs of an exported model yet: "
    "pipe.unload_ip_adapter(), or stay with the PyTorch UNet",
    "PAG": "perturbed attention guidance (PAG) has set its attention processors: unet.set_default_attn_processor(), and a "
    "pipeline without PAG; its pipelines need the PyTorch UNet",
    "XFormers": "xFormers computes the attention: pipe.disable_xformers_memory_efficient_attention()",
}
"""What attention processors of diffusers are called after, and what is said of them."""


def refuse_patches(model: nn.Module) -> None:
    """Raise ShapecheckError that names every patch of a live UNet or ControlNet at once; do nothing if there is none."""
    if found := describe_patches(model):
        raise ShapecheckError(found)


def describe_patches(model: nn.Module) -> str:
    """Return the words for all patches of a live UNet or ControlNet; nothing if there is none."""
    found = "; ".join(dict.fromkeys(_find_patches(model)))
    return f"{type(model).__name__} cannot be observed or exported as it is: {found}" if found else ""


def _find_patches(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if all(isinstance(value := vars(module).get(key), int | float) and value for key in _FREEU):
            yield "FreeU is on, which filters by an FFT: pipe.disable_freeu()"
        if hasattr(module, "_tome_info") or type(module).__name__.startswith("ToMe"):
            yield "token merging (ToMe) is on: tomesd.remove_patch(pipe)"
        if type(module).__module__.endswith("unet_motion_model") or "MotionModule" in type(module).__name__:
            yield f"{name or 'the model'} is a motion module of AnimateDiff, which needs frames: use the UNet without it"
        processor = type(getattr(module, "processor", None)).__name__
        yield from (words for start, words in _PROCESSORS.items() if processor.startswith(start))
        if type(module).__name__ == "GatedSelfAttentionDense":
            yield "GLIGEN's gated attention takes boxes, which are no inputs of an exported model: use a UNet without it"
        if _has_other_forward(module) and _is_block(name):
            yield (
                f"the forward of {name or 'the model'} is replaced, as DeepCache and other patches of a pipeline do: "
                "disable them first (DeepCache: helper.disable())"
            )


def _is_block(name: str) -> bool:
    """Return whether this is a whole model or one of its parts that caches and tilings replace, not a single layer."""
    *above, last = name.split(".")
    return not name or last in ("mid_block", "attn1", "attn2") or (last.isdigit() and above[-1] in _LISTS)


def _has_other_forward(module: nn.Module) -> bool:
    """Return whether a forward was put into this very object; Accelerate and torch.compile change no number."""
    forward: Callable[..., Any] | None = vars(module).get("forward")
    return forward is not None and not hasattr(module, "_hf_hook") and not hasattr(forward, "_torchdynamo_orig_callable")
