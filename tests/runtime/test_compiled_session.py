"""A model for torch.compile computes what the module does; what was compiled is shared, kept and found again, and told apart.

The default tests compile with `eager`, which runs what PyTorch traced: a second instead of a minute. One test has Inductor.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import re
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import small
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch._dynamo.utils import counters

import shapecheck
from shapecheck import Geometry, ShapecheckError
from shapecheck.models.forward_call import build_arguments
from shapecheck.observe.subject import resolve_subject
from shapecheck.runtime import compiled_code
from shapecheck.runtime.binding import CallError
from shapecheck.runtime.compiled_model import CompiledModel
from shapecheck.runtime.compiled_session import CompiledSession
from shapecheck.runtime.torch_session import output_names

LEAST = small.TINY | {"mid_block_type": None}
"""A level without a middle: compiling takes as long as the model is deep."""
AT, OTHER = Geometry(2, 9, 13, 7), Geometry(1, 11, 8, 5)
MIXED = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
"""Cross-attention in some blocks, of two widths."""
COMPILES_AHEAD = hasattr(torch.compiler, "load_compiled_function")
"""PyTorch before 2.9 keeps nothing, and guards what it compiled by the model: each compiles anew."""
UNETS = {
    "sd15": {},
    "some blocks": MIXED,
    "sdxl": MIXED | small.TEXT_TIME | {"use_linear_projection": True, "transformer_layers_per_block": (1, 2, 2)},
    "only cross-attention": MIXED | {"only_cross_attention": (False, True, False), "mid_block_only_cross_attention": True},
    "class labels": small.SHALLOW | {"class_embed_type": "timestep"},
    "an activation of the time": small.SHALLOW | {"time_embedding_act_fn": "silu"},
    "scale and shift": small.SHALLOW | {"resnet_time_scale_shift": "scale_shift"},
    "time not activated again": small.SHALLOW | {"resnet_skip_time_act": True},
    "no mid block": small.SHALLOW | {"mid_block_type": None},
}


def contract_of(module):
    return resolve_subject(module).contract("float32", control=True)


def draw(contract, geometry=AT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = contract.input_shapes(geometry)
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return inputs | {"timestep": torch.linspace(3, 997, geometry.batch)}


def compute(module, contract, inputs):
    """The module's own outputs, in the contract's order."""
    with torch.no_grad():
        first, *mid = module(**build_arguments(contract, inputs), return_dict=False)
    return [first] if contract.role == "unet" else [*first, *mid]


def are_close(found, expected):
    return all(
        bool(((one - other).abs().max() <= 1e-5 * other.abs().max()).item()) for one, other in zip(found, expected, strict=True)
    )


def run_copy(module, contract, inputs):
    """Return the outputs of the copy that is compiled, not compiled."""
    with torch.no_grad():
        first, *mid = CompiledModel(module)(**build_arguments(contract, inputs))
    return [first] if contract.role == "unet" else [*first, *mid]


def count_linear(module):
    return sum(isinstance(layer, torch.nn.Linear) for layer in module.modules())


@pytest.mark.parametrize("kind", UNETS)
def test_the_copy_computes_what_the_unet_does_with_fewer_products(kind):
    unet = small.unet(**UNETS[kind])
    contract = contract_of(unet)
    for seed, geometry in enumerate((AT, OTHER)):
        inputs = draw(contract, geometry, seed)
        assert are_close(run_copy(unet, contract, inputs), compute(unet, contract, inputs))
    assert count_linear(CompiledModel(unet)) < count_linear(unet)


def test_the_copy_computes_what_the_controlnet_does():
    for changes in ({}, UNETS["sdxl"]):
        net = small.controlnet(small.unet(**changes))
        contract = contract_of(net)
        inputs = draw(contract)
        found = run_copy(net, contract, inputs)
        assert are_close(found, compute(net, contract, inputs))
        assert len(found) == len(contract.slots)
        assert count_linear(CompiledModel(net)) < count_linear(net)


SIMPLE = small.SHALLOW | {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}


def with_processor(unet):
    next(iter(unet.mid_block.attentions)).transformer_blocks[0].attn2.set_processor(AttnProcessor())
    return unet


def with_lora(unet):
    """Add to a projection as a LoRA does: a layer of another class in its place."""

    class LoraLinear(torch.nn.Linear):
        def forward(self, values):
            return super().forward(values) + 0.5 * values[..., :1]

    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_k.__class__ = LoraLinear
    return unet


@pytest.mark.parametrize(
    ("make", "time_is_joined"),
    [
        (lambda: small.unet(**SIMPLE), False),
        (lambda: with_processor(small.unet(**small.SHALLOW)), True),
        (lambda: with_lora(small.unet(**small.SHALLOW)), True),
    ],
    ids=["unknown blocks", "a processor of its own", "a LoRA"],
)
def test_what_is_not_known_stays_as_it_is(make, time_is_joined):
    unet = make()
    contract, copied = contract_of(unet), CompiledModel(unet)
    inputs = draw(contract)
    assert are_close(run_copy(unet, contract, inputs), compute(unet, contract, inputs))
    assert copied.text is None
    processors = {type(layer) for layer in unet.attn_processors.values()}
    assert {type(layer) for layer in copied.model.attn_processors.values()} == processors
    assert (count_linear(copied) < count_linear(unet)) is time_is_joined


@pytest.mark.parametrize(
    "changes",
    [{"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 12}, {"addition_embed_type": "text", "cross_attention_dim": 64}],
)
def test_text_that_something_else_reads_is_not_joined(changes):
    unet = small.unet(**small.SHALLOW | changes)
    contract = contract_of(unet)
    inputs = draw(contract)
    assert CompiledModel(unet).text is None
    assert are_close(run_copy(unet, contract, inputs), compute(unet, contract, inputs))


def test_the_given_module_is_left_as_it_was_and_shares_its_weights():
    unet = small.unet(**small.SHALLOW)
    unet.train()
    hook = unet.register_forward_hook(lambda *_: None)
    before = {name: (value, value.clone(), value.stride(), value.requires_grad) for name, value in unet.named_parameters()}
    copied = CompiledModel(unet)
    CompiledSession(unet, contract_of(unet))
    after = dict(unet.named_parameters())
    assert after.keys() == before.keys()
    for name, (value, numbers, stride, trained) in before.items():
        assert after[name] is value and torch.equal(value, numbers) and value.stride() == stride
        assert value.requires_grad is trained
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    assert list(unet._forward_hooks) == [hook.id]
    assert unet.training and not copied.model.training
    assert copied.model.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr()


@pytest.fixture
def compiled(monkeypatch):
    """Count what is compiled, from nothing compiled on."""
    monkeypatch.setattr(compiled_code, "compiled_code", {})
    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


def open_session(module, **options):
    return CompiledSession(module, contract_of(module), compiler="eager", **options)


def other_weights(unet):
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.1)
    return other


def serve_sizes_and_models(compiled, codes):
    """Two sizes in turns, control on and off, two models of one structure: each size is compiled once for all, or for each."""
    unet = small.unet(**LEAST)
    models = [unet, other_weights(unet)]
    contract = contract_of(unet)
    sessions = [open_session(model) for model in models]
    for number, geometry in enumerate((AT, OTHER, OTHER, AT)):
        for model, session in zip(models, sessions, strict=True):
            inputs = draw(contract, geometry, number)
            off = inputs | {slot.name: torch.zeros_like(inputs[slot.name]) for slot in contract.slots}
            on = list(session(inputs).values())
            assert are_close(on, compute(model, contract, inputs))
            assert are_close(session(off).values(), compute(model, contract, off))
            assert are_close(on, compute(model, contract, inputs))  # an output is the caller's
    assert not are_close(sessions[0](inputs).values(), sessions[1](inputs).values())
    assert compiled() == codes


def test_each_size_is_compiled_once_for_all_models_of_a_structure(compiled):
    serve_sizes_and_models(compiled, codes=2 if COMPILES_AHEAD else 4)


@pytest.mark.full
def test_a_pytorch_that_cannot_compile_ahead_serves_the_same(compiled, monkeypatch, tmp_path):
    monkeypatch.delattr(torch.compiler, "load_compiled_function", raising=False)
    serve_sizes_and_models(compiled, codes=4)
    session = open_session(small.unet(**LEAST), cache=tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert session(draw(session.contract))["out_sample"].dtype == torch.float32
    assert not list(tmp_path.iterdir())  # it keeps nothing


@pytest.mark.skipif(COMPILES_AHEAD, reason="this PyTorch does not guard code by its model")
def test_an_older_pytorch_serves_model_after_model(unet, inputs, monkeypatch):
    """As an exchange of ControlNets is: PyTorch compiles a function for eight models, and refuses the ninth."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    monkeypatch.setattr(torch._dynamo.config, limit, 1)
    for _ in range(3):
        model = other_weights(unet)
        with open_session(model) as session:
            assert are_close(session(inputs).values(), compute(model, session.contract, inputs))


@pytest.fixture(scope="module")
def unet():
    return small.unet(**LEAST)


@pytest.fixture(scope="module")
def inputs(unet):
    return draw(contract_of(unet))


@pytest.mark.full
@pytest.mark.skipif(not COMPILES_AHEAD, reason="this PyTorch keeps nothing")
def test_what_was_compiled_is_found_again_in_its_folder(compiled, unet, inputs, tmp_path, monkeypatch, caplog):
    written = []
    whole = compiled_code.atomic_write
    monkeypatch.setattr(compiled_code, "atomic_write", lambda path: written.append(path) or whole(path))
    open_session(unet, cache=tmp_path)(inputs)
    (file,) = tmp_path.iterdir()
    assert written == [file]  # under its name only when it is whole
    monkeypatch.setattr(compiled_code, "compiled_code", {})
    other = other_weights(unet)
    found = open_session(other, cache=tmp_path)(inputs)
    assert are_close(found.values(), compute(other, contract_of(unet), inputs))
    assert (compiled(), list(tmp_path.iterdir())) == (1, [file])

    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2])
    monkeypatch.setattr(compiled_code, "compiled_code", {})
    with caplog.at_level(logging.WARNING):
        found = open_session(unet, cache=tmp_path)(inputs)
    assert are_close(found.values(), compute(unet, contract_of(unet), inputs))
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("shapecheck")]
    assert told.startswith(f"{file} cannot be loaded, and is compiled again: ")
    assert compiled() == 2
    assert file.stat().st_size > len(kept) // 2


@pytest.mark.skipif(not COMPILES_AHEAD, reason="this PyTorch keeps nothing")
def test_code_that_cannot_be_kept_runs_all_the_same(compiled, unet, inputs, tmp_path, caplog):
    for _ in range(2):
        found = open_session(unet, cache=tmp_path / "lost")(inputs)
        assert are_close(found.values(), compute(unet, contract_of(unet), inputs))
    (told,) = [record.getMessage() for record in caplog.records if record.name.startswith("shapecheck")]
    assert re.match(r".*lost.compiled-\w{16}\.bin cannot be written, and is compiled again in the next process: .*lost", told)
    assert compiled() == 1


def name_file(module, contract, folder, monkeypatch, geometry=AT, compiler="eager"):
    """Return the name under which a model's code is kept, if it is. Nothing is compiled: an empty file is written."""
    monkeypatch.setattr(compiled_code, "compiled_code", {})

    def pretend(forward, tensors, file, compiler):
        if file is not None:
            file.touch()
        return lambda forward, *tensors: (tensors[0],) * len(output_names(contract))

    monkeypatch.setattr(compiled_code, "compile_forward", pretend)
    for file in folder.iterdir():
        file.unlink()
    with CompiledSession(module, contract, cache=folder, compiler=compiler) as session:
        session(draw(contract, geometry))
    names = [file.name for file in folder.iterdir()]
    assert len(names) <= 1
    return names[0] if names else "not kept"


def test_only_the_same_computation_has_the_same_file(unet, tmp_path, monkeypatch):
    """Other weights may share it; a setting that only the config holds, an option, a release may not. A hook has none."""
    contract = contract_of(unet)

    def name(module, contract=contract, **how):
        return name_file(module, contract, tmp_path, monkeypatch, **how)

    first = name(unet)
    assert name(other_weights(unet)) == first
    centred = copy.deepcopy(unet)
    centred.register_to_config(center_input_sample=True)
    moved = copy.deepcopy(unet)
    moved.register_to_config(_name_or_path="/somewhere/else")
    assert name(moved) == first
    hooked, halved, slower = copy.deepcopy(unet), copy.deepcopy(unet), copy.deepcopy(unet)
    hooked.conv_in.register_forward_hook(lambda module, inputs, output: output * 2)
    halved.conv_in.padding_mode = "circular"
    slower.set_attn_processor(AttnProcessor())
    assert name(hooked) == "not kept"
    others = [name(module) for module in (centred, halved, slower)]
    others += [name(unet, geometry=OTHER), name(unet, compiler="aot_eager")]
    nets = [small.controlnet(small.unet(**small.TINY)) for _ in range(2)]
    nets[1].register_to_config(controlnet_conditioning_channel_order="bgr")
    others += [name(net, contract_of(nets[0])) for net in nets]
    with monkeypatch.context() as patch:
        patch.setattr(compiled_code, "OPTIONS", {"conv_1x1_as_mm": False})
        others.append(name(unet))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99.0")
        others.append(name(unet))
    with monkeypatch.context() as patch:
        patch.setattr(compiled_code, "version", lambda package: "0.99.0")
        others.append(name(unet))
    assert len({first, *others}) == 1 + len(others)


def test_a_refused_call_names_what_is_wrong_and_the_next_is_served(unet, inputs):
    with open_session(unet) as session:
        before = session(inputs)["out_sample"]
        with pytest.raises(CallError, match=r"sample: dtype: got float16, expected float32"):
            session(inputs | {"sample": inputs["sample"].half()})
        with pytest.raises(CallError, match=r"mid_block_residual.*missing"):
            session({name: tensor for name, tensor in inputs.items() if name != "mid_block_residual"})
        assert torch.equal(session(inputs)["out_sample"], before)
    session.close()
    with pytest.raises(ShapecheckError, match="UNet2DConditionModel: this session is closed; open it again"):
        session(inputs)


def test_gradients_inference_mode_and_odd_layouts_change_nothing(unet, inputs):
    session = open_session(unet)
    expected = compute(unet, session.contract, inputs)
    odd = {name: value.mT.contiguous().mT if value.dim() > 1 else value for name, value in inputs.items()}
    assert are_close(session(inputs | {"sample": inputs["sample"].clone().requires_grad_()}).values(), expected)
    assert not session(inputs)["out_sample"].requires_grad
    assert are_close(session(odd).values(), expected)
    with torch.inference_mode():
        made_here = {name: value.clone() for name, value in inputs.items()}
        assert are_close(session(made_here).values(), expected)
    assert are_close(session(made_here).values(), expected)


def test_a_closed_session_frees_the_weights(unet, inputs):
    mine = copy.deepcopy(unet)
    session = open_session(mine)
    session(inputs)
    weight = weakref.ref(mine.conv_in.weight.untyped_storage())
    parameter = weakref.ref(mine.conv_in.weight)
    session.close()
    del mine
    gc.collect()
    assert parameter() is None
    assert weight() is None


def test_two_threads_at_once_are_refused(unet, inputs, compiled, monkeypatch):
    inside, go = threading.Event(), threading.Event()

    def wait(forward, *tensors):
        inside.set()
        assert go.wait(20)
        return tensors[:1]

    monkeypatch.setattr(compiled_code, "compile_forward", lambda *_: wait)
    session = open_session(unet)
    thread = threading.Thread(target=session, args=[inputs])
    thread.start()
    assert inside.wait(20)
    try:
        with pytest.raises(ShapecheckError, match="this session is serving another call; open a session for each thread"):
            session(inputs)
    finally:
        go.set()
        thread.join()


def test_what_the_compiler_says_is_one_error(unet, inputs, compiled, tmp_path):
    class Untraceable(torch.nn.Module):
        def forward(self, values):
            torch._dynamo.graph_break()
            return values

    broken = copy.deepcopy(unet)
    broken.conv_norm_out = torch.nn.Sequential(broken.conv_norm_out, Untraceable())
    with open_session(broken, cache=tmp_path) as session:
        for _ in range(2):
            with pytest.raises(ShapecheckError, match=r"^torch\.compile cannot compile this model: .*") as caught:
                session(draw(session.contract))
            assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def compile_quickly(monkeypatch):
    monkeypatch.setattr("shapecheck.runtime.load.CompiledSession", partial(CompiledSession, compiler="eager"))


@pytest.mark.full
def test_a_pipeline_with_both_compiled_draws_pytorchs_pictures(compile_quickly, compiled, tmp_path):
    """Guidance, the strength live; the second time what the first compiled is found."""
    unet = small.unet(**small.TINY)
    net = small.controlnet(unet)
    pipe = small.pipeline(unet, net)
    expected = [small.generate(pipe, controlnet_conditioning_scale=scale).images for scale in (1.0, 0.3)]
    assert not are_close(expected[:1], expected[1:])
    for _ in range(2):
        pipe.unet = shapecheck.load(unet, "torch-compile", cache=tmp_path / "compiled")
        pipe.controlnet = shapecheck.load(net, "torch-compile", cache=tmp_path / "compiled")
        assert pipe.unet.engine.provider == pipe.controlnet.engine.provider == "torch.compile"
        found = [small.generate(pipe, controlnet_conditioning_scale=scale).images for scale in (1.0, 0.3)]
        assert are_close(found, expected)
    assert (compiled(), len(list((tmp_path / "compiled").iterdir()))) == ((2, 2) if COMPILES_AHEAD else (4, 0))


def test_a_controlnet_in_pytorch_takes_the_place_of_itself():
    unet = small.unet(**small.TINY)
    pipe = small.pipeline(unet, small.controlnet(unet))
    expected = small.generate(pipe).images
    pipe.controlnet = shapecheck.load(pipe.controlnet, "torch")
    assert torch.equal(small.generate(pipe).images, expected)
    with pytest.raises(CallError, match="controlnet_cond"):
        pipe.controlnet(torch.zeros(1, 4, 9, 13), 5, torch.zeros(1, 7, 12), torch.zeros(1, 3, 72, 100))


IN_A_PROCESS = """
import json, logging, sys, torch
sys.path.insert(0, {support!r})
import small, shapecheck
from shapecheck.runtime import compiled_code
logging.basicConfig()
if not {may_compile}:
    del compiled_code.compile_forward
unet = small.unet(**small.TINY, mid_block_type=None)
with torch.no_grad():
    for value in unet.parameters():
        value.mul_({factor})
loaded = shapecheck.load(unet, "torch-compile", cache={cache!r})
inputs = torch.load({inputs!r})
worst = []
for call in inputs:
    with torch.no_grad():
        expected = unet(**call).sample
    found = loaded(**call).sample
    worst.append(float((found - expected).abs().max() / expected.abs().max()))
print(json.dumps(worst))
"""


@pytest.mark.skipif(not COMPILES_AHEAD, reason="this PyTorch keeps nothing")
@pytest.mark.full
def test_inductor_serves_another_process_from_the_folder(tmp_path):
    """The second one has other weights, and may not compile. Tensors in odd layouts: compiled code takes one alone."""
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 9, 13, generator=generator), torch.randn(2, 7, 12, generator=generator)
    *downs, mid = (torch.randn(2, 8, 9, 13, generator=generator) for _ in range(3))
    call = {"sample": sample, "timestep": torch.tensor(500), "encoder_hidden_states": text}
    control = {"down_block_additional_residuals": downs, "mid_block_additional_residual": mid}
    odd = {"sample": sample.to(memory_format=torch.channels_last), "encoder_hidden_states": text[:1].expand(2, -1, -1)}
    torch.save([call, call | control, call | control | odd], tmp_path / "inputs.pt")
    names = {"support": str(Path(small.__file__).parent)}
    names |= {"cache": str(tmp_path / "kept"), "inputs": str(tmp_path / "inputs.pt")}
    for number, factor in enumerate((1.0, 1.1)):
        code = IN_A_PROCESS.format(factor=factor, may_compile=number == 0, **names)
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"inductor-{number}")}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert all(worst <= 1e-5 for worst in json.loads(done.stdout))
        assert len(list((tmp_path / "kept").iterdir())) == 1
