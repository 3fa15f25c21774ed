"""The explanation of an error text or a claimed table as JSON, and its verdict in a word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from shapecheck.explain.diagnosis import Candidate, Cause, Diagnosis, TextReading
from shapecheck.explain.judge_mapping import Judgement
from shapecheck.explain.predicted_messages import format_message
from shapecheck.explain.report import explain_symptom, name_certain_command
from shapecheck.explain.residual_table import Fault, ResidualShapes, right_shapes
from shapecheck.explain.symptom import Symptom
from shapecheck.report.numbers import dump_json


def render_json(diagnosis: Diagnosis, judgement: Judgement | None = None, others: Sequence[Judgement] = ()) -> str:
    """Return the report for machines, with every candidate and the residuals that lead to it.

    `judgement` is of the claimed table on the UNet it fits best, `others` are on the other UNets that were tried.
    """
    record = {
        "verdict": judge_diagnosis(diagnosis, judgement),
        "reason": diagnosis.reason or None,
        "tried": list(diagnosis.tried),
        "symptoms": [_record_reading(reading) for reading in diagnosis.readings],
        "mapping": None if judgement is None else _record_judgement(judgement),
        "mapping_gives_text": None if judgement is None else judgement.reproduces(diagnosis),
        "mapping_elsewhere": [
            {"models": list(other.models), "right": other.is_right, "mismatches": len(other.mismatches)} for other in others
        ],
    }
    return dump_json(record, ascii_only=True)


def judge_diagnosis(diagnosis: Diagnosis, judgement: Judgement | None) -> str:
    """Return `diagnosis` or `none`, for the text if there is one, else for the table."""
    return "diagnosis" if diagnosis.explanations or (judgement is not None and not diagnosis.reason) else "none"


def _record_reading(reading: TextReading) -> dict[str, Any]:
    return {
        "symptom": _record_fields(reading.symptom) | {"meaning": explain_symptom(reading.symptom)},
        "causes": [_record_fields(cause) for cause in reading.causes],
        "answers": [
            {
                "models": list(answer.models),
                "geometry": asdict(answer.geometry),
                "certain": name_certain_command(answer),
                "slots": list(dict.fromkeys(candidate.failure.slot for candidate in answer.candidates)),
                "candidates": [_record_candidate(candidate) for candidate in answer.candidates],
                "right": right_shapes(answer.contract, answer.geometry).named,
            }
            for answer in reading.answers
        ],
    }


def _record_fields(value: Symptom | Cause) -> dict[str, Any]:
    # the keys are older than the names of the fields
    keys = {"expected": "wanted", "actual": "given", "message": "told"}
    return {re.sub("|".join(keys), lambda word: keys[word[0]], name): entry for name, entry in asdict(value).items()}


def _record_candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "slot": candidate.failure.slot,
        "module": candidate.failure.module,
        "stage": candidate.failure.stage,
        **_record_fault(candidate.fault),
        "wanted": candidate.failure.expected,
        "given": candidate.failure.actual,
        "alike": [_record_fault(fault) for fault in candidate.faults[1:]],
        "mapping": _record_shapes(candidate.fault.residuals),
        "geometries": [asdict(geometry) for geometry in candidate.geometries],
    }


def _record_fault(fault: Fault) -> dict[str, Any]:
    return {"fault": fault.kind, "told": fault.message, "change": fault.change, "touched": list(fault.slots)}


def _record_shapes(residuals: ResidualShapes) -> dict[str, Any]:
    return {"down": residuals.downs, "mid": residuals.mid}


def _record_judgement(judgement: Judgement) -> dict[str, Any]:
    return {
        "models": list(judgement.models),
        "geometry": asdict(judgement.geometry),
        "verdict": "right" if judgement.is_right else "silent" if judgement.is_silent else "raises",
        "text": format_message(judgement.failure) if judgement.failure else None,
        "slot": judgement.failure.slot if judgement.failure else None,
        "mismatches": [asdict(mismatch) for mismatch in judgement.mismatches],
        "faults": [_record_fault(fault) | {"differs": match.differs} for match in judgement.matches for fault in match.faults],
        "notes": list(judgement.notes),
        "given": _record_shapes(judgement.received),
        "right": right_shapes(judgement.contract, judgement.geometry).named,
    }
