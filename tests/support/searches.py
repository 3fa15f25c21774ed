"""How long a search by Hypothesis is in each layer: the same few examples by default, more in `full`, many new ones nightly."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
"""Without the phase that explains a failure: it traces every line of PyTorch."""


def layers(few: int, more: int, many: int) -> pytest.MarkDecorator:
    """Parametrize a test by `search`, the settings for a property inside it, with so many examples in each layer."""
    return pytest.mark.parametrize(
        "search",
        [
            pytest.param(_examples(few, derandomize=True), id="few"),
            pytest.param(_examples(more, derandomize=True), id="more", marks=pytest.mark.full),
            pytest.param(_examples(many, derandomize=False), id="many", marks=pytest.mark.nightly),
        ],
    )


def _examples(count: int, *, derandomize: bool) -> settings:
    return settings(max_examples=count, deadline=None, phases=PHASES, derandomize=derandomize)
