"""LoRAs of random values that change what a model computes, made by peft as diffusers' pipelines load them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(model: Any, name: str, targets: tuple[str, ...] = ATTENTION, *, seed: int, rank: int = 3, **settings: Any) -> None:
    """Load an adapter into a UNet or a ControlNet; `targets` are ends of the names of layers."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # of a second one
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), init_lora_weights=False, **settings), name
        )
    model.eval()


def count_changed(model: nn.Module, before: dict[str, torch.Tensor]) -> int:
    """Count the tensors of a model that are no longer what they were, bit by bit."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    return sum(not torch.equal(after[name], value) for name, value in before.items())


def write_lora(model: Any, folder: Path, *, seed: int) -> Path:
    """Write an adapter of a model alone to a file, as people publish them; the model that is given stays as it is."""
    with_lora = copy.deepcopy(model)
    add_lora(with_lora, "default", seed=seed)
    with_lora.save_lora_adapter(folder, adapter_name="default", weight_name=f"{seed}.safetensors")
    state = load_file(folder / f"{seed}.safetensors")
    save_file({f"unet.{name}": value for name, value in state.items()}, folder / f"{seed}.safetensors", {"format": "pt"})
    return folder / f"{seed}.safetensors"
