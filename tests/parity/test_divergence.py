"""Where a file leaves PyTorch's numbers: planted faults in small real UNets, each found at its place and nowhere else."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import engines
import exports
import numpy as np
import onnx
import onnx_files
import onnx_ir as ir
import pytest
import torch
from onnx_files import planted
from small import SHALLOW, unet

from shapecheck import Geometry, ShapecheckError
from shapecheck.onnx.file import OnnxFile
from shapecheck.onnx.intermediate_values import add_outputs, find_values, name_output
from shapecheck.parity.divergence import compute_inner, find_divergence
from shapecheck.parity.polygraphy_repro import reproduce
from shapecheck.runtime.onnx_session import OnnxSession

AT = Geometry(2, 17, 25, 7)
TIMES_OWN = 4
KOALA = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "layers_per_block": 1,
    "mid_block_type": None,
}
"""No mid block: the mid residual is added to the last skip."""
IN_ORDER = [
    "conv_in.out",
    "down_blocks.0.resnets.0.out",
    "down_blocks.0.attentions.0.out",
    "down_blocks.0.downsamplers.0.out",
    "down_blocks.1.resnets.0.out",
    "conv_in.out+down_block_residual_00",
    "down_blocks.0.attentions.0.out+down_block_residual_01",
    "down_blocks.0.downsamplers.0.out+down_block_residual_02",
    "down_blocks.1.resnets.0.out+down_block_residual_03",
    "mid_block.out",
    "mid_block.out+mid_block_residual",
    "up_blocks.0.out",
    "up_blocks.1.out",
    "conv_out.out",
]
"""What a UNet of two levels computes, by reading diffusers."""


class Case:
    """A healthy file, and PyTorch's values for it."""

    def __init__(self, folder: Path, config: dict) -> None:
        self.config = config
        self.path, self.contract = engines.exported(folder / "unet.onnx", config)
        self.inputs = inputs_of(self.contract)
        self.names = {name: name for name in self.inputs}
        self._known: dict = {}

    def source(self, dtype: torch.dtype):
        """PyTorch's values, computed once for each set of values."""

        def values_of(values):
            key = (dtype, frozenset(each.name for each in values))
            if key not in self._known:
                self._known[key] = compute_inner(unet(**self.config).to(dtype), self.contract, self.inputs, values)
            return self._known[key]

        return values_of

    def find(self, path: Path | None = None, **changes):
        own = {"reference": self.source(torch.float64), "own": self.source(torch.float32), "names": self.names} | changes
        names, reference, mine = own.pop("names"), own.pop("reference"), own.pop("own")
        return find_divergence(
            OnnxFile(path or self.path),
            self.contract,
            names,
            self.inputs,
            reference,
            mine,
            tolerance_factor=TIMES_OWN,
            dtype=torch.float32,
            **own,
        )


def inputs_of(contract) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = contract.input_shapes(AT)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | {
        "timestep": torch.tensor([7.0, 901.0])
    }


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("shallow"), SHALLOW)


@pytest.fixture(scope="module")
def koala(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("koala"), KOALA)


def reweigh(name: str, change):
    """Another weight in place of one: what `change` makes of it and of all weights."""

    def edit(model: ir.Model) -> None:
        weights = {each: value.const_value.numpy() for each, value in model.graph.initializers.items() if value.const_value}
        model.graph.initializers[name].const_value = ir.tensor(change(weights[name].copy(), weights), name=name)

    return edit


def scaled(weight, _):
    return (weight * 1.01).astype(np.float32)


def with_nan(weight, _):
    weight[3] = np.nan
    return weight


def in_half(output: str):
    """The convolution that gives this value computes in float16."""

    def edit(model: ir.Model) -> None:
        node = next(node for node in model.graph if node.outputs[0].name == output)
        casts = [ir.Node("", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT16)]) for value in node.inputs]
        back = ir.Node("", "Cast", [node.outputs[0]], [ir.AttrInt64("to", ir.DataType.FLOAT)])
        users = [(user, index) for user, index in node.outputs[0].uses() if user is not back]
        for index, cast in enumerate(casts):
            node.replace_input_with(index, cast.outputs[0])
        model.graph.insert_before(node, casts)
        model.graph.insert_after(node, back)
        for user, index in users:
            user.replace_input_with(index, back.outputs[0])

    return edit


def ours(model: ir.Model) -> None:
    """The names of our own exporter for blocks and sums, derived here from those of PyTorch's."""
    names = {
        "/model/conv_in/Conv_output_0": "conv_in.out",
        "/model/down_blocks.0/attentions.0/Add_output_0": "down_blocks.0.attentions.0.out",
    }
    names |= {
        "/model/Add_output_0": "conv_in.out+down_block_residual_00",
        "/model/Add_1_output_0": "down_blocks.0.attentions.0.out+down_block_residual_01",
    }
    for node in model.graph:
        node.outputs[0].name = names.get(node.outputs[0].name, node.outputs[0].name)


def test_the_values_are_those_of_the_unet_in_its_order(case):
    values = find_values(OnnxFile(case.path), case.contract, case.names)
    assert [each.name for each in values] == IN_ORDER
    assert set(case.source(torch.float64)(values)) == set(IN_ORDER)


def test_a_healthy_file_agrees_everywhere(case, koala):
    assert case.find() is None
    assert koala.find() is None


def test_under_the_numbers_of_an_optimiser_skips_and_sums_are_still_found(case, tmp_path):
    path = planted(case.path, tmp_path / "numbers.onnx", onnx_files.forget_names)
    found = [each.name for each in find_values(OnnxFile(path), case.contract, case.names)]
    assert found == [name for name in IN_ORDER if not name.startswith("up_blocks") and name != "down_blocks.0.resnets.0.out"]
    assert case.find(path) is None


def test_a_mid_slot_without_a_mid_block_shares_its_skip(koala):
    sums = [each for each in find_values(OnnxFile(koala.path), koala.contract, koala.names) if each.slot]
    assert [(each.module, each.slot) for each in sums[-2:]] == [
        ("down_blocks.1.resnets.0", "down_block_residual_03"),
        ("down_blocks.1.resnets.0", "mid_block_residual"),
    ]


@pytest.mark.parametrize("slot", ["mid_block_residual", "down_block_residual_03"])
def test_of_two_slots_on_one_skip_the_dropped_one_is_named(koala, tmp_path, slot):
    found = koala.find(planted(koala.path, tmp_path / "dropped.onnx", onnx_files.unconsume(slot)))
    assert (found.module, found.slot) == ("down_blocks.1.resnets.0", slot)


FAULTS = {
    "scaled": (
        reweigh("model.down_blocks.1.resnets.0.conv1.weight", scaled),
        "down_blocks.1.resnets.0.out",
        "down_block_residual_03",
    ),
    "another's": (
        reweigh("model.mid_block.resnets.0.conv2.weight", lambda own, all_: all_["model.mid_block.resnets.1.conv2.weight"]),
        "mid_block.out",
        "mid_block_residual",
    ),
    "half": (in_half("/model/up_blocks.0/resnets.0/conv1/Conv_output_0"), "up_blocks.0.out", ""),
    "half skip": (in_half("/model/conv_in/Conv_output_0"), "conv_in.out", "down_block_residual_00"),
    "nan": (
        reweigh("model.down_blocks.0.downsamplers.0.conv.bias", with_nan),
        "down_blocks.0.downsamplers.0.out",
        "down_block_residual_02",
    ),
    "output": (reweigh("model.conv_out.weight", scaled), "conv_out.out", ""),
    "dropped": (
        onnx_files.unconsume("down_block_residual_02"),
        "down_blocks.0.downsamplers.0.out+down_block_residual_02",
        "down_block_residual_02",
    ),
    "dropped mid": (onnx_files.unconsume("mid_block_residual"), "mid_block.out+mid_block_residual", "mid_block_residual"),
    "exchanged": (
        onnx_files.exchange("down_block_residual_00", "down_block_residual_01"),
        "conv_in.out+down_block_residual_00",
        "down_block_residual_00",
    ),
    "twice": (
        onnx_files.add_again("down_block_residual_01"),
        "down_blocks.0.attentions.0.out+down_block_residual_01",
        "down_block_residual_01",
    ),
}


KINDS = {"scaled", "half skip", "output", "dropped mid", "exchanged", "twice"}
"""One of each kind; the others are of the same kind at another place."""


@pytest.mark.parametrize("fault", [pytest.param(name, marks=[pytest.mark.full] * (name not in KINDS)) for name in FAULTS])
def test_a_planted_fault_is_found_where_it_is(case, tmp_path, fault):
    edit, place, slot = FAULTS[fault]
    path = planted(case.path, tmp_path / "planted.onnx", edit)
    found = case.find(path)
    assert found is not None
    assert f"{found.module}.out" == place.partition("+")[0]
    assert found.slot == slot
    assert not found.verdict.passes
    values = find_values(OnnxFile(path), case.contract, case.names)
    at = next(index for index, each in enumerate(values) if each.name == place)
    assert [each.name for each in values] == IN_ORDER
    assert (found.value, found.agreed) == (values[at].value, tuple(each.value for each in values[:at]))
    assert found.command == ""


def test_nan_is_counted_where_it_begins(case, tmp_path):
    found = case.find(planted(case.path, tmp_path / "nan.onnx", FAULTS["nan"][0]))
    assert (found.module, found.slot) == ("down_blocks.0.downsamplers.0", "down_block_residual_02")
    assert (found.verdict.nan, found.verdict.shape) == (2 * 9 * 13, (2, 8, 9, 13))


def test_a_residual_that_the_file_does_not_have_is_missed_at_its_skip(case, tmp_path):
    name = "down_block_residual_01"
    path = planted(case.path, tmp_path / "without.onnx", onnx_files.unconsume(name), onnx_files.drop(name))
    found = case.find(path, names={key: each for key, each in case.names.items() if key != name})
    assert (found.module, found.slot) == ("down_blocks.0.attentions.0", name)


@pytest.mark.parametrize("also", [onnx_files.forget_names, ours], ids=["numbers", "ours"])
def test_exchanged_residuals_are_found_under_any_names(case, tmp_path, also):
    swap = onnx_files.exchange("down_block_residual_00", "down_block_residual_01")
    found = case.find(planted(case.path, tmp_path / "swapped.onnx", swap, also))
    assert (found.module, found.slot) == ("conv_in", "down_block_residual_00")


def test_the_files_own_names_of_its_inputs_are_followed(case, tmp_path):
    path = planted(case.path, tmp_path / "renamed.onnx", onnx_files.rename(mid_block_residual="input_17", sample="x"))
    assert case.find(path, names=case.names | {"mid_block_residual": "input_17", "sample": "x"}) is None


def test_a_residual_scaled_in_the_graph_is_still_a_sum(case, tmp_path):
    path = planted(case.path, tmp_path / "scaled.onnx", onnx_files.scale("mid_block_residual"))
    values = find_values(OnnxFile(path), case.contract, case.names)
    assert [each.name for each in values] == IN_ORDER


def test_an_addition_inside_of_a_branch_is_left_out(case, tmp_path):
    def branch(model: ir.Model) -> None:
        """The mid residual is added in both arms of an If."""
        residual = next(value for value in model.graph.inputs if value.name == "mid_block_residual")
        (add,) = residual.consumers()
        skip = next(value for value in add.inputs if value is not residual)
        condition = ir.Value(name="always", const_value=ir.tensor(True, name="always"))
        model.graph.register_initializer(condition)
        arms = []
        for arm in ("then_branch", "else_branch"):
            inner = ir.Node("", "Add", [skip, residual], outputs=[ir.Value(name=arm, type=ir.TensorType(ir.DataType.FLOAT))])
            arms.append(ir.AttrGraph(arm, ir.Graph([], inner.outputs, nodes=[inner], name=arm)))
        either = ir.Node("", "If", [condition], arms)
        for node, index in list(add.outputs[0].uses()):
            node.replace_input_with(index, either.outputs[0])
        model.graph.insert_before(add, either)
        model.graph.remove(add, safe=True)

    path = planted(case.path, tmp_path / "branch.onnx", branch)
    found = [each.name for each in find_values(OnnxFile(path), case.contract, case.names)]
    assert found == [name for name in IN_ORDER if name != "mid_block.out+mid_block_residual"]
    assert case.find(path) is None


def test_another_shape_is_a_fault_of_its_own(case):
    def cut(source):
        return lambda values: {
            name: value[..., :-1] if name == "mid_block.out" else value for name, value in source(values).items()
        }

    found = case.find(reference=cut(case.source(torch.float64)), own=cut(case.source(torch.float32)))
    assert found.module == "mid_block"
    assert found.verdict.fault == "its shape is 2×16×9×13, PyTorch's 2×16×9×12"


def test_where_pytorch_itself_overflows_nothing_passes(case):
    def overflown(values):
        return case.source(torch.float32)(values) | {"up_blocks.0.out": torch.full((2, 16, 17, 25), torch.nan)}

    assert case.find(own=overflown).module == "up_blocks.0"


def test_values_of_modules_that_the_model_lacks_are_left_out(case):
    known = unet(**SHALLOW)
    values = find_values(OnnxFile(case.path), case.contract, case.names)
    asked = [*values, replace(values[0], module="up_blocks.7")]
    assert set(compute_inner(known, case.contract, case.inputs, asked)) == set(IN_ORDER)


def hooks(module) -> int:
    return sum(len(each._forward_hooks) for each in module.modules())


def test_no_hook_remains_even_where_forward_raises(case):
    module = unet(**SHALLOW)
    values = find_values(OnnxFile(case.path), case.contract, case.names)
    compute_inner(module, case.contract, case.inputs, values)
    assert hooks(module) == 0
    seen = []
    module.conv_out.register_forward_pre_hook(lambda *_: (seen.append(hooks(module)), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        compute_inner(module, case.contract, case.inputs, values)
    assert seen[0] >= len(IN_ORDER)
    assert hooks(module) == 0


def test_a_sum_is_rounded_as_the_model_rounds(case):
    values = [each for each in find_values(OnnxFile(case.path), case.contract, case.names) if each.module == "conv_in"]
    skip, total = compute_inner(unet(**SHALLOW).bfloat16(), case.contract, case.inputs, values).values()
    expected = skip.bfloat16() + case.inputs["down_block_residual_00"].bfloat16()
    assert torch.equal(total, expected.double())
    assert not torch.equal(total, skip + case.inputs["down_block_residual_00"].double())


@pytest.mark.parametrize("files", [1, pytest.param(2, marks=pytest.mark.full)])
def test_weights_in_other_files_stay_there(case, tmp_path, files):
    path = tmp_path / "outside.onnx"
    onnx.save(
        onnx.load(case.path),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=files == 1,
        location="weights.bin" if files == 1 else None,
        size_threshold=0,
    )
    values = find_values(OnnxFile(path), case.contract, case.names)
    model = add_outputs(OnnxFile(path), [each.value for each in values])
    assert len(model) < case.path.stat().st_size
    assert len(list(tmp_path.iterdir())) == 2 or files > 1
    with OnnxSession.open(model, folder=tmp_path) as session, OnnxSession.open(case.path) as healthy:
        assert set(session.outputs) == {"out_sample", *(name_output(each.value) for each in values)}
        found, expected = session(case.inputs), healthy(case.inputs)
    torch.testing.assert_close(found["out_sample"], expected["out_sample"], rtol=0, atol=1e-5)
    assert case.find(path) is None


def test_a_value_of_another_precision_is_shown_as_float32(case, tmp_path):
    value = "/model/conv_in/Conv_output_0"
    path = planted(case.path, tmp_path / "half.onnx", in_half(value))
    with OnnxSession.open(add_outputs(OnnxFile(path), [value]), folder=tmp_path) as session:
        found = session(case.inputs)[name_output(value)]
    exact = case.source(torch.float64)(find_values(OnnxFile(case.path), case.contract, case.names))["conv_in.out"]
    assert found.dtype == torch.float32
    assert 1e-5 < (found - exact).abs().max() < 1e-2  # ONNX Runtime leaves out the rounding of what goes back to float32


def test_an_unknown_value_and_no_model_at_all_are_told(case, tmp_path):
    with pytest.raises(ShapecheckError, match=r"unet\.onnx has no value nowhere$"):
        add_outputs(OnnxFile(case.path), ["nowhere", "out_sample"])
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x01nothing")
    with pytest.raises(ShapecheckError, match="is not an ONNX model"):
        find_values(OnnxFile(broken), case.contract, case.names)


def test_what_protobuf_cannot_hold_is_refused(case, monkeypatch):
    file = OnnxFile(case.path)
    monkeypatch.setattr("shapecheck.onnx.intermediate_values.LARGEST", len(file.proto.SerializeToString()))
    with pytest.raises(ShapecheckError, match=r"unet\.onnx cannot be given further outputs: .* 2 GiB"):
        add_outputs(file, ["out_sample"])


def run(command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)


@pytest.mark.full
def test_polygraphy_agrees_with_the_verdict(case, tmp_path):
    folder = tmp_path / "to show; it's"
    folder.mkdir()
    found = case.find(planted(case.path, folder / "planted.onnx", FAULTS["dropped"][0]), folder=folder)
    assert shlex.split(found.command)[:4] == ["polygraphy", "run", str(folder / "planted.onnx"), "--onnxrt"]
    faulty = run(found.command)
    assert faulty.returncode != 0
    assert "Difference exceeds tolerance" in faulty.stdout + faulty.stderr


@pytest.mark.full
def test_polygraphy_passes_a_healthy_file_and_fails_one_with_nan(case, tmp_path):
    values = find_values(OnnxFile(case.path), case.contract, case.names)
    skip = next(each for each in values if each.name == "down_blocks.0.downsamplers.0.out")
    expected = case.source(torch.float64)(values)[skip.name]
    healthy = run(reproduce(OnnxFile(case.path), case.inputs, {skip.value: expected}, tmp_path, allowed=1e-5))
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert "FAILED" not in healthy.stdout
    path = planted(case.path, tmp_path / "nan.onnx", FAULTS["nan"][0])
    assert run(reproduce(OnnxFile(path), case.inputs, {skip.value: expected}, tmp_path, allowed=1e-5)).returncode != 0


def test_no_command_is_better_than_one_that_does_not_run(case, tmp_path, monkeypatch):
    expected = {"out_sample": torch.zeros(2, 4, 17, 25)}
    assert reproduce(OnnxFile(case.path), case.inputs, expected, tmp_path, allowed=float("nan")) == ""
    command = reproduce(OnnxFile(case.path), case.inputs, expected, tmp_path, allowed=1e-5, backend="ort-cuda")
    assert "--providers cuda" in command
    (tmp_path / "inputs.json").unlink()
    monkeypatch.setitem(sys.modules, "polygraphy.json", None)
    assert reproduce(OnnxFile(case.path), case.inputs, expected, tmp_path, allowed=1e-5) == ""
    assert not (tmp_path / "inputs.json").exists()


def weighing(path: Path, size: int) -> Path:
    """A model with this many bytes of weights in another file, which has holes and takes no room."""
    weights = onnx.TensorProto(name="weights", dims=[size], data_type=onnx.TensorProto.INT8)
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(size))):
        weights.external_data.add(key=key, value=value)
    path.with_name("weights.bin").touch()
    os.truncate(path.with_name("weights.bin"), size)
    sizes = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("sample", "out_sample")}
    nodes = [onnx.helper.make_node("Neg", ["sample"], ["inner"]), onnx.helper.make_node("Neg", ["inner"], ["out_sample"])]
    graph = onnx.helper.make_graph(nodes, "large", [sizes["sample"]], [sizes["out_sample"]], [weights])
    onnx.save(onnx.helper.make_model(graph), path)
    return path


def test_a_model_too_large_for_polygraphy_to_mark_gets_no_command(tmp_path):
    inputs, inside, image = ({name: torch.zeros(1)} for name in ("sample", "inner", "out_sample"))
    file = OnnxFile(weighing(tmp_path / "large.onnx", 2**31 - 4))
    assert reproduce(file, inputs, inside, tmp_path, allowed=1e-5) == ""  # with the graph it is over 2 GiB
    assert "--onnx-outputs" not in reproduce(file, inputs, image, tmp_path, allowed=1e-5)  # which would load the weights
    file = OnnxFile(weighing(tmp_path / "large.onnx", 2**31 - 4096))
    assert "--onnx-outputs inner" in reproduce(file, inputs, inside, tmp_path, allowed=1e-5)


def test_bfloat16_is_written_as_float32(case, tmp_path):
    feed, image = {"sample": torch.ones(1, 2).bfloat16()}, {"out_sample": torch.ones(1)}
    reproduce(OnnxFile(case.path), feed, image, tmp_path, allowed=1.0)
    from polygraphy.json import load_json

    (feed,) = load_json(str(tmp_path / "inputs.json"))
    assert feed["sample"].dtype == np.float32


@pytest.mark.full
def test_our_own_files_name_every_value(tmp_path):
    made = exports.exported_once(unet(**exports.LEAST))
    folder = shutil.copytree(made.path.parent, tmp_path / "model")  # with the weights
    contract, path = made.contract, folder / made.path.name
    inputs = inputs_of(contract)
    names = {name: name for name in inputs}
    values = find_values(OnnxFile(path), contract, names)
    assert [each.name for each in values] == [
        "conv_in.out",
        "down_blocks.0.resnets.0.out",
        "conv_in.out+down_block_residual_00",
        "down_blocks.0.resnets.0.out+down_block_residual_01",
        "mid_block.out",
        "mid_block.out+mid_block_residual",
        "up_blocks.0.out",
        "conv_out.out",
    ]
    assert all(each.name == each.value for each in values[:-1])

    def find(file: Path):
        return find_divergence(
            OnnxFile(file),
            contract,
            names,
            inputs,
            lambda wanted: compute_inner(unet(**exports.LEAST).double(), contract, inputs, wanted),
            lambda wanted: compute_inner(unet(**exports.LEAST), contract, inputs, wanted),
            tolerance_factor=TIMES_OWN,
            dtype=torch.float32,
        )

    assert find(path) is None
    swap = onnx_files.exchange("down_block_residual_00", "down_block_residual_01")
    found = find(planted(path, folder / "swapped.onnx", swap))
    assert (found.value, found.slot) == ("conv_in.out+down_block_residual_00", "down_block_residual_00")
