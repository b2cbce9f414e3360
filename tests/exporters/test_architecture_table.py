"""The page of architectures has every family of the zoo, and figures within the tolerances."""

import pytest

from . import architecture_table, zoo
from .test_architectures import COSINE, NORM, OUTPUT

ROWS = architecture_table.read()


def test_the_page_is_what_the_script_writes() -> None:
    """One row a family, in the zoo's order, below the script's own words."""
    written = architecture_table.PATH.read_text(encoding="utf-8")
    assert list(ROWS) == list(zoo.FAMILIES), "run: make docs"
    assert written == architecture_table.render(ROWS), "run: make docs"


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_row_is_within_the_tolerances(family: str) -> None:
    cells = dict(zip(architecture_table.COLUMNS, ROWS[family], strict=True))
    assert cells["class"] == zoo.FAMILIES[family][1]
    assert int(cells["training"]) > int(cells["nodes, forward"]) > 0
    for bits in zoo.BITS:
        assert 0 <= float(cells[f"output difference, {bits} bits"]) <= OUTPUT[bits]
        assert 0 <= float(cells[f"1 - cosine, {bits} bits"]) <= 1 - COSINE[bits]
        assert 0 <= float(cells[f"norm difference, {bits} bits"]) <= NORM
