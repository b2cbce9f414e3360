"""Every command that writes, killed at every call to the file system: run again, it ends as one run does, and
leaves nothing else behind.

    python -m tests.kills [--every N] [--disk full|gone] [SCENARIO...]

prints, for each scenario, how many places a kill was tried at and what went wrong. A place is an event that
Python audits (a file opened, renamed, removed, …; see `sys.addaudithook`) or a flush to the disk. With
`--disk full` or `--disk gone` the disk takes no more from there on, or is there no more: the command has to
end in one line, and to end well when the disk is back. A process is forked for each, so that nothing but
the command itself takes time.
"""

import argparse
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgepeft import cli
from edgepeft.adapters import save_adapter
from edgepeft.bundle.reader import open_bundle
from tests.runtime import tiny

_EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.listdir",
    "os.scandir",
)
_LIMIT_S = 60
_NEVER = 2**31
_ADAPT = "adapt b.edge --data data.jsonl --budget 2GiB --lr 0.02 --batch-size 4 --steps 25"
_EXPORT = "adapter export b.edge mine -o"


@dataclass(frozen=True)
class Scenario:
    """A command, how it is run again, and what of the working folder has to be as after one run.

    `again` may fail where the command has done its work.
    """

    command: str
    again: str
    result: str
    may_fail: bool = False


SCENARIOS = {
    "adapt": Scenario(f"{_ADAPT} -o out", f"{_ADAPT} -o out --resume", "out"),
    "adapt-anew": Scenario(f"{_ADAPT} -o out", f"{_ADAPT} -o out", "out"),
    "adapt-over": Scenario(f"{_ADAPT} -o other", f"{_ADAPT} -o other --resume", "other"),
    "adapt-in-place": Scenario(
        f"{_ADAPT} --adapter ./other -o other", f"{_ADAPT} --adapter ./other -o other --resume", "other"
    ),
    "adapt-deep": Scenario(f"{_ADAPT} -o deep/out", f"{_ADAPT} -o deep/out --resume", "deep"),
    "adapter-add": Scenario("adapter add b.edge new=other", "adapter add b.edge new=other", "b.edge", True),
    "adapter-remove": Scenario("adapter remove b.edge mine", "adapter remove b.edge mine", "b.edge", True),
    "adapter-export": Scenario(f"{_EXPORT} other", f"{_EXPORT} other", "other"),
    "adapter-export-file": Scenario(
        f"{_EXPORT} x.onnx_adapter", f"{_EXPORT} x.onnx_adapter", "x.onnx_adapter"
    ),
    "prompt-cache": Scenario("cache", "cache", "prompt.cache"),
}


def make(folder: Path) -> None:
    """What every scenario begins with."""
    tiny.write_bundle(folder / "b.edge", tokenizer=tiny.word_tokenizer())
    tiny.write_bundle(folder / "lm.edge", "text-generation", tokenizer=tiny.word_tokenizer())
    save_adapter(tiny.adapter(seed=5, trained=True), folder / "other")
    lines = [json.dumps(record) for record in tiny.records(120)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")


def _killed_at(folder: Path, count: int, disk: str | None) -> Callable[[], int]:
    """Have this process killed at the event of that number, or the disk fail from there on; returns how many
    events there were."""
    seen = 0

    def event(name: str, writes: bool) -> None:
        nonlocal seen
        seen += 1
        if seen == count and disk is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if seen >= count and (disk == "gone" or (disk == "full" and writes)):
            code = errno.EIO if disk == "gone" else errno.ENOSPC
            raise OSError(code, os.strerror(code), name)

    def audit(name: str, arguments: tuple[object, ...]) -> None:
        if name in _EVENTS and any(
            (isinstance(item, str | bytes) and os.fsdecode(item).startswith(str(folder)))
            # Below a descriptor, as shutil.rmtree removes.
            or (name in ("os.remove", "os.rmdir") and index == 1 and item != -1)
            for index, item in enumerate(arguments)
        ):
            opened = arguments[1] if name == "open" else None
            event(name, name == "os.mkdir" or (isinstance(opened, str) and opened[0] in "wxa"))

    flush = os.fsync

    def fsync(descriptor: int) -> None:
        event("fsync", True)
        flush(descriptor)

    os.fsync = fsync
    sys.addaudithook(audit)
    return lambda: seen


def run(folder: Path, command: str, killed_at: int = _NEVER, disk: str | None = None) -> tuple[int, int]:
    """Run a command in a folder, in a process of its own.

    Returns:
        Its exit code (negative: the signal that ended it; -14: it took too long), and the events there were.
    """
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            signal.alarm(_LIMIT_S)
            os.chdir(folder)
            with (folder.parent / "log").open("w", encoding="utf-8") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            count = _killed_at(folder, killed_at, disk)
            try:
                if command == "cache":
                    import edgepeft

                    with edgepeft.load("lm.edge", threads=1) as model:
                        model.read_prompt("w1 w2 w3").save(folder / "prompt.cache")
                    code = 0
                else:
                    here = ("b.edge", "other", "out")
                    cli.main([str(folder / word) if word in here else word for word in command.split()])
            except SystemExit as ended:
                code = int(ended.code or 0)
            os.write(write, str(count()).encode())
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        counted = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(counted or 0)


_OF_ITS_RUN = ("adapt_report.json", "README.md")


def contents(path: Path) -> dict[str, bytes]:
    """Every file at or below a path by its name; of a report and of the card made of it, which tell the time
    and the memory, only that they are there."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] * path.exists()
    return {
        str(file.relative_to(path)): b"" if file.name in _OF_ITS_RUN else file.read_bytes()
        for file in files
        if file.is_file()
    }


def names(folder: Path) -> list[str]:
    """What there is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def check(
    scenario: Scenario, scratch: Path, every: int = 1, disk: str | None = None
) -> tuple[int, list[str]]:
    """Try a scenario with a kill at every `every`th place, or with a disk that fails.

    Returns:
        How many kills there were, and what went wrong, a line each.
    """
    start, work = scratch / "start", scratch / "work"
    start.mkdir()
    make(start)

    def again() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(start, work)

    again()
    code, events = run(work, scenario.command)
    assert code == 0, (scratch / "log").read_text()
    expected, beside = contents(work / scenario.result), names(work)
    faults = []
    tried = range(1, events + 1, every)
    for number in tried:
        again()
        code, _ = run(work, scenario.command, number, disk)
        told = (scratch / "log").read_text()
        if disk is not None and (code not in (0, 1, 2) or "Traceback" in told or told.count("error:") > 1):
            faults.append(f"place {number}: ended with {code}: {told.strip()[-600:]}")
        if disk is None and code != -signal.SIGKILL:
            faults.append(f"place {number}: ended with {code} instead of being killed")
            continue
        for bundle in ("b.edge", "lm.edge"):
            open_bundle(work / bundle)
        finished = contents(work / scenario.result) == expected and names(work) == beside
        code, _ = run(work, scenario.again)
        same = contents(work / scenario.result) == expected
        if code and not (same and scenario.may_fail):
            faults.append(f"place {number}: {(scratch / 'log').read_text().strip()[-300:]}")
        left = sorted(set(names(work)) ^ set(beside))
        if left:
            faults.append(f"place {number}: {', '.join(left)} should not be there, or should")
        if not (same or finished):
            faults.append(f"place {number}: another result")
    return len(tried), faults


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the number of faults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--every", type=int, default=1, help="try one place of so many")
    parser.add_argument("--disk", choices=["full", "gone"], help="what happens instead of a kill")
    options = parser.parse_args(arguments)
    import edgepeft.runtime.training.adapt  # noqa: F401  (once, for all processes)

    total = 0
    for name in options.scenarios or SCENARIOS:
        began_s = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            count, faults = check(SCENARIOS[name], Path(scratch), options.every, options.disk)
        what = "kills" if options.disk is None else f"disks {options.disk}"
        took_s = time.perf_counter() - began_s
        print(f"{name}: {count} {what}, {len(faults)} faults ({took_s:.0f} s)")
        print("".join(f"  {fault}\n" for fault in faults), end="", flush=True)
        total += len(faults)
    return total


if __name__ == "__main__":
    sys.exit(min(main(), 1))
