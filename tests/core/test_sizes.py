"""Sizes as people write them."""

import pytest

from edgepeft.errors import UsageError
from edgepeft.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("96MiB", 96 * 2**20),
        ("128MB", 128_000_000),
        ("0.5GiB", 2**29),
        ("1048576", 2**20),
        (1048576, 2**20),
        (" 2 kib ", 2048),
        ("0.1GB", 100_000_000),
        ("7B", 7),
    ],
)
def test_sizes_are_read_exactly(text: str | int, size_bytes: int) -> None:
    """Binary and decimal units, fractions and plain bytes."""
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["0", "lots", "-5MiB", "", "MiB", "1e3", "1,5GiB", "5 parsecs", "0.4B", "nan", "٣MiB", "9" * 30, True],
)
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    """One line that repeats what was given."""
    with pytest.raises(UsageError, match="96MiB") as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_letter_is_no_unit() -> None:
    """What M means depends on whom one asks; both readings are offered, to be copied."""
    for text in ("256M", "256m"):
        with pytest.raises(UsageError, match=r"'256[Mm]' is not a size.* 256MiB \(.* or 256MB \("):
            parse_size(text)
    with pytest.raises(UsageError, match=r"write 1\.5GiB"):
        parse_size("1.5 g")


def test_sizes_are_shown_in_binary_units() -> None:
    """From bytes to gibibytes."""
    shown = [format_size(size) for size in (0, 1023, 1024, 96 * 2**20, 5 * 2**30, 3000 * 2**30)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "96.0 MiB", "5.00 GiB", "3000.00 GiB"]
