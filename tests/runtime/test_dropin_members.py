"""Every public member of diffusers' UNet and ControlNet on a session in its place: it works, changes nothing, or is refused."""

from __future__ import annotations

import copy
import os
import pickle  # noqa: TID251  # of its own bytes
import shutil
from functools import cache

import engines
import pytest
import small
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

import shapecheck
from shapecheck import ShapecheckError
from shapecheck.observe.subject import resolve_subject
from shapecheck.runtime.contract_session import ContractSession
from shapecheck.runtime.dropin import DropIn, UnsupportedError
from shapecheck.runtime.dropin_saving import find_beside_engine
from shapecheck.runtime.dropin_unet import DropInUNet

H, W, TOKENS = 9, 13, 7
CLASSES = {"unet": UNet2DConditionModel, "controlnet": ControlNetModel}
LORA, PROCESSOR, LAYERS = "a LoRA cannot be put", "another attention processor cannot be put", "has no layers to change"
ATTENTION, WEIGHTS = "how attention is computed cannot be changed", "has no weights in PyTorch to change"

REFUSED = {
    **dict.fromkeys(
        ("add_adapter", "set_adapter", "set_adapters", "fuse_lora", "unfuse_lora", "delete_adapters", "disable_lora"), LORA
    ),
    **dict.fromkeys(("enable_lora", "disable_adapters", "enable_adapters", "active_adapters", "enable_lora_hotswap"), LORA),
    **dict.fromkeys(("save_lora_adapter", "load_attn_procs", "save_attn_procs"), LORA),
    **dict.fromkeys(("attn_processors", "set_attn_processor", "set_default_attn_processor"), PROCESSOR),
    **dict.fromkeys(("get_time_embed", "get_class_embed", "get_aug_embed", "process_encoder_hidden_states"), LAYERS),
    **dict.fromkeys(("set_attention_slice", "set_attention_backend", "reset_attention_backend"), ATTENTION),
    **dict.fromkeys(("load_state_dict", "enable_layerwise_casting", "enable_parallelism", "dequantize"), WEIGHTS),
    "enable_freeu": "FreeU cannot be switched on",
    "fuse_qkv_projections": "projections cannot be fused",
    "unfuse_qkv_projections": "projections cannot be unfused",
    "enable_gradient_checkpointing": "cannot be trained",
}
"""Name → what the refusal says."""
REFUSED |= {
    name: ATTENTION
    for name in dir(UNet2DConditionModel)
    if name.startswith(("enable_", "disable_", "set_use_")) and any(kind in name for kind in ("xformers", "npu_", "xla_"))
}

CHANGES_NOTHING = {
    "compile": (),
    "compile_repeated_blocks": (),
    "disable_freeu": (),
    "disable_gradient_checkpointing": (),
    "eval": (),
    "requires_grad_": (False,),
    "train": (),
    "unload_lora": (),
    "zero_grad": (),
}
"""Name → what it is called with here."""

WORKS_AS_ITS_OWN = {"load_lora_adapter"}  # a LoRA for the text encoder alone: in test_pipelines.py
MOVES = {
    *("bfloat16", "cpu", "cuda", "double", "float", "half", "ipu", "mtia", "share_memory", "to", "to_empty", "type", "xpu"),
    *("enable_group_offload", "device", "dtype"),
}
SAVES = {"save_pretrained", "push_to_hub", "save_config", "to_json_file", "to_json_string", "config", "register_to_config"}
MAKES_MODELS_IN_PYTORCH = {"from_config", "from_pretrained", "from_single_file", "from_unet"}
OF_THE_CLASS = {
    *(
        "config_name",
        "extract_init_dict",
        "get_config_dict",
        "has_compatibles",
        "ignore_for_config",
        "load_config",
        "unet_name",
    ),
    *("register_for_auto_class", "text_encoder_name", "call_super_init", "dump_patches", "T_destination"),
}
AS_ANY_MODULE_WITHOUT_LAYERS = {"forward", "get_memory_footprint", "is_gradient_checkpointing", "num_parameters"}
"""Besides all of PyTorch's own: hooks, walks over modules and parameters, and what counts them see one empty parameter."""


@cache
def torch_models():
    unet = small.unet(**small.TINY)
    return {"unet": unet, "controlnet": small.controlnet(unet)}


@pytest.fixture
def model(role) -> DropIn:
    return shapecheck.load(torch_models()[role], "torch", contract=contract(role))


@cache
def contract(role):
    return shapecheck.load(torch_models()[role], "torch").contract


both = pytest.mark.parametrize("role", CLASSES)


def compute(model, *, dtype=torch.float32, rounded=torch.float32):
    """Return the noise, or the last residual, of inputs in this precision that were rounded to another before."""
    generator = torch.Generator().manual_seed(3)
    sample, text, image = (
        torch.randn(shape, generator=generator).to(rounded).to(dtype)
        for shape in ((2, 4, H, W), (2, TOKENS, 12), (2, 3, 8 * H, 8 * W))
    )
    with torch.no_grad():
        if isinstance(model, ControlNetModel):
            return model(sample, 11, text, image, return_dict=False)[1]
        return model(sample, 11, text, return_dict=False)[0]


@both
def test_every_public_member_is_decided_upon(role):
    """A new release of diffusers may bring members: decide what a session does with each."""
    decided = (
        REFUSED.keys() | CHANGES_NOTHING.keys() | WORKS_AS_ITS_OWN | MOVES | SAVES | MAKES_MODELS_IN_PYTORCH | OF_THE_CLASS
    )
    public = {name for name in dir(CLASSES[role]) if not name.startswith("_") and not hasattr(nn.Module, name)}
    assert public - decided - AS_ANY_MODULE_WITHOUT_LAYERS == set()


@both
def test_what_needs_layers_or_weights_is_refused_by_name(role, model):
    for name in REFUSED:
        if hasattr(CLASSES[role], name):
            assert not hasattr(model, name)
            with pytest.raises(UnsupportedError, match=f"^{name}: .*{REFUSED[name]}"):
                getattr(model, name)
    for name in ("conv_in", "down_blocks", "mid_block", "time_embedding"):
        with pytest.raises(UnsupportedError, match=f"^{name}: .*{LAYERS}"):
            getattr(model, name)
    with pytest.raises(UnsupportedError, match="requires_grad_: an exported model cannot be trained"):
        model.requires_grad_()


@both
def test_what_changes_nothing_changes_nothing(role, model):
    before = compute(model)
    for name, arguments in CHANGES_NOTHING.items():
        if hasattr(CLASSES[role], name):
            getattr(model, name)(*arguments)
            assert torch.equal(compute(model), before)
    assert (model.dtype, str(model.device)) == (torch.float32, "cpu")


@both
def test_programs_read_what_they_read_of_a_module(role, model):
    theirs = torch_models()[role]
    assert next(model.parameters()).dtype == model.dtype == torch.float32
    assert next(model.parameters()).device == model.device
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.num_parameters(), model.get_memory_footprint(), model.is_gradient_checkpointing) == (0, 0, False)
    assert [name for name, _ in model.named_modules()] == [""]
    assert model.config["cross_attention_dim"] == model.config.cross_attention_dim == theirs.config.cross_attention_dim
    assert model.config._class_name == CLASSES[role].__name__
    assert isinstance(model, CLASSES[role])
    rebuilt = model.from_config(model.config)
    assert type(rebuilt) is type(model).replaces is CLASSES[role]
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    compute(model)
    handle.remove()
    compute(model)
    assert seen == [1]


def test_a_state_dict_without_weights_is_said(caplog):
    model = shapecheck.load(torch_models()["unet"], "torch", contract=contract("unet"))
    assert sum(value.numel() for value in model.state_dict().values()) == 0
    assert caplog.messages == [
        "an exported model has no weights in its state_dict(): save_pretrained writes those of the PyTorch model"
    ]


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_another_precision_inputs_are_converted_and_outputs_back(role, model, dtype, caplog):
    expected = compute(torch_models()[role], rounded=dtype).to(dtype)
    assert model.to(dtype) is model
    name = str(dtype).removeprefix("torch.")
    (said,) = caplog.messages
    assert said.startswith(f"this session computes in float32, the precision of its file, and converts what comes in {name}: ")
    converted = compute(model, dtype=dtype)
    assert model.dtype == converted.dtype == dtype
    assert torch.equal(converted, expected)
    model.float().to(dtype).float()
    assert torch.equal(compute(model), compute(torch_models()[role]))
    assert len(caplog.messages) == 1


def test_what_no_input_is_in_is_refused_and_changes_nothing():
    model = shapecheck.load(torch_models()["unet"], "torch", contract=contract("unet"))
    with pytest.raises(ShapecheckError, match="this session runs on cpu: it takes no inputs on meta"):
        model.to("meta")
    with pytest.raises(ShapecheckError, match="this session computes in float32: it takes no inputs in float8_e4m3fn"):
        model.to(torch.float8_e4m3fn)
    assert (model.dtype, str(model.device)) == (torch.float32, "cpu")


class Elsewhere:
    """A session that says that it runs on another device: no GPU is here, and what came to it has no values."""

    reuses_outputs = False

    def __init__(self, contract):
        self.contract, self.device, self.seen = contract, torch.device("meta"), {}

    def __call__(self, inputs):
        self.seen = {name: value.device for name, value in inputs.items()}
        return {"out_sample": torch.ones(2, 4, H, W)}

    def close(self):
        pass


def test_what_comes_from_another_device_is_taken_to_where_the_session_runs():
    session = Elsewhere(contract("unet"))
    model = DropInUNet(session)
    model.no_weights = nn.Parameter(torch.empty(0), requires_grad=False)  # as hooks that offload put it elsewhere
    assert str(compute(model).device) == str(model.device) == "cpu"
    assert {str(device) for device in session.seen.values()} == {"meta"}


@both
def test_a_copy_shares_the_session_and_a_deep_one_or_a_pickled_one_has_its_own(role, model, tmp_path):
    expected = compute(model)
    shared = copy.copy(model)
    assert shared.engine is model.engine
    for other in (copy.deepcopy(model.half()), pickle.loads(pickle.dumps(model))):
        assert other.engine is not model.engine
        assert other.dtype == torch.float16
        assert torch.equal(compute(other.float()), expected)
    model.close()
    with pytest.raises(ShapecheckError, match="this session is closed"):
        compute(shared.float())


def test_a_session_that_somebody_opened_is_not_copied_and_not_saved(tmp_path):
    model = DropInUNet(ContractSession.of_module(torch_models()["unet"], contract("unet")))
    with pytest.raises(
        UnsupportedError, match=r"^copy.deepcopy: a session that is open cannot be copied.* use shapecheck.load"
    ):
        copy.deepcopy(model)
    with pytest.raises(UnsupportedError, match=r"^pickle: a session that is open cannot be copied"):
        pickle.dumps(model)
    with pytest.raises(
        UnsupportedError, match=r"^save_pretrained: the UNet2DConditionModel in PyTorch .* is not known: its session"
    ):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_file_that_was_written_again_is_neither_copied_nor_saved(tmp_path):
    """It is another model, perhaps, than the one that the session runs."""
    path = tmp_path / "unet.onnx"
    shutil.copyfile(engines.export_sealed(torch_models()["unet"]), path)
    model = shapecheck.load(path, "ort")
    assert torch.equal(compute(copy.deepcopy(model)), compute(model))
    os.utime(path, ns=(1, 1))
    with pytest.raises(ShapecheckError, match=r"unet\.onnx was changed or moved since it was loaded: load it again"):
        copy.deepcopy(model)
    with pytest.raises(ShapecheckError, match=r"save_pretrained: .*unet\.onnx was changed or moved since it was loaded"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_engine_is_saved_from_the_model_that_was_named(tmp_path):
    unet = torch_models()["unet"]
    with pytest.raises(ShapecheckError, match=r"the engine .*unet\.plan holds its weights under no names"):
        find_beside_engine(tmp_path / "unet.plan", contract("unet"), None)
    unet.save_pretrained(tmp_path / "unet")
    found = find_beside_engine(tmp_path / "unet.plan", contract("unet"), str(tmp_path))()
    assert torch.equal(found.conv_in.weight, unet.conv_in.weight)


@both
def test_an_exported_model_is_not_taken_for_one_to_export(model, role):
    with pytest.raises(ShapecheckError, match=r"is an exported model already: give the PyTorch model, or its file"):
        resolve_subject(model)


@both
def test_its_class_is_that_of_diffusers_where_a_program_asks(model, role):
    """`from_pipe` compares types, `register_modules` reads `__class__` and `__module__`."""
    assert type(model) in (nn.Linear, CLASSES[role])
    assert type(model) not in (nn.Linear, CLASSES["controlnet" if role == "unet" else "unet"])
    assert model.__class__ is CLASSES[role]
    assert model.__module__ == CLASSES[role].__module__
    assert isinstance(model, DropIn)
    assert not isinstance(torch_models()[role], DropIn)
