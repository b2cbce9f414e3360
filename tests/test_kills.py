"""Commands that write, killed at places all over what they do; `python -m tests.kills` tries every place."""

import os

import pytest

from tests import kills
from tests.programs import run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("scenario", ["adapt-in-place", "adapter-add", "adapter-remove", "prompt-cache"])
def test_a_killed_command_is_run_again(scenario: str) -> None:
    """At some places."""
    assert "kills, 0 faults" in run("tests.kills", scenario, "--every", "19")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("disk", ["full", "gone"])
def test_a_disk_that_fails_is_told_in_one_line(disk: str) -> None:
    """From some places on; when it is back, the command is run again."""
    done = run("tests.kills", "adapt-in-place", "adapter-add", "--every", "29", "--disk", disk)
    assert done.count(", 0 faults") == 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("scenario", kills.SCENARIOS)
def test_a_command_killed_anywhere_is_run_again(scenario: str) -> None:
    """At every place."""
    assert "kills, 0 faults" in run("tests.kills", scenario)
