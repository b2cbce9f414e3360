"""The table of devices, and `plan --device`."""

import json
from pathlib import Path
from urllib.parse import urlparse

import pytest

from edgepeft.devices import DEVICES, device
from edgepeft.errors import UsageError

from ..cli.test_commands import fails, run
from ..runtime import tiny

MIB = 2**20


@pytest.mark.parametrize("item", DEVICES.values(), ids=lambda item: item.name)
def test_a_profile_is_plausible_and_sourced(item) -> None:
    """A budget is a part of the RAM; both rest on a page that can be read."""
    assert 0 < item.budget_bytes <= item.ram_bytes // 2
    assert item.ram_bytes % (256 * MIB) == 0
    address = urlparse(item.source)
    assert (address.scheme, bool(address.netloc), bool(address.path)) == ("https", True, True)
    assert item.rule


def test_names_and_titles_are_unique() -> None:
    """So that a name means one device."""
    assert [item.name for item in DEVICES.values()] == list(DEVICES)
    assert len({item.title for item in DEVICES.values()}) == len(DEVICES)


def test_an_unknown_device_names_the_known_ones() -> None:
    """All of them."""
    assert device("pi-zero-2w").budget_bytes == 256 * MIB
    with pytest.raises(UsageError, match=r"no device 'toaster'.*pi-zero-2w.*phone-8gb"):
        device("toaster")


def test_plan_takes_a_device_instead_of_a_budget(tmp_path: Path) -> None:
    """Its budget, where it comes from, and exactly one of the two."""
    bundle = tiny.write_bundle(tmp_path / "tiny.edge")
    result = json.loads(run("plan", bundle, "--device", "pi-5-8gb", "--json").stdout)
    assert (result["budget_bytes"], result["chosen"]) == (4096 * MIB, "resident")
    assert result["device"]["name"] == "pi-5-8gb"
    text = run("plan", bundle, "--device", "phone-4gb").stdout
    assert "Android phone, 4 GB: Android's heap limit of an app (https://android" in text
    assert "both given" in fails(2, "plan", bundle, "--device", "phone-4gb", "--budget", "1GiB")
    assert "neither --budget nor --device" in fails(2, "plan", bundle)
    assert "no device 'toaster'" in fails(2, "plan", bundle, "--device", "toaster")


def test_the_devices_can_be_listed_without_a_bundle() -> None:
    """With RAM and budget."""
    listed = run("plan", "--device", "list")
    assert listed.exit_code == 0
    assert len(listed.stdout.splitlines()) == len(DEVICES) + 1
    assert "512.0 MiB  256.0 MiB  half of the RAM" in listed.stdout
