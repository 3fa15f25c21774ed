"""What an error text or a claimed table comes to, as JSON, and in a word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from shapecheck.explain.diagnosis import Candidate, Diagnosis, Reading
from shapecheck.explain.fault import Fault
from shapecheck.explain.judge_mapping import Judgement
from shapecheck.explain.report import certain, meaning
from shapecheck.explain.residual_table import Given, Table
from shapecheck.explain.torch_messages import eager


def as_json(diagnosis: Diagnosis, judgement: Judgement | None = None, others: Sequence[Judgement] = ()) -> str:
    """The same for machines, with every candidate and the residuals that lead to it.

    `judgement` is the claimed table on the UNet it fits best, `others` the same on the other UNets that were tried.
    """
    record: dict[str, Any] = {
        "verdict": verdict(diagnosis, judgement),
        "reason": diagnosis.reason or None,
        "tried": list(diagnosis.tried),
        "symptoms": [_reading_record(reading) for reading in diagnosis.readings],
        "mapping": None if judgement is None else _judgement_record(judgement),
        "mapping_gives_text": None if judgement is None else judgement.gives(diagnosis),
        "mapping_elsewhere": [
            {"models": list(each.models), "right": each.is_right, "mismatches": len(each.mismatches)} for each in others
        ],
    }
    return json.dumps(record, indent=1, ensure_ascii=True) + "\n"


def verdict(diagnosis: Diagnosis, judgement: Judgement | None) -> str:
    """`diagnosis`, or `none`: of the text where there is one, else of the table."""
    return "diagnosis" if diagnosis.found or (judgement is not None and not diagnosis.reason) else "none"


def _reading_record(reading: Reading) -> dict[str, Any]:
    return {
        "symptom": asdict(reading.symptom) | {"meaning": meaning(reading.symptom)},
        "causes": [asdict(cause) for cause in reading.causes],
        "answers": [
            {
                "models": list(answer.models),
                "geometry": asdict(answer.geometry),
                "certain": certain(answer),
                "slots": list(dict.fromkeys(each.slot for each in answer.candidates)),
                "candidates": [_candidate_record(each) for each in answer.candidates],
                "right": Table.of(answer.contract, answer.geometry).right.named,
            }
            for answer in reading.answers
        ],
    }


def _candidate_record(candidate: Candidate) -> dict[str, Any]:
    return {
        "slot": candidate.slot,
        "module": candidate.module,
        "stage": candidate.stage,
        "fault": candidate.fault.kind,
        "told": candidate.fault.told,
        "change": candidate.fault.change,
        "touched": list(candidate.fault.slots),
        "wanted": candidate.wanted,
        "given": candidate.given,
        "alike": [_fault_record(fault) for fault in candidate.faults[1:]],
        "mapping": _given_record(candidate.table),
        "geometries": [asdict(geometry) for geometry in candidate.geometries],
    }


def _fault_record(fault: Fault) -> dict[str, Any]:
    return {"fault": fault.kind, "told": fault.told, "change": fault.change, "touched": list(fault.slots)}


def _given_record(given: Given) -> dict[str, Any]:
    return {"down": given.downs, "mid": given.mid}


def _judgement_record(judgement: Judgement) -> dict[str, Any]:
    return {
        "models": list(judgement.models),
        "geometry": asdict(judgement.geometry),
        "verdict": "right" if judgement.is_right else "silent" if judgement.is_silent else "raises",
        "text": eager(judgement.failure) if judgement.failure else None,
        "slot": judgement.failure.slot if judgement.failure else None,
        "mismatches": [asdict(each) for each in judgement.mismatches],
        "faults": [_fault_record(fault) | {"differs": match.differs} for match in judgement.matches for fault in match.faults],
        "notes": list(judgement.notes),
        "given": _given_record(judgement.given),
        "right": Table.of(judgement.contract, judgement.geometry).right.named,
    }
