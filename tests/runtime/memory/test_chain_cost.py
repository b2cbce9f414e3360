"""What a chain costs beside its formula."""

import pytest

from edgepeft.runtime.memory.chain_cost import size_of


@pytest.mark.parametrize(
    ("dim", "samples", "size"),
    [
        ("sequence", 16_000, 16_000),
        ("((s76//10)) - 1", 16_000, 1_599),
        # The seven convolutions of wav2vec 2.0: a second has 49 frames.
        ("((((((((s76//80)) - 3)//2)) - 1)//2)) + 1", 16_000, 49),
        ("2*s1", 5, 10),
        ("s1//0", 7, 7),
        ("f(s1)", 7, 7),
        ("(", 7, 7),
        ("1 - s1", 7, 0),
    ],
)
def test_an_axis_may_be_an_expression_of_the_sequence(dim: str, samples: int, size: int) -> None:
    assert size_of(dim, samples) == size
