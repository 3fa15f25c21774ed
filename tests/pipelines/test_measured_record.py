"""What was measured of backends: which one is chosen, what is measured later, and the file it is kept in. Numbers alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from shapecheck import ShapecheckError
from shapecheck.pipelines.measured_record import (
    MeasuredRecord,
    Measurement,
    choose_fastest,
    describe_choice,
    describe_measurements,
    locate_record,
    read_record,
    select_waiting,
    write_record,
)

KEY = {"models": "unet-1, controlnet-2", "device": "NVIDIA H200", "size": "batch 2, latent 64×64"}
EAGER = Measurement("torch", 42.0, "as it is")
RIGHT = "right: at most 1.2 times PyTorch's own error, 4 allowed"
COMPILED = Measurement("torch-compile", 9.5, RIGHT, right=True, seconds=91.0)
WRONG = Measurement("ort-cuda", None, "wrong: the image with control on: 3 NaN", seconds=60.0)
LATER = Measurement("trt", refusal="not begun: it takes about 500 s, and 20 s of the budget are left", waiting=True)
RECORD = MeasuredRecord(tuple(KEY.items()), 120.0, (EAGER, COMPILED, WRONG, LATER))


@pytest.mark.parametrize(
    ("others", "fastest"),
    [
        ([], "torch"),
        ([COMPILED], "torch-compile"),
        ([COMPILED, Measurement("trt", 9.4, "right", right=True)], "trt"),
        ([replace(COMPILED, milliseconds=42.0)], "torch"),  # no gain is no reason
        ([replace(COMPILED, milliseconds=43.0)], "torch"),
        ([replace(COMPILED, right=False)], "torch"),
        ([replace(COMPILED, milliseconds=math.nan)], "torch"),
        ([WRONG, LATER], "torch"),
    ],
)
def test_the_fastest_that_is_right_is_chosen_and_never_one_slower_than_pytorch(others, fastest):
    assert choose_fastest([EAGER, *others]) == fastest


def test_what_was_chosen_is_told_with_its_figures():
    assert describe_choice(RECORD.measurements) == (
        "torch-compile is the fastest that is right: a frame takes 9.50 ms, 42.00 in PyTorch"
    )
    slower = replace(COMPILED, milliseconds=50.0)
    assert describe_choice([EAGER, slower, WRONG]) == (
        "nothing faster runs here: the UNet stays in PyTorch, where a frame takes 42.00 ms, 50.00 in torch-compile"
    )
    assert describe_choice([replace(EAGER, milliseconds=None)]) == "nothing faster runs here: the UNet stays in PyTorch"


def test_every_backend_is_a_line_of_a_table():
    assert describe_measurements(RECORD.measurements) == [
        "torch             42.00 ms  1.00x  as it is",
        "torch-compile      9.50 ms  4.42x  right: at most 1.2 times PyTorch's own error, 4 allowed; 91 s to prepare",
        "ort-cuda       wrong: the image with control on: 3 NaN",
        "trt            not begun: it takes about 500 s, and 20 s of the budget are left",
    ]
    assert str(RECORD).splitlines() == describe_measurements(RECORD.measurements)


@pytest.mark.parametrize(
    ("budget", "made", "waiting"),
    [
        (120.0, (), ()),
        (60.0, (), ()),
        (120.0, ("trt", "ort-cuda"), ("trt",)),  # what was measured is not measured again
        (600.0, (), ("trt",)),
        (None, (), ("trt",)),
    ],
)
def test_what_was_not_begun_is_measured_once_its_files_are_there_or_there_is_more_time(budget, made, waiting):
    assert select_waiting(RECORD, budget, made.__contains__) == waiting


def test_all_the_time_there_is_can_not_become_more():
    assert select_waiting(replace(RECORD, budget=None), None, lambda _: False) == ()


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = write_record(tmp_path, RECORD)
    assert path == locate_record(tmp_path, KEY)
    assert path.name.startswith("measured-")
    assert read_record(tmp_path, KEY) == RECORD
    assert RECORD.winner == "torch-compile"
    forever = replace(RECORD, budget=None)
    assert MeasuredRecord.from_json(forever.to_json()) == forever
    assert [path.name] == [file.name for file in tmp_path.iterdir()]


@pytest.mark.parametrize("changed", KEY)
def test_a_record_of_another_gpu_other_weights_or_another_size_is_not_read(tmp_path, changed):
    path = write_record(tmp_path, RECORD)
    other = KEY | {changed: "another"}
    assert read_record(tmp_path, other) is None
    # even where it lies in its place
    path.rename(locate_record(tmp_path, other))
    assert read_record(tmp_path, other) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.pop("measurements"),
        lambda record: record.update(shapecheck_measured=2),
        lambda record: record.update(budget="120"),
        lambda record: record["measurements"].append(record["measurements"][0]),
        lambda record: record["measurements"][1].update(milliseconds=math.nan),
        lambda record: record["measurements"][1].update(milliseconds=0.0),
        lambda record: record["measurements"][1].update(milliseconds=-1.0),
        lambda record: record["measurements"][1].update(seconds=math.inf),
        lambda record: record["measurements"][1].update(right="yes"),
        lambda record: record["measurements"][1].update(verdict="\x1b[2J"),
    ],
)
def test_a_damaged_record_is_refused_and_measured_again(tmp_path, damage, caplog):
    record = json.loads(RECORD.to_json())
    damage(record)
    text = json.dumps(record)
    with pytest.raises(ShapecheckError):
        MeasuredRecord.from_json(text)
    locate_record(tmp_path, KEY).write_text(text, encoding="utf-8")
    assert read_record(tmp_path, KEY) is None
    assert "cannot be read, so the backends are measured again" in caplog.text
