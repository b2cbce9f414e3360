"""PEFT's methods beside LoRA: step time and memory, each in a memory cgroup of one size.

    python -m benchmarks.methods [METHOD…] [--shape smollm2-135m] [--seq-len 128] [--budget 112MiB]

For each method a fresh adapter of it trains (rank 8, or 8 virtual tokens), a step in turn with LoRA on all
linears, both in cgroups of the budget. The predicted peak is `edgepeft plan`'s. Writes
benchmarks/results/methods.json.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from benchmarks.compare import Command, SideEndedError, compare, machine
from benchmarks.memory import say
from benchmarks.shapes import DECODERS, RANK, bundle_of
from edgepeft.errors import BudgetError
from edgepeft.sizes import parse_size
from edgepeft.techniques import peft_methods

RESULTS = Path(__file__).parent / "results" / "methods.json"
PEER = "lora"


def planned(bundle: Path, method: str, budget: str, seq_len: int) -> dict[str, Any]:
    """What `edgepeft plan` chooses: the strategy and its peak; of a refusal the smallest budget."""
    command = [sys.executable, "-m", "edgepeft.cli", "plan", str(bundle), "--budget", budget, "--json"]
    command += ["--method", method, "--rank", str(RANK), "--seq-len", str(seq_len), "--batch-size", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, BudgetError.exit_code):
        raise click.ClickException(done.stderr)
    plan = json.loads(done.stdout)
    chosen = [item for item in plan["strategies"] if item["strategy"] == plan["chosen"]]
    return {
        "strategy": plan["chosen"],
        "predicted_bytes": chosen[0]["peak_bytes"] if chosen else None,
        "smallest_budget_bytes": plan["smallest_budget_bytes"],
    }


def measure(
    bundles: dict[str, Path], method: str, seq_len: int, budget: str, rounds: int, threads: int
) -> dict[str, Any]:
    """The method's row."""

    def side(name: str) -> Command:
        arguments = [sys.executable, "-m", "benchmarks.side", "edgepeft", str(bundles[name])]
        arguments += ["--seq-len", str(seq_len), "--threads", str(threads), "--budget", budget]
        return Command([*arguments, "--method", name], parse_size(budget))

    row = {"method": method, **planned(bundles[method], method, budget, seq_len)}
    try:
        found = compare({PEER: side(PEER), f"{method} ": side(method)}, rounds, say).rows()[1]
    except SideEndedError as error:
        if error.exit_code != BudgetError.exit_code and not error.killed:
            raise
        say(str(error))
        return row | {"outcome": "killed" if error.killed else "refused"}
    return row | {"outcome": "ran", **{name: value for name, value in found.items() if name != "side"}}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| method | strategy | step of LoRA's | predicted, MiB | peak, MiB | of LoRA's | cgroup's, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["outcome"] != "ran":
            smallest = row["smallest_budget_bytes"] / 2**20
            lines.append(
                f"| {row['method']} | {row['outcome']}; smallest budget {smallest:.0f} MiB | | | | | |"
            )
            continue
        cells = [row["method"], row["strategy"], f"{row['step_ratio']:.2f}"]
        cells += [f"{row[name] / 2**20:.0f}" for name in ("predicted_bytes", "peak_bytes")]
        cells += [f"{row['peak_ratio']:.2f}", f"{row['cgroup_peak_bytes'] / 2**20:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(help=__doc__.split("\n", 1)[0])
@click.argument("methods", nargs=-1)
@click.option("--shape", type=click.Choice(DECODERS), default="smollm2-135m", show_default=True)
@click.option("--seq-len", type=int, default=128, show_default=True)
@click.option("--budget", default="112MiB", show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Counted steps of each side.")
@click.option("--threads", default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep the exported bundles here.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def main(
    methods: tuple[str, ...],
    shape: str,
    seq_len: int,
    budget: str,
    rounds: int,
    threads: int,
    work: Path | None,
    as_json: bool,
) -> None:
    rows = []
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundles: dict[str, Path] = {}
        for method in dict.fromkeys((PEER, *(methods or peft_methods()))):
            (folder / method).mkdir(parents=True, exist_ok=True)
            bundles[method] = bundle_of(shape, folder / method, say, method=method)
            row = measure(bundles, method, seq_len, budget, rounds, threads)
            rows.append({"shape": shape, "seq_len": seq_len, "budget": budget, **row})
            say(json.dumps(rows[-1]))
    results: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"rows": []}
    measured = {(row["shape"], row["seq_len"], row["budget"], row["method"]) for row in rows}
    kept = [
        row
        for row in results["rows"]
        if (row["shape"], row["seq_len"], row["budget"], row["method"]) not in measured
    ]
    results = {"machine": machine(), "rows": kept + rows}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    click.echo(json.dumps(results, indent=2) if as_json else table(rows))


if __name__ == "__main__":
    main()
