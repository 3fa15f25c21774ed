"""Every form in which a model can be named leads to its configuration, and a hub id to configurations only."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest

from shapecheck import ShapecheckError
from shapecheck.models import hub, lookup
from shapecheck.presets import Kind

REPOSITORY = "owner/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 24,
}
CONTROLNET = {key: value for key, value in UNET.items() if key != "up_block_types"} | {"_class_name": "ControlNetModel"}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [4, 4, 4]}  # 2 halvings: 4 pixels a latent cell
LLM = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "A"]}
WITH_CONTROLNET = INDEX | {"controlnet": ["diffusers", "ControlNetModel"]}


def write(path: Path, record: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


# presets


@pytest.mark.parametrize(
    ("name", "role", "class_name", "vae_factor"),
    [
        ("sd15", "unet", "UNet2DConditionModel", 8),
        ("sd-x4-upscaler", "unet", "UNet2DConditionModel", 4),
        ("controlnet-sd15", "controlnet", "ControlNetModel", 8),
        ("controlnet-union-sdxl", "controlnet", "ControlNetUnionModel", 8),
        ("sdxl", "controlnet", "UNet2DConditionModel", 8),  # the ControlNet made for it
    ],
)
def test_a_preset_is_found_by_name(name: str, role: Kind, class_name: str, vae_factor: int) -> None:
    found = lookup.find(name, role)
    assert (found.name, found.origin, found.class_name, found.vae_factor) == (name, f"preset {name}", class_name, vae_factor)
    assert found.config["block_out_channels"]


def test_a_preset_goes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "sd15/config.json", UNET)
    monkeypatch.chdir(tmp_path)
    assert lookup.find("sd15", "unet").origin == "preset sd15"
    assert lookup.find("./sd15", "unet").origin == "sd15/config.json"


def test_a_controlnet_preset_is_no_model() -> None:
    with pytest.raises(ShapecheckError, match=r"^controlnet-sd15 is a ControlNet; .* --controlnet$"):
        lookup.find("controlnet-sd15", "unet")


# files and folders that diffusers wrote


@dataclass(frozen=True)
class Saved:
    """A pipeline's folder with two ControlNets, and the configurations of the modules it was saved from."""

    folder: Path
    unet: Mapping[str, Any]
    nets: tuple[Mapping[str, Any], ...]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    from diffusers import AutoencoderKL, ControlNetModel, MultiControlNetModel, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("saved") / "model"
    shape = {key: value for key, value in UNET.items() if key != "_class_name"}
    unet = UNet2DConditionModel(**shape, norm_num_groups=4, attention_head_dim=2, layers_per_block=1)
    nets = [
        ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, width, 4, 4), load_weights_from_unet=False)
        for width in (8, 12)
    ]
    unet.save_config(folder / "unet")
    MultiControlNetModel(nets).save_pretrained(str(folder / "controlnet"))
    AutoencoderKL(block_out_channels=(4, 4, 4), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 3,
                  up_block_types=("UpDecoderBlock2D",) * 3).save_config(folder / "vae")  # fmt: skip
    write(folder / "model_index.json", WITH_CONTROLNET)
    return Saved(folder, dict(unet.config), tuple(dict(net.config) for net in nets))


def same(found: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
    """Whether a configuration that was read is the one a module had; JSON has no tuples."""
    without = {key: value for key, value in saved.items() if not key.startswith("_")}
    return {key: found[key] for key in without} == json.loads(json.dumps(without))


@pytest.mark.parametrize("place", ["", "model_index.json"])
def test_a_model_folder_gives_unet_vae_factor_and_controlnets(saved: Saved, place: str) -> None:
    found = lookup.find(str(saved.folder / place), "unet")
    assert found.origin == str(saved.folder / "unet/config.json")
    assert (found.role, found.vae_factor, found.notes) == ("unet", 4, ())
    assert same(found.config, saved.unet)
    assert [net.origin for net in found.controlnets] == [
        str(saved.folder / "controlnet/config.json"),
        str(saved.folder / "controlnet_1/config.json"),
    ]
    assert all(same(net.config, config) for net, config in zip(found.controlnets, saved.nets, strict=True))
    assert saved.nets[0] != saved.nets[1]


@pytest.mark.parametrize("place", ["unet", "unet/config.json"])
def test_the_unet_alone_takes_its_vae_factor_from_the_model_around_it(saved: Saved, place: str) -> None:
    found = lookup.find(str(saved.folder / place), "unet")
    assert same(found.config, saved.unet)
    assert (found.vae_factor, found.controlnets) == (4, ())


@pytest.mark.parametrize(
    ("place", "number"),
    [("", 0), ("controlnet", 0), ("controlnet/config.json", 0), ("controlnet_1", 1), ("controlnet_1/config.json", 1)],
)
def test_a_controlnet_is_found_in_its_folder_and_in_the_models(saved: Saved, place: str, number: int) -> None:
    found = lookup.find(str(saved.folder / place), "controlnet")
    assert (found.role, found.class_name) == ("controlnet", "ControlNetModel")
    assert same(found.config, saved.nets[number])


@pytest.mark.parametrize("place", ["", "model_index.json", "controlnet", "controlnet/"])
def test_a_multi_controlnet_is_all_of_its_controlnets(saved: Saved, place: str) -> None:
    found = lookup.find(f"{saved.folder}/{place}", "controlnet")
    every = (found, *found.controlnets)
    assert [net.name for net in every] == [str(saved.folder / "controlnet"), str(saved.folder / "controlnet_1")]
    assert all(same(net.config, config) for net, config in zip(every, saved.nets, strict=True))


@pytest.mark.parametrize("name", ["controlnet", ".", "../controlnet"])
def test_a_multi_controlnet_by_a_relative_name(saved: Saved, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.folder / ("" if name == "controlnet" else "controlnet"))
    (further,) = lookup.find(name, "controlnet").controlnets
    assert Path(further.name).resolve() == saved.folder / "controlnet_1"


@pytest.mark.parametrize("place", ["controlnet/config.json", "controlnet_1"])
def test_one_of_several_controlnets_can_be_named_alone(saved: Saved, place: str) -> None:
    found = lookup.find(str(saved.folder / place), "controlnet")
    assert (found.controlnets, found.notes) == ((), ())


def test_what_is_taken_with_a_controlnet_is_told(saved: Saved) -> None:
    (note,) = lookup.find(str(saved.folder / "controlnet"), "controlnet").notes
    assert f"{saved.folder}/controlnet_1 lies beside" in note
    assert f"{saved.folder}/controlnet/config.json is the first alone" in note


@pytest.mark.parametrize("place", ["", "/", "/model_index.json"])
def test_controlnets_of_a_model_are_called_by_their_paths(saved: Saved, place: str) -> None:
    found = lookup.find(f"{saved.folder}{place}", "unet")
    assert [net.name for net in found.controlnets] == [str(saved.folder / "controlnet"), str(saved.folder / "controlnet_1")]


@pytest.mark.parametrize("name", ["config.json", ".", "./config.json"])
def test_relative_names_find_the_vae_too(saved: Saved, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.folder / "unet")
    found = lookup.find(name, "unet")
    assert same(found.config, saved.unet)
    assert found.vae_factor == 4


def test_a_tilde_is_the_home_folder(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.folder.parent))
    assert lookup.find("~/model", "unet").vae_factor == 4


def test_what_is_found_builds_the_module_that_was_saved(saved: Saved) -> None:
    from shapecheck.models import diffusers_models

    built = diffusers_models.build(lookup.find(str(saved.folder), "unet"))
    assert same(saved.unet, dict(built.config))  # type: ignore[arg-type]


# files and folders of other hands


@pytest.mark.parametrize(
    ("record", "role", "guess"), [(UNET, "unet", "UNet2DConditionModel"), (CONTROLNET, "controlnet", "ControlNetModel")]
)
def test_without_a_class_name_the_keys_tell_and_a_note_says_so(
    tmp_path: Path, record: Mapping[str, Any], role: Kind, guess: str
) -> None:
    path = write(tmp_path / "config.json", {key: value for key, value in record.items() if key != "_class_name"})
    found = lookup.find(str(path), role)
    assert (found.class_name, found.role) == (guess, role)
    assert found.notes == (f"no _class_name in {path}: taken for a {guess} by its keys",)
    assert lookup.find(str(write(path, record)), role).notes == ()


@pytest.mark.parametrize(
    ("levels", "factor"), [([4], 1), ([4] * 3, 4), ([4] * 4, 8), ([4] * 6, 32), ([4] * 9, 8), ([], 8), (4, 8)]
)
def test_the_vae_factor_is_two_to_the_halvings_and_8_where_that_is_absurd(tmp_path: Path, levels: object, factor: int) -> None:
    write(tmp_path / "unet/config.json", UNET)
    write(tmp_path / "vae/config.json", VAE | {"block_out_channels": levels})
    assert lookup.find(str(tmp_path), "unet").vae_factor == factor


def test_a_vae_below_the_unets_own_config_goes_before_one_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "model/config.json", UNET)
    write(tmp_path / "model/vae/config.json", VAE)
    write(tmp_path / "vae/config.json", VAE | {"block_out_channels": [4]})
    assert lookup.find(str(tmp_path / "model"), "unet").vae_factor == 4


def test_without_a_vae_8_pixels_make_a_latent_cell(tmp_path: Path) -> None:
    write(tmp_path / "a/unet/config.json", UNET)
    write(tmp_path / "vae/config.json", VAE)  # somebody else's: a model folder's VAE lies inside it
    assert lookup.find(str(tmp_path / "a"), "unet").vae_factor == 8


def test_the_unet_in_its_subfolder_goes_before_a_config_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "config.json", LLM)
    write(tmp_path / "unet/config.json", UNET)
    assert lookup.find(str(tmp_path), "unet").origin == str(tmp_path / "unet/config.json")


def test_for_a_controlnet_a_folders_unet_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "config.json", UNET)
    write(tmp_path / "controlnet/config.json", CONTROLNET)
    assert lookup.find(str(tmp_path), "controlnet").origin == str(tmp_path / "controlnet/config.json")


def test_controlnets_are_numbered_without_a_gap(tmp_path: Path) -> None:
    for place in ("unet", "controlnet", "controlnet_2"):
        write(tmp_path / place / "config.json", UNET if place == "unet" else CONTROLNET)
    assert [net.name for net in lookup.find(str(tmp_path), "unet").controlnets] == [f"{tmp_path}/controlnet"]


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(UNET), encoding="utf-8-sig")
    assert lookup.find(str(path), "unet").config == UNET


def test_of_a_key_given_twice_the_last_counts_as_it_does_for_diffusers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(UNET)[:-1] + ', "cross_attention_dim": 48}', encoding="utf-8")
    assert lookup.find(str(path), "unet").config["cross_attention_dim"] == 48


def test_a_link_to_a_config_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "blob", UNET)
    (tmp_path / "config.json").symlink_to("blob")
    assert lookup.find(str(tmp_path), "unet").config == UNET


# the hub's cache, as huggingface_hub lays it out


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with the network gone: whoever asks the hub is told so."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_network)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    return tmp_path / "hub"


def no_network(*asked: object, **options: object) -> None:
    raise ConnectionError("the test has no network")


def store(cache: Path, files: Mapping[str, object], *, absent: tuple[str, ...] = ()) -> None:
    """Files of the repository at its main branch: links to blobs, and empty files for what is known not to exist."""
    repository = cache / f"models--{REPOSITORY.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    for number, (place, record) in enumerate(files.items()):
        blob = write(repository / f"blobs/{number:040x}", record)
        link = repository / "snapshots" / COMMIT / place
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + place.count("/")), "blobs", blob.name))
    for place in absent:
        mark = repository / ".no_exist" / COMMIT / place
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


MODEL = {"unet/config.json": UNET, "vae/config.json": VAE, "model_index.json": INDEX}


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_model_is_found_without_asking_the_hub(cache: Path, offline: bool) -> None:
    store(cache, MODEL)
    found = lookup.find(REPOSITORY, "unet", offline=offline)
    assert (found.name, found.origin, found.config) == (REPOSITORY, f"hub {REPOSITORY} unet/config.json", UNET)
    assert (found.vae_factor, found.controlnets, found.notes) == (4, (), ())


def test_a_cached_pipeline_brings_the_controlnets_its_index_lists(cache: Path) -> None:
    nets = {f"{place}/config.json": CONTROLNET for place in ("controlnet", "controlnet_1")}
    store(cache, MODEL | nets | {"model_index.json": WITH_CONTROLNET}, absent=("controlnet_2/config.json",))
    assert [net.name for net in lookup.find(REPOSITORY, "unet").controlnets] == [
        f"{REPOSITORY}/controlnet",
        f"{REPOSITORY}/controlnet_1",
    ]


def test_a_cached_pipeline_is_as_a_controlnet_all_it_holds(cache: Path) -> None:
    nets = {f"{place}/config.json": CONTROLNET for place in ("controlnet", "controlnet_1")}
    store(cache, nets, absent=("controlnet_2/config.json", "config.json"))
    found = lookup.find(REPOSITORY, "controlnet")
    assert [net.name for net in (found, *found.controlnets)] == [f"{REPOSITORY}/controlnet", f"{REPOSITORY}/controlnet_1"]
    assert found.notes == ()


@pytest.mark.parametrize("absent", [("unet/config.json",), ()])
@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_unet_repository_needs_no_subfolder(cache: Path, offline: bool, absent: tuple[str, ...]) -> None:
    store(cache, {"config.json": UNET}, absent=absent)
    assert lookup.find(REPOSITORY, "unet", offline=offline).origin == f"hub {REPOSITORY} config.json"


@pytest.mark.parametrize("place", ["config.json", "controlnet/config.json"])
def test_a_cached_controlnet_is_found(cache: Path, place: str) -> None:
    store(cache, {place: CONTROLNET})
    assert lookup.find(REPOSITORY, "controlnet", offline=True).origin == f"hub {REPOSITORY} {place}"


def test_what_lies_beside_a_cached_unet_may_be_out_of_reach_and_a_note_says_so(cache: Path) -> None:
    store(cache, {"unet/config.json": UNET})
    found = lookup.find(REPOSITORY, "unet")
    assert found.vae_factor == 8
    assumed = f"8 pixels per latent cell and no ControlNet in {REPOSITORY} are assumed"
    assert found.notes == (f"{assumed}: the hub could not be asked: the test has no network",)


def test_a_repository_known_to_hold_no_unet_says_so(cache: Path) -> None:
    store(cache, {}, absent=("unet/config.json", "config.json"))
    with pytest.raises(
        ShapecheckError, match=rf"in hub repository {REPOSITORY}: it has no unet/config.json and no config.json"
    ):
        lookup.find(REPOSITORY, "unet")


def test_a_cached_llm_is_named_for_what_it_is(cache: Path) -> None:
    store(cache, {"config.json": LLM}, absent=("unet/config.json",))
    with pytest.raises(
        ShapecheckError, match=r"config\.json is the config of a LlamaForCausalLM; expected a UNet2DConditionModel"
    ):
        lookup.find(REPOSITORY, "unet", offline=True)


@pytest.mark.parametrize("cached", [{}, {"vae/config.json": VAE}])
def test_what_is_not_cached_is_not_said_to_be_absent(cache: Path, cached: Mapping[str, object]) -> None:
    store(cache, cached)
    with pytest.raises(hub.HubError, match=r"unet/config\.json is not in the local hub cache, and --offline forbids") as raised:
        lookup.find(REPOSITORY, "unet", offline=True)
    assert raised.value.reason == "--offline forbids asking the hub"


def test_a_cache_that_cannot_be_read_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(cache, MODEL)

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ShapecheckError, match=rf"^cannot read {REPOSITORY}: Permission denied; give a preset"):
        lookup.find(REPOSITORY, "unet", offline=True)


def test_the_hub_librarys_own_switch_forbids_the_network_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubError, match="HF_HUB_OFFLINE forbids asking the hub"):
        lookup.find(REPOSITORY, "unet")


def test_without_network_one_message_says_what_was_looked_for_and_what_to_do(cache: Path) -> None:
    with pytest.raises(hub.HubError) as raised:
        lookup.find(REPOSITORY, "unet")
    assert str(raised.value) == (
        "owner/tiny is not a file or folder here, its unet/config.json is not in the local hub cache, "
        "and the hub could not be asked: the test has no network; "
        "give a local folder or config.json, a preset (`shapecheck presets`), or try again with a network"
    )


@pytest.mark.parametrize("name", ["a--b/c", "a/b..c", "a/b.git", "a/b-"])
def test_a_name_the_hub_would_refuse_is_no_hub_id(cache: Path, name: str) -> None:
    with pytest.raises(ShapecheckError, match=r"not a hub id of the form owner/name either; check the spelling"):
        lookup.find(name, "unet")


# the hub itself, played by a server of ours for the real huggingface_hub


@dataclass
class Hub:
    """What the server holds, what it answers instead of a file, and what it was asked."""

    files: Mapping[str, bytes]
    refusal: tuple[int, str] = (404, "EntryNotFound")
    commit: str = COMMIT
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            place = self.path.partition("/resolve/main/")[2] or self.path.partition(f"/resolve/{COMMIT}/")[2]
            hub.asked.append(f"{self.command} {place}")
            body = hub.files.get(place)
            self.send_response(200 if body is not None else hub.refusal[0])
            self.send_header("X-HF-Warning", "topic; which the hub library logs")
            if hub.commit:
                self.send_header("X-Repo-Commit", hub.commit)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("ETag", f'"{abs(hash(body)):040x}"')
            if body is None:
                self.send_header("X-Error-Code", hub.refusal[1])
            self.end_headers()
            if body and self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD  # noqa: N815  # the name http.server calls

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


FIND = """
import dataclasses, json, sys
from shapecheck import ShapecheckError
from shapecheck.models import lookup
try:
    print(json.dumps(dataclasses.asdict(lookup.find(sys.argv[1], sys.argv[2])), default=str))
except ShapecheckError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def find(tmp_path: Path) -> Callable[..., Any]:
    """configs.find in a process of its own, with an empty cache that later calls share, against that hub."""

    def run(endpoint: str, role: str = "unet", **environment: str) -> Any:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"}
        process = subprocess.run(
            [sys.executable, "-c", FIND, REPOSITORY, role],
            env={"PATH": "", "HF_HUB_DISABLE_TELEMETRY": "1"} | settings | environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        assert process.stderr == ""
        return json.loads(process.stdout)

    return run


def served(files: Mapping[str, object]) -> dict[str, bytes]:
    return {place: json.dumps(record).encode() for place, record in files.items()}


WEIGHTS = {
    "unet/diffusion_pytorch_model.safetensors": "w",
    "unet/diffusion_pytorch_model.bin": "w",
    "vae/pytorch_model.bin": "w",
}


def test_from_the_hub_come_configs_only_and_only_once(find: Callable[..., Any]) -> None:
    server = Hub(served(MODEL | WEIGHTS))
    with serving(server) as endpoint:
        first = find(endpoint)
        asked = tuple(server.asked)
        second = find(endpoint)
    assert {each.split()[1] for each in asked} == MODEL.keys()
    assert tuple(server.asked) == asked, "the second time the cache knows it all"
    assert first == second
    assert (first["config"], first["vae_factor"], first["notes"]) == (UNET, 4, [])


def test_the_cache_remembers_what_the_hub_does_not_have(find: Callable[..., Any]) -> None:
    server = Hub(served({}))
    with serving(server) as endpoint:
        first = find(endpoint)
    assert "it has no unet/config.json and no config.json" in first
    assert {"HEAD unet/config.json", "HEAD config.json"} == set(server.asked)
    assert find("http://127.0.0.1:9") == first


def test_what_answers_to_every_name_is_no_hub(find: Callable[..., Any]) -> None:
    """A hotel's login page does."""
    with serving(Hub(served(MODEL), commit="")) as endpoint:
        assert "unet/config.json is not in the local hub cache, and the hub could not be asked: " in find(endpoint)


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (
            (404, "EntryNotFound"),
            f"in hub repository {REPOSITORY}: it has no unet/config.json and no config.json; give a preset",
        ),
        ((401, "RepoNotFound"), "the hub knows no such repository, or it is private"),
        ((403, "GatedRepo"), "its owner gives access on request only"),
        ((403, "Forbidden"), "the hub could not be asked: "),
        ((500, "Broken"), "the hub could not be asked: "),
    ],
)
def test_the_hubs_refusals_are_told_apart(find: Callable[..., Any], refusal: tuple[int, str], said: str) -> None:
    with serving(Hub({}, refusal)) as endpoint:
        assert said in find(endpoint)


def test_a_huge_config_is_not_downloaded(find: Callable[..., Any]) -> None:
    server = Hub({"unet/config.json": b" " * (hub.LARGEST_FILE + 1)})
    with serving(server) as endpoint:
        assert find(endpoint) == f"hub {REPOSITORY} unet/config.json is larger than 1048576 bytes: not a config.json"
    assert server.asked == ["HEAD unet/config.json"]


def test_a_closed_port_fails_at_once_and_quietly(find: Callable[..., Any]) -> None:
    assert "the hub could not be asked: " in find("http://127.0.0.1:9")


@pytest.mark.full
def test_a_hub_that_never_answers_is_asked_once(find: Callable[..., Any]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert "the hub could not be asked: " in find(f"http://127.0.0.1:{port}", HF_HUB_ETAG_TIMEOUT="1")
