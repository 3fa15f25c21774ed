"""Copy a UNet or ControlNet for torch.compile: the same weights, the same numbers, fewer and larger kernels."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

_KNOWN_BLOCKS = frozenset(
    ("CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
)
"""Blocks known to use text and time only in projections that may be computed before them."""


class _Interruption(threading.local):
    call: Callable[[], None] | None = None


_interruption = _Interruption()


# Declared to change the residuals, so that no compiler reads them before it; `after` is what it must not come before.
@torch.library.custom_op(
    "shapecheck::await_residuals", mutates_args=("residuals",), schema="(Tensor(a!)[] residuals, Tensor after) -> ()"
)
def await_residuals(residuals: Sequence[Tensor], after: Tensor) -> None:
    """Mark where a UNet has done all that it can do without residuals."""
    if _interruption.call is not None:
        _interruption.call()


await_residuals.register_fake(lambda residuals, after: None)


@contextmanager
def at_residuals(call: Callable[[], None]) -> Iterator[None]:
    """Call a function whenever a UNet comes to where it reads its residuals, for the length of a `with`."""
    _interruption.call = call
    try:
        yield
    finally:
        _interruption.call = None


class _Slice(nn.Module):
    """Stands for a linear layer whose product was computed with those of others: returns its columns."""

    def __init__(self, begin: int, end: int) -> None:
        super().__init__()
        self.begin, self.end = begin, end

    def forward(self, products: Tensor) -> Tensor:
        return products[..., self.begin : self.end]


class _JoinedLinear(nn.Module):
    """Several linear layers of one input in one product, after an activation if there is one."""

    def __init__(self, layers: Sequence[nn.Linear], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else nn.Parameter(torch.cat([b.detach() for b in biases]), requires_grad=False)
        self.activation = activation

    def forward(self, values: Tensor) -> Tensor:
        return functional.linear(values if self.activation is None else self.activation(values), self.weight, self.bias)


class CompiledModel(nn.Module):
    """A model whose text and time projections are computed at once, and its self-attention's likewise.

    `forward` takes diffusers' keyword arguments. Its weights are the storage of the given module's, but for those that are
    joined and, on a GPU, those of convolutions, which are kept in the order that its kernels read (channels last).
    With `marks_residuals` a UNet says where it comes to them: see `at_residuals`.
    """

    def __init__(self, module: nn.Module, *, marks_residuals: bool = False) -> None:
        super().__init__()
        on_gpu = next(module.parameters()).is_cuda
        memo: dict[int, Any] = {}
        for value in module.parameters():
            order = torch.channels_last if value.dim() == 4 else torch.contiguous_format
            memo[id(value)] = nn.Parameter(value.detach().contiguous(memory_format=order) if on_gpu else value.detach(), False)
        self.model = cast("Any", copy.deepcopy(module, memo).eval())
        self.text: nn.Module | None = None
        blocks = [*self.model.down_blocks, self.model.mid_block, *getattr(self.model, "up_blocks", ())]
        if all(type(block).__name__ in _KNOWN_BLOCKS for block in blocks if block is not None):
            self._join_attention()
            if hasattr(self.model, "time_embed_act"):
                self._join_time()
        self._residuals: list[Tensor] | None = None
        if marks_residuals and hasattr(self.model, "up_blocks"):
            self.model.down_blocks[-1].register_forward_hook(self._mark_residuals)

    def forward(self, **arguments: Any) -> Any:
        if self.text is not None:
            arguments["encoder_hidden_states"] = self.text(arguments["encoder_hidden_states"])
        if (mid := arguments.get("mid_block_additional_residual")) is not None:
            self._residuals = [*arguments["down_block_additional_residuals"], mid]
        outputs = self.model(**arguments, return_dict=False)
        self._residuals = None
        return outputs

    def _mark_residuals(self, _block: nn.Module, _arguments: Any, outputs: tuple[Tensor, Any]) -> None:
        if self._residuals is not None:
            await_residuals(self._residuals, outputs[0])

    def _join_attention(self) -> None:
        """Compute keys and values of the text for all layers at once, and query, key and value of each other layer."""
        layers = [module for module in self.model.modules() if isinstance(module, Attention)]
        if any(type(layer.processor) is not AttnProcessor2_0 or not _is_plain(layer) for layer in layers):
            return
        crossing = [layer for layer in layers if layer.is_cross_attention]
        for layer in layers:
            if not layer.is_cross_attention:
                layer.fuse_projections()
                layer.set_processor(FusedAttnProcessor2_0())
                del layer.to_q, layer.to_k, layer.to_v
        projections = [projection for layer in crossing for projection in (layer.to_k, layer.to_v)]
        if not projections or not _are_joinable(projections) or getattr(self.model, "encoder_hid_proj", None) is not None:
            return
        if any(layer.norm_cross for layer in crossing) or _reads_text_elsewhere(self.model):
            return
        self.text, begin = _JoinedLinear(projections), 0
        for layer in crossing:
            width = layer.to_k.out_features
            layer.to_k, layer.to_v = _Slice(begin, begin + width), _Slice(begin + width, begin + 2 * width)
            begin += 2 * width

    def _join_time(self) -> None:
        """Compute what every residual block adds for the time step in one product."""
        resnets: list[Any] = [module for module in self.model.modules() if isinstance(module, ResnetBlock2D)]
        projections = [resnet.time_emb_proj for resnet in resnets]
        activations = {type(resnet.nonlinearity) for resnet in resnets} | {resnet.skip_time_act for resnet in resnets}
        if not _are_joinable(projections) or len(activations) != 2:
            return
        activation = None if resnets[0].skip_time_act else resnets[0].nonlinearity
        joined, begin = _JoinedLinear(projections, activation), 0
        before = self.model.time_embed_act
        self.model.time_embed_act = joined if before is None else nn.Sequential(before, joined)
        for resnet in resnets:
            width = resnet.time_emb_proj.out_features
            resnet.time_emb_proj, resnet.skip_time_act = _Slice(begin, begin + width), True
            begin += width


def _is_plain(layer: Attention) -> bool:
    """Return whether query, key and value are linear layers of their own, with nothing beside them such as a LoRA."""
    return all(type(getattr(layer, name, None)) is nn.Linear for name in ("to_q", "to_k", "to_v")) and layer.add_k_proj is None


def _are_joinable(layers: Sequence[nn.Module | None]) -> bool:
    """Return whether these are linear layers of one input width, all with a bias or all without."""
    kinds = {(layer.in_features, layer.bias is None) if type(layer) is nn.Linear else None for layer in layers}
    return len(kinds) == 1 and None not in kinds


def _reads_text_elsewhere(model: nn.Module) -> bool:
    """Return whether something else than cross-attention reads the text, such as the embedding of added conditions."""
    return getattr(model.config, "addition_embed_type", None) not in (None, "text_time")
