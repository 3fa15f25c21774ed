"""A session in a UNet's place: what is refused and by what words, and that the next call is served. No pipeline."""

from __future__ import annotations

import copy
import threading
from functools import cache
from types import SimpleNamespace

import engines
import foreign_files as foreign
import onnx_files
import onnxruntime
import psutil
import pytest
import real_pipelines
import small
import torch
from diffusers import MultiControlNetModel
from living import find_living_tensors
from torch.utils._python_dispatch import TorchDispatchMode

import shapecheck
from shapecheck import ContractError, ShapecheckError
from shapecheck.observe import subject
from shapecheck.runtime import combine, contract_session, onnx_session
from shapecheck.runtime.binding import CallError
from shapecheck.runtime.contract_session import ContractSession
from shapecheck.runtime.dropin import UnsupportedError
from shapecheck.runtime.dropin_arguments import Arguments
from shapecheck.runtime.dropin_unet import DropInUNet
from shapecheck.runtime.onnx_session import OnnxSession

H, W, TOKENS = 9, 13, 7


@pytest.fixture(scope="module")
def file(torch_unet):
    """A UNet of five slots, of which 0, 1 and 3, 4 share no shape with others but each other."""
    return engines.export_sealed(torch_unet, latent=(17, 25))


@pytest.fixture(scope="module")
def torch_unet():
    return small.unet(**small.SHALLOW)


@pytest.fixture(scope="module")
def unet(file):
    """One session for all: whatever a test did to it, the next call is served."""
    with_session = shapecheck.load(file, "ort")
    yield with_session
    with_session.close()


@cache
def shallow():
    return shapecheck.read_contract(engines.export_sealed(small.unet(**small.SHALLOW), latent=(17, 25)))


def call(batch=2, seed=0, **changes):
    """Arguments of a forward, residuals included."""
    contract = changes.pop("contract", None) or shallow()
    generator = torch.Generator().manual_seed(seed)
    shapes = contract.shapes(shapecheck.Geometry(batch, H, W))
    *downs, mid = (torch.randn(shape, generator=generator) for shape in shapes.values())
    return {
        "sample": torch.randn(batch, 4, H, W, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, TOKENS, 12, generator=generator),
        "down_block_additional_residuals": downs,
        "mid_block_additional_residual": mid,
    } | changes


@pytest.fixture(scope="module")
def good():
    return call()


def close_to(one, other):
    return bool(((one - other).abs().max() <= 1e-5 * other.abs().max()).item())


def test_it_computes_what_the_unet_computes(unet, torch_unet, good):
    with torch.no_grad():
        assert close_to(unet(**good).sample, torch_unet(**good).sample)
        assert not close_to(unet(**good).sample, unet(good["sample"], 500, good["encoder_hidden_states"])[0])
        assert close_to(
            unet(good["sample"], 500, good["encoder_hidden_states"], return_dict=False)[0],
            torch_unet(good["sample"], 500, good["encoder_hidden_states"]).sample,
        )


@pytest.mark.parametrize(
    "timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0]), torch.tensor([7, 7], dtype=torch.int32)]
)
def test_a_timestep_in_any_form_is_one_number_a_row(unet, torch_unet, good, timestep):
    with torch.no_grad():
        assert close_to(unet(**good | {"timestep": timestep}).sample, torch_unet(**good | {"timestep": 7}).sample)


def test_each_row_has_its_own_timestep(unet, torch_unet, good):
    steps = torch.tensor([3.5, 801.0])
    with torch.no_grad():
        assert close_to(unet(**good | {"timestep": steps}).sample, torch_unet(**good | {"timestep": steps}).sample)


@pytest.mark.full
@pytest.mark.parametrize("form", ["int64", "int32 one", "scalar"])
def test_a_timestep_is_given_in_the_form_that_a_file_takes(form, tmp_path):
    model = foreign.make_model("sd")
    model.save_pretrained(tmp_path / "model")
    path = foreign.make(tmp_path / "foreign.onnx", foreign.Kind(foreign.Export(timestep=form)))
    unet = shapecheck.load(path, "ort", model=str(tmp_path / "model"))
    sample, text = torch.randn(2, 4, 17, 25), torch.randn(2, TOKENS, 12)
    for timestep in (500, torch.tensor(20), torch.tensor([981.0, 981.0])):
        found = unet(sample, timestep, encoder_hidden_states=text, return_dict=False)[0]
        with torch.no_grad():
            expected = model(sample, timestep, encoder_hidden_states=text, return_dict=False)[0]
        assert torch.allclose(found, expected, atol=1e-4)
    if "int" in form:
        with pytest.raises(CallError, match=r"timestep: dtype: got 967.7, expected int.*takes whole timesteps alone"):
            unet(sample, 967.7, encoder_hidden_states=text)
    if form != "int64":
        with pytest.raises(CallError, match=r"timestep: input: got 500, 20, expected one number"):
            unet(sample, torch.tensor([500, 20]), encoder_hidden_states=text)
    unet.close()


def test_a_number_that_is_stored_negated_is_read_as_it_is(unet, torch_unet, good):
    sample = torch._neg_view((-good["sample"]).clone())
    assert sample.is_neg() and torch.equal(sample, good["sample"])
    with torch.no_grad():
        assert close_to(unet(**good | {"sample": sample}).sample, torch_unet(**good).sample)


def test_a_gradient_that_would_be_lost_is_an_error(unet, good):
    wanted = {"sample": good["sample"].clone().requires_grad_(True)}
    with pytest.raises(
        ShapecheckError, match=r"^sample: requires a gradient, and none passes through an exported model: call it"
    ):
        unet(**good | wanted)
    with torch.no_grad():
        unet(**good | wanted)


def test_caches_that_a_program_passes_empty_are_let_pass(unet, torch_unet, good):
    """As StreamDiffusion 0.4 passes them in every call."""
    with torch.no_grad():
        assert close_to(unet(**good, kvo_cache=[], fio_cache=(), fi_strength=None).sample, torch_unet(**good).sample)
        nothing = {"cache": {}, "names": "", "caches": [[], (None, None)], "use_cache": False, "buffer": torch.empty(0)}
        assert close_to(unet(**good, **nothing).sample, torch_unet(**good).sample)
        with pytest.raises(CallError, match="kvo_cache: surplus"):
            unet(**good, kvo_cache=[torch.ones(1)])


def test_outputs_are_copied_before_another_call_is_let_in(file, good, monkeypatch):
    """A thread that was let in between would have its picture in the place of this one's."""
    session = ContractSession.open_onnx(file, shallow(), reuse=True)
    copied, plain = [], contract_session.copy_outputs

    def copy(outputs):
        with pytest.raises(ShapecheckError, match="serving another call"):
            session(dict.fromkeys(session.contract.input_rules, torch.ones(1)))
        copied.append(plain(outputs))
        return copied[-1]

    monkeypatch.setattr(contract_session, "copy_outputs", copy)
    unet = DropInUNet(session)
    with torch.no_grad():
        first = unet(**good).sample
        kept = first.clone()
        second = unet(**good | {"sample": -good["sample"]}).sample
    assert torch.equal(first, kept) and not torch.equal(first, second)
    assert len(copied) == 2
    session.close()


@pytest.mark.parametrize("name", ["set_attn_processor", "fuse_qkv_projections", "attn_processors"])
def test_a_controlnet_refuses_what_a_unet_does(name, unet, torch_unet):
    """It inherits these from ControlNetModel, where they would do nothing."""
    net = shapecheck.load(small.controlnet(torch_unet), "torch")
    for model in (net, unet):
        assert not hasattr(model, name)
        with pytest.raises(UnsupportedError, match=f"^{name}: "):
            getattr(model, name)


def test_pooled_residuals_are_expanded(unet, torch_unet, good):
    cells = {
        "down_block_additional_residuals": [each.mean((2, 3), True) for each in good["down_block_additional_residuals"]],
        "mid_block_additional_residual": good["mid_block_additional_residual"].mean((2, 3), True),
    }
    with torch.no_grad():
        assert close_to(unet(**good | cells).sample, torch_unet(**good | cells).sample)


def with_down(index, change):
    def make(good):
        downs = list(good["down_block_additional_residuals"])
        downs[index] = change(downs[index])
        return {"down_block_additional_residuals": downs}

    return make


REFUSED = {
    "rounded down": (
        with_down(2, lambda each: each[..., :-1]),
        r"down_block_residual_02 \(UNet down_blocks.*rounding",
    ),
    "one cell among others": (with_down(1, lambda each: each[..., :1, :1]), "down_block_residual_01 .*broadcast: got 2×8×1×1"),
    "batch of one": (with_down(0, lambda each: each[:1]), "down_block_residual_00 .*batch: got 1×8×9×13"),
    "half precision": (with_down(3, torch.Tensor.half), "down_block_residual_03 .*dtype: got float16, expected float32"),
    "elsewhere": (with_down(3, lambda each: each.to("meta")), "down_block_residual_03: device: got a tensor on meta"),
    "a number": (with_down(0, lambda each: 0.5), "down_block_residual_00: got float; expected tensors"),
    "NaN": (with_down(1, lambda each: each * torch.nan), r"down_block_residual_01 \(UNet .*values: got 1872 NaN"),
    "infinite": (with_down(1, lambda each: each / 0), "down_block_residual_01 .*values: got 0 NaN and 1872 infinite values"),
    "one too few": (
        lambda good: {"down_block_additional_residuals": good["down_block_additional_residuals"][:-1]},
        "down_block_residual_03 .*missing",
    ),
    "one too many": (
        lambda good: {"down_block_additional_residuals": [*good["down_block_additional_residuals"], good["sample"]]},
        "down_block_residual_04: surplus",
    ),
    "mid alone": (lambda good: {"down_block_additional_residuals": None}, "got mid alone, expected down and mid"),
    "downs alone": (lambda good: {"mid_block_additional_residual": None}, "got down alone, expected down and mid"),
    "wrong family": (
        lambda good: {"encoder_hidden_states": torch.zeros(2, TOKENS, 20)},
        "encoder_hidden_states: channels: got 2×7×20, expected 2×7×12",
    ),
    "another size": (lambda good: {"sample": torch.zeros(2, 4, H + 2, W)}, "down_block_residual_00 .*size: got 2×8×9×13"),
    "an IP-Adapter": (
        lambda good: {"added_cond_kwargs": {"image_embeds": good["sample"]}},
        "added_cond_kwargs.image_embeds: surplus(.|\n)*IP-Adapter",
    ),
    "a LoRA's scale": (lambda good: {"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs(.|\n)*fuse the LoRA"),
    "a T2I-Adapter": (
        lambda good: {"down_intrablock_additional_residuals": [good["sample"]]},
        "down_intrablock_additional_residuals: surplus(.|\n)*T2I-Adapter",
    ),
    "a mask": (lambda good: {"encoder_attention_mask": torch.ones(2, TOKENS)}, "encoder_attention_mask: surplus(.|\n)*pad"),
    "text_embeds": (
        lambda good: {"text_embeds": torch.ones(2, 20)},
        "added_cond_kwargs.text_embeds: surplus(.|\n)*forward takes sample, timestep",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_call_is_refused_by_name_and_the_next_is_served(unet, good, case):
    change, words = REFUSED[case]
    before = unet(**good).sample
    with pytest.raises(ShapecheckError, match=words):
        unet(**good | change(good))
    assert torch.equal(unet(**good).sample, before)


def test_missing_text_embeds_are_named():
    unet = shapecheck.load(real_pipelines.export_unet("shallow-xl"), "ort")
    sample, text = torch.zeros(1, 4, H, W), torch.zeros(1, TOKENS, 80)
    with pytest.raises(CallError, match=r"text_embeds: missing: got nothing, expected 1×40(.|\n)*time_ids: missing"):
        unet(sample, 1, text)
    both = {"text_embeds": torch.zeros(1, 40), "time_ids": torch.zeros(1, 6)}
    flat = unet(sample, 1, text, **both)[0]  # as StreamDiffusion gives them to an engine
    assert torch.equal(flat, unet(sample, 1, text, added_cond_kwargs=both).sample)
    assert unet.add_embedding.linear_1.in_features == 88


def test_single_precision_for_a_half_precision_graph_is_refused():
    unet = shapecheck.load(engines.export_sealed(small.unet(**small.TINY).half()), "ort")
    assert unet.dtype == torch.float16
    sample, text = torch.zeros(1, 4, H, W), torch.zeros(1, TOKENS, 12)
    with pytest.raises(CallError, match=r"sample: dtype: got float32, expected float16(.|\n)*tensor.to\(dtype\)"):
        unet(sample, 1, text)
    assert unet(sample.half(), 1, text.half()).sample.dtype == torch.float16


@pytest.mark.parametrize(("half", "asked"), [(True, {}), (True, {"trt_fp16_enable": "False"}), (False, {})])
def test_onnx_runtimes_tensorrt_computes_a_half_precision_graph_as_such(half, asked, monkeypatch):
    """By itself it would in float32. What the caller says stands."""
    opened = []

    def refuse(_path, *, options, **_others):
        opened.append(dict(options))
        raise ShapecheckError("no GPU")

    monkeypatch.setattr(OnnxSession, "open", refuse)
    model = small.unet(**small.TINY)
    with pytest.raises(ShapecheckError, match="no GPU"):
        shapecheck.load(engines.export_sealed(model.half() if half else model), "ort-trt", options=asked)
    assert opened == [asked or ({"trt_fp16_enable": "True"} if half else {})]


def test_a_closed_session_says_so(file, good):
    unet = shapecheck.load(file, "ort")
    unet.close()
    unet.close()
    with pytest.raises(ShapecheckError, match=r"unet\.onnx: this session is closed; open it again"):
        unet(**good)


def test_two_threads_at_once_are_refused(torch_unet, good):
    """A live UNet stands for any model that takes its time."""
    live = copy.deepcopy(torch_unet)
    unet = shapecheck.load(live)
    inside, go = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert go.wait(20)

    waiting = live.register_forward_pre_hook(wait)
    found = []
    thread = threading.Thread(target=lambda: found.append(unet(**good).sample))
    thread.start()
    assert inside.wait(20)
    try:
        for use in (lambda: unet(**good), unet.close):
            with pytest.raises(ShapecheckError, match="this session is serving another call; open a session for each thread"):
                use()
    finally:
        go.set()
        thread.join()
    waiting.remove()
    assert torch.equal(unet(**good).sample, found[0])


def call_often(unet, good, times):
    """Good and bad calls in turn; returns what then lives: tensors, and bytes of this process."""
    bad = [good | change(good) for change, _ in REFUSED.values()]
    for number in range(times):
        unet(**good)
        with pytest.raises(ShapecheckError):
            unet(**bad[number % len(bad)])
    return len(find_living_tensors()), psutil.Process().memory_info().rss


def test_good_and_bad_calls_keep_no_tensor(unet, good):
    before, _ = call_often(unet, good, 20)
    after, _ = call_often(unet, good, 20)
    assert after <= before


@pytest.mark.full
def test_a_thousand_good_and_bad_calls_leave_memory_flat(unet, good):
    call_often(unet, good, 200)
    _, before = call_often(unet, good, 1)
    _, after = call_often(unet, good, 500)
    assert after - before < 8 * 2**20


def test_outputs_are_the_callers_own_unless_it_says_otherwise(file, good):
    other = good | {"timestep": 3}
    unet = shapecheck.load(file, "ort")
    first = unet(**good).sample
    kept = first.clone()
    assert not torch.equal(unet(**other).sample, kept)
    assert torch.equal(first, kept)
    unet = shapecheck.load(file, "ort", own_outputs=False)
    places = {unet(**good | {"timestep": step}).sample.data_ptr() for step in range(5)}
    assert len(places) == 1


def test_threads_of_onnx_runtime_do_not_spin_beside_pytorch(file, monkeypatch):
    """They went on after a call, and a ControlNet in PyTorch took twice as long (reports/performance.md)."""
    opened = []
    plain = onnxruntime.InferenceSession

    def open_session(source, settings, **options):
        opened.append(settings.get_session_config_entry("session.intra_op.allow_spinning"))
        return plain(source, settings, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    shapecheck.load(file, "ort")
    assert opened == ["0"]


def test_zeros_are_made_once_a_size_in_one_piece():
    contract = shallow()
    arguments = Arguments(contract, torch.device("cpu"))
    first = arguments.residuals(None, None, torch.zeros(2, 4, H, W))
    assert [tuple(zeros.shape) for zeros in first.values()] == list(contract.shapes(shapecheck.Geometry(2, H, W)).values())
    assert len({zeros.untyped_storage().data_ptr() for zeros in first.values()}) == 1
    assert not any(zeros.any() for zeros in first.values())
    assert arguments.residuals(None, None, torch.zeros(2, 4, H, W)) is first


def test_a_live_model_with_a_contract_is_not_observed(torch_unet, file, monkeypatch):
    contract = shapecheck.read_contract(file)
    monkeypatch.delattr(subject, "probe")
    assert shapecheck.load(torch_unet, "torch", contract=contract).contract is contract
    with pytest.raises(NameError):
        shapecheck.load(torch_unet, "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_the_call_that_made_the_nan_raises(dtype):
    unet = small.unet(**small.SHALLOW)
    models = unet.to("cuda", dtype), small.controlnet(unet).to("cuda", dtype)
    ours, net = (shapecheck.load(model, "torch") for model in models)
    sample, text = torch.randn(2, 4, H, W).to("cuda", dtype), torch.randn(2, TOKENS, 12).to("cuda", dtype)
    image = torch.rand(2, 3, 8 * H, 8 * W).to("cuda", dtype)
    with torch.no_grad():
        for value in (torch.nan, torch.inf, -torch.inf):
            assert ours(sample, 7, text)[0].isfinite().all()
            assert net(sample, 7.0, text, image, return_dict=False)[1].isfinite().all()
            bad = sample.clone()
            bad[1, 2, 3, 4] = value
            with pytest.raises(ContractError, match="sample: values: got"):
                ours(bad, 7, text)
            with pytest.raises(ContractError, match="sample: values: got"):
                net(bad, torch.tensor(7), text, image)


class Operations(TorchDispatchMode):
    """What PyTorch is told to do."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("value", [7, 7.0, torch.tensor(7), torch.tensor([7.0], dtype=torch.float64)])
def test_a_number_is_made_on_the_device_and_never_copied_there(value):
    """Copying one to a GPU waits for all that was queued before."""
    arguments = Arguments(shallow(), torch.device("cpu"))
    with Operations() as done:
        (timestep,) = (arguments.place_number("timestep", value, 3),)
    assert (timestep.tolist(), timestep.dtype) == ([7.0] * 3, torch.float32)
    assert [name for name in done.names if "item" not in name and "scalar" not in name] == ["aten.full.default"]
    assert arguments.place_number("timestep", torch.tensor([7, 5, 3]), 3).tolist() == [7.0, 5.0, 3.0]


def test_a_stream_of_frames_keeps_nothing_of_the_last(file, torch_unet):
    """StreamDiffusion's loop: a batch of denoising steps, one timestep a row, positional, control on, off and exchanged."""
    unet = shapecheck.load(file, "ort", own_outputs=False)
    assert hasattr(unet, "engine")
    assert hasattr(unet, "stream")
    steps = torch.tensor([32, 45, 399], dtype=torch.int64)
    frames = [call(batch=3, seed=seed) for seed in range(3)]
    names = ("down_block_additional_residuals", "mid_block_additional_residual")

    def play(model, number):
        frame = frames[number or 0]
        control = {name: frame[name] for name in names} if number is not None else {}
        return model(frame["sample"], steps, frame["encoder_hidden_states"], **control)[0]

    fresh = {number: play(shapecheck.load(file, "ort"), number) for number in (None, 0, 1, 2)}
    with torch.no_grad():
        for number in (0, None, 1, None, 2, 0):
            ours = play(unet, number)
            assert close_to(ours, play(torch_unet, number))
            assert torch.equal(ours, fresh[number])


def test_a_stream_takes_a_controlnets_file_for_a_controlnet(torch_unet, tmp_path):
    """StreamDiffusion unpacks what an engine gives, told by `engine` and `stream`, and asks a ControlNet for no dictionary."""
    net = small.controlnet(torch_unet)
    ours = shapecheck.load(onnx_files.controlnet_written(tmp_path / "net.onnx", net, latent=(H, W)), "ort")
    assert not (hasattr(ours, "engine") and hasattr(ours, "stream"))
    frame = {name: call(batch=3)[name] for name in ("sample", "encoder_hidden_states")}
    frame |= {"timestep": torch.tensor([32, 45, 399]), "controlnet_cond": torch.rand(3, 3, 8 * H, 8 * W)}
    with torch.no_grad():
        downs, mid = ours(**frame, conditioning_scale=0.7, return_dict=False)
        expected, expected_mid = net(**frame, conditioning_scale=0.7, return_dict=False)
    assert all(close_to(one, other) for one, other in zip([*downs, mid], [*expected, expected_mid], strict=True))


def test_a_live_unet_is_held_to_its_contract_too(torch_unet, good):
    unet = shapecheck.load(torch_unet)
    with torch.no_grad():
        assert torch.equal(unet(**good).sample, torch_unet(**good).sample)
    with pytest.raises(CallError, match="got mid alone"):
        unet(**good | {"down_block_additional_residuals": None})


def test_a_saved_model_runs_in_pytorch(torch_unet, good, tmp_path):
    torch_unet.save_pretrained(tmp_path / "model" / "unet")
    unet = shapecheck.load(tmp_path / "model", "torch")
    with torch.no_grad():
        assert torch.equal(unet(**good).sample, torch_unet(**good).sample)


def test_what_cannot_be_loaded_says_what_can(file, tmp_path):
    with pytest.raises(ShapecheckError, match=r"no backend 'cuda'; known: auto, ort, "):
        shapecheck.load(file, "cuda")
    with pytest.raises(ShapecheckError, match=r"backend trt does not run an ONNX file, .*: use ort or ort-cuda or ort-trt"):
        shapecheck.load(file, "trt")
    with pytest.raises(ShapecheckError, match=r"no ONNX file at .*lost\.onnx"):
        shapecheck.load(tmp_path / "lost.onnx", "ort")
    with pytest.raises(ShapecheckError, match="ort does not run on cuda"):
        shapecheck.load(file, "ort", device="cuda")
    bare, contract = onnx_files.exported(tmp_path / "bare.onnx", small.TINY, latent=(9, 13))
    with pytest.raises(ShapecheckError, match=r"bare\.onnx holds no contract: say which model it is with model=, such as"):
        shapecheck.load(bare, "ort")
    assert shapecheck.load(bare, "ort", contract=contract).contract == contract
    half = contract.with_dtypes(dict.fromkeys(contract.input_dtypes, "float16"))
    (tmp_path / "half.json").write_text(half.to_json(), encoding="utf-8")
    named = shapecheck.load(bare, "ort", model=str(tmp_path / "half.json"))
    assert named.contract == contract  # a model by name is loaded in the precision of its file
    with pytest.raises(ContractError, match="float32"):
        shapecheck.load(bare, "ort", contract=half)
    with pytest.raises(ContractError, match=r"down_block_residual_02 \(UNet down_blocks.0.downsamplers.0\): missing"):
        shapecheck.load(bare, "ort", contract=shapecheck.read_contract(file))


def test_a_gpu_that_was_named_is_never_exchanged_for_the_cpu(file, monkeypatch, caplog):
    """Only `auto` may do that, and says so."""
    plain = onnxruntime.InferenceSession

    def open_session(source, settings, *, providers, enable_fallback):
        if providers[0][0] != "CPUExecutionProvider":
            raise RuntimeError("no CUDA on this machine")
        return plain(source, settings, providers=providers, enable_fallback=enable_fallback)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnx_session, "Gpu", lambda name: SimpleNamespace(name=name, handle=7))
    for named in ({"backend": "ort-cuda"}, {"device": "cuda"}):
        with pytest.raises(ShapecheckError, match="no CUDA on this machine"):
            shapecheck.load(file, **named)
    assert not caplog.messages
    assert shapecheck.load(file).device == torch.device("cpu")
    (told,) = caplog.messages
    assert told.startswith(f"{file} runs on the CPU: ") and "no CUDA on this machine" in told


def test_sums_of_unlike_controlnets_are_refused():
    one = torch.ones(1, 2, 3, 4)
    with pytest.raises(ShapecheckError, match="these ControlNets return 2, 3 residuals"):
        combine.combined([([one], one), ([one, one], one)])
    with pytest.raises(ShapecheckError, match="1 ControlNets and 2 scales"):
        combine.combined([([one], one)], [1.0, 2.0])


@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("scales", [[1.0], [0.0, 1.2], [0.3, 1.7, 0.9]])
def test_sums_scales_and_guess_mode_are_diffusers_own_numbers(torch_unet, scales, guess):
    """To the last bit those of real ControlNets in a MultiControlNetModel."""
    nets = [small.controlnet(torch_unet, seed=seed) for seed in range(len(scales))]
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, H, W, generator=generator), torch.randn(1, TOKENS, 12, generator=generator)
    images = [torch.rand(1, 3, 8 * H, 8 * W, generator=generator) for _ in nets]
    with torch.no_grad():
        downs, mid = MultiControlNetModel(nets)(sample, 9, text, images, scales, guess_mode=guess, return_dict=False)
        plain = [net(sample, 9, text, image, return_dict=False) for net, image in zip(nets, images, strict=True)]
    ours, our_mid = shapecheck.combined(plain, scales, guess_mode=guess)
    assert any(each.any() for each in ours)
    assert all(torch.equal(one, other) for one, other in zip([*ours, our_mid], [*downs, mid], strict=True))
    padded, _ = shapecheck.combined(plain, scales, guess_mode=guess, unconditional=True)
    assert all(torch.equal(each, torch.cat([torch.zeros_like(own), own])) for each, own in zip(padded, ours, strict=True))


def test_a_sample_that_is_no_tensor_is_refused_by_name(unet, good):
    with pytest.raises(ShapecheckError, match="sample: got list; expected tensors"):
        unet(**good | {"sample": [1.0]})
    with pytest.raises(CallError, match=r"sample: missing: got nothing"):
        unet(**good | {"sample": None})
