"""Wrong input gets one clear message and exit status 2: no traceback, no hang, and nothing executed from the file."""

from __future__ import annotations

import io
import json
import os
import pickle  # noqa: TID251  # to make the hostile files, never to read one
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shapecheck import ShapecheckError
from shapecheck.cli import main
from shapecheck.models import hub, lookup
from shapecheck.presets import Kind

ADVICE = "give a preset (`shapecheck presets`), a diffusers folder, its config.json or a hub id"
UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 24,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "layers_per_block": 1,
}


def refused(*arguments: str) -> str:
    """The one message of a command that could not run."""
    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return one_message(result.exit_code, result.stdout, result.stderr)


def refused_in_a_process(*arguments: str) -> str:
    """The same of the real command, which must not hang either."""
    process = subprocess.run(
        [Path(sys.executable).with_name("shapecheck"), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )
    return one_message(process.returncode, process.stdout, process.stderr)


def one_message(status: int, stdout: str, stderr: str) -> str:
    assert (status, stdout) == (2, ""), stderr
    assert stderr.startswith("error: ")
    assert stderr.count("error: ") == 1
    assert stderr.endswith("\n")
    return one_line(stderr.removeprefix("error: ")[:-1])


def refused_by_find(name: str | Path, role: Kind = "unet") -> str:
    """What the command would say, without the command."""
    with pytest.raises(ShapecheckError) as error:
        lookup.find(str(name), role)
    return one_line(str(error.value))


def one_line(message: str) -> str:
    assert "Traceback" not in message
    assert len(message) < 1000
    assert message.isprintable(), "no escape sequence of a file reaches the terminal, and no second line"
    return message


# files


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content, encoding="utf-8")  # type: ignore[return-value]


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)  # type: ignore[return-value]


def config(**changes: Any) -> Callable[[Path], None]:
    return text(json.dumps(UNET | changes))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


WHOLE = json.dumps(UNET)
FILES = {
    "truncated": (text(WHOLE[: len(WHOLE) // 2]), "is not valid JSON: .*; is the file cut short"),
    "empty": (text(""), "is not valid JSON: Expecting value"),
    "prose": (text("# A model card\n"), "is not valid JSON: Expecting value"),
    "random bytes": (raw(bytes(range(255, 0, -1)) * 9), "is not UTF-8 text"),
    "utf-16": (raw(WHOLE.encode("utf-16")), "is not UTF-8 text"),
    "half a surrogate pair": (text('{"_class_name": "\\ud800"}'), "is not UTF-8 text"),
    "NUL bytes": (raw(b"\0" * 64), "is not valid JSON"),
    "list": (text("[1, 2]"), "holds a JSON list, not the object"),
    "number": (text("12"), "holds a JSON int, not the object"),
    "null": (text("null"), "holds a JSON NoneType, not the object"),
    "nested past the interpreter": (text("[" * 200_000), "nested too deeply"),
    "nested past reason": (config(sample_size=json.loads("[" * 90 + "]" * 90)), "nested too deeply"),
    "huge number": (text('{"sample_size": ' + "9" * 5000 + "}"), "is not valid JSON: Exceeds the limit"),
    "NaN": (text('{"norm_eps": NaN}'), "is not valid JSON: NaN is not a finite number"),
    "Infinity": (text('{"norm_eps": -Infinity}'), "is not valid JSON: -Infinity is not a finite number"),
    "overflowing float": (text('{"norm_eps": 1e999}'), "is not valid JSON: 1e999 is not a finite number"),
    "larger than any config": (text(WHOLE + " " * 2**20), "is larger than 1048576 bytes"),
    "a billion channels written out": (text('{"block_out_channels": [' + "1," * 2**20 + "1]}"), "is larger than 1048576 bytes"),
    "terabyte": (sparse, "is larger than 1048576 bytes"),
    "llm": (text('{"architectures": ["LlamaForCausalLM"]}'), "is the config of a LlamaForCausalLM; expected a "),
    "llm without architectures": (text('{"model_type": "gpt2"}'), "is the config of a gpt2; expected a "),
    "odd architectures": (text('{"architectures": [{"a": [1]}]}'), "is the config of a {'a': .*; expected a "),
    "other json": (text('{"name": "a package"}'), r"is not a diffusers config \(no _class_name\); expected a "),
    "transformer": (
        text('{"_class_name": "FluxTransformer2DModel"}'),
        "is of class FluxTransformer2DModel, which is not",
    ),
    "vae": (text('{"_class_name": "AutoencoderKL"}'), "is of class AutoencoderKL, which is not supported yet"),
    "pipeline": (
        text('{"_class_name": "StableDiffusionPipeline"}'),
        "is of class StableDiffusionPipeline, which is not",
    ),
    "class name of another type": (text('{"_class_name": ["UNet2DConditionModel"]}'), "which is not supported yet"),
    "terminal escapes": (
        text('{"_class_name": "\\u001b[2J\\u202e\\n"}'),
        r"is of class \\x1b\[2J\\u202e\\n, which",
    ),
    "endless class name": (text(json.dumps({"_class_name": "A" * 500_000})), "is of class A{119}…, which"),
    "contract": (text('{"shapecheck_contract": 1}'), "is a saved contract, not a model; read it with"),
}


@pytest.mark.parametrize(("make", "said"), FILES.values(), ids=FILES)
def test_a_wrong_file_is_refused(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    path = tmp_path / "unet/config.json"
    path.parent.mkdir()
    make(path)
    message = refused_by_find(path)
    assert str(path) in message
    assert re.search(said, message)
    assert message.endswith(ADVICE) or "contract" in said
    assert refused_by_find(tmp_path) == message, "in a folder alike"


@pytest.mark.parametrize("option", [[], ["sd15", "--controlnet"]], ids=["MODEL", "--controlnet"])
@pytest.mark.parametrize("kind", ["truncated", "terabyte", "llm", "terminal escapes", "contract"])
def test_the_command_refuses_a_wrong_file_in_every_place(tmp_path: Path, kind: str, option: list[str]) -> None:
    make, said = FILES[kind]
    path = tmp_path / "config.json"
    make(path)
    message = refused("probe", *option, str(path))
    assert str(path) in message
    assert re.search(said, message)
    assert message.endswith(ADVICE) or kind == "contract"


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", "controlnet/config.json"])
def test_a_wrong_file_beside_a_good_unet_is_named(tmp_path: Path, name: str) -> None:
    for place in ("unet/config.json", name):
        (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{", encoding="utf-8")
    if name != "model_index.json":
        config()(tmp_path / "unet/config.json")
    message = refused("probe", str(tmp_path))
    assert re.search("is not valid JSON: .* cut short", message)
    assert str(tmp_path / name) in message


def test_a_unet_is_no_controlnet_and_a_controlnet_no_unet(tmp_path: Path) -> None:
    unet, net = tmp_path / "unet.json", tmp_path / "net.json"
    config()(unet)
    config(_class_name="ControlNetModel")(net)
    assert refused("probe", str(net)) == f"{net} is a ControlNet; name the UNet as MODEL and give this one with --controlnet"
    assert refused("probe", "sd15", "--controlnet", str(unet)) == (
        f"{unet} is a UNet; --controlnet takes a ControlNet, or the name of a UNet preset"
    )
    assert refused("probe", "controlnet-sd15").endswith("name the UNet as MODEL and give this one with --controlnet")


# pickles, in which opening is executing


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickled(bomb: Bomb, protocol: int) -> bytes:
    return pickle.dumps({"state_dict": bomb}, protocol=protocol)


def zipped(bomb: Bomb) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(bomb, 2))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


PICKLES: dict[str, Callable[[Bomb], bytes]] = {
    "protocol 0": lambda bomb: pickled(bomb, 0),
    "protocol 2": lambda bomb: pickled(bomb, 2),
    "protocol 5": lambda bomb: pickled(bomb, 5),
    "zip": zipped,
}


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[Bomb]:
    """A bomb that must not have gone off at the end of the test."""
    bomb = Bomb(tmp_path / "executed")
    yield bomb
    assert not bomb.marker.exists()


def test_the_bomb_is_a_bomb(tmp_path: Path) -> None:
    pickle.loads(pickled(Bomb(tmp_path / "executed"), 2))
    assert (tmp_path / "executed").exists()


NAMES = ["model.ckpt", "model.pt", "model.PTH", "diffusion_pytorch_model.bin", "model.pkl", "model", "config.json"]
"""Each name with the usual kind of pickle, and each kind under a name that says so and under one that does not."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "zip") for name in NAMES), *product(("model.ckpt", "config.json"), sorted(set(PICKLES) - {"zip"}))],
)
def test_a_pickle_is_never_opened(tmp_path: Path, bomb: Bomb, name: str, kind: str) -> None:
    path = tmp_path / name
    path.write_bytes(PICKLES[kind](bomb))
    message = refused("probe", str(path))
    assert message.startswith(str(path))
    if kind == "protocol 0" and path.suffix == ".json":  # looks like any other text
        assert re.search("is not (valid JSON|UTF-8)", message)
    else:
        assert "is a pickled checkpoint: opening it would run code it contains, so it is never opened; give " in message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("unet/diffusion_pytorch_model.bin", "zip"),
        ("unet/config.json", "zip"),
        ("unet/config.json", "protocol 0"),
        ("model_index.json", "protocol 2"),
        ("vae/config.json", "protocol 5"),
        ("vae/config.json", "protocol 0"),
    ],
)
def test_a_pickle_inside_a_folder_is_never_opened(tmp_path: Path, bomb: Bomb, name: str, kind: str) -> None:
    for place in ("unet/config.json", name):
        (tmp_path / place).parent.mkdir(exist_ok=True)
    if name == "vae/config.json":
        config()(tmp_path / "unet/config.json")
    (tmp_path / name).write_bytes(PICKLES[kind](bomb))
    assert str(tmp_path) in refused("probe", str(tmp_path))


def test_the_real_command_runs_no_pickle_either(tmp_path: Path, bomb: Bomb) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(zipped(bomb))
    assert "so it is never opened" in refused_in_a_process("probe", str(path))


def test_safetensors_without_a_model_say_so(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert refused("probe", str(path)) == (
        f"{path} holds no Stable Diffusion UNet or ControlNet, neither in the original layout nor in diffusers': it is empty"
    )


def test_code_in_a_folder_is_not_imported(tmp_path: Path, bomb: Bomb) -> None:
    (tmp_path / "unet.py").write_text(f"import os; os.mkdir({str(bomb.marker)!r})", encoding="utf-8")
    config(_class_name="Own", auto_map={"AutoModel": "unet.Own"})(tmp_path / "config.json")
    assert "is of class Own, which is not supported yet" in refused("probe", str(tmp_path))


# folders


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    assert refused("probe", str(tmp_path)) == (
        f"looked for a UNet2DConditionModel in {tmp_path}: no unet/config.json and no config.json, it holds nothing; {ADVICE}"
    )
    assert refused("probe", "sd15", "--controlnet", str(tmp_path)) == (
        f"looked for a ControlNetModel in {tmp_path}: no config.json and no controlnet/config.json, it holds nothing; {ADVICE}"
    )


def test_another_folder_says_what_it_holds_instead(tmp_path: Path) -> None:
    for name in ("b.txt", "a\x1b[2J"):
        (tmp_path / name).touch()
    assert r"it holds a\x1b[2J, b.txt; give" in refused("probe", str(tmp_path))


def test_a_pipeline_without_a_unet_is_named_with_its_parts(tmp_path: Path) -> None:
    parts = {"vae": ["diffusers", "A"], "transformer": ["diffusers", "B"], "feature_extractor": [None, None]}
    text(json.dumps({"_class_name": "FluxPipeline", "_diffusers_version": "0", **parts}))(tmp_path / "model_index.json")
    for name in (tmp_path, tmp_path / "model_index.json"):
        assert "it is a FluxPipeline with transformer, vae: no unet among them; give" in refused("probe", str(name))


def test_an_incomplete_copy_is_called_so(tmp_path: Path) -> None:
    text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"]}))(tmp_path / "model_index.json")
    assert "its model_index.json lists a unet: the copy is incomplete; download it again" in refused("probe", str(tmp_path))


def test_a_folder_called_config_json_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "config.json"
    folder.mkdir()
    assert f"in {folder}: no unet/config.json" in refused("probe", str(folder))
    assert f"in {tmp_path}: no unet/config.json and no config.json, it holds config.json" in refused("probe", str(tmp_path))


# what is no ordinary file


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    expected = f"{pipe} is a pipe, a device or a socket, which are never opened; {ADVICE}"
    assert refused_in_a_process("probe", str(pipe)) == expected
    assert "no unet/config.json and no config.json, it holds config.json" in refused_in_a_process("probe", str(tmp_path))


def test_a_device_is_not_read() -> None:
    assert refused_in_a_process("probe", "/dev/zero").startswith("/dev/zero is a pipe, a device or a socket")
    for device in ("/dev/null", "/dev/stdin"):
        assert refused_by_find(Path(device)).startswith(f"{device} is a pipe, a device or a socket")


def test_a_socket_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("model")
        assert refused("probe", "./model").startswith("model is a pipe, a device or a socket")


def test_a_link_in_a_circle_leads_nowhere(tmp_path: Path) -> None:
    for name, target in (("a", "b"), ("b", "a"), ("gone", "nowhere")):
        (tmp_path / name).symlink_to(target)
    for name in ("a", "gone", "a/config.json"):
        assert f"{tmp_path / name} is not a preset, file, folder" in refused("probe", str(tmp_path / name))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("locked", ["", "config.json"])
def test_what_may_not_be_read_is_said(tmp_path: Path, locked: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config()(folder / "config.json")
    (folder / locked).chmod(0)
    try:
        assert f"cannot read {folder}: Permission denied" in refused("probe", str(folder))
    finally:
        (folder / locked).chmod(0o700)


@pytest.mark.parametrize("method", ["is_file", "open", "is_dir"])
def test_an_error_of_the_file_system_is_told(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config()(tmp_path / "config.json")

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(Path, method, fail)
    with pytest.raises(ShapecheckError, match=rf"^cannot read {tmp_path}: Permission denied; give a preset"):
        lookup.find(str(tmp_path), "unet")


# names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/nowhere/model", "/nowhere/model is not a preset, file, folder, or hub id of the form owner/name; "),
        ("./nowhere.json", "./nowhere.json is not a preset, file, folder"),
        ("owner/model.ckpt", "owner/model.ckpt is not a preset, file, folder"),
        ("owner/model.safetensors", "owner/model.safetensors is not a preset, file, folder"),
        ("a/b/c", "a/b/c is not a preset, file, folder"),
        ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name is not a preset, file, folder"),
        ("sd16", "did you mean sd21 or sd15 or ssd-1b? Otherwise "),
        ("SD15", "SD15 is not a preset, file, folder"),
        ("a\0b", r"a\x00b is not a preset, file, folder"),
        ("x\x1b[2J\n", r"x\x1b[2J\n is not a preset, file, folder"),
        ("", "the name of the unet is empty; "),
        (" ", "the name of the unet is empty; "),
        ("~nobody-of-this-name/model", "cannot read ~nobody-of-this-name/model: "),
        ("owner/" + "n" * 100, f"owner/{'n' * 100} is not a preset, file, folder"),
        ("n" * 5000, f"cannot read {'n' * 119}…: File name too long"),
        ("o/" + "n" * 5000, f"o/{'n' * 117}…"),
    ],
)
def test_a_name_of_nothing_is_refused_without_asking_the_hub(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hub, "fetch")
    monkeypatch.delattr(hub, "is_cached")
    message = refused_by_find(name)
    assert said in message
    assert message.endswith(ADVICE)


def test_a_hub_id_without_network_is_refused_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = refused_in_a_process("probe", "owner/name")
    assert (
        "owner/name is not a file or folder here, its unet/config.json is not in the local hub cache, and the hub could not"
        in message
    )
    assert message.endswith("give a local folder or config.json, a preset (`shapecheck presets`), or try again with a network")
    assert "--offline forbids asking the hub" in refused_in_a_process("probe", "owner/name", "--offline")


# before torch is imported


REFUSE = """
import sys
from shapecheck.cli import main
status = main(sys.argv[1:], standalone_mode=False)
print(status, *sorted({"torch", "diffusers", "transformers"} & sys.modules.keys()), file=sys.stdout)
"""


def status_and_modules(*arguments: str) -> list[str]:
    command = [sys.executable, "-c", REFUSE, "probe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout.splitlines()[-1].split()


def test_wrong_input_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    config(_class_name="ControlNetModel", block_out_channels=[7])(tmp_path / "config.json")
    assert status_and_modules(str(tmp_path)) == ["2"]
    assert status_and_modules("sd15", "--controlnet", str(tmp_path / "nothing.json")) == ["2"]


@pytest.mark.full
def test_good_input_does_import_torch(tmp_path: Path) -> None:
    """Or the test above would show nothing."""
    config()(tmp_path / "config.json")
    assert status_and_modules(str(tmp_path))[:3] == ["0", "diffusers", "torch"]


# configurations of a UNet that no UNet can have


ABSURD = {
    "a billion layers": {"layers_per_block": 10**9},
    "layers by name": {"layers_per_block": "2"},
    "no layers": {"layers_per_block": None},
    "fewer layers than none": {"layers_per_block": -1},
    "layers beyond 64 bits": {"layers_per_block": 10**30},
    "a billion transformer layers": {"transformer_layers_per_block": [1, 10**9]},
    "channels beyond memory": {"block_out_channels": [10**9, 10**9]},
    "one level of channels": {"block_out_channels": [10**12]},
    "no channels": {"block_out_channels": []},
    "channels of null": {"block_out_channels": None},
    "heads of no width": {"attention_head_dim": 0},
    "heads of null": {"attention_head_dim": None},
    "no groups": {"norm_num_groups": 0},
    "negative input": {"in_channels": -1},
    "unknown blocks": {"down_block_types": ["os.system", "__import__"]},
    "unknown activation": {"act_fn": "eval"},
    "text of another type": {"cross_attention_dim": "24"},
}


@pytest.mark.parametrize("changes", ABSURD.values(), ids=ABSURD)
def test_an_absurd_configuration_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    config(**changes)(path)
    assert str(path) in refused("probe", str(path))
