"""A session in a model's place: all that UNets and ControlNets share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from shapecheck.contract import Contract, ContractError, Mismatch, Role, ShapecheckError, show
from shapecheck.runtime.call_gate import name_dtype
from shapecheck.runtime.dropin_arguments import Arguments

_BEFORE = "apply it to the PyTorch UNet, then export that"
UNSUPPORTED: Mapping[str, str] = {
    **dict.fromkeys(
        ("add_adapter", "set_adapter", "set_adapters", "fuse_lora", "unfuse_lora", "unload_lora", "delete_adapters",
         "disable_lora", "enable_lora", "load_lora_adapter", "save_lora_adapter", "load_attn_procs", "save_attn_procs"),
        "a LoRA cannot be put into an exported model: fuse it into the PyTorch UNet with pipe.fuse_lora(), then export that",
    ),
    **dict.fromkeys(
        ("_load_ip_adapter_weights", "_load_ip_adapter_loras", "attn_processors", "set_attn_processor",
         "set_default_attn_processor"),
        "an IP-Adapter, PAG or another attention processor cannot be put into an exported model: use the PyTorch UNet with it",
    ),
    **dict.fromkeys(
        ("down_blocks", "mid_block", "up_blocks"),
        "an exported model has no layers to change, as the scale of an IP-Adapter or LoRA would: use the PyTorch UNet with it",
    ),
    "enable_freeu": "FreeU cannot be switched on in an exported model, nor be exported: use the PyTorch UNet with it",
    "fuse_qkv_projections": f"projections cannot be fused in an exported model: {_BEFORE}",
    "unfuse_qkv_projections": f"projections cannot be unfused in an exported model: {_BEFORE}",
    "enable_gradient_checkpointing": "an exported model cannot be trained",
    "set_attention_slice": "attention cannot be sliced in an exported model",
    "save_pretrained": "it is a file already: copy that, or save the PyTorch model it was exported from",
}  # fmt: skip
"""Members of a PyTorch model that a session in its place does not have, and what to do instead."""


class UnsupportedError(ShapecheckError, AttributeError):
    """A session in a model's place cannot do that. It is an AttributeError too, so that `hasattr` says no."""


class DropInSession(Protocol):
    """A `ContractSession`, an `EngineSession` or a `CompiledSession`: it runs a model under its contract."""

    @property
    def contract(self) -> Contract: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def reuses_outputs(self) -> bool:
        """Return whether the next call writes over the outputs of this one."""

    def __call__(self, inputs: Mapping[str, Tensor], *, own_outputs: bool = False) -> dict[str, Tensor]:
        """Return the outputs; with `own_outputs` copies, made before another call is let in."""
        ...

    def close(self) -> None: ...


class DropIn(nn.Module):
    """A session as a module of diffusers: dtype, device and config of the model it stands for, and no weights."""

    def _set_up(self, session: DropInSession, role: Role, *, finite: bool, own_outputs: bool) -> FrozenDict:
        """Hold the session, and return the config that pipelines read."""
        contract = session.contract
        if contract.role != role:
            raise ShapecheckError(f"the session's contract: got that of a {contract.role}, expected that of a {role}")
        self.contract, self.engine = contract, session
        self._finite, self._copies = finite, own_outputs and session.reuses_outputs
        self._dtype: torch.dtype = getattr(torch, contract.dtype)
        self._arguments = Arguments(contract, session.device)
        like = torch.empty(0, dtype=self._dtype, device=session.device)
        self.register_buffer("_like", like, persistent=False)  # MultiControlNetModel reads its dtype off a tensor inside
        self.eval()
        names = {"_class_name": contract.class_name, "_diffusers_version": diffusers.__version__}
        return FrozenDict(contract.config.to_json() | names)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def close(self) -> None:
        """Free the memory; a call afterwards is an error."""
        self.engine.close()

    def _run(self, inputs: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        asked = [name for name, value in inputs.items() if getattr(value, "requires_grad", False)]
        if asked and torch.is_grad_enabled():
            raise ShapecheckError(
                f"{', '.join(asked)}: requires a gradient, and none passes through an exported model: call it under "
                "torch.no_grad(), or train the PyTorch model"
            )
        outputs = self.engine(inputs, **options, **({"own_outputs": True} if self._copies else {}))
        if self._finite and not _are_finite(list(outputs.values())):
            self._refuse_infinite(inputs, outputs)
        return outputs

    def _refuse_infinite(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> NoReturn:
        """Raise ContractError naming the inputs with values that are not finite, or the outputs if all inputs are finite."""
        producers = {slot.name: slot.producer for slot in self.contract.residuals if self.contract.role == "unet"}
        bad = {name: value for name, value in inputs.items() if value.is_floating_point() and not value.isfinite().all()}
        cause = ""
        if not bad:
            cause = "every input is finite: the model itself overflows here, as half precision may"
            bad, producers = {name: value for name, value in outputs.items() if not value.isfinite().all()}, {}
        mismatches = []
        for name, value in bad.items():
            counts = f"{int(value.isnan().sum())} NaN and {int(value.isinf().sum())} infinite values"
            observed, module = f"{counts} in {show(tuple(value.shape))}", producers.get(name, "")
            mismatches.append(Mismatch("values", name, observed, "finite numbers", unet_module=module, cause=cause))
        raise ContractError(tuple(mismatches), subject="values that are not finite", contract=self.contract)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DropIn:
        """Move nothing, and raise ShapecheckError if `.to()`, `.half()`, `.cuda()` or others, which end here, would have to."""
        moved = fn(torch.empty_like(self._like))
        if moved.dtype != self.dtype:
            raise ShapecheckError(
                f"this session computes in {name_dtype(self.dtype)}, the precision of its file: export again with "
                f"--dtype {name_dtype(moved.dtype)}"
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


def _are_finite(tensors: list[Tensor]) -> bool:
    if len(tensors) > 1 and tensors[0].is_cuda:
        # one number to wait for; a sum, which no NaN is lost in
        sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors])
        if math.isfinite(sums.sum().item()):
            return True
    return all(_is_finite(tensor) for tensor in tensors)


def _is_finite(tensor: Tensor) -> bool:
    # one number over all values shows it at a fraction of what looking at each costs: on a GPU one kernel, and one wait
    if tensor.dtype == torch.float32 and not tensor.is_cuda:
        flat = tensor.reshape(-1)
        total = torch.dot(flat, flat)
    else:
        total = tensor.sum(dtype=torch.float32)
    return math.isfinite(total.item()) or bool(tensor.isfinite().all())
