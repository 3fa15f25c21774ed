"""Contracts that `accelerate` keeps in its folder: the next start observes nothing, and never takes that of another model."""

from __future__ import annotations

import logging

import pytest
import small
import torch

from shapecheck import ContractError
from shapecheck.pipelines import kept_contracts
from shapecheck.pipelines.kept_contracts import find_joint_contract, find_own_contract


@pytest.fixture
def observed(monkeypatch):
    """How often a model was observed."""
    calls = []

    def count(function):
        return lambda *arguments: (calls.append(arguments), function(*arguments))[1]

    for name in ("probe", "resolve_subject"):
        monkeypatch.setattr(kept_contracts, name, count(getattr(kept_contracts, name)))
    return calls


def make_pair(**changes):
    unet = small.unet(**small.TINY | changes)
    return unet, small.controlnet(unet)


def test_it_is_observed_once_for_all_models_of_a_structure(tmp_path, observed):
    unet, net = make_pair()
    told = []
    joint = find_joint_contract(tmp_path, unet, [net], lambda text: told.append(text))
    own = find_own_contract(tmp_path, net)
    assert (len(observed), told) == (2, ["observing the contract"])
    others = make_pair()
    with torch.no_grad():
        others[0].train().conv_in.weight += 1
    again = find_joint_contract(tmp_path, others[0], [others[1]], told.append)
    assert (again, again.header) == (joint, joint.header)
    assert find_own_contract(tmp_path, others[1]) == own != joint
    assert (len(observed), len(told), len(list(tmp_path.glob("contract-*.json")))) == (2, 1, 2)


def test_another_structure_precision_or_company_is_observed_anew(tmp_path, observed):
    (unet, net), (wider, beside) = make_pair(), make_pair(in_channels=9)
    found = [
        find_joint_contract(tmp_path, unet, [net]),
        find_joint_contract(tmp_path, unet, [net, net]),
        find_joint_contract(tmp_path, unet, []),
        find_joint_contract(tmp_path, wider, [beside]),
        find_joint_contract(tmp_path, unet.half(), [net.half()]),
    ]
    assert len(observed) == 5
    assert [contract.config["in_channels"] for contract in found] == [4, 4, 4, 9, 4]
    assert [contract.dtype for contract in found] == ["float32"] * 4 + ["float16"]


def test_what_does_not_fit_is_refused_every_time(tmp_path, observed):
    unet, other = small.unet(**small.TINY), small.unet(**small.SHALLOW)
    for _ in range(2):
        with pytest.raises(ContractError):
            find_joint_contract(tmp_path, unet, [small.controlnet(other)])
    assert len(observed) == 2
    assert not list(tmp_path.iterdir())


def test_a_damaged_one_or_a_folder_that_takes_none_costs_time_alone(tmp_path, observed, caplog):
    unet, net = make_pair()
    contract = find_joint_contract(tmp_path, unet, [net])
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text().replace('"mid_block_residual"', '"mid"'))
    with caplog.at_level(logging.WARNING):
        assert find_joint_contract(tmp_path, unet, [net]) == contract
        assert find_joint_contract(tmp_path / "absent", unet, [net]) == contract
    assert [record.message.split(str(tmp_path))[0] for record in caplog.records] == [
        "",
        "the contract is not kept, so the next start observes it again: cannot write ",
    ]
    assert len(observed) == 3
    assert find_joint_contract(tmp_path, unet, [net]) == contract
    assert len(observed) == 3
