"""A product by each layout of quantized weights against our own symmetric 4 bits of the same size.

    python -m benchmarks.layouts [--rows 1536 --columns 3072] [--rounds 15]

One product of a decoder each, as it is written into a bundle, on a stock onnxruntime: one token and 128, with
exact and with rounded activations. Both sides run in turn in this process; the ratios are medians over the
rounds. Writes benchmarks/results/layouts.json.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.compare import machine
from edgepeft.exporters.decoder.half_bytes import multiply_by_half_bytes
from edgepeft.exporters.graph import graph_input, new_model, tidy
from edgepeft.exporters.quantize.layouts import BlockValues, QuantizedWeight
from edgepeft.exporters.quantize.lower_minimums import lower_minimums
from edgepeft.exporters.quantize.products import QuantizedConstant

RESULTS = Path(__file__).parent / "results"
OURS = "ours: 4 bits, blocks of 32"


def layouts(rows: int, columns: int) -> dict[str, QuantizedWeight]:
    """A weight of each layout, of random codes."""
    rng = np.random.default_rng(0)

    def codes(bits: int) -> np.ndarray:
        return rng.integers(0, 2**bits, (rows, columns), np.uint8)

    def halves(blocks: int) -> np.ndarray:
        return rng.uniform(0.01, 0.02, (rows, blocks)).astype(np.float16)

    def levels(block_size: int, dtype: type) -> BlockValues:
        values = rng.integers(1, 63, (rows, columns // block_size)).astype(dtype)
        return BlockValues(values, halves(columns // 256))

    def nothing(block_size: int) -> np.ndarray:
        return np.zeros((rows, columns // block_size), np.uint8)

    def middle(block_size: int) -> np.ndarray:
        return rng.integers(4, 12, (rows, columns // block_size), np.uint8)

    of, small, large = QuantizedWeight.of_codes, columns // 32, columns // 128
    single = BlockValues(halves(small).astype(np.float32))
    return {
        OURS: of(codes(4), single, 4, 32),
        "Q4_0": of(codes(4), BlockValues(halves(small)), 4, 32),
        "Q4_1": of(
            codes(4),
            BlockValues(halves(small)),
            4,
            32,
            zero_points=nothing(32),
            minimums=BlockValues(-halves(small)),
        ),
        "Q4_K": of(
            codes(4),
            levels(32, np.uint8),
            4,
            32,
            zero_points=nothing(32),
            minimums=levels(32, np.uint8),
        ),
        "Q5_0, Q8_0, IQ4_NL (8-bit codes)": of(codes(8), BlockValues(halves(small)), 8, 32),
        "Q5_1 (8-bit codes)": of(
            codes(8),
            BlockValues(halves(small)),
            8,
            32,
            zero_points=nothing(32),
            minimums=BlockValues(-halves(small)),
        ),
        "Q6_K (8-bit codes, blocks of 16)": of(codes(8), levels(16, np.int8), 8, 16),
        "GPTQ, blocks of 128": of(codes(4), BlockValues(halves(large)), 4, 128, zero_points=middle(128)),
        "GPTQ, activation order": of(
            codes(4),
            BlockValues(halves(large)),
            4,
            128,
            zero_points=middle(128),
            order=rng.permutation(columns).astype(np.int64),
        ),
        "AWQ, zero points": of(codes(4), BlockValues(halves(large)), 4, 128, zero_points=middle(128)),
        "MLX (float minimums, 64)": of(
            codes(4),
            BlockValues(halves(columns // 64)),
            4,
            64,
            zero_points=nothing(64),
            minimums=BlockValues(-halves(columns // 64)),
        ),
    }


def session(weight: QuantizedWeight, *, int8: bool) -> ort.InferenceSession:
    """`y = x Wᵀ` of tokens `[tokens, columns]`."""
    rows, columns = weight.shape
    graph = ir.Graph([], [], nodes=[], name="product")
    model = new_model(graph)
    x = graph_input(graph, "x", ["tokens", columns])
    graph.outputs.append(
        QuantizedConstant(graph, "layer.weight", weight).multiply(x, ir.Shape(["tokens", rows]))
    )
    graph.outputs[0].name = "y"
    if not int8:
        multiply_by_half_bytes(graph)
    lower_minimums(graph)
    tidy(model)
    for node in graph:
        if int8 and node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 4)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def seconds(run: ort.InferenceSession, x: np.ndarray, runs: int) -> float:
    """Of one run, the fastest of several."""
    found = []
    for _ in range(runs):
        began_s = time.perf_counter()
        run.run(None, {"x": x})
        found.append(time.perf_counter() - began_s)
    return min(found)


def ratios(rows: int, columns: int, rounds: int) -> list[dict[str, Any]]:
    """What each layout takes of the time of ours."""
    weights = layouts(rows, columns)
    found = []
    for int8 in (False, True):
        ours = session(weights[OURS], int8=int8)
        for name, weight in weights.items():
            other = session(weight, int8=int8)
            for tokens, runs in ((1, 40), (128, 3)):
                x = np.random.default_rng(1).standard_normal((tokens, columns), np.float32)
                pairs = []
                for _ in range(rounds):
                    pairs.append((seconds(other, x, runs), seconds(ours, x, runs)))
                found.append(
                    {
                        "layout": name,
                        "activations": "int8" if int8 else "exact",
                        "tokens": tokens,
                        "microseconds": 1e6 * statistics.median(pair[0] for pair in pairs),
                        "ratio": statistics.median(a / b for a, b in pairs),
                    }
                )
    return found


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--rows", default=1536, show_default=True)
@click.option("--columns", default=3072, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(rows: int, columns: int, rounds: int, as_json: bool) -> None:
    results = {
        "machine": machine(),
        "rows": rows,
        "columns": columns,
        "products": ratios(rows, columns, rounds),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "layouts.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    click.echo(json.dumps(results, indent=2) if as_json else table(results))


def table(results: dict[str, Any]) -> str:
    """The ratios, a layout a line."""
    lines = [
        f"{'':36}" + "".join(f"{head:>14}" for head in ("exact, 1", "exact, 128", "int8, 1", "int8, 128"))
    ]
    for name in dict.fromkeys(row["layout"] for row in results["products"]):
        cells = [f"{row['ratio']:14.2f}" for row in results["products"] if row["layout"] == name]
        lines.append(f"{name:36}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
