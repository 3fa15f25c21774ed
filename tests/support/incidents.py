"""Incidents of probes/incidents acted out with today's libraries: the text each really raises, on a UNet a tenth as wide."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import traceback
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_files
import onnxruntime as ort
import small
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from small import fill_zero_convolutions
from spoilt import Shape

from shapecheck import Contract, Geometry, presets, probe

FOLDER = Path(__file__).parents[2] / "probes" / "incidents"
SCALE = 10
"""How many times narrower than its preset the UNet is that acts an incident out."""
DEEP = "deep"
"""In place of a preset: the UNet of nine slots whose graph other tests read too, for runtimes that know nothing of families."""


@dataclass(frozen=True)
class Incident:
    """One file of the catalogue."""

    name: str
    story: str
    model: str
    setup: dict[str, Any]
    expect: dict[str, Any]
    text: str = ""
    threads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Acted:
    """What happened."""

    text: str
    traceback: str
    contract: Contract
    at: Geometry
    given: tuple[tuple[Shape, ...], Shape | None] | None = None


def read(path: Path) -> Incident:
    return Incident(path.stem, **tomllib.loads(path.read_text(encoding="utf-8")))


def act(incident: Incident, folder: Path) -> Acted:
    """Act an incident out. `text` is empty where nothing is raised and nothing warned."""
    return _STAGES[incident.setup["how"]](incident.setup, incident.model, folder)


def narrow(model: str, **changes: Any) -> UNet2DConditionModel:
    """The preset's UNet, a tenth as wide."""
    if model == DEEP:
        return small.unet(**onnx_files.DEEP | changes)
    config = dict(presets.load(model).config)
    widths = [width // SCALE for width in config["block_out_channels"]]
    heads = 4 if isinstance(config["attention_head_dim"], int) else [4] * len(widths)
    own = {"block_out_channels": widths, "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": heads}
    if config.get("addition_embed_type") == "text_time":
        own |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    if isinstance(config.get("transformer_layers_per_block"), list):
        own["transformer_layers_per_block"] = 1
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(config | own | changes).eval()


@cache
def contract_of(model: str, **changes: Any) -> Contract:
    """What the narrow UNet of a preset takes."""
    return probe(narrow(model, **changes).to("meta"))


@cache
def _session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _pair(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def _shape(row: list[int], batch: int = 2) -> Shape:
    return (batch, row[0] // SCALE, *row[1:])


def _zeros(shape: Shape | None, **options: Any) -> torch.Tensor | None:
    return None if shape is None else torch.zeros(shape, **options)


def _caught(call) -> tuple[str, str]:
    """What a call raises, in a line and with its traceback; what it warns of, where it raises nothing."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:  # whatever it is, it is what a user would paste
            return f"{type(error).__name__}: {error}", traceback.format_exc()
    texts = [str(each.message) for each in told if "intrablock" in str(each.message)]
    return ("\n".join(texts),) * 2


def _arguments(contract: Contract, at: Geometry, **options: Any) -> dict[str, Any]:
    """Zeros for every base input, as diffusers' forward takes them."""
    given: dict[str, Any] = {}
    for each in contract.inputs:
        group, _, key = each.argument.rpartition(".")
        dtype = torch.float32 if each.name == "timestep" else options.get("dtype", torch.float32)
        value = torch.zeros(each.shape_at(at), device=options.get("device"), dtype=dtype)
        (given.setdefault(group, {}) if group else given)[key] = value
    return given


def _called(setup: dict[str, Any], unet: UNet2DConditionModel, contract: Contract, at: Geometry, **options: Any):
    """The call with the residuals of the set-up, and their shapes."""
    if "down" in setup:
        downs, mid = tuple(map(_shape, setup["down"])), _shape(setup["mid"]) if "mid" in setup else None
    else:
        shapes = _shapes(setup, contract, at)
        downs, mid = tuple(shapes.values())[:-1], list(shapes.values())[-1]
    residuals = [_zeros(shape, device=options.get("device")) for shape in downs]

    def call() -> None:
        unet(
            **_arguments(contract, at, **options),
            down_block_additional_residuals=tuple(residuals) if setup.get("tuple") else residuals,
            mid_block_additional_residual=_zeros(mid, device=options.get("device")),
        )

    return call, (downs, mid)


def _shapes(setup: dict[str, Any], contract: Contract, at: Geometry) -> dict[str, Shape]:
    """Right shapes but for those the set-up has otherwise."""
    return contract.shapes(at) | {name: _shape(row, at.batch) for name, row in setup.get("shapes", {}).items()}


def _torch(setup: dict[str, Any], model: str, folder: Path, device: str = "cpu") -> Acted:
    unet = narrow(model).to(device)
    contract, at = contract_of(model), Geometry(2, *_pair(setup["latent"]), 7)
    dtype = getattr(torch, setup.get("dtype", "float32"))
    call, given = _called(setup, unet.to(dtype), contract, at, device=device, dtype=dtype)
    return Acted(*_caught(call), contract, at, given)


def _meta(setup: dict[str, Any], model: str, folder: Path) -> Acted:
    return _torch(setup, model, folder, "meta")


def _compile(setup: dict[str, Any], model: str, folder: Path) -> Acted:
    unet = narrow(model)
    contract, at = contract_of(model), Geometry(2, *_pair(setup["latent"]), 7)
    call, given = _called(setup, torch.compile(unet, backend="eager"), contract, at)
    try:
        return Acted(*_caught(call), contract, at, given)
    finally:
        torch.compiler.reset()


class _Flat(torch.nn.Module):
    def __init__(self, unet: torch.nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, base, downs, mid):
        return self.unet(**base, down_block_additional_residuals=downs, mid_block_additional_residual=mid, return_dict=False)


def _export(setup: dict[str, Any], model: str, folder: Path) -> Acted:
    unet = narrow(model).to("meta")
    contract, at = contract_of(model), Geometry(2, *_pair(setup["latent"]), 7)
    shapes = _shapes(setup, contract, at)
    tensors = [torch.zeros(shape, device="meta") for shape in shapes.values()]
    base = _arguments(contract, at, device="meta")
    auto = torch.export.Dim.AUTO
    spatial = {0: auto, 2: auto, 3: auto}
    dims = {name: spatial if value.dim() == 4 else dict.fromkeys(range(value.dim() - 1), auto) for name, value in base.items()}
    dynamic = (dims, [dict(spatial) for _ in tensors[:-1]], dict(spatial))
    call = lambda: torch.export.export(_Flat(unet), (base, tensors[:-1], tensors[-1]), dynamic_shapes=dynamic)  # noqa: E731
    return Acted(*_caught(call), contract, at, (tuple(shapes.values())[:-1], list(shapes.values())[-1]))


def _feed(setup: dict[str, Any], contract: Contract, at: Geometry) -> dict[str, np.ndarray]:
    shapes = contract.input_shapes(at) | _shapes(setup, contract, at)
    dtypes = {name: np.dtype(dtype) for name, dtype in contract.input_dtypes.items()}
    feed = {
        name: np.zeros(shape, np.float16 if name in setup.get("half", ()) else dtypes[name]) for name, shape in shapes.items()
    }
    feed = {name: value for name, value in feed.items() if name not in setup.get("leave_out", ())}
    renamed = setup.get("rename", {})
    return feed | {new: feed[old] for old, new in renamed.items()}


@cache
def _written(model: str, traced: tuple[int, int], folder: Path) -> tuple[Path, Contract]:
    return onnx_files.written(folder / f"{model}-{traced[0]}x{traced[1]}.onnx", narrow(model), latent=traced)


def _graph(setup: dict[str, Any], model: str, folder: Path) -> tuple[Path, Contract, Geometry]:
    at = Geometry(2, *_pair(setup["latent"]), 7)
    usual = (16, 24) if model == DEEP else (17, 25)
    return *_written(model, _pair(setup["traced"]) if "traced" in setup else usual, folder), at


def _onnxruntime(setup: dict[str, Any], model: str, folder: Path) -> Acted:
    path, contract, at = _graph(setup, model, folder)
    return Acted(*_caught(lambda: _session(path).run(None, _feed(setup, contract, at))), contract, at)


_POLYGRAPHY = """
import sys, numpy as np
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.backend.common import BytesFromPath
feed = dict(np.load(sys.argv[2]))
with OnnxrtRunner(SessionFromOnnx(sys.argv[1], providers=["CPUExecutionProvider"])) as runner:
    runner.infer(feed)
"""
_RTX = """
import json, sys
import tensorrt_rtx
logger = tensorrt_rtx.Logger()
builder = tensorrt_rtx.Builder(logger)
network = builder.create_network(0)
assert tensorrt_rtx.OnnxParser(network, logger).parse_from_file(sys.argv[1])
config = builder.create_builder_config()
made = builder.create_optimization_profile()
for name, shape in json.loads(sys.argv[2]).items():
    made.set_shape(name, shape, shape, shape)
config.add_optimization_profile(made)
assert builder.build_serialized_network(network, config) is None
"""


def _said_by(code: str, *arguments: str) -> tuple[str, str]:
    """Everything a process of its own writes."""
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=300)
    text = ran.stdout + ran.stderr
    return text, text


def _polygraphy(setup: dict[str, Any], model: str, folder: Path) -> Acted:
    path, contract, at = _graph(setup, model, folder)
    np.savez(folder / "feed.npz", **_feed(setup, contract, at))
    return Acted(*_said_by(_POLYGRAPHY, str(path), str(folder / "feed.npz")), contract, at)


def _rtx(setup: dict[str, Any], model: str, folder: Path) -> Acted:
    path, contract, at = _graph(setup, model, folder)
    shapes = {name: value.shape for name, value in _feed(setup, contract, at).items()}
    return Acted(*_said_by(_RTX, str(path), json.dumps(shapes)), contract, at)


def _controlnet(setup: dict[str, Any], model: str, folder: Path) -> Acted:
    """The ControlNet itself, at the UNet's own text width; called with another text or image."""
    own = presets.load(model).config["cross_attention_dim"]
    unet = narrow(model, cross_attention_dim=own)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8), load_weights_from_unet=False)
    fill_zero_convolutions(net)
    width, height = map(int, setup.get("image", "192x128").split("x"))
    sample, text = torch.zeros(2, 4, 16, 24), torch.zeros(2, 77, setup.get("given_text", own))
    call = lambda: net(sample, 1, text, torch.zeros(2, 3, height, width), return_dict=False)  # noqa: E731
    return Acted(*_caught(call), contract_of(model, cross_attention_dim=own), Geometry(2, 16, 24, 77))


def _from_unet(setup: dict[str, Any], model: str, folder: Path) -> Acted:
    changes = {key: None if value == "none" else value for key, value in setup["config"].items()}
    unet = narrow(model, **changes)
    return Acted(*_caught(lambda: ControlNetModel.from_unet(unet)), contract_of(model), Geometry(1, 16, 16))


def _lora(setup: dict[str, Any], model: str, folder: Path) -> Acted:
    """Low-rank weights of another width, added by a function of that name in a file of that name."""
    code = compile("def add_lora_delta(x, down, up):\n    return x + down @ up\n", "lora.py", "exec")
    space: dict[str, Any] = {}
    exec(code, space)  # our own two lines, under the name that a traceback is to show
    call = lambda: space["add_lora_delta"](torch.zeros(2, 32, 4, 4), torch.zeros(2, 64, 4, 4), torch.eye(4))  # noqa: E731
    _, told = _caught(call)
    return Acted(told, told, contract_of(model), Geometry(2, 16, 24, 7))


_STAGES = {
    "torch": _torch,
    "meta": _meta,
    "export": _export,
    "compile": _compile,
    "onnxruntime": _onnxruntime,
    "polygraphy": _polygraphy,
    "tensorrt-rtx": _rtx,
    "controlnet": _controlnet,
    "from_unet": _from_unet,
    "lora": _lora,
}
