"""The benchmark: every phase of every task, sane figures, a limit that is the kernel's, a picture."""

import dataclasses
import json
import platform
import sys
import tempfile
from pathlib import Path

import pytest

from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import CgroupError, EdgePeftError, MissingExtraError
from edgepeft.runtime.bench import machine, plot, run
from edgepeft.runtime.bench.report import BenchReport, Measured, PhaseResult
from edgepeft.runtime.bench.run import BenchOptions, bench
from edgepeft.runtime.bench.synthetic import synthetic_adapter, synthetic_records
from edgepeft.runtime.memory.cgroup import MemoryCgroup
from edgepeft.runtime.memory.process import Sample, read_memory
from edgepeft.runtime.records import records
from edgepeft.runtime.tasks import task_for

from ...cli.test_commands import fails
from ...cli.test_commands import run as command

MIB = 2**20
FAST = BenchOptions(steps=2, max_new_tokens=4)
TIMELINE = [Sample(seconds, MIB, MIB, MIB) for seconds in (0.1, 0.2)]
LANGUAGE = ["load", "prefill", "decode", "train", "swap"]


@pytest.fixture
def cgroups() -> None:
    """Skips where the system gives none."""
    try:
        MemoryCgroup(128 * MIB).__exit__(None, None, None)
    except CgroupError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("classifier", ["load", "predict", "train", "swap"]),
        ("encoder", ["load", "predict", "swap"]),  # exported without a training graph
        ("language_model", LANGUAGE),
    ],
)
def test_every_phase_is_measured_beside_its_prediction(
    request: pytest.FixtureRequest, name: str, phases: list[str]
) -> None:
    """Parts are no more than the whole, predictions are of the process's order."""
    said: list[str] = []
    report = bench(request.getfixturevalue(name), FAST, None, said.append)
    assert [phase.name for phase in report.phases] == phases == said
    assert (report.budget_bytes, report.enforced_by, report.note) == (None, None, None)
    for phase in report.phases:
        measured = phase.measured
        assert (phase.status, phase.message) == ("ran", None)
        assert measured is not None
        assert measured.seconds is None or measured.seconds > 0
        assert measured.peak_bytes >= max(sample.resident_bytes for sample in measured.timeline) - MIB
        assert measured.predicted_peak_bytes == pytest.approx(measured.peak_bytes, rel=0.2)
        assert (measured.strategy == "resident") == (phase.name == "train")
        if read_memory().anonymous_bytes is None:
            assert (measured.anonymous_bytes, measured.file_bytes) == (None, None)
            continue
        assert measured.anonymous_bytes is not None
        assert measured.file_bytes is not None
        assert max(measured.anonymous_bytes, measured.file_bytes) <= measured.peak_bytes + MIB
        for sample in measured.timeline:
            parts = (sample.anonymous_bytes or 0) + (sample.file_bytes or 0)
            assert parts == pytest.approx(sample.resident_bytes, abs=MIB)


@pytest.mark.usefixtures("cgroups")
def test_a_budget_is_a_memory_cgroup(language_model: Path) -> None:
    """Whose own peak is told, too."""
    report = bench(language_model, FAST, 128 * MIB, print)
    assert report.enforced_by == "memory cgroup"
    assert [phase.status for phase in report.phases] == ["ran"] * len(LANGUAGE)
    for phase in report.phases:
        assert phase.cgroup_peak_bytes is None or 32 * MIB < phase.cgroup_peak_bytes <= 128 * MIB


@pytest.mark.usefixtures("cgroups")
def test_a_phase_that_does_not_fit_says_so(language_model: Path, tmp_path: Path) -> None:
    """Refused by the plan, or killed by the kernel if the plan was told of no budget."""
    bundle = open_bundle(language_model)
    request = run._request(bundle, "prefill", str(tmp_path), (), FAST, MIB)
    refused = run._run(request, 128 * MIB)
    assert refused.status == "refused"
    assert refused.required_bytes is not None
    assert "the budget is 1.0 MiB" in str(refused.message)
    killed = run._run(dataclasses.replace(request, budget_bytes=None), 4 * MIB)
    assert (killed.status, killed.measured) == ("killed", None)
    assert killed.message == "the kernel killed it: it needs more than 4.0 MiB"


def test_without_cgroups_it_measures_and_says_so(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan and the process's own watch remain."""

    def none(limit_bytes: int) -> MemoryCgroup:
        raise CgroupError(f"no memory cgroup of {limit_bytes} B can be made")

    monkeypatch.setattr(run, "MemoryCgroup", none)
    report = bench(classifier, FAST, 512 * MIB, print)
    assert report.enforced_by == "edgepeft"
    assert report.note is not None
    assert report.note.startswith("the budget is not enforced by the kernel: no memory cgroup")
    assert all(phase.cgroup_peak_bytes is None for phase in report.phases)


def test_the_command_prints_a_table_or_json_and_draws(classifier: Path, tmp_path: Path) -> None:
    """Predictions stand beside measurements; the picture is a PNG."""
    picture = tmp_path / "memory.png"
    sizes = ("--steps", 1, "--seq-len", 8, "--batch-size", 2, "--plot", picture)
    text = command("bench", classifier, *sizes)
    assert text.exit_code == 0
    header, *rows = text.stdout.splitlines()
    assert header.split()[:5] == ["phase", "seconds", "tokens/s", "predicted", "peak"]
    assert [row.split()[0] for row in rows] == ["load", "predict", "train", "swap", "2"]
    assert "measuring train" in text.stderr
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.glob(".memory*"))
    report = json.loads(command("bench", classifier, *sizes[:6], "--json").stdout)
    assert report["model"] == "tiny"
    assert [phase["name"] for phase in report["phases"]] == ["load", "predict", "train", "swap"]
    assert report["phases"][2]["measured"]["strategy"] == "resident"


def test_a_picture_says_what_it_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model, its budget, the machine and the engine, each no longer than a title is wide; no host's name,
    and no character of a name is mathematics."""
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "_BOARD", tmp_path / "board")
    monkeypatch.setattr(platform, "node", lambda: pytest.fail("asks for the host's name"))
    (tmp_path / "board").write_bytes(b"Raspberry Pi Zero 2 W Rev 1.0\0")
    assert machine.machine_name().startswith("Raspberry Pi Zero 2 W Rev 1.0, ")
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: A  CPU of $many_ words" + "!" * 90 + "\n"
    )
    name = machine.machine_name()
    assert name.startswith("A CPU of $many_ words!!!")
    assert name.split(", ")[1].endswith(" cores")
    assert len(name) < 100
    report = BenchReport(
        *("0.1.0", "1.32.0", name, "a$model_" + "x" * 90, "bundle", "fill-mask", 2**28, "edgepeft", None),
        *(16, 1, 1),
        [PhaseResult("load", "ran", measured=Measured(0.1, 1, None, MIB, MIB, MIB, MIB, None, TIMELINE))],
    )
    first, second = plot.title(report).splitlines()
    assert first == "a$model_" + "x" * 51 + "…: memory of every phase, budget 256.0 MiB"
    assert second == f"{name}, onnxruntime 1.32.0"
    assert "no budget" in plot.title(dataclasses.replace(report, budget_bytes=None))
    plot.require_matplotlib()
    plot.draw(report, tmp_path / "picture.png")
    with pytest.raises(EdgePeftError, match="cannot be written"):
        plot.draw(report, tmp_path / "none" / "picture.png")


def test_a_budget_for_nothing_exits_3(classifier: Path) -> None:
    """With one line, which names the phase that needs the least."""
    result = command("bench", classifier, "--budget", "40MiB", "--steps", 1)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert "error: no phase runs in 40.0 MiB; the smallest, " in result.stderr
    assert "give at least" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 0), "--steps is 0"),
        (("--seq-len", 99), "--seq-len is 99"),
        (("--max-new-tokens", 16), "--max-new-tokens is 16, expected 1 to 15"),
    ],
)
def test_sizes_that_cannot_be(language_model: Path, arguments: tuple[object, ...], message: str) -> None:
    """Exit 2, before any process is started."""
    assert message in fails(2, "bench", language_model, *arguments)


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "edgepeft\[plot\]"'):
        plot.require_matplotlib()


def test_a_bundle_on_a_disk_that_takes_nothing(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's temporary folder does; whether a folder can be written to shows when it is."""
    make = tempfile.mkdtemp

    def refused(suffix: str | None, prefix: str | None, parent: Path | None) -> str:
        if parent is not None:
            raise PermissionError(13, "Permission denied", str(parent))
        return make(suffix, prefix)

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with run._scratch(open_bundle(classifier)) as scratch:
        assert Path(scratch).parent == Path(tempfile.gettempdir())


def test_synthetic_records_and_adapters_are_usable(classifier: Path) -> None:
    """Of the length asked for; the adapter has an effect."""
    bundle = open_bundle(classifier)
    task = task_for(bundle)
    examples = task.encode_all(records(synthetic_records(bundle.manifest, 3, 7)), 16, training=True)
    assert [example.length for example in examples] == [7, 7, 7]
    assert synthetic_adapter(bundle, 0).has_effect({})
