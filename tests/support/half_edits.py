"""A small UNet in float16 with random weights, and edits of it: what healthy backends compute otherwise, and graded faults."""

from __future__ import annotations

import math
from collections.abc import Callable

import small
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.nn import functional

Edit = Callable[[nn.Module], object]
XL = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 3),
    "use_linear_projection": True,
}


def make_model(name: str, seed: int = 0) -> UNet2DConditionModel:
    """Return a model in float16. `default` has PyTorch's usual weights, in which every branch is quiet beside the skips; in
    `lively` and `xl` each layer keeps its input's size, so that rounding grows as in no trained model."""
    model = small.unet(**(XL if name == "xl" else {}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if name == "default":
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.half()


def edit_each(kind: type[nn.Module], edit: Edit, number: int | None = None) -> Edit:
    """Return what edits every module of a kind, or that of a number."""

    def apply(model: nn.Module) -> None:
        modules = [module for module in model.modules() if isinstance(module, kind)]
        for module in modules if number is None else [modules[number]]:
            edit(module)

    return apply


def quantize(bits: int) -> Edit:
    """Weights as integers of that many bits, one scale a tensor."""

    def apply(model: nn.Module) -> None:
        for weight in (weight.data for weight in model.parameters() if weight.ndim > 1):
            step = weight.float().abs().max() / (2 ** (bits - 1) - 1)
            weight.copy_((weight.float() / step).round() * step)

    return apply


def round_mantissa(bits: int) -> Edit:
    """Weights with that many significant bits; float16 has 11, bfloat16 8."""

    def apply(model: nn.Module) -> None:
        for weight in (weight.data for weight in model.parameters()):
            mantissa, exponent = torch.frexp(weight.float())
            weight.copy_(torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent))

    return apply


def compute_in_bfloat16(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data.bfloat16().half()
    layer.register_forward_pre_hook(lambda _, given: (given[0].bfloat16().half(), *given[1:]))
    layer.register_forward_hook(lambda _, __, output: output.bfloat16().half())


def sum_in_float16(norm: nn.GroupNorm) -> None:
    """Sums one after the other in float16, as a kernel of 32 threads makes them."""

    def add_up(values: Tensor) -> Tensor:
        values = functional.pad(values, (0, -values.shape[-1] % 32)).unflatten(-1, (-1, 32))
        total = torch.zeros_like(values[..., 0, :])
        for part in values.unbind(-2):
            total = total + part
        while total.shape[-1] > 1:
            total = total[..., ::2] + total[..., 1::2]
        return total

    def forward(value: Tensor) -> Tensor:
        groups = value.reshape(len(value), norm.num_groups, -1)
        mean = add_up(groups) / groups.shape[-1]
        variance = add_up(groups * groups) / groups.shape[-1] - mean * mean
        normed = ((groups - mean) * torch.rsqrt(variance + norm.eps)).reshape(value.shape)
        shape = (1, -1) + (1,) * (value.ndim - 2)
        return normed * norm.weight.view(shape) + norm.bias.view(shape)

    norm.forward = forward


def unfuse_norm(norm: nn.GroupNorm) -> None:
    """Mean and variance in float32, each step after them rounded."""

    def forward(value: Tensor) -> Tensor:
        groups = value.reshape(len(value), norm.num_groups, -1)
        mean, variance = (part.half() for part in (groups.float().mean(-1, True), groups.float().var(-1, False, True)))
        normed = ((groups - mean) * torch.rsqrt(variance.float() + norm.eps).half()).reshape(value.shape)
        shape = (1, -1) + (1,) * (value.ndim - 2)
        return normed * norm.weight.view(shape) + norm.bias.view(shape)

    norm.forward = forward


def approximate_silu(pieces: int) -> Edit:
    """A sigmoid of straight pieces between -8 and 8."""

    def forward(value: Tensor) -> Tensor:
        place = (value.float().clamp(-8, 8) + 8) * pieces / 16
        low, high = (torch.sigmoid((place.floor() + step) * 16 / pieces - 8) for step in (0, 1))
        return (value.float() * torch.lerp(low, high, place - place.floor())).half()

    return edit_each(nn.SiLU, lambda layer: setattr(layer, "forward", forward))


def split_linear(layer: nn.Linear) -> None:
    """Add products up in pieces of 16, rounded in between, as split-K kernels and float16 accumulators do."""

    def forward(value: Tensor) -> Tensor:
        pairs = zip(value.split(16, -1), layer.weight.split(16, 1), strict=True)
        first, *others = (functional.linear(part, weight) for part, weight in pairs)
        for other in others:
            first = first + other
        return first if layer.bias is None else first + layer.bias

    layer.forward = forward


def set_gelu(function: Callable[[Tensor], Tensor]) -> Edit:
    return edit_each(GEGLU, lambda layer: setattr(layer, "gelu", function))


def scale_attention(factor: float, number: int | None = None) -> Edit:
    return edit_each(Attention, lambda layer: layer.to_q.weight.data.mul_(factor), number)


def set_eps(kind: type[nn.Module], eps: float) -> Edit:
    return edit_each(kind, lambda norm: setattr(norm, "eps", eps))


def change_input(position: int, name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    def hook(_: nn.Module, given: tuple, named: dict) -> tuple:
        if name in named:
            return given, named | {name: change(named[name])}
        return (*given[:position], change(given[position]), *given[position + 1 :]), named

    return lambda model: model.register_forward_pre_hook(hook, with_kwargs=True)


def shift_image(share: float) -> Edit:
    return lambda model: model.conv_out.register_forward_hook(lambda _, __, out: out + share * out.float().std().half())


def combine(*edits: Edit) -> Edit:
    return lambda model: [edit(model) for edit in edits]


SPLIT, UNFUSED_NORM = edit_each(nn.Linear, split_linear), edit_each(nn.GroupNorm, unfuse_norm)
UNFUSED_SILU = edit_each(nn.SiLU, lambda layer: setattr(layer, "forward", lambda value: value * torch.sigmoid(value)))
UNFUSED_GELU = set_gelu(lambda value: value * (torch.erf(value / math.sqrt(2)) + 1) * 0.5)
PLAIN_ATTENTION = lambda model: model.set_attn_processor(AttnProcessor())  # noqa: E731  # one of a list
HEALTHY: dict[str, Edit] = {
    "PyTorch in float16": lambda model: None,
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "computed in float32, as ONNX Runtime's CPU does": lambda model: model.float(),
    "products added in pieces": SPLIT,
    "attention from single operators": PLAIN_ATTENTION,
    "norms from single operators": UNFUSED_NORM,
    "SiLU and GELU from single operators": combine(UNFUSED_SILU, UNFUSED_GELU),
    "all of these four": combine(SPLIT, PLAIN_ATTENTION, UNFUSED_NORM, UNFUSED_SILU, UNFUSED_GELU),
}
FAULTS: dict[str, Edit] = {
    **{f"weights as integers of {bits} bits": quantize(bits) for bits in (8, 9, 10, 11, 12)},
    **{f"weights with {bits} significant bits": round_mantissa(bits) for bits in (8, 9, 10)},
    "tanh-GELU": set_gelu(lambda value: functional.gelu(value, approximate="tanh")),
    "GELU as x·sigmoid(1.702 x)": set_gelu(lambda value: value * torch.sigmoid(1.702 * value)),
    "hard SiLU": edit_each(nn.SiLU, lambda layer: setattr(layer, "forward", functional.hardswish)),
    **{f"SiLU of {pieces} pieces": approximate_silu(pieces) for pieces in (32, 64, 128)},
    **{f"GroupNorm's eps {eps:g}": set_eps(nn.GroupNorm, eps) for eps in (1e-3, 1e-2)},
    **{f"LayerNorm's eps {eps:g}": set_eps(nn.LayerNorm, eps) for eps in (1e-3, 1e-2)},
    **{f"attention's scale times {factor:g}": scale_attention(factor) for factor in (1.003, 1.01, 1.03, 1.1)},
    "one attention's scale times 1.1": scale_attention(1.1, 5),
    "GroupNorm's sums in float16": edit_each(nn.GroupNorm, sum_in_float16),
    "first convolution in bfloat16": edit_each(nn.Conv2d, compute_in_bfloat16, 0),
    "one inner convolution in bfloat16": edit_each(nn.Conv2d, compute_in_bfloat16, 8),
    "all convolutions in bfloat16": edit_each(nn.Conv2d, compute_in_bfloat16),
    "all linear layers in bfloat16": edit_each(nn.Linear, compute_in_bfloat16),
    "one convolution's bias dropped": edit_each(nn.Conv2d, lambda layer: layer.bias.data.zero_(), 8),
    "one convolution times 1.01": edit_each(nn.Conv2d, lambda layer: layer.weight.data.mul_(1.01), 8),
    "the image shifted by 1 %": shift_image(0.01),
    "timestep 0.3 too large": change_input(1, "timestep", lambda value: value + 0.3),
    "text in float8": change_input(2, "encoder_hidden_states", lambda value: value.to(torch.float8_e4m3fn).half()),
}
