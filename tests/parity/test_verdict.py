"""Verdicts of numbers written here: what passes, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

from shapecheck.parity.results import Verdict, Worst

NEAR = Verdict((2, 3, 5, 7), allowed=1e-5, own=2e-6, scale=3.5, absolute=Worst((1, 2, 4, 6), 0.250004, 0.25, 4e-6))
"""210 values, of which none is further from the reference than is allowed."""


def test_one_infinite_value_fails_and_is_counted_in_words():
    assert NEAR.passes
    assert str(NEAR).startswith("largest difference 4.00e-06 at [1, 2, 4, 6] ")
    infinite = replace(NEAR, inf=1)  # `outside` stays 0: it is the infinite value alone that fails
    assert not infinite.passes
    assert str(infinite) == f"0 NaN and 1 Inf among 210 values; {NEAR}"
