"""A session in a model's place: all that UNets and ControlNets share."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, NoReturn, Protocol

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from shapecheck.contract import Contract, ContractError, Mismatch, Role, ShapecheckError, show
from shapecheck.runtime.call_gate import name_dtype
from shapecheck.runtime.dropin_arguments import Arguments
from shapecheck.runtime.dropin_class import ReplacingClass
from shapecheck.runtime.dropin_saving import Source, ask_before_saving, find_nothing

_log = logging.getLogger(__name__)
_BEFORE = "apply it to the PyTorch UNet, then export that"
UNSUPPORTED: Mapping[str, str] = {
    **dict.fromkeys(
        ("add_adapter", "set_adapter", "set_adapters", "fuse_lora", "unfuse_lora", "delete_adapters",
         "disable_lora", "enable_lora", "disable_adapters", "enable_adapters", "active_adapters", "enable_lora_hotswap",
         "load_lora_adapter", "save_lora_adapter", "load_attn_procs", "save_attn_procs"),
        "a LoRA cannot be put into an exported model: load it into the PyTorch UNet, or fuse it there with "
        "pipe.fuse_lora(), then export that, or exchange the weights of the file with shapecheck.rebind",
    ),
    **dict.fromkeys(
        ("_load_ip_adapter_weights", "_load_ip_adapter_loras", "attn_processors", "set_attn_processor",
         "set_default_attn_processor"),
        "an IP-Adapter, PAG or another attention processor cannot be put into an exported model: use the PyTorch UNet with it",
    ),
    **dict.fromkeys(
        ("down_blocks", "mid_block", "up_blocks", "conv_in", "conv_norm_out", "conv_act", "conv_out", "time_proj",
         "time_embedding", "class_embedding", "add_time_proj", "time_embed_act", "position_net", "controlnet_cond_embedding",
         "controlnet_down_blocks", "controlnet_mid_block", "get_time_embed", "get_class_embed", "get_aug_embed",
         "process_encoder_hidden_states"),
        "an exported model has no layers to change, as the scale of an IP-Adapter or LoRA would: use the PyTorch UNet with it",
    ),
    **dict.fromkeys(
        ("set_attention_slice", "set_attention_backend", "reset_attention_backend",
         "enable_xformers_memory_efficient_attention", "disable_xformers_memory_efficient_attention",
         "set_use_memory_efficient_attention_xformers",
         "enable_npu_flash_attention", "disable_npu_flash_attention", "set_use_npu_flash_attention",
         "enable_xla_flash_attention", "disable_xla_flash_attention", "set_use_xla_flash_attention"),
        "how attention is computed cannot be changed, or sliced, in an exported model: its backend chooses",
    ),
    **dict.fromkeys(
        ("load_state_dict", "enable_layerwise_casting", "enable_parallelism", "dequantize"),
        "an exported model has no weights in PyTorch to change: change those of the PyTorch model, then export that",
    ),
    "enable_freeu": "FreeU cannot be switched on in an exported model, nor be exported: use the PyTorch UNet with it",
    "fuse_qkv_projections": f"projections cannot be fused in an exported model: {_BEFORE}",
    "unfuse_qkv_projections": f"projections cannot be unfused in an exported model: {_BEFORE}",
    "enable_gradient_checkpointing": "an exported model cannot be trained",
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


class DropIn(nn.Module, metaclass=ReplacingClass):
    """A session as a module of diffusers: dtype, device and config of the model it stands for, and no weights.

    It computes where its file runs, in the file's precision. `.to()`, and what ends in it, says where and in which precision
    its inputs come: they are converted for each call, and the outputs back. So a pipeline that is moved is never left half
    moved, whatever runs its UNet. `diffusers` asks objects for their class where it saves, and gets its own.
    """

    replaces: Any = None
    """diffusers' class."""

    def __init_subclass__(cls, replaces: Any, **options: Any) -> None:
        """Refuse by name what of the replaced class needs layers or weights, and let it make models in PyTorch alone."""
        super().__init_subclass__(**options)
        cls.replaces = replaces
        for name in UNSUPPORTED:
            if hasattr(replaces, name) and name not in vars(cls):
                setattr(cls, name, property(partial(_refuse, name)))
        for name in ("from_config", "from_pretrained", "from_single_file", "from_unet"):
            if hasattr(replaces, name):
                setattr(cls, name, getattr(replaces, name))

    def _set_up(self, session: DropInSession, role: Role, *, finite: bool, own_outputs: bool) -> None:
        """Hold the session, and the config that pipelines read."""
        contract = session.contract
        if contract.role != role:
            raise ShapecheckError(f"the session's contract: got that of a {contract.role}, expected that of a {role}")
        self.contract, self.engine = contract, session
        self._finite, self._copies = finite, own_outputs and session.reuses_outputs
        self._precision: torch.dtype = getattr(torch, contract.dtype)
        self._arguments = Arguments(contract, session.device)
        self._source: Source = find_nothing
        self._reopen: partial[DropIn] | None = None
        like = torch.empty(0, dtype=self._precision, device=session.device)
        # Programs read device and dtype off the first parameter, and hooks that offload move it.
        self.no_weights = nn.Parameter(like, requires_grad=False)
        self._place, self._warned = like.device, set[object]()  # with the number of a GPU, which a session may leave out
        self.eval()
        names = {"_class_name": contract.class_name, "_diffusers_version": diffusers.__version__}
        self._internal_dict = FrozenDict(contract.config.to_json() | names)
        self.__module__ = self.replaces.__module__
        ask_before_saving()

    @property
    def __class__(self) -> type:
        """Return diffusers' class, which a saved pipeline is to name. The type is ours."""
        model_class: type = type(self).replaces
        return model_class

    @__class__.setter
    def __class__(self, _new: type) -> None:
        raise ShapecheckError("the class of an exported model cannot be changed")

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision in which it takes its inputs: that of its file, unless `.to()` said another."""
        return self._parameters["no_weights"].dtype  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        """Return where it takes its inputs: where its file runs, unless `.to()` said another place."""
        return self._parameters["no_weights"].device  # type: ignore[union-attr]

    @property
    def is_converted(self) -> bool:
        """Return whether inputs come in another precision or from another device than the file's."""
        return self.dtype != self._precision or self.device != self._place

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
        given = self._convert(inputs) if self.is_converted else inputs
        outputs = self.engine(given, **options, **({"own_outputs": True} if self._copies else {}))
        if self.is_converted:
            outputs = {name: value.to(self.device, self.dtype) for name, value in outputs.items()}
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

    def _convert(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs as the file takes them: from where, and in the precision, in which `.to()` said they come."""
        converted = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                device = self._place if value.device == self.device else value.device
                wanted = self.contract.input_dtypes.get(name)
                dtype = getattr(torch, wanted) if wanted and value.dtype == self.dtype else value.dtype
                converted[name] = value.to(device, dtype)
        return converted

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DropIn:
        """Take inputs as `.to()`, `.half()`, `.cuda()` or others say, which end here; the session stays as it is."""
        moved = fn(torch.empty_like(self.no_weights))
        if moved.is_meta or moved.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            what = f"runs on {self._place}" if moved.is_meta else f"computes in {name_dtype(self._precision)}"
            raise ShapecheckError(
                f"this session {what}: it takes no inputs {'on meta' if moved.is_meta else 'in ' + name_dtype(moved.dtype)}"
            )
        if moved.dtype not in {self._precision, *self._warned}:
            _log.warning(
                "this session computes in %s, the precision of its file, and converts what comes in %s: export again with "
                "--dtype %s to spare that",
                *map(name_dtype, (self._precision, moved.dtype, moved.dtype)),
            )
        if moved.device not in {self._place, *self._warned}:
            _log.warning(
                "this session runs on %s, and copies what comes from %s: load it again for there to spare that "
                "(backend=, device=)",
                self._place,
                moved.device,
            )
        self._warned |= {moved.dtype, moved.device}  # once: hooks that offload move it for every picture
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    to = nn.Module.to  # without a warning of ModelMixin's, of weights that stay in float32

    def come_from(self, source: Source, reopen: partial[DropIn] | None = None) -> None:
        """Say where the PyTorch model is to be found that `save_pretrained` writes, and what opens the session again."""
        self._source, self._reopen = source, reopen or self._reopen

    def require_savable(self) -> Callable[[], ModelMixin]:
        """Return what loads the PyTorch model. Raises UnsupportedError if nobody knows it."""
        try:
            return self._source()
        except ShapecheckError as error:
            raise UnsupportedError(
                f"save_pretrained: the {type(self).replaces.__name__} in PyTorch that this one was made from is not known: "
                f"{error}; put it back into the pipeline before you save, or name its folder: shapecheck.load(…, model=FOLDER)"
            ) from None

    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        model = self.require_savable()()
        if self.dtype != self._precision and model.dtype != self.dtype:
            model = copy.deepcopy(model).to(self.dtype)
        model.save_pretrained(save_directory, *arguments, **options)

    def __copy__(self) -> DropIn:
        """Return another module of the same session."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> DropIn:
        """Return one with a session of its own, opened again."""
        reopen = self._require_reopening("copy.deepcopy")
        again = memo[id(self)] = copy.deepcopy(reopen, memo)()
        if not isinstance(reopen.args[0], nn.Module):
            again.come_from(self._source)
        return again.to(self.device, self.dtype)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        """Pickle how the session was opened; it is opened again from the same file, which has to be there."""
        return _open_again, (self._require_reopening("pickle"), self.device, self.dtype)

    def _require_reopening(self, what: str) -> partial[DropIn]:
        if self._reopen is None:
            raise UnsupportedError(
                f"{what}: a session that is open cannot be copied, and nobody said what it was opened from: use "
                "shapecheck.load, and load the file again for the copy"
            )
        return self._reopen

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Return one empty tensor, which is all that hooks that offload need, and log that there are no weights."""
        _log.warning("an exported model has no weights in its state_dict(): save_pretrained writes those of the PyTorch model")
        return super().state_dict(*arguments, **options)

    def requires_grad_(self, requires_grad: bool = True) -> DropIn:
        """Do nothing, or refuse to be trained."""
        if requires_grad:
            raise UnsupportedError("requires_grad_: an exported model cannot be trained")
        return self

    def compile(self, *_: Any, **__: Any) -> None:
        """Do nothing: it is compiled already."""

    def compile_repeated_blocks(self, *_: Any, **__: Any) -> None:
        """Do nothing: it is compiled already."""

    def unload_lora(self) -> None:
        """Do nothing: a LoRA that it computes with is part of the file."""

    def disable_gradient_checkpointing(self) -> None:
        """Do nothing: it is never on."""

    def __getattr__(self, name: str) -> Any:
        if name in UNSUPPORTED:
            raise UnsupportedError(f"{name}: {UNSUPPORTED[name]}")
        return super().__getattr__(name)


def _refuse(name: str, _self: object) -> NoReturn:
    raise UnsupportedError(f"{name}: {UNSUPPORTED[name]}")


def _open_again(reopen: partial[DropIn], device: torch.device, dtype: torch.dtype) -> DropIn:
    return reopen().to(device, dtype)


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
