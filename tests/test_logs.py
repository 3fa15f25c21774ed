"""A library's log is silenced for a while, and speaks again afterwards."""

from __future__ import annotations

import logging

import pytest

from shapecheck.logs import silence_logger


def test_a_library_is_silent_inside_and_speaks_afterwards(caplog):
    logger = logging.getLogger("shapecheck-test-library")
    logger.setLevel(logging.INFO)
    with silence_logger("shapecheck-test-library"):
        logger.error("inside")
    logger.info("afterwards")
    with pytest.raises(ZeroDivisionError), silence_logger("shapecheck-test-library"):
        raise ZeroDivisionError
    logger.info("after an error")
    assert caplog.messages == ["afterwards", "after an error"]
