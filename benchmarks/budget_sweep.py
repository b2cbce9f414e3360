"""Whether budgets are true: random updates in random budgets, each in a process of its own.

    python -m benchmarks.budget_sweep BUNDLE… [--runs 60] [--seed 0] [--results FILE.jsonl]
        [--limit-command "systemd-run --scope --quiet -p MemoryMax={bytes} -p MemorySwapMax=0"]

A run draws a bundle, lengths, batch, rank, what trains and how its moments are kept, and a budget between
refusal and plenty. `--limit-command` is put before `edgepeft adapt`, `{bytes}` being the budget: something
that has the kernel enforce it. What must hold:

- the process ends by itself, with exit code 0, 3 or 4 and without a traceback;
- its own count never exceeds the budget, and the predicted peak is within a tenth of it;
- a refused run's named minimum works, and 4 MiB less is refused;
- `edgepeft plan` names the same peak, within `NOISE_BYTES`.

Every run is a line of the results, with its faults; the summary is a table.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.bench.synthetic import synthetic_records

MIB = 2**20
LESS_BYTES = 4 * MIB
"""So much below the minimum that is named is refused."""
NOISE_BYTES = 2 * MIB
"""Two processes with the same libraries differ by that."""
TOLERANCE = 0.1
PLENTY = "64GiB"
TEXT_TASKS = ("text-classification", "text-generation")
WORDS = (json.__doc__ or "").split()
LENGTHS, CHAT_LENGTHS, SAMPLES = (8, 16, 32, 64, 128, 256), (64, 128, 256), (8_000, 16_000, 32_000)


@dataclass(frozen=True)
class Case:
    """One update: `lengths` are those of its records, `options` what `plan` and `adapt` both take."""

    bundle: str
    lengths: list[int]
    seed: int
    steps: int
    options: dict[str, str | int]


@dataclass
class Outcome:
    """What came of it, in bytes, and what should not have."""

    case: Case
    budget_bytes: int
    exit_code: int = 0
    strategy: str = ""
    predicted_bytes: int = 0
    measured_bytes: int = 0
    stepped_down: int = 0
    faults: list[str] = field(default_factory=list)


def drawn(generator: np.random.Generator, bundles: list[Path], seed: int) -> Case:
    """A random case."""

    def one(*choices: Any) -> Any:
        return choices[int(generator.integers(len(choices)))]

    bundle = one(*bundles)
    manifest = open_bundle(bundle).manifest
    batch_size = one(2, 4, 8) if manifest.task == "feature-extraction" else one(1, 2, 4, 8)
    lengths_of = SAMPLES if "audio" in manifest.task else CHAT_LENGTHS if _is_chat(manifest) else LENGTHS
    longest = _longest(manifest, one(*lengths_of))
    shortest = min(max(one(longest, longest // 8), 3), longest)
    count = max(2 * batch_size, 6)
    lengths = [longest, *generator.integers(shortest, longest + 1, 3 * count - 1).tolist()]
    options: dict[str, str | int] = {"batch-size": batch_size, "accumulate": one(1, 1, 2)}
    options |= {"optimizer-state": one("32bit", "8bit"), "trainable": one("all", "all", "lora_B")}
    options |= {"max-grad-norm": one(1, 1, 0)}
    if manifest.lora_slots:
        options["rank"] = one(4, 8, 16)
    return Case(str(bundle), lengths, seed, 3, options)


def _longest(manifest: Manifest, length: int) -> int:
    return min(length, manifest.model.max_length or length)


def run(case: Case, share: float, limit_command: str, work: Path) -> Outcome:
    """Run a case in a budget of `share` of the way from what the cheapest strategy needs, less a tenth, to
    what the dearest does."""
    data, output = work / "records.jsonl", work / "adapter"
    write_records(case, data)
    _, planned = edgepeft("plan", case, PLENTY)
    peaks = [item["peak_bytes"] for item in planned["strategies"] if item["relative_step"] is not None]
    low_bytes, high_bytes = 0.9 * min(peaks), 1.05 * max(peaks)
    budget_bytes = int((low_bytes + share * (high_bytes - low_bytes)) // MIB * MIB)

    def adapt(budget_bytes: int) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        limit = shlex.split(limit_command.format(bytes=budget_bytes))
        more = ["--data", str(data), "-o", str(output), "--steps", str(case.steps), "--seed", str(case.seed)]
        return edgepeft("adapt", case, f"{budget_bytes // MIB}MiB", more, limit)

    done, report = adapt(budget_bytes)
    outcome = Outcome(case, budget_bytes)
    _judge(outcome, done, report, _planned(case, budget_bytes))
    if done.returncode == 3 and "required_bytes" in report.get("error", {}):
        _check_refusal(outcome, report["error"]["required_bytes"], adapt)
    return outcome


def write_records(case: Case, path: Path) -> None:
    """The case's records, as a file: texts where the bundle can read them, else what its model takes."""
    manifest = open_bundle(case.bundle).manifest
    generator = np.random.default_rng(case.seed)
    reads_text = "tokenizer.json" in manifest.files and manifest.task in TEXT_TASKS
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(case.lengths):
            record = synthetic_records(manifest, 1, length, seed=case.seed * 1000 + number)[0]
            if reads_text:  # of at least as many tokens, and cut to the longest
                del record["input_ids"]
                text = " ".join(generator.choice(WORDS, length).tolist())
                record |= {"messages": _conversation(text)} if _is_chat(manifest) else {"text": text}
            plain = {
                key: value.tolist() if isinstance(value, np.ndarray) else value
                for key, value in record.items()
            }
            file.write(json.dumps(plain) + "\n")


def _is_chat(manifest: Manifest) -> bool:
    return "chat_template.jinja" in manifest.files


def _conversation(text: str) -> list[dict[str, str]]:
    """An answer to a short question."""
    parts = {"system": ".", "user": "?", "assistant": text}
    return [{"role": role, "content": content} for role, content in parts.items()]


def edgepeft(
    command: str, case: Case, budget: str, more: list[str] | None = None, limit: list[str] | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """One command on the case's bundle, in JSON."""
    options = [word for name, value in case.options.items() for word in (f"--{name}", str(value))]
    line = [sys.executable, "-m", "edgepeft.cli", command, case.bundle, "--budget", budget, "--json"]
    if max(case.lengths) > 1:  # not an image
        line += ["--seq-len", str(max(case.lengths))]
    line += [*options, *(more or [])]
    done = subprocess.run([*(limit or []), *line], capture_output=True, text=True, check=False)
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        result = {}
    return done, result


def _planned(case: Case, budget_bytes: int) -> tuple[str | None, int]:
    """The strategy that `plan` chooses and its peak; of a refusal, None and the peak of the cheapest."""
    result = edgepeft("plan", case, f"{budget_bytes // MIB}MiB")[1]
    peaks = {item["strategy"]: item["peak_bytes"] for item in result["strategies"]}
    chosen = result["chosen"]
    exact = [item["peak_bytes"] for item in result["strategies"] if item["relative_step"] is not None]
    return chosen, peaks[chosen] if chosen else min(exact)


def _judge(
    outcome: Outcome,
    done: subprocess.CompletedProcess[str],
    report: dict[str, Any],
    planned: tuple[str | None, int],
) -> None:
    outcome.exit_code = done.returncode
    if done.returncode not in (0, 3, 4):
        outcome.faults.append(f"exit code {done.returncode}: {_said(done, report)}")
    if "Traceback" in done.stderr:
        outcome.faults.append("a traceback")
    memory = report.get("memory")
    if memory is None:
        if planned[0] is not None and done.returncode == 3:
            outcome.faults.append(f"plan chooses {planned[0]}, adapt refuses: {_said(done, report)}")
        return
    downs = report["stepped_down"]
    outcome.strategy, outcome.stepped_down = report["strategy"], len(downs)
    outcome.measured_bytes = memory["measured_peak_bytes"]
    outcome.predicted_bytes = (downs[0] if downs else memory)["predicted_peak_bytes"]
    if outcome.measured_bytes > outcome.budget_bytes:
        outcome.faults.append("its own count is over the budget")
    if abs(outcome.predicted_bytes / outcome.measured_bytes - 1) > TOLERANCE:
        outcome.faults.append("the prediction is off by more than a tenth")
    if min(memory["predicted"].values()) < 0:
        outcome.faults.append("a part of the prediction is negative")
    first = downs[0]["before"] if downs else report["strategy"]
    noise_bytes = NOISE_BYTES + 4 * sum(outcome.case.lengths)  # and the records, which adapting holds
    if planned[0] == first and abs(planned[1] - outcome.predicted_bytes) > noise_bytes:
        outcome.faults.append(f"plan says {planned[1] / MIB:.1f} MiB")


def _said(done: subprocess.CompletedProcess[str], report: dict[str, Any]) -> str:
    """The error of a command, in JSON or on standard error."""
    return str(report.get("error", {}).get("message") or done.stderr.strip()[-300:])


def _check_refusal(outcome: Outcome, required_bytes: int, adapt: Any) -> None:
    """What is named as enough is enough, and little less is not."""
    done, report = adapt(required_bytes)
    if done.returncode not in (0, 4):
        told = _said(done, report)
        outcome.faults.append(f"{required_bytes // MIB} MiB are named as enough, and then: {told}")
    elif report["memory"]["measured_peak_bytes"] > required_bytes:
        outcome.faults.append("its own count is over the named minimum")
    done, _ = adapt(required_bytes - LESS_BYTES)
    if done.returncode != 3:
        outcome.faults.append(f"4 MiB below the named {required_bytes // MIB} MiB is not refused")


def summary(outcomes: list[Outcome]) -> str:
    """A line for every bundle: runs, refusals, ratios, steps down, faults."""
    lines = ["bundle                runs  refused  predicted / measured  stepped down  faulty"]
    for bundle in dict.fromkeys(outcome.case.bundle for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.case.bundle == bundle]
        ratios = [item.predicted_bytes / item.measured_bytes for item in own if item.measured_bytes]
        ends = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        refused = sum(item.exit_code == 3 for item in own)
        downs, faulty = sum(item.stepped_down > 0 for item in own), sum(bool(item.faults) for item in own)
        lines.append(f"{Path(bundle).name:20}  {len(own):4}  {refused:7}  {ends:20}  {downs:12}  {faulty:6}")
    return "\n".join(lines)


def sweep(
    bundles: list[Path], runs: int, seed: int, limit_command: str, results: Path, tell: Any
) -> list[Outcome]:
    """Run so many cases; every one is added to the results as it ends."""
    generator = np.random.default_rng(seed)
    outcomes = []
    for number in range(runs):
        case, share = drawn(generator, bundles, seed * 10_000 + number), float(generator.random())
        with tempfile.TemporaryDirectory(prefix="edgepeft-sweep-") as work:
            outcome = run(case, share, limit_command, Path(work))
        outcomes.append(outcome)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        tell(_line(number, outcome))
    return outcomes


def _line(number: int, outcome: Outcome) -> str:
    case = outcome.case
    sizes = [outcome.budget_bytes, outcome.predicted_bytes, outcome.measured_bytes]
    budget, predicted, measured = (f"{nbytes / MIB:.0f}" for nbytes in sizes)
    length = f"{min(case.lengths)}-{max(case.lengths)}"
    told = f"{number}: {Path(case.bundle).name} {length} {case.options} in {budget} MiB: exit "
    told += f"{outcome.exit_code}, predicted {predicted}, measured {measured}, {outcome.strategy}"
    return told + "".join(f"\n    FAULT {fault}" for fault in outcome.faults)


@click.command(help=__doc__.split("\n", 1)[0])
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--runs", default=60, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--limit-command", default="", help="Put before the command; {bytes} is the budget.")
@click.option("--results", default="budget_sweep.jsonl", show_default=True, type=click.Path(path_type=Path))
def main(bundles: tuple[Path, ...], runs: int, seed: int, limit_command: str, results: Path) -> None:
    outcomes = sweep(
        list(bundles), runs, seed, limit_command, results, lambda text: click.echo(text, err=True)
    )
    click.echo(summary(outcomes))
    sys.exit(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    main()
