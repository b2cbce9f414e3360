"""`edgepeft predict`: classify or embed the records of a file."""

import math
from collections.abc import Sequence
from typing import Any

import click

from .console import Console
from .options import (
    adapter_spec,
    adapters_option,
    aligned,
    budget_option,
    bundle_argument,
    check_floor,
    column_widths,
    data_option,
    force_option,
    json_option,
)

TOGETHER = 256
"""Results that are written at a time; as wide as these are the columns of a table."""


@click.command(short_help="Classify or embed records.")
@bundle_argument()
@data_option('JSON lines such as {"text": …}; - reads them from standard input.')
@adapters_option()
@force_option()
@click.option("--batch-size", type=int, default=8, show_default=True, help="Records a run.")
@click.option(
    "--seq-len",
    type=int,
    help="Tokens a text is cut to, or samples a recording; the model's maximum unless given.",
)
@budget_option()
@json_option()
@click.pass_obj
def predict(
    console: Console,
    /,
    bundle: str,
    data: str,
    adapters: tuple[str, ...],
    force: bool,
    batch_size: int,
    seq_len: int | None,
    budget: int | None,
) -> None:
    """Classify or embed every record of a file, or put numbers to it; with labels in it, also say how many
    are right.

    \b
    Example:
      edgepeft predict model.edge --data records.jsonl --adapter mine
      head -n 3 records.jsonl | edgepeft predict model.edge --data - --json
    """
    check_floor(budget)
    spec = adapter_spec(adapters)
    progress = console.progress
    progress.stage("opening the bundle")
    from edgepeft.runtime import load

    def done(count: int, total: int) -> None:
        progress.update(count, total, "records")

    with load(bundle, memory_budget=budget, force=force) as model:
        progress.stage("predicting")
        task = model.manifest.task
        listing = _Listing(console, task, spec)
        for record in model.predictions(data, spec, batch_size, seq_len, on_progress=done):
            listing.add(record)
        listing.close()


class _Listing:
    """Writes results some at a time, so that any number of them takes no memory."""

    def __init__(self, console: Console, task: str, adapter: Any) -> None:
        self._console = console
        self._head = {"task": task, "adapter": adapter}
        self._task = task
        self._waiting: list[dict[str, Any]] = []
        self._count = self._right = self._graded = 0
        self._header: list[str] = []  # of the table that is being written
        self._widths: list[int] = []

    def add(self, record: dict[str, Any]) -> None:
        """One more result."""
        graded = _graded(self._task, record)
        self._right += sum(graded)
        self._graded += len(graded)
        self._waiting.append(record)
        if len(self._waiting) == TOGETHER:
            self._write()

    def close(self) -> None:
        """That was the last; with labels, how many are right."""
        if self._waiting:
            self._write()
        accuracy = self._right / self._graded if self._graded else None
        if self._console.as_json or accuracy is not None:
            self._console.show({"accuracy": accuracy}, lambda told: f"accuracy {told['accuracy']:.4f}")

    def _write(self) -> None:
        if self._console.as_json:
            self._console.write_items(self._waiting, "records", self._head)
        else:
            header, rows = _rows(self._task, self._waiting, self._count + 1)
            lines = rows
            if header != self._header:
                lines = [header, *rows]
                self._header, self._widths = header, column_widths(lines)
            self._console.write_text(aligned(lines, self._widths))
        self._count += len(self._waiting)
        self._waiting = []


def _graded(task: str, record: dict[str, Any]) -> list[bool]:
    """What of a labelled record is right: its label, or the set of them, or each token's; a regression's
    values are no question of right or wrong."""
    if "expected" not in record or "values" in record:
        return []
    if task in ("token-classification", "fill-mask"):
        pairs = zip(_labels(record), record["expected"], strict=True)
        return [label == expected for label, expected in pairs if expected is not None]
    return [record.get("label", record.get("labels")) == record["expected"]]


def _labels(record: dict[str, Any]) -> list[str]:
    """The label of each token, or the best token of each mask."""
    if "masks" in record:
        return [tokens[0]["token_str"] for tokens in record["masks"]]
    labels: list[str] = record["labels"]
    return labels


def _rows(task: str, records: Sequence[dict[str, Any]], first: int) -> tuple[list[str], list[list[str]]]:
    """A table's header and rows; `first` is the first record's number."""
    if any("entities" in record for record in records):
        rows = [
            [
                str(number),
                item["label"],
                f"{item['score']:.4f}",
                f"{item['start']}-{item['end']}",
                item["text"],
            ]
            for number, record in enumerate(records, start=first)
            for item in record.get("entities", ())
        ]
        return ["record", "label", "score", "characters", "text"], rows
    if task == "feature-extraction":
        rows = [
            [
                str(number),
                str(len(record["embedding"])),
                f"{math.hypot(*record['embedding']):.4f}",
                ", ".join(f"{value:.4f}" for value in record["embedding"][:4]) + ", …",
            ]
            for number, record in enumerate(records, start=first)
        ]
        return ["record", "width", "norm", "embedding (use --json for all of it)"], rows
    rows = [
        [str(number), _shown(record), _score(record), _shown({"label": record.get("expected", "")})]
        for number, record in enumerate(records, start=first)
    ]
    return ["record", "label", "score", "expected"], rows


def _shown(record: dict[str, Any]) -> str:
    """A label, several, values by name, or what belongs in each mask."""
    if "masks" in record:
        return " ".join(_labels(record))
    value = next(record[name] for name in ("label", "labels", "values") if name in record)
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:.4f}" for name, number in value.items())
    return value if isinstance(value, str) else " ".join("-" if item is None else item for item in value)


def _score(record: dict[str, Any]) -> str:
    """The probability of the label, of the best of several, or of the least certain token."""
    if "score" in record:
        return f"{record['score']:.4f}"
    scores = record.get("scores", [tokens[0]["score"] for tokens in record.get("masks", ())])
    if isinstance(scores, dict):
        return f"{max(scores.values()):.4f}"
    return f"{min(scores):.4f}" if scores else ""
