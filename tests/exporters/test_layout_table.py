"""The page of quantized checkpoints has every layout, and figures within the tolerances."""

import json

import pytest

from . import layout_table
from .sources.quantized.cases import CASES, COSINE, OUTPUT

ROWS = layout_table.read()


def test_the_page_is_what_the_script_writes() -> None:
    """One row a layout, and the benchmark's ratios."""
    assert list(ROWS) == list(CASES), "run: make docs"
    speed = json.loads(layout_table.SPEED.read_text("utf-8"))
    assert layout_table.PATH.read_text("utf-8") == layout_table.render(ROWS, speed), "run: make docs"


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_within_the_tolerances(name: str) -> None:
    _, bits, source, output, distance = ROWS[name]
    assert (bits, source) == (f"{CASES[name].bits} bits", CASES[name].source)
    assert 0 < float(output) <= OUTPUT
    assert -1e-6 <= float(distance) <= 1 - COSINE
