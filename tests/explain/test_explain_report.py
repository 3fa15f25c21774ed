"""reports/explain.md: how far a text alone leads, a text with its traceback, and a table; held to what is computed today."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
from tabulate import tabulate

from shapecheck import Geometry, presets
from shapecheck.explain.explain_text import explain_text, group_models
from shapecheck.explain.fault_catalogue import list_faults
from shapecheck.explain.judge_mapping import judge_residuals
from shapecheck.explain.predicted_messages import format_message
from shapecheck.explain.residual_table import RequestedSize, ResidualTable
from shapecheck.explain.simulate import lay_out_unet, simulate_call

REPORT = Path(__file__).parents[2] / "reports" / "explain.md"
AT = Geometry(2, 72, 56)
LINES = {
    "down": "down_block_res_sample = down_block_res_sample + down_block_additional_residual",
    "mid": "sample = sample + mid_block_additional_residual",
    "feature": "hidden_states = hidden_states + additional_residuals",
    "up": "hidden_states = torch.cat([hidden_states, res_hidden_states], dim=1)",
}
TITLE = f"""# How far an error text leads

Every fault that `shapecheck explain` has a name for is made of each UNet's right table, at {AT}, and the text that
PyTorch raises for it is explained again. A text that several tables give cannot tell them apart: the *bound* is what the best
order of candidates could reach, one of each text first, three of each text in the first three. Candidates are told by kind
and not ordered to do well here. Silent: faults that PyTorch runs with.

"""


def ranked(name: str):
    """Per way of asking: how many are first, in the first three, and what the bound allows; then the table's own."""
    contract = presets.contract(name)
    unet, table = lay_out_unet(contract, AT), ResidualTable.of(contract, AT)
    silent, texts, by_table = 0, defaultdict(list), 0
    faults = list_faults(table)
    for each in faults:
        failure = simulate_call(unet, each[0].residuals)
        judged = judge_residuals(each[0].residuals, (name,), contract, AT)
        by_table += judged.matches[0].differs == 0 and set(each) <= set(judged.matches[0].faults)
        if failure is None:
            silent += 1
        else:
            texts[format_message(failure), failure.stage].append(each[0].residuals)
    alone = defaultdict(list)
    for (text, _), tables in texts.items():
        alone[text] += tables
    rows = [
        _row("text", {text: (text, tables) for text, tables in alone.items()}, name, contract),
        _row("traceback", {key: (f"    {LINES[key[1]]}\n{key[0]}", tables) for key, tables in texts.items()}, name, contract),
    ]
    return len(faults), silent, rows, by_table


def _row(way: str, texts, name: str, contract):
    first = three = count = bound = bound_three = 0
    for text, tables in texts.values():
        (answer,) = explain_text(text, {name: contract}, RequestedSize((AT.height, AT.width), AT.batch)).explanations[0].answers
        order = [each.fault.residuals for each in answer.candidates]
        assert set(tables) <= set(order), text
        count += len(tables)
        first += order[0] in tables
        three += len(set(order[:3]) & set(tables))
        bound += 1
        bound_three += min(3, len(tables))
    return way, f"{first} ({bound})", f"{three} ({bound_three})", count


@pytest.mark.full
def test_the_report_is_what_is_computed_today(update_reports):
    rows = []
    for names in group_models({name: presets.contract(name) for name in presets.contracts()}):
        contract = presets.contract(names[0])
        if AT.height % contract.divisor or AT.width % contract.divisor:
            continue
        faults, silent, ranks, by_table = ranked(names[0])
        assert by_table == faults
        for way, first, three, count in ranks:
            rows.append((", ".join(names), faults, silent, way, count, first, three))
        rows.append((", ".join(names), faults, silent, "table", faults, f"{by_table} ({faults})", f"{by_table} ({faults})"))
    headers = ("models", "faults", "silent", "given", "told of", "true one first (bound)", "in the first three (bound)")
    text = TITLE + tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n"
    if update_reports:
        REPORT.write_text(text, encoding="utf-8")
    assert REPORT.read_text(encoding="utf-8") == text
