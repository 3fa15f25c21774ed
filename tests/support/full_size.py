"""Models at their real sizes with random weights, saved as diffusers folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from shapecheck import presets


def save(preset: str, folder: Path, *, shards: str = "100GB", dtype: torch.dtype = torch.float32) -> None:
    """The preset's UNet as `folder/unet`: uniform weights of the size that PyTorch's own initialisation gives."""
    config = json.loads(json.dumps(presets.load(preset).config))
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config).to(dtype)
    model.to_empty(device="cpu")
    noise = torch.rand(2**24 + 7, generator=torch.Generator().manual_seed(0)) * 2 - 1  # drawn once: gigabytes take minutes
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            bound = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), len(noise)):
                part = flat[start : start + len(noise)]
                part.copy_(noise.roll(number * 7919)[: len(part)] * bound)
        for module in model.modules():
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                module.weight += 1
    model.save_pretrained(folder / "unet", max_shard_size=shards)


if __name__ == "__main__":
    import sys

    save(sys.argv[1], Path(sys.argv[2]), shards=sys.argv[3])
