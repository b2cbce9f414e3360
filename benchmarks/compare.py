"""Run two or more sides in turn and compare them."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgepeft.runtime.memory.cgroup import MemoryCgroup, drop_page_cache

#: Threads of a pool go on spinning for a moment after a run.
REST_S = 0.3
Report = Callable[[str], None]


class SideEndedError(RuntimeError):
    """A side ended before it was told to.

    Attributes:
        exit_code: of its process; 3 where it refused its budget.
        killed: whether the kernel killed it because of its cgroup's limit.
    """

    def __init__(self, name: str, exit_code: int, killed: bool) -> None:
        super().__init__(f"{name} ended with exit code {exit_code}{', killed by the kernel' * killed}")
        self.exit_code = exit_code
        self.killed = killed


@dataclass(frozen=True)
class Command:
    """What starts a side, and the memory cgroup that it runs in; none without a limit."""

    arguments: Sequence[str]
    limit_bytes: int | None = None


class Side(ExitStack):
    """A process of `benchmarks.side`, or of anything that speaks as it does."""

    def __init__(self, name: str, command: Command) -> None:
        super().__init__()
        self.name = name
        self.step_s: list[float] = []
        self.losses: list[float] = []
        self.memory: dict[str, int] = {}
        self._group: MemoryCgroup | None = None
        arguments = command.arguments
        if command.limit_bytes is not None:
            self._group = self.enter_context(MemoryCgroup(command.limit_bytes))
            arguments = self._group.command(arguments)
            drop_page_cache()
        self._process = self.enter_context(
            subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
            )
        )
        self.callback(self._process.kill)

    def wait(self) -> None:
        """Until the side is ready for its first step."""
        self._read()

    def step(self) -> None:
        """One step, timed by the side itself."""
        answer = self._ask("step")
        self.step_s.append(answer["step_s"])
        self.losses.append(answer["loss"])

    def end(self) -> None:
        """Ask for the memory and let the process go."""
        self.memory = self._ask("end")
        self._process.wait()
        if self._group is not None and self._group.peak_bytes is not None:
            self.memory["cgroup_peak_bytes"] = self._group.peak_bytes

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what has ended is found when it is read
            self._process.stdin.write(f"{command}\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            exit_code = self._process.wait()
            raise SideEndedError(self.name, exit_code, self._group is not None and self._group.oom_kills > 0)
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Comparison:
    """What the steps of several sides took; ratios are to the first, the peer."""

    names: tuple[str, ...]
    step_s: tuple[tuple[float, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    memory: tuple[dict[str, int], ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row a side: medians, and the median over the rounds of the ratio to the peer's step beside it."""
        peer_s, peer_memory = self.step_s[0], self.memory[0]
        return [
            {
                "side": name,
                "rounds": len(step_s),
                "step_s": statistics.median(step_s),
                "step_ratio": statistics.median(a / b for a, b in zip(step_s, peer_s, strict=True)),
                "peak_bytes": memory["peak_bytes"],
                "peak_ratio": memory["peak_bytes"] / peer_memory["peak_bytes"],
                "anonymous_bytes": memory["anonymous_bytes"],
                "cgroup_peak_bytes": memory.get("cgroup_peak_bytes"),
                "first_loss": losses[0],
                "last_loss": losses[-1],
            }
            for name, step_s, losses, memory in zip(
                self.names, self.step_s, self.losses, self.memory, strict=True
            )
        ]


def compare(sides: dict[str, Command], rounds: int, report: Report) -> Comparison:
    """Start every side, then a step of each in turn, `rounds` times after one that is not counted.

    The first side is the peer. Those in cgroups start before the others: a page of a library is charged to
    whoever reads it first.

    Raises:
        SideEndedError: a side died, or refused.
    """
    with ExitStack() as stack:
        started: dict[str, Side] = {}
        for name in sorted(sides, key=lambda name: sides[name].limit_bytes is None):
            report(f"starting {name}")
            started[name] = stack.enter_context(Side(name, sides[name]))
            started[name].wait()
        running = [started[name] for name in sides]
        for number in range(rounds + 1):
            report(f"round {number} of {rounds}")
            for side in running:
                side.step()
                time.sleep(REST_S)
        for side in running:
            side.step_s, side.losses = side.step_s[1:], side.losses[1:]
            side.end()
    return Comparison(
        tuple(side.name for side in running),
        tuple(tuple(side.step_s) for side in running),
        tuple(tuple(side.losses) for side in running),
        tuple(side.memory for side in running),
    )


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in info.read_text("utf-8").splitlines()
            if "model name" in line
        ]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    packages = {name: version(name) for name in ("onnxruntime", "torch", "transformers", "peft")}
    return {"cpu": cpu, "python": platform.python_version(), **packages}
