"""`edgepeft predict`: classify or embed the records of a file."""

import math
from typing import Any

import click

from edgepeft.cli.console import Console
from edgepeft.cli.options import (
    adapter_spec,
    adapters_option,
    budget_option,
    bundle_argument,
    check_floor,
    data_option,
    force_option,
    json_option,
    table,
)


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
        records = model.predict(data, spec, batch_size, seq_len, on_progress=done)
        task = model.manifest.task
    graded = [right for record in records for right in _graded(task, record)]
    accuracy = sum(graded) / len(graded) if graded else None
    result = {"task": task, "adapter": spec, "accuracy": accuracy, "records": records}
    console.show(result, _table, indent=None)


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


def _table(result: dict[str, Any]) -> str:
    if any("entities" in record for record in result["records"]):
        rows = [
            [
                str(number),
                item["label"],
                f"{item['score']:.4f}",
                f"{item['start']}-{item['end']}",
                item["text"],
            ]
            for number, record in enumerate(result["records"], start=1)
            for item in record.get("entities", ())
        ]
        return table(rows, ["record", "label", "score", "characters", "text"])
    if result["task"] == "feature-extraction":
        rows = [
            [
                str(number),
                str(len(record["embedding"])),
                f"{math.hypot(*record['embedding']):.4f}",
                ", ".join(f"{value:.4f}" for value in record["embedding"][:4]) + ", …",
            ]
            for number, record in enumerate(result["records"], start=1)
        ]
        return table(rows, ["record", "width", "norm", "embedding (use --json for all of it)"])
    rows = [
        [str(number), _shown(record), _score(record), _shown({"label": record.get("expected", "")})]
        for number, record in enumerate(result["records"], start=1)
    ]
    text = table(rows, ["record", "label", "score", "expected"])
    if result["accuracy"] is not None:
        text += f"\naccuracy {result['accuracy']:.4f}"
    return text


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
