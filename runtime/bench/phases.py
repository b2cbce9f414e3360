"""The phases: what each does in its process, and how long one run of it takes."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepeft.bundle.manifest import GenerationSettings, Manifest
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.errors import UpdateRejectedError
from edgepeft.techniques import peft_slots

from ..model import Model
from .synthetic import prompt_ids, synthetic_records

LEARNING_RATE = 1e-4
RECORDS = 20
"""For an update to learn from; a tenth of them is held out."""


@dataclass(frozen=True)
class Request:
    """What a phase's process is asked for; plain JSON.

    Attributes:
        bundle: the bundle's folder.
        phase: a name of `PHASES`.
        scratch: a folder on the disk that the bundle is on.
        adapters: folders of two adapters; empty where the bundle takes none.
        budget_bytes: limit on the process's resident memory; None for no limit.
        seq_len: tokens or samples of a record; None for images.
        batch_size: records of a batch.
        steps: counted runs of the phase.
        new_tokens: tokens to write in `decode`.
    """

    bundle: str
    phase: str
    scratch: str
    adapters: tuple[str, ...]
    budget_bytes: int | None
    seq_len: int | None
    batch_size: int
    steps: int
    new_tokens: int


@dataclass(frozen=True)
class Timing:
    """What a phase tells of itself; see `edgepeft.runtime.bench.report.Measured`."""

    seconds: float | None
    runs: int
    tokens: int | None
    predicted_peak_bytes: int
    strategy: str | None = None


def names(manifest: Manifest) -> list[str]:
    """The phases that a bundle has, in the order of use."""
    generates = manifest.task.endswith("-generation")
    phases = ["load", *(("prefill", "decode") if generates else ("predict",))]
    if peft_slots(manifest.slots):
        phases += ["train"] if manifest.strategies else []
        phases += ["swap"]
    return phases


def load(request: Request) -> Timing:
    """From nothing to a first answer: every file checked, the session open, a smallest record through it."""
    seconds, predicted = [], []
    for _ in range(request.steps):
        began_s = time.perf_counter()
        with _model(request) as model:
            _answer(model, request, _smallest(model.manifest), 1, request.adapters[:1])
            seconds.append(time.perf_counter() - began_s)
            predicted.append(_predicted(model))
    # Later plans start from what the earlier models have left behind.
    return Timing(statistics.median(seconds), len(seconds), None, predicted[0])


def prefill(request: Request) -> Timing:
    """The first token after a prompt."""
    return _batches(request, rows=1)


def predict(request: Request) -> Timing:
    """A batch of records."""
    return _batches(request, rows=request.batch_size)


def decode(request: Request) -> Timing:
    """One more token after a prompt: what several take beyond the first, divided by their number."""
    assert request.seq_len is not None
    with _model(request) as model:
        prompt = prompt_ids(model.manifest, request.seq_len)
        adapter = _named(request.adapters[:1])

        def write(count: int) -> None:
            model.generate_ids(prompt, adapter, max_new_tokens=count)

        write(1)
        first = _timed(lambda: write(1), request.steps)
        more = _timed(lambda: write(1 + request.new_tokens), request.steps)
        seconds = (statistics.median(more) - statistics.median(first)) / request.new_tokens
        # A token of a toy takes less than the clock's noise.
        return Timing(seconds if seconds > 0 else None, request.steps, 1, _predicted(model))


def train(request: Request) -> Timing:
    """A step of `adapt`, the whole update around it included in the memory."""
    length = request.seq_len or 1
    with _model(request) as model:
        count = max(RECORDS, 2 * request.batch_size)
        try:
            report = model.adapt(
                synthetic_records(model.manifest, count, length),
                Path(request.scratch) / "trained",
                adapter=request.adapters[0],
                steps=request.steps,
                seq_len=request.seq_len,
                batch_size=request.batch_size,
                learning_rate=LEARNING_RATE,
            ).to_dict()
        except UpdateRejectedError as rejected:  # there is nothing to learn in random records
            if rejected.report is None:
                raise
            report = rejected.report
    return Timing(
        report["seconds"]["step"],
        report["steps"],
        request.batch_size * length,
        report["memory"]["predicted_peak_bytes"],
        report["strategy"],
    )


def swap(request: Request) -> Timing:
    """A smallest record's answer with another adapter than the last one had, read from its files."""
    with _model(request) as model:
        length = _smallest(model.manifest)
        turn = 0

        def swapped() -> None:
            nonlocal turn
            turn += 1
            _answer(model, request, length, 1, (request.adapters[turn % 2],))

        _answer(model, request, length, 1, request.adapters[:1])
        seconds = _timed(swapped, request.steps)
        return Timing(statistics.median(seconds), len(seconds), None, _predicted(model))


PHASES: dict[str, Callable[[Request], Timing]] = {
    function.__name__: function for function in (load, prefill, predict, decode, train, swap)
}


def _batches(request: Request, rows: int) -> Timing:
    length = request.seq_len or 1
    with _model(request) as model:

        def answer() -> None:
            _answer(model, request, length, rows, request.adapters[:1])

        answer()  # opens the session
        seconds = _timed(answer, request.steps)
        return Timing(statistics.median(seconds), len(seconds), rows * length, _predicted(model))


def _answer(model: Model, request: Request, length: int, rows: int, adapters: tuple[str, ...]) -> None:
    adapter = _named(adapters)
    if model.manifest.task.endswith("-generation"):
        model.generate_ids(prompt_ids(model.manifest, length), adapter, max_new_tokens=1)
    else:
        seq_len = None if request.seq_len is None else max(length, 2)
        model.predict(synthetic_records(model.manifest, rows, length), adapter, rows, seq_len)


def _named(adapters: tuple[str, ...]) -> str | None:
    return adapters[0] if adapters else None


def _timed(run: Callable[[], Any], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        began_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began_s)
    return seconds


def _smallest(manifest: Manifest) -> int:
    return max(manifest.model.min_length, 1)


def _predicted(model: Model) -> int:
    assert model.predicted_peak_bytes is not None
    return model.predicted_peak_bytes


def _model(request: Request) -> Model:
    """The bundle without what ends an answer, or chooses its tokens: how long one gets is the request's
    business."""
    bundle = open_bundle(request.bundle)
    settings = GenerationSettings()
    endless = dataclasses.replace(bundle.manifest.model, eos_token_ids=(), generation=settings)
    return Model(
        Bundle(bundle.path, dataclasses.replace(bundle.manifest, model=endless)), request.budget_bytes
    )
