"""One phase in a process of its own: `python -m edgepeft.runtime.bench.worker REQUEST`, as JSON.

Prints one JSON object: `measured`, `refused` (the budget is too small) or `failed`.
"""

import dataclasses
import json
import sys

from edgepeft.errors import BudgetError, EdgePeftError

from ..memory.process import MemoryRecorder
from .phases import PHASES, Request
from .report import Measured


def measure(request: Request) -> Measured:
    """Run a phase and watch this process's memory meanwhile.

    Raises:
        BudgetError: the budget cannot hold it.
        EdgePeftError: it failed.
    """
    with MemoryRecorder(interval_s=0.005) as recorder:
        timing = PHASES[request.phase](request)
    anonymous = [sample.anonymous_bytes for sample in recorder.samples if sample.anonymous_bytes is not None]
    files = [sample.file_bytes for sample in recorder.samples if sample.file_bytes is not None]
    return Measured(
        seconds=timing.seconds,
        runs=timing.runs,
        tokens_per_s=timing.tokens / timing.seconds if timing.tokens and timing.seconds else None,
        predicted_peak_bytes=timing.predicted_peak_bytes,
        peak_bytes=recorder.peak_bytes,
        anonymous_bytes=max(anonymous, default=None),
        file_bytes=max(files, default=None),
        strategy=timing.strategy,
        timeline=recorder.samples,
    )


def main() -> None:
    """Answer on standard output what the first argument asks for."""
    fields = json.loads(sys.argv[1])
    request = Request(**{**fields, "adapters": tuple(fields["adapters"])})
    answer: dict[str, object]
    try:
        answer = {"measured": dataclasses.asdict(measure(request))}
    except BudgetError as error:
        answer = {"refused": str(error), "required_bytes": error.required_bytes}
    except EdgePeftError as error:
        answer = {"failed": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
