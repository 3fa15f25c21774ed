"""The border to diffusers: real modules built from a configuration on the meta device, without memory for weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, T2IAdapter, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from shapecheck.contract import ShapecheckError, show
from shapecheck.contract.errors import first_line, one_line
from shapecheck.logs import silence_logger
from shapecheck.models.config_file import ModelSource

_MOST_SHOWN = 6
_MODELS: Mapping[str, Any] = {
    model.__name__: model for model in (UNet2DConditionModel, ControlNetModel, ControlNetUnionModel, T2IAdapter)
}


def build(source: ModelSource) -> nn.Module:
    """Return the module that the configuration describes, on the meta device, in eval mode.

    Raises ShapecheckError if diffusers cannot build it, or if the checkpoint it was read from has other tensors.
    """
    class_name = source.class_name
    # diffusers would build the class that the configuration names, whichever it is
    config = {key: value for key, value in source.config.items() if not key.startswith("_")} | {"_class_name": class_name}
    try:
        with silence_logger("diffusers"), torch.device("meta"):
            module: nn.Module = _MODELS[class_name].from_config(config)
    except Exception as error:  # the configuration is the user's: so whatever diffusers raises is the user's to know
        raise ShapecheckError(f"diffusers cannot build a {class_name} from {source.origin}: {first_line(error)}") from None
    if not source.tensors:
        return module.eval()

    differences = []
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in dict.fromkeys((*expected, *source.tensors)):
        tensor = source.tensors.get(name)
        if tensor is None:
            differences.append(f"no {name} of {show(expected[name])}")
        elif name not in expected:
            differences.append(f"{one_line(tensor.name)} of {show(tensor.shape)} has no place")
        elif tensor.shape != expected[name]:
            original = f" ({one_line(tensor.name)})" if tensor.name != name else ""
            differences.append(f"{name}{original} is {show(tensor.shape)}, expected {show(expected[name])}")
    if differences:
        more = f"; and {len(differences) - _MOST_SHOWN} more" if len(differences) > _MOST_SHOWN else ""
        raise ShapecheckError(
            f"{source.origin} is not supported: a {class_name} of the sizes in its header has other tensors than it holds, "
            f"{len(differences)} of them: {'; '.join(differences[:_MOST_SHOWN])}{more}; give the diffusers folder it was made "
            "from, or its config.json"
        )
    return module.eval()


def load(source: ModelSource, variant: str | None, dtype: torch.dtype) -> nn.Module:
    """Return the model with its weights, from safetensors alone, in eval mode. Raises ShapecheckError if diffusers cannot."""
    try:
        with silence_logger("diffusers"):
            module: nn.Module = _MODELS[source.class_name].from_pretrained(
                source.folder, variant=variant, torch_dtype=dtype, use_safetensors=True, local_files_only=True
            )
    except Exception as error:  # as above
        raise ShapecheckError(f"diffusers cannot load {source.origin}: {first_line(error)}") from None
    return module.eval()


def derive_controlnet(unet: nn.Module) -> nn.Module:
    """Return the ControlNet a UNet implies, on the meta device, in eval mode. Raises ShapecheckError with diffusers' reason."""
    try:
        with silence_logger("diffusers"), torch.device("meta"):
            controlnet: nn.Module = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
            controlnet.to(next(unet.parameters()).dtype)
    except Exception as error:  # from_unet fails in many ways, none of them documented
        raise ShapecheckError(f"diffusers cannot build the ControlNet this UNet implies: {first_line(error)}") from None
    return controlnet.eval()


def derive_adapters(unet: nn.Module, vae_factor: int) -> list[nn.Module]:
    """Return the T2I-Adapters that may be made for a UNet, on the meta device: of diffusers' kind for SD1.5, and for SDXL.

    SDXL's gives one feature more than there are down blocks, for the mid block, and works on a grid half as fine.
    """
    config: Any = unet.config
    channels, dtype = list(config["block_out_channels"]), next(unet.parameters()).dtype
    with silence_logger("diffusers"), torch.device("meta"):
        adapters = (
            T2IAdapter(3, channels, 2, vae_factor, "full_adapter"),
            T2IAdapter(3, [*channels, channels[-1]], 2, 2 * vae_factor, "full_adapter_xl"),
        )
        return [adapter.to(dtype).eval() for adapter in adapters]


def is_adapter(module: nn.Module) -> bool:
    """Return whether this is a T2I-Adapter."""
    return isinstance(module, T2IAdapter)


def is_unet(module: nn.Module) -> bool:
    """Return whether this is a conditional UNet."""
    return isinstance(module, UNet2DConditionModel)


def is_controlnet(module: nn.Module) -> bool:
    """Return whether this is a ControlNet, a union one included."""
    return isinstance(module, (ControlNetModel, ControlNetUnionModel))


def is_union(module: nn.Module) -> bool:
    """Return whether this is a ControlNet for several kinds of control, which takes a list of images and their kinds."""
    return isinstance(module, ControlNetUnionModel)


def list_ignored_keys(source: ModelSource) -> tuple[str, ...]:
    """Return the keys of the configuration that diffusers' class does not know and drops."""
    model = _MODELS[source.class_name]
    known = model._get_init_keys(model)
    return tuple(sorted(key for key in source.config if not key.startswith("_") and key not in known))


def embed_numbers(numbers: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return SDXL's size numbers, (batch, count), as cosines and sines, in the way of the UNet itself."""
    waves: Tensor = get_timestep_embedding(
        numbers.flatten(),
        config["addition_time_embed_dim"],
        flip_sin_to_cos=config["flip_sin_to_cos"],
        downscale_freq_shift=config["freq_shift"],
    )
    return waves.reshape(len(numbers), -1)
