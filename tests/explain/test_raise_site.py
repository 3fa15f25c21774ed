"""Where a text was raised: the same words from other code are no matter of residuals, however a traceback is printed."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from shapecheck import presets
from shapecheck.cli import main
from shapecheck.explain.explain_text import explain_text
from shapecheck.explain.residual_table import RequestedSize

MODELS = {name: presets.contract(name) for name in ("sd15", "sdxl", "sdxl-refiner")}
SUM = "RuntimeError: The size of tensor a (320) must match the size of tensor b (640) at non-singleton dimension 1"
HALF = "RuntimeError: mat1 and mat2 must have the same dtype, but got Float and Half"
HEAD = "Traceback (most recent call last):\n"
ADDED = "down_block_res_sample = down_block_res_sample + down_block_additional_residual"
ONE_MORE = "\n\nDuring handling of the above exception, another exception occurred:\n\n"


def frame(file: str, source: str = "x = f(y)", function: str = "forward") -> str:
    return f'  File "/v/site-packages/{file}", line 3, in {function}\n    {source}\n'


UNET = frame("diffusers/models/unets/unet_2d_condition.py")
MODULE = frame("torch/nn/modules/module.py", "return forward_call(*args, **kwargs)", "_call_impl")
NETS = frame("diffusers/models/controlnets/multicontrolnet.py", "samples_prev + samples_curr", "<listcomp>")
DYNAMO = frame("torch/_dynamo/utils.py", "return fn()", "run_node")
IPYTHON = """---------------------------------------------------------------------------
RuntimeError                              Traceback (most recent call last)
Cell In[3], line 5
----> 5 net(x)

File ~/v/lib/python3.11/site-packages/torch/nn/modules/module.py:1751, in Module._call_impl(self, *args, **kwargs)
-> 1751     return forward_call(*args, **kwargs)

"""
ELSEWHERE = {
    "a script": (HEAD + frame("train.py", "y = a + b", "<module>") + SUM, "train.py"),
    "timm": (HEAD + frame("timm/models/resnet.py", "x += shortcut") + SUM, "resnet.py"),
    "torchvision": (HEAD + frame("torchvision/models/resnet.py", "out += identity") + SUM, "resnet.py"),
    "lycoris in the UNet": (HEAD + UNET + MODULE + frame("lycoris/modules/locon.py", "return org + d") + SUM, "locon.py"),
    "the VAE's resnet": (
        HEAD + frame("diffusers/models/autoencoders/autoencoder_kl.py") + frame("diffusers/models/resnet.py") + SUM,
        "resnet.py",
    ),
    "the UNet's time embedding": (
        HEAD + UNET + frame("diffusers/models/resnet.py", "hidden_states = hidden_states + temb") + SUM,
        "resnet.py",
    ),
    "windows": (HEAD + '  File "C:\\v\\timm\\models\\vit.py", line 3, in forward\n    x + y\n' + SUM, "vit.py"),
    "a notebook's cell": (HEAD + "Cell In[3], line 5\n      4 x = 1\n----> 5 a + b\n\n" + SUM, "Cell In[3]"),
    "a library in a notebook": (
        f"{IPYTHON}File ~/v/segment_anything/image_encoder.py:77, in Block.forward(self)\n---> 77 x = x + h\n\n{SUM}",
        "image_encoder.py",
    ),
    "pytest": (f"test_x.py:5: in test\n    net(x)\nE   {SUM}\n\n/v/mylib/blocks.py:120: RuntimeError", "blocks.py"),
    "torch.compile": (
        HEAD + frame("run.py") + DYNAMO + SUM + "\n\nfrom user code:\n" + frame("timm/layers.py", "y = x + z"),
        "layers.py",
    ),
    "dtypes of a language model": (HEAD + frame("transformers/models/llama.py") + MODULE + HALF, "llama.py"),
    "dtypes of a VAE": (
        HEAD + frame("diffusers/models/autoencoders/autoencoder_kl.py") + MODULE
        + "RuntimeError: Input type (float) and bias type (c10::Half) should be the same",
        "autoencoder_kl.py",
    ),
    "somebody's tuple": (
        HEAD + frame("queue.py", "items.pop()") + "AttributeError: 'tuple' object has no attribute 'pop'",
        "queue.py",
    ),
    "somebody's index": (HEAD + frame("shapes.py", "shape[4]") + "IndexError: tuple index out of range", "shapes.py"),
    "somebody's state dict": (
        HEAD + frame("mine.py", "net.load_state_dict(x)")
        + 'loading state_dict for TimestepEmbedding: Unexpected key(s) in state_dict: "cond_proj.weight"',
        "mine.py",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_same_words_from_other_code_are_no_matter_of_residuals(name):
    text, file = ELSEWHERE[name]
    diagnosis = explain_text(text, MODELS, RequestedSize())
    assert diagnosis.explanations == ()
    assert diagnosis.reason == f"it was raised in {file}, where no residual is added"


OURS = {
    "no traceback": (SUM, None),
    "eager": (HEAD + UNET + f"    {ADDED}\n" + SUM, "down"),
    "somebody's own UNet": (HEAD + frame("my/unet.py", "skip = skip + control[i]") + SUM, None),
    "the original layout": (HEAD + frame("comfy/ldm/modules/diffusionmodules/openaimodel.py", "h += ctrl") + SUM, None),
    "a notebook": (
        f"{IPYTHON}File ~/v/unets/unet_2d_condition.py:7, in U.forward()\n-> 7 {ADDED}\n\n{SUM}",
        "down",
    ),
    "rich": (
        f"╭── Traceback (most recent call last) ──╮\n│ /v/models/unet_2d_condition.py:7 in forward │\n╰╯\n{SUM}",
        None,
    ),
    "torch.export, which shows no more": (HEAD + frame("run.py") + DYNAMO + SUM, None),
    "torch.compile": (HEAD + frame("run.py") + DYNAMO + SUM + f"\n\nfrom user code:\n{UNET}    {ADDED}\n", "down"),
    "after something else": (
        HEAD + frame("train.py", "y = a + b") + SUM + ONE_MORE + HEAD + UNET + f"    {ADDED}\n{SUM}",
        "down",
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_what_a_unet_says_is_explained_in_every_form(name):
    text, stage = OURS[name]
    (reading,) = explain_text(text, MODELS, RequestedSize()).explanations
    slots = {each.failure.slot for answer in reading.answers if "sd15" in answer.models for each in answer.candidates}
    assert reading.symptom.stage == stage
    assert slots == {f"down_block_residual_{number:02d}" for number in range(4)}


def test_one_exception_elsewhere_does_not_hide_another():
    other = SUM.replace("320", "1280").replace("640", "320")
    diagnosis = explain_text(
        HEAD + frame("train.py", "y = a + b") + SUM + ONE_MORE + HEAD + UNET + other, MODELS, RequestedSize()
    )
    assert [(reading.symptom.expected, reading.symptom.actual) for reading in diagnosis.explanations] == [(1280, 320)]


def test_a_dtype_of_the_unet_or_its_controlnet_is_told():
    for file in ("unets/unet_2d_condition.py", "controlnets/controlnet.py"):
        text = HEAD + frame(f"diffusers/models/{file}") + frame("diffusers/models/attention_processor.py") + MODULE + HALF
        (reading,) = explain_text(text, MODELS, RequestedSize()).explanations
        assert [cause.kind for cause in reading.causes] == ["dtype"]


def test_a_runtime_s_own_call_is_no_other_code():
    run = frame("run.py", "session.run(None, feed)") + frame("onnxruntime/capi/onnxruntime_inference_collection.py", "return x")
    text = "Got invalid dimensions for input: input_control_03 for the following indices index: 1 Got: 640 Expected: 320"
    (reading,) = explain_text(HEAD + run + text, MODELS, RequestedSize()).explanations
    assert {slot for cause in reading.causes for slot in cause.slots} == {"down_block_residual_03"}


def nets(axis: int, one: int, other: int):
    text = f"The size of tensor a ({one}) must match the size of tensor b ({other}) at non-singleton dimension {axis}"
    (reading,) = explain_text(HEAD + NETS + text, MODELS, RequestedSize()).explanations
    (cause,) = reading.causes
    assert reading.answers == ()
    assert cause.kind == "nets"
    return cause


def test_two_controlnets_that_cannot_be_added_are_told():
    cause = nets(1, 384, 320)
    assert cause.where == "down_block_residual_00"
    assert "kandinsky-2.2 and bk-sdm-small" in cause.message
    assert nets(1, 321, 320).slots == ()
    assert "ran at different sizes" in nets(3, 64, 48).message
    assert "ran at different batches" in nets(0, 2, 4).message


# words that are like those of residuals


@pytest.mark.parametrize(
    "text",
    [
        "mat1 and mat2 shapes cannot be multiplied (32x768 and 1024x10)",
        "No valid profile found for yolo",
        "but got weight of shape [,] and input of shape [,]",
        "shape '[2, 77, 8]' is invalid for input of size 100",
        "KeyError: 'mid_block_type'",
        "KeyError: 'down_block_types'",
        "TypeError: unsupported operand type(s) for +: 'Tensor' and 'NoneType'",
        "TypeError: forward() got an unexpected keyword argument 'attention_mask'",
        "Input type (torch.cuda.FloatTensor) and weight type (torch.FloatTensor) should be the same",
        "Input type (torch.FloatTensor) and weight type (torch.cuda.HalfTensor) should be the same",
        "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Invalid rank for input: input_ids Got: 1 Expected: 2",
    ],
)
def test_words_alike_are_no_diagnosis(text):
    assert explain_text(text, presets.contracts(), RequestedSize()).explanations == ()


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (
            "TypeError: UNet2DModel.forward() got an unexpected keyword argument 'down_block_additional_residuals'",
            "unknown",
            "UNet2DModel takes no down_block_additional_residuals",
        ),
        (
            f"{HEAD}{UNET}    {ADDED}\nTypeError: unsupported operand type(s) for +: 'Tensor' and 'NoneType'",
            "value",
            "one of the residuals is a NoneType",
        ),
        (
            "Input type (torch.cuda.HalfTensor) and weight type (torch.cuda.FloatTensor) should be the same",
            "dtype",
            "HalfTensor met FloatTensor",
        ),
    ],
)
def test_a_call_that_cannot_be_is_told(text, kind, said):
    (reading,) = explain_text(text, MODELS, RequestedSize()).explanations
    (cause,) = reading.causes
    assert cause.kind == kind
    assert cause.message.startswith(said)


def explain(*arguments: str):
    return CliRunner().invoke(main, ["explain", *arguments])


@pytest.mark.parametrize("name", ["log.txt", "/nowhere/at/all", "logs/run", ".", "~/log"])
def test_a_file_that_is_not_there_is_no_text(name):
    result = explain(name)
    assert result.exit_code == 2
    assert f"cannot read {name}" in result.stderr
    assert result.stdout == ""


def test_beside_a_text_the_status_is_the_text_s():
    result = explain("CUDA out of memory", "--mapping", "320,640@64", "--model", "sd15")
    assert result.exit_code == 1
    assert result.stdout.startswith("NO DIAGNOSIS: memory ran out")
    assert "WRONG" in result.stdout
    assert explain(SUM, "--mapping", "640,640@64", "--model", "sd15").exit_code == 0
