"""Progress where a person is watching, and nothing of it elsewhere."""

from __future__ import annotations

import io
import re
import sys
import threading

import pytest

from shapecheck.terminal import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_step_is_told_and_a_long_copy_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress() as steps:
        steps("reading the model")
        assert "reading the model …" in terminal.getvalue()
        for done in (0, 2**30, 2**31):
            steps("copying the weights", done, 2**31)
    text = terminal.getvalue()
    assert "copying the weights:   0%" in text
    assert "2.15G" in text
    assert text.rstrip(" ").endswith("\r")  # an empty line is left


def test_nobody_watches_a_pipe(monkeypatch):
    monkeypatch.setattr(sys, "stderr", pipe := io.StringIO())
    with progress() as steps:
        steps("reading the model")
        steps("copying the weights", 1, 2)
    assert pipe.getvalue() == ""


def test_a_closed_stderr_stops_no_work(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress(log_every=0.001) as steps:
        steps("reading the model")


def test_a_log_has_a_line_now_and_then_if_it_is_asked_for(monkeypatch):
    written = threading.Event()

    class Log(io.StringIO):
        def flush(self) -> None:
            written.set()

    monkeypatch.setattr(sys, "stderr", log := Log())
    with progress(log_every=0.001) as steps:
        steps("reading the model")
        assert written.wait(10)
    written.clear()
    steps("copying the weights")
    assert not written.wait(0.02)
    assert re.fullmatch(r"0 s: reading the model\n", log.getvalue())


def test_the_line_is_emptied_when_the_work_fails(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(RuntimeError), progress() as steps:
        steps("reading the model")
        raise RuntimeError
    assert terminal.getvalue().rstrip(" ").endswith("\r")
