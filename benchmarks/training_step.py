"""A training step: edgepeft's graph on a stock onnxruntime against PyTorch + PEFT in float32.

    python -m benchmarks.training_step [--shape smollm2-135m] [--seq-len 128 --seq-len 256] [--rounds 7]

exports the shape at 4 bits (once, if --work names a folder), then lets both sides take steps in turn. Counts
the nodes of the forward and the training graph too. Writes benchmarks/results/training_step.json.
"""

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import onnx

from benchmarks.compare import Command, compare, machine
from benchmarks.shapes import DECODERS, bundle_of

RESULTS = Path(__file__).parent / "results"
#: Too little for the resident graph, so the planner takes the stages.
SMALL_BUDGET = "256MiB"


def count_nodes(bundle: Path) -> dict[str, Any]:
    """Nodes of the training graph, and of its forward part: those that its logits need."""
    graph = onnx.load(bundle / "graphs" / "train.onnx", load_external_data=False).graph
    needed, forward = {"logits"}, 0
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            forward += 1
    return {"forward": forward, "training": len(graph.node), "ratio": len(graph.node) / forward}


def _say(text: str) -> None:
    click.echo(f"{text} …", err=True)


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--shape", type=click.Choice(DECODERS), default="smollm2-135m", show_default=True)
@click.option("--seq-len", "seq_lens", type=int, multiple=True, default=(128, 256), show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Counted steps of each side.")
@click.option("--threads", default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep the exported bundle here.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(
    shape: str, seq_lens: tuple[int, ...], rounds: int, threads: int, work: Path | None, as_json: bool
) -> None:
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bundle = bundle_of(shape, folder, _say)
        results: dict[str, Any] = {
            "machine": machine(),
            "shape": shape,
            "nodes": count_nodes(bundle),
            "steps": [],
        }
        for seq_len in seq_lens:
            common = ["--seq-len", str(seq_len), "--threads", str(threads)]
            side = [sys.executable, "-m", "benchmarks.side"]
            comparison = compare(
                {
                    "PyTorch + PEFT, float32": Command([*side, "torch", shape, *common]),
                    "edgepeft, int4, resident": Command([*side, "edgepeft", str(bundle), *common]),
                    f"edgepeft, int4, in {SMALL_BUDGET}": Command(
                        [*side, "edgepeft", str(bundle), *common, "--budget", SMALL_BUDGET]
                    ),
                },
                rounds,
                _say,
            )
            results["steps"] += [{"seq_len": seq_len, **row} for row in comparison.rows()]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "training_step.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    click.echo(json.dumps(results, indent=2) if as_json else table(results))


def table(results: dict[str, Any]) -> str:
    """The steps as a table in Markdown."""
    lines = [
        "| tokens | side | step, s | of the peer's | peak, MiB | of the peer's |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['seq_len']} | {row['side']} | {row['step_s']:.3f} | {row['step_ratio']:.2f} "
        f"| {row['peak_bytes'] / 2**20:.0f} | {row['peak_ratio']:.2f} |"
        for row in results["steps"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
