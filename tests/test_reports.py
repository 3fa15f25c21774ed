"""Every probe file is carried out for real; what it must come to stands in the file, what is said of it in reports/."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

import pytest

from shapecheck import Contract, presets
from shapecheck.observe import request as requests
from shapecheck.observe.probe import probe
from shapecheck.report.contract import told

ROOT = Path(__file__).parent.parent
PROBES = sorted((ROOT / "probes").glob("*.toml"))
UNETS = [name for name in presets.names() if presets.load(name).kind == "unet"]


def _quiet(_: str) -> None: ...


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
def test_a_probe_comes_to_what_it_expects_and_its_report_is_as_committed(path, update_reports):
    request = requests.read(path)
    finding = requests.carry_out(request, progress=_quiet)
    wrong = [f"{each.where} {each.kind}" for each in finding.mismatches]
    assert wrong == list(request.expect.get("wrong", ()))
    verdict = "mismatch" if wrong else "agree" if finding.contract.header.controlnets else "unet alone"
    assert verdict == request.expect["verdict"]
    if cause := request.expect.get("cause"):
        assert {each.cause.split(";")[0] for each in finding.mismatches} == {cause}
    claim = request.claim is not None
    text = told(finding.contract, finding.mismatches, finding.geometry, form="markdown", lines=False, claim=claim)
    _golden(ROOT / "reports" / f"{path.stem}.md", f"> {request.story}\n\n{text}", update_reports)


@pytest.mark.parametrize("name", UNETS)
def test_the_contract_saved_for_a_preset_is_what_is_observed_today(name, update_reports):
    observed = probe(name)
    if update_reports:
        (ROOT / "shapecheck/presets/contracts" / f"{name}.json").write_text(observed.to_json(), encoding="utf-8")
    saved = Contract.from_json((ROOT / "shapecheck/presets/contracts" / f"{name}.json").read_text(encoding="utf-8"))
    assert saved == observed
    assert saved.header.parameters == observed.header.parameters
    assert saved.header.vae_factor == observed.header.vae_factor


def test_every_preset_is_probed_and_every_report_has_its_probe():
    probed = {tomllib.loads(path.read_text(encoding="utf-8"))["model"] for path in PROBES}
    assert probed >= set(UNETS)
    assert {path.stem for path in (ROOT / "reports").glob("*.md")} - {"README", "performance"} == {path.stem for path in PROBES}
    verdicts = Counter(requests.read(path).expect["verdict"] for path in PROBES)
    assert min(verdicts[each] for each in ("agree", "mismatch", "unet alone")) >= 3


def _golden(path: Path, text: str, update: bool) -> None:
    if update:
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, f"{path.name} changed; accept with `pytest --update-reports`"
