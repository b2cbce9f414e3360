"""Run two or more sides in turn and compare them."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

#: Threads of a pool go on spinning for a moment after a run.
REST_S = 0.3
Report = Callable[[str], None]


class Side:
    """A process of `benchmarks.side`, or of anything that speaks as it does."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.step_s: list[float] = []
        self.losses: list[float] = []
        self.memory: dict[str, int] = {}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
        )

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

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.__exit__(kind, error, trace)


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
                "first_loss": losses[0],
                "last_loss": losses[-1],
            }
            for name, step_s, losses, memory in zip(
                self.names, self.step_s, self.losses, self.memory, strict=True
            )
        ]


def compare(sides: dict[str, Sequence[str]], rounds: int, report: Report) -> Comparison:
    """Start every side, then a step of each in turn, `rounds` times after one that is not counted."""
    with ExitStack() as stack:
        running: list[Side] = []
        for name, command in sides.items():
            report(f"starting {name}")
            running.append(stack.enter_context(Side(name, command)))
            running[-1].wait()
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
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    packages = {name: version(name) for name in ("onnxruntime", "torch", "transformers", "peft")}
    return {"cpu": cpu, "python": platform.python_version(), **packages}
