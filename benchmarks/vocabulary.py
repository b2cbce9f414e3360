"""What trimming the vocabulary (`--keep-vocabulary`) saves, and what it does to kept texts and others.

    python -m benchmarks.vocabulary MODEL --work DIR [--texts N]

MODEL is exported twice, whole and trimmed to the docstrings of `samples.docstrings` that are learned from; of
these, and of the docstrings held out, the first N are judged. A text is as long as it is, so what is compared
is its surprise as a whole, in nats, however many tokens it is cut into. `among kept` is the whole model that
may choose among the kept tokens alone. Answers are of 48 tokens, the two bundles in turn, five times each;
memory is the largest resident size of a process that writes one. Results are written to DIR/vocabulary.json.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import tokenizers

import edgepeft
from benchmarks.compare import machine
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.model import Model
from samples.docstrings import write

TOKENS, ROUNDS = 48, 5
PROMPT = "Return the number of"
_ANSWER = """
import resource, sys
import edgepeft
with edgepeft.load(sys.argv[1]) as model:
    model.generate(sys.argv[2], max_new_tokens=int(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def surprise(model: Model, ids: list[int], among: Sequence[list[int] | None]) -> list[float]:
    """What a text says beyond its first token, in nats, where there are all tokens (None) or some alone."""
    batch = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    logits = model.forward(batch)["logits"][0, :-1]
    logits -= logits.max(axis=1, keepdims=True)
    told = float(np.take_along_axis(logits, np.array(ids[1:])[:, None], 1).sum(dtype=np.float64))
    shares = np.exp(logits, out=logits)
    sums = [(shares if one is None else shares[:, one]).sum(axis=1, dtype=np.float64) for one in among]
    return [float(np.log(one).sum()) - told for one in sums]


def tokenizer_of(folder: Path) -> tokenizers.Tokenizer:
    """A bundle's."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def judged(folders: dict[str, Path], texts: list[str], *, kept: bool) -> dict[str, Any]:
    """Nats and tokens of a text, and perplexity of a token, by bundle."""
    read = {name: tokenizer_of(folder) for name, folder in folders.items()}
    whole, trimmed = read["whole"], read["trimmed"]
    rows = [whole.token_to_id(trimmed.id_to_token(token)) for token in range(trimmed.get_vocab_size())]
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        ids = [read[name].encode(text).ids for text in texts]
        tokens = sum(len(one) - 1 for one in ids)
        with edgepeft.load(folder) as model:
            cases = {name: None} | ({"among kept": rows} if kept and name == "whole" else {})
            nats = np.sum([surprise(model, one, list(cases.values())) for one in ids], axis=0)
        for case, total in zip(cases, nats.tolist(), strict=True):
            found[case] = {
                "nats_a_text": total / len(texts),
                "tokens_a_text": tokens / len(texts),
                "perplexity": float(np.exp(total / tokens)),
            }
    if kept:
        assert all(whole.encode(text).tokens == trimmed.encode(text).tokens for text in texts)
    return found


def answered(model: Model, prompt: list[int]) -> float:
    """Seconds for a token of an answer."""
    start = time.perf_counter()
    answer = model.generate_ids(prompt, max_new_tokens=TOKENS)
    return (time.perf_counter() - start) / len(answer)


def peak_bytes(folder: Path) -> int:
    """The largest resident size of a process that writes an answer."""
    command = [sys.executable, "-c", _ANSWER, str(folder), PROMPT, str(TOKENS)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024


@click.command()
@click.argument("model")
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--texts", default=30, show_default=True)
def main(model: str, work: Path, texts: int) -> None:
    """See the module."""
    kept, others = write(work)
    folders = {"whole": work / "whole.edge", "trimmed": work / "trimmed.edge"}
    for name, folder in folders.items():
        if not folder.exists():
            options = {"keep_vocabulary": kept} if name == "trimmed" else {}
            edgepeft.export(model, folder, train=False, report=click.echo, **options)
    found: dict[str, Any] = {"machine": machine(), "model": Path(model).name}
    for name, folder in folders.items():
        parts = {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        found[name] = {
            "bundle_bytes": sum(parts.values()),
            "vocab_size": open_bundle(folder).manifest.model.vocab_size,
            "weights_bytes": parts["weights.bin"],
            "tokenizer_bytes": parts["tokenizer.json"],
            "generation_peak_bytes": statistics.median(peak_bytes(folder) for _ in range(3)),
        }
    with edgepeft.load(folders["whole"]) as whole, edgepeft.load(folders["trimmed"]) as trimmed:
        both = {"whole": whole, "trimmed": trimmed}
        read = {name: tokenizer_of(folder).encode(PROMPT).ids for name, folder in folders.items()}
        rounds = range(ROUNDS + 1)  # of which the first opens the sessions
        times = [{name: answered(both[name], read[name]) for name in both} for _ in rounds][1:]
        for name in both:
            found[name]["token_s"] = statistics.median(one[name] for one in times)
    found["token_ratios"] = [one["trimmed"] / one["whole"] for one in times]
    click.echo(json.dumps(found))
    for name, path in (("kept texts", kept), ("other texts", others)):
        chosen = [json.loads(line)["text"] for line in path.read_text().splitlines()[:texts]]
        found[name] = judged(folders, chosen, kept=path == kept)
        click.echo(json.dumps(found[name]))
    (work / "vocabulary.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
