"""What a session put in a model's place has in common, UNet or ControlNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from shapecheck.contract import Contract, ContractError, Mismatch, Role, ShapecheckError, show
from shapecheck.runtime.arguments import Arguments

_FUSE = "fuse it into the PyTorch UNet with pipe.fuse_lora(), then export that"


_BEFORE = "apply it to the PyTorch UNet, then export that"


UNSUPPORTED: Mapping[str, str] = {
    **dict.fromkeys(
        ("add_adapter", "set_adapter", "set_adapters", "fuse_lora", "unfuse_lora", "unload_lora", "delete_adapters",
         "disable_lora", "enable_lora", "load_lora_adapter", "save_lora_adapter", "load_attn_procs", "save_attn_procs"),
        f"a LoRA cannot be put into an exported model: {_FUSE}",
    ),
    **dict.fromkeys(
        ("_load_ip_adapter_weights", "_load_ip_adapter_loras", "attn_processors", "set_attn_processor",
         "set_default_attn_processor"),
        "an IP-Adapter or another attention processor cannot be put into an exported model: use the PyTorch UNet with it",
    ),
    **dict.fromkeys(
        ("down_blocks", "mid_block", "up_blocks"),
        "an exported model has no layers to change, as the scale of an IP-Adapter or LoRA would: use the PyTorch UNet with it",
    ),
    "enable_freeu": f"FreeU cannot be switched on in an exported model: {_BEFORE}",
    "fuse_qkv_projections": f"projections cannot be fused in an exported model: {_BEFORE}",
    "unfuse_qkv_projections": f"projections cannot be unfused in an exported model: {_BEFORE}",
    "enable_gradient_checkpointing": "an exported model cannot be trained",
    "set_attention_slice": "attention cannot be sliced in an exported model",
    "save_pretrained": "it is a file already: copy that, or save the PyTorch model it was exported from",
}  # fmt: skip
"""What a PyTorch model can do and a session in its place cannot, and what to do instead."""


class UnsupportedError(ShapecheckError, AttributeError):
    """A session in a model's place cannot do that. It is an AttributeError too, so that `hasattr` says no."""


class Session(Protocol):
    """What runs: a `ContractSession` or an `EngineSession`."""

    @property
    def contract(self) -> Contract:
        """What it takes."""

    @property
    def device(self) -> torch.device:
        """Where inputs have to lie."""

    @property
    def reuses_outputs(self) -> bool:
        """Whether the next call writes over what this one returns."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output for these inputs."""

    def close(self) -> None:
        """Give the memory back."""


class DropIn(nn.Module):
    """A session as a module of diffusers: dtype, device and config of the model it stands for, and no weights."""

    def _hold(self, session: Session, role: Role, *, finite: bool, own_outputs: bool) -> None:
        contract = session.contract
        if contract.role != role:
            raise ShapecheckError(f"this session is of a {contract.role}, and one of a {role} is expected")
        self.contract, self.engine = contract, session
        self._finite, self._copies = finite, own_outputs and session.reuses_outputs
        self._dtype: torch.dtype = getattr(torch, contract.dtype)
        self._arguments = Arguments(contract, session.device)
        like = torch.empty(0, dtype=self._dtype, device=session.device)
        self.register_buffer("_like", like, persistent=False)  # MultiControlNetModel reads its dtype off a tensor inside
        self.eval()

    def _config(self) -> FrozenDict:
        """What pipelines read."""
        kept = {"_class_name": self.contract.class_name, "_diffusers_version": diffusers.__version__}
        return FrozenDict(self.contract.config.to_json() | kept)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the graph."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the session runs."""
        return self.engine.device

    def close(self) -> None:
        """Give the memory back; a call afterwards is an error."""
        self.engine.close()

    def _base(self, given: Mapping[str, Any], added: Mapping[str, Any], timestep: Any) -> dict[str, Any]:
        """The inputs that every model takes, from a forward's arguments. Raises CallError for what it takes none of."""
        inputs = self._arguments.base(given, added)
        inputs["timestep"] = self._arguments.timestep(timestep, given["sample"])
        return inputs

    def _run(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        found = self.engine(inputs)
        if self._finite and not all(_finite(each) for each in found.values()):
            self._refuse_infinite(inputs, found)
        return {name: each.clone() for name, each in found.items()} if self._copies else found

    def _refuse_infinite(self, inputs: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> NoReturn:
        """Raise ContractError naming the inputs whose values are no finite numbers, or the outputs where all inputs are."""
        producers = {slot.name: slot.producer for slot in self.contract.residuals if self.contract.role == "unet"}
        bad = {name: each for name, each in inputs.items() if each.is_floating_point() and not each.isfinite().all()}
        wrong = [
            Mismatch("values", name, _counted(each), "finite numbers", unet_module=producers.get(name, ""))
            for name, each in bad.items()
        ]
        if not wrong:
            cause = "every input is finite: the model itself overflows here, as half precision may"
            outputs = {name: each for name, each in found.items() if not each.isfinite().all()}
            wrong = [Mismatch("values", name, _counted(each), "finite numbers", cause=cause) for name, each in outputs.items()]
        raise ContractError(tuple(wrong), subject="values that are no finite numbers", contract=self.contract)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DropIn:
        """What `.to()`, `.half()`, `.cuda()` and others end in: nothing to move, and an error where that would be needed."""
        moved = fn(torch.empty_like(self._like))
        if moved.dtype != self.dtype:
            raise ShapecheckError(
                f"this session computes in {_plain(self.dtype)}, which is the precision of its file: export again with "
                f"--dtype {_plain(moved.dtype)}"
            )
        if moved.device != self.device:
            raise ShapecheckError(
                f"this session runs on {self.device}: load it again for {moved.device} (backend=, device=), and move "
                "a pipeline before its UNet is exchanged"
            )
        return self

    def __getattr__(self, name: str) -> Any:
        if name in UNSUPPORTED:
            raise UnsupportedError(f"{name}: {UNSUPPORTED[name]}")
        return super().__getattr__(name)


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite numbers. One number over all of them tells, at a fraction of what looking at each costs."""
    flat = tensor.reshape(-1)
    total = torch.dot(flat, flat) if flat.dtype == torch.float32 else flat.sum(dtype=torch.float32)
    return math.isfinite(total.item()) or bool(tensor.isfinite().all())


def _counted(tensor: Tensor) -> str:
    nan = int(tensor.isnan().sum())
    return f"{nan} NaN and {int(tensor.isinf().sum())} infinite values in {show(tuple(tensor.shape))}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
