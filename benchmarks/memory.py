"""Memory: the same training through PyTorch + PEFT and through edgepeft, in less and less of it.

    python -m benchmarks.memory [--shape smollm2-135m] [--seq-len 128] [--budget 256MiB --budget 128MiB …]

First the peers (float32, with gradient checkpointing, and bfloat16 where the processor has it) and edgepeft
without a budget, a step of each in turn. Then every budget: edgepeft in a memory cgroup of that size with a
cold page cache, a step in turn with PyTorch in float32, which has no limit. A budget that is refused, or in
which the kernel kills, is a row too. Writes benchmarks/results/memory.json, where the rows of other shapes
and lengths stay.
"""

import json
import platform
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from benchmarks.compare import Command, SideEndedError, compare, machine
from benchmarks.shapes import DECODERS, bundle_of
from edgepeft.errors import BudgetError
from edgepeft.sizes import format_size, parse_size

RESULTS = Path(__file__).parent / "results" / "memory.json"
PEER = "PyTorch + PEFT, float32"
#: What the kernel calls arithmetic in bfloat16, on x86 and on ARM.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16; where it does not, PyTorch emulates it slowly."""
    info = Path("/proc/cpuinfo")
    return platform.system() == "Linux" and not BFLOAT16_FLAGS.isdisjoint(info.read_text("utf-8").split())


def measure(
    shape: str, bundle: Path, seq_len: int, budgets: tuple[str, ...], rounds: int, threads: int
) -> list[dict[str, Any]]:
    """A row for every side: the peers, edgepeft without a budget, and edgepeft in every budget."""
    common = ["--seq-len", str(seq_len), "--threads", str(threads)]
    side = [sys.executable, "-m", "benchmarks.side"]
    torch, ours = [*side, "torch", shape, *common], [*side, "edgepeft", str(bundle), *common]
    sides = {PEER: Command(torch), "… with checkpointing": Command([*torch, "--checkpoint"])}
    if has_bfloat16():
        sides["… bfloat16"] = Command([*torch, "--dtype", "bfloat16"])
    sides["edgepeft, int4, no budget"] = Command(ours)
    rows = compare(sides, rounds, say).rows()
    for budget in budgets:
        name, limit_bytes = f"edgepeft, int4, in {budget}", parse_size(budget)
        limited = Command([*ours, "--budget", budget], limit_bytes)
        try:
            rows += compare({PEER: Command(torch), name: limited}, rounds, say).rows()[1:]
        except SideEndedError as error:
            if error.exit_code != BudgetError.exit_code and not error.killed:
                raise
            say(str(error))
            rows.append({"side": name, "outcome": "killed" if error.killed else "refused"})
    return [{"shape": shape, "seq_len": seq_len, "outcome": "ran", **row} for row in rows]


def write(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the rows in place of those of the same shape and length; all results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"rows": []}
    measured = {(row["shape"], row["seq_len"]) for row in rows}
    kept = [row for row in results["rows"] if (row["shape"], row["seq_len"]) not in measured]
    results = {"machine": machine(), "rows": kept + rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return results


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| shape, tokens | side | step, s | of the peer's | peak, MiB | of the peer's | anonymous, MiB "
        "| cgroup's peak, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['shape']}, {row['seq_len']}", row["side"]]
        if row["outcome"] == "ran":
            cells += [f"{row['step_s']:.3f}", f"{row['step_ratio']:.2f}"]
            cells += [f"{row['peak_bytes'] / 2**20:.0f}", f"{row['peak_ratio']:.2f}"]
            cells += [f"{row['anonymous_bytes'] / 2**20:.0f}"]
            in_cgroup = row["cgroup_peak_bytes"]
            cells += ["" if in_cgroup is None else f"{in_cgroup / 2**20:.0f}"]
        else:
            cells += [row["outcome"], *[""] * 5]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def say(text: str) -> None:
    """What is being done, on standard error."""
    click.echo(f"{text} …", err=True)


@click.command(help=__doc__.split("\n", 1)[0])
@click.option("--shape", type=click.Choice(DECODERS), default="smollm2-135m", show_default=True)
@click.option("--seq-len", type=int, default=128, show_default=True)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    default=("256MiB", "192MiB", "144MiB", "128MiB", "112MiB"),
    show_default=True,
)
@click.option("--rounds", default=7, show_default=True, help="Counted steps of each side.")
@click.option("--threads", default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep the exported bundle here.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(
    shape: str,
    seq_len: int,
    budgets: tuple[str, ...],
    rounds: int,
    threads: int,
    work: Path | None,
    as_json: bool,
) -> None:
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bundle = bundle_of(shape, folder, say)
        size_bytes = (bundle / "weights.bin").stat().st_size
        say(f"{shape}: {format_size(size_bytes)} of weights")
        rows = measure(shape, bundle, seq_len, budgets, rounds, threads)
    results = write(rows)
    click.echo(json.dumps(results, indent=2) if as_json else table(rows))


if __name__ == "__main__":
    main()
