"""Exported files beside PyTorch: inputs for both, what each computes, and how far apart they are."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch


def inputs_for(contract, geometry, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = contract.input_shapes(geometry)
    given = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    given["timestep"] = torch.linspace(3, 997, geometry.batch)
    return given


def given_to(contract, given):
    """The arguments of a model's forward, without residuals."""
    call = {"encoder_hidden_states": None}
    for each in contract.inputs:
        group, _, key = each.argument.rpartition(".")
        (call.setdefault(group, {}) if group else call)[key] = given[each.name]
    return call


def with_torch(unet, contract, given):
    call = given_to(contract, given)
    if contract.slots:
        call["down_block_additional_residuals"] = [given[slot.name] for slot in contract.slots[:-1]]
        call["mid_block_additional_residual"] = given[contract.slots[-1].name]
    with torch.no_grad():
        return unet(**call).sample.float().numpy()


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def with_onnx(runtime, given):
    wanted = {each.name for each in runtime.get_inputs()}
    return [np.asarray(each, dtype=np.float32) for each in runtime.run(None, {name: given[name].numpy() for name in wanted})]


def difference(found, expected):
    """The largest difference, as a share of the largest expected value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def every_output(model, contract, given):
    if contract.role == "unet":
        return [with_torch(model, contract, given)]
    with torch.no_grad():
        downs, mid = model(**given_to(contract, given), return_dict=False)
    return [each.float().numpy() for each in (*downs, mid)]
