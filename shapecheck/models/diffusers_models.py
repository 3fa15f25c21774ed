"""The border to diffusers: real modules built from a configuration on the meta device, without memory for weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter, UNet2DConditionModel
from torch import nn

from shapecheck.contract import ShapecheckError, show
from shapecheck.contract.errors import one_line
from shapecheck.models.lookup import ModelSource
from shapecheck.models.single_file import CheckpointTensor
from shapecheck.progress import silence_logger

_SHOWN = 6


_MODELS: Mapping[str, Any] = {
    each.__name__: each for each in (UNet2DConditionModel, ControlNetModel, ControlNetUnionModel, T2IAdapter)
}


def build(source: ModelSource) -> nn.Module:
    """The module the configuration describes, on the meta device, in eval mode.

    Raises ShapecheckError where diffusers cannot build it.
    """
    try:
        with silence_logger("diffusers"), torch.device("meta"):
            module: nn.Module = _MODELS[source.class_name].from_config(_without_shadow_class(source.config, source.class_name))
    except Exception as error:  # the configuration is the user's: whatever diffusers makes of it is told to the user
        raise ShapecheckError(
            f"diffusers cannot build a {source.class_name} from {source.origin}: {_first_line(error)}"
        ) from None
    if source.tensors and (found := _unlike(module, source.tensors)):
        shown = "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        raise ShapecheckError(
            f"{source.origin} is not read: a {source.class_name} of the sizes its header tells has other tensors than it "
            f"holds, {len(found)} of them: {shown}; give the diffusers folder it was made from, or its config.json"
        )
    return module.eval()


def load(source: ModelSource, variant: str | None, dtype: torch.dtype) -> nn.Module:
    """The model with its weights, from safetensors alone, in eval mode. Raises ShapecheckError where diffusers cannot."""
    try:
        with silence_logger("diffusers"):
            module: nn.Module = _MODELS[source.class_name].from_pretrained(
                source.folder, variant=variant, torch_dtype=dtype, use_safetensors=True, local_files_only=True
            )
    except Exception as error:  # as above
        raise ShapecheckError(f"diffusers cannot load {source.origin}: {_first_line(error)}") from None
    return module.eval()


def implied_controlnet(unet: nn.Module) -> nn.Module:
    """The ControlNet diffusers derives from a UNet, on the meta device, in eval mode.

    Raises ShapecheckError with diffusers' own reason where it cannot: no mid block, lists of layers, …
    """
    try:
        with silence_logger("diffusers"), torch.device("meta"):
            controlnet: nn.Module = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
            controlnet.to(next(unet.parameters()).dtype)
    except Exception as error:  # from_unet fails in many ways, none of them documented
        raise ShapecheckError(f"diffusers cannot build the ControlNet this UNet implies: {_first_line(error)}") from None
    return controlnet.eval()


def implied_adapters(unet: nn.Module, vae_factor: int) -> list[nn.Module]:
    """The T2I-Adapters that may be made for a UNet, on the meta device: of diffusers' kind for SD1.5, and for SDXL.

    SDXL's gives one feature more than there are down blocks, for the mid block, and works on a grid half as fine.
    """
    config: Any = unet.config
    channels, dtype = list(config["block_out_channels"]), next(unet.parameters()).dtype
    with silence_logger("diffusers"), torch.device("meta"):
        kinds = [
            T2IAdapter(3, channels, 2, vae_factor, "full_adapter"),
            T2IAdapter(3, [*channels, channels[-1]], 2, 2 * vae_factor, "full_adapter_xl"),
        ]
        return [each.to(dtype).eval() for each in kinds]


def is_adapter(module: nn.Module) -> bool:
    """Whether this is the kind of T2I-Adapter that is read."""
    return isinstance(module, T2IAdapter)


def is_unet(module: nn.Module) -> bool:
    """Whether this is the kind of UNet that is read."""
    return isinstance(module, UNet2DConditionModel)


def is_controlnet(module: nn.Module) -> bool:
    """Whether this is the kind of ControlNet that is read."""
    return isinstance(module, (ControlNetModel, ControlNetUnionModel))


def is_union(module: nn.Module) -> bool:
    """Whether this is a ControlNet for several kinds of control, which takes a list of images and says which they are."""
    return isinstance(module, ControlNetUnionModel)


def ignored_keys(source: ModelSource) -> tuple[str, ...]:
    """Keys of the configuration that diffusers' class does not know and drops."""
    model = _MODELS[source.class_name]
    known = model._get_init_keys(model)
    return tuple(sorted(key for key in source.config if not key.startswith("_") and key not in known))


def _unlike(module: nn.Module, tensors: Mapping[str, CheckpointTensor]) -> list[str]:
    """Every tensor that a module and a checkpoint do not have alike, by its name in diffusers, with the file's own."""
    found = []
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in dict.fromkeys((*wanted, *tensors)):
        held = tensors.get(name)
        if held is None:
            found.append(f"no {name} of {show(wanted[name])}")
        elif name not in wanted:
            found.append(f"{one_line(held.name)} of {show(held.shape)} has no place")
        elif held.shape != wanted[name]:
            own = f" ({one_line(held.name)})" if held.name != name else ""
            found.append(f"{name}{own} is {show(held.shape)}, expected {show(wanted[name])}")
    return found


def _first_line(error: Exception) -> str:
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0], longest=300)


def _without_shadow_class(config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")} | {"_class_name": class_name}
