"""Every family of the zoo equals PyTorch + PEFT at 32 and at 4 bits: outputs and every gradient."""

from pathlib import Path

import pytest

from . import zoo

OUTPUT = {32: 1e-4, 4: 1e-3}
COSINE = {32: 0.9999, 4: 0.999}
NORM = 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_family_equals_pytorch_with_a_lora_on_every_linear(family: str, tmp_path: Path) -> None:
    measured = zoo.measure(family, tmp_path)
    for bits, figures in measured.figures.items():
        assert figures.output <= OUTPUT[bits]
        assert figures.cosine >= COSINE[bits]
        assert figures.norm <= NORM
