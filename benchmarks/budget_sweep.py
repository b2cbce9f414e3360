"""Whether budgets are true: random updates in random budgets, each in a process of its own.

    python -m benchmarks.budget_sweep BUNDLE… [--runs 60] [--seed 0] [--results FILE.jsonl]
        [--limit-command "systemd-run --scope --quiet -p MemoryMax={bytes} -p MemorySwapMax=0"]

A run draws a bundle, lengths, batch, rank, what trains, how and with what moments, and a budget between
refusal and plenty. Records are what users have: texts (one of a mebibyte now and then), pictures of several
sizes and formats, recordings; where a bundle cannot read those, what its model takes. `--limit-command` is
put before `edgepeft adapt`, `{bytes}` being the budget: something that has the kernel enforce it.

What must hold:

- the process ends by itself, with exit code 0, 3 or 4 and without a traceback;
- its own count never exceeds the budget, and the predicted peak is within a tenth of it;
- a refused run's named minimum works, and 4 MiB less is refused;
- `edgepeft plan` names the same peak, within `NOISE_BYTES`.

Every run is a line of the results, with its faults; the summary is a table.
"""

import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import wave
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from edgepeft.bundle.manifest import FORWARD_ONLY, Manifest
from edgepeft.bundle.reader import open_bundle
from edgepeft.runtime.bench.synthetic import synthetic_records

MIB = 2**20
LESS_BYTES = 4 * MIB
"""So much below the minimum that is named is refused."""
NOISE_BYTES = 2 * MIB
"""Two processes with the same libraries differ by that."""
TOLERANCE = 0.1
MARGIN = 1.02
"""What a plan leaves free."""
PLENTY = "64GiB"
TEXT_TASKS = ("text-classification", "text-generation")
WORDS = (json.__doc__ or "").split()
LENGTHS, CHAT_LENGTHS, SECONDS = (8, 16, 32, 64, 128, 256, 512), (64, 128, 256, 512), (1, 3, 10, 60)
RATE, FRAME_SAMPLES = 16_000, 720
"""Of recordings, and what wav2vec 2.0 needs of one at least: models with smaller strides get shorter ones."""
MOST_TOKENS, MOST_CHAT_TOKENS, MOST_SAMPLES = 2048, 1024, 40 * RATE
"""Of a batch, so that a run takes no minutes."""
LEARNT = 12
"""Records that a run learns from at least, so that the longest are among them."""
LONG_LINE = 2**20


@dataclass(frozen=True)
class Case:
    """One update: `lengths` are those of its records, `options` what `plan` and `adapt` both take, `steps`
    and `strategy` (None: what the budget has room for) what `adapt` alone does; with `long_line` one of its
    texts is a mebibyte."""

    bundle: str
    lengths: list[int]
    seed: int
    steps: int | None
    options: dict[str, str | int]
    strategy: str | None = None
    long_line: bool = False


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
    sizes = (2, 4, 8) if manifest.task == "feature-extraction" else (1, 2, 4, 8)
    longest, most = _longest(manifest, one)
    batch_size = one(*(size for size in sizes if size * longest <= most or size == sizes[0]))
    shortest = min(max(one(longest, longest // 8), 3, manifest.model.min_length), longest)
    others = generator.integers(shortest, longest + 1, 3 * max(batch_size, 3)).tolist()
    lengths = [length for other in others for length in (longest, other)]
    options: dict[str, str | int] = {"batch-size": batch_size, "accumulate": one(1, 1, 2)}
    options |= {"optimizer-state": one("32bit", "8bit"), "max-grad-norm": one(1, 1, 0)}
    kinds = ["all", "all", "lora", "lora_B", *(["head"] if manifest.linear_head else [])]
    options |= {"trainable": one(*kinds), "rank": one(4, 8, 16)}
    names = [item.name for item in manifest.strategies]
    strategy = None if options["trainable"] == "head" else one(None, None, None, *names)
    if strategy == FORWARD_ONLY:
        options["optimizer-state"] = "32bit"
    records = batch_size * int(options["accumulate"])
    steps = None if options["trainable"] == "head" else max(3, math.ceil(LEARNT / records))
    return Case(str(bundle), lengths, seed, steps, options, strategy, bool(generator.random() < 0.25))


def _longest(manifest: Manifest, one: Any) -> tuple[int, int]:
    """Tokens or samples of the longest record (1 for images), and what a batch may have of them."""
    if "audio" in manifest.task:
        scale = manifest.model.min_length / FRAME_SAMPLES
        samples = min(one(*SECONDS) * RATE, manifest.model.max_length)
        return int(scale * samples), int(scale * MOST_SAMPLES)
    length = one(*(CHAT_LENGTHS if _is_chat(manifest) else LENGTHS))
    most = MOST_CHAT_TOKENS if _is_chat(manifest) else MOST_TOKENS
    return min(length, manifest.model.max_length or length), most


def run(case: Case, share: float, limit_command: str, work: Path) -> Outcome:
    """Run a case in a budget of `share` of the way from what the cheapest strategy needs, less a tenth, to
    what the dearest does."""
    data, output = work / "records.jsonl", work / "adapter"
    write_records(case, data)
    planned = _ways(case, edgepeft("plan", case, PLENTY)[1])
    peaks = [item["peak_bytes"] for item in planned]
    low_bytes, high_bytes = 0.9 * min(peaks), 1.05 * max(peaks)
    budget_bytes = int((low_bytes + share * (high_bytes - low_bytes)) // MIB * MIB)

    def adapt(budget_bytes: int) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        limit = shlex.split(limit_command.format(bytes=budget_bytes))
        more = ["--data", str(data), "-o", str(output), "--seed", str(case.seed)]
        more += [] if case.steps is None else ["--steps", str(case.steps)]
        more += [] if case.strategy is None else ["--strategy", case.strategy]
        return edgepeft("adapt", case, f"{budget_bytes // MIB}MiB", more, limit)

    done, report = adapt(budget_bytes)
    outcome = Outcome(case, budget_bytes)
    _judge(outcome, done, report, _planned(case, budget_bytes))
    if done.returncode == 3 and "required_bytes" in report.get("error", {}):
        _check_refusal(outcome, report["error"]["required_bytes"], adapt)
    return outcome


def write_records(case: Case, path: Path) -> None:
    """The case's records, as a file: texts, pictures and recordings where the bundle can read them, else what
    its model takes. What they name is beside it."""
    manifest = open_bundle(case.bundle).manifest
    generator = np.random.default_rng(case.seed)
    reads_text = "tokenizer.json" in manifest.files and manifest.task in TEXT_TASKS
    long_lines = 1 if case.long_line else 0
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(case.lengths):
            record = synthetic_records(manifest, 1, length, seed=case.seed * 1000 + number)[0]
            if reads_text:  # of at least as many tokens, and cut to the longest
                del record["input_ids"]
                text = " ".join(generator.choice(WORDS, length).tolist())
                text *= math.ceil(LONG_LINE / len(text)) if number < long_lines else 1
                record |= {"messages": _conversation(text)} if _is_chat(manifest) else {"text": text}
            elif manifest.image_preprocessing is not None:
                record = {"image": picture(path.parent, number, generator), "label": record["label"]}
            elif manifest.audio_preprocessing is not None:
                name = recording(path.parent, number, length, generator)
                record = {"audio": name, "label": record["label"]}
            plain = {
                key: value.tolist() if isinstance(value, np.ndarray) else value
                for key, value in record.items()
            }
            file.write(json.dumps(plain) + "\n")


def picture(folder: Path, number: int, generator: np.random.Generator) -> str:
    """The name of a picture of some size, in one of the formats that are read."""
    name = f"{number}.{generator.choice(['png', 'jpg', 'ppm'])}"
    height, width = generator.integers(20, 1000, 2).tolist()
    Image.fromarray(generator.integers(256, size=(height, width, 3), dtype=np.uint8)).save(folder / name)
    return name


def recording(folder: Path, number: int, samples: int, generator: np.random.Generator) -> str:
    """The name of a recording of so many samples, of one channel or two, and 8 to 32 bits a sample; every
    third goes on for as long again, and is cut."""
    name = f"{number}.wav"
    channels, width = int(generator.integers(1, 3)), int(generator.integers(1, 5))
    samples *= 2 if number % 3 == 0 else 1
    with wave.open(str(folder / name), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(RATE)
        file.writeframes(generator.bytes(samples * channels * width))
    return name


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


def _ways(case: Case, result: dict[str, Any]) -> list[dict[str, Any]]:
    """What of the strategies that `plan` lists the case may take."""
    if case.strategy is not None:
        return [item for item in result["strategies"] if item["strategy"].split(",")[0] == case.strategy]
    return [item for item in result["strategies"] if item["exact"]]


def _planned(case: Case, budget_bytes: int) -> tuple[str | None, int]:
    """The strategy that `plan` chooses and its peak; of a refusal, None and the peak of the cheapest."""
    ways = _ways(case, edgepeft("plan", case, f"{budget_bytes // MIB}MiB")[1])
    fitting = [item for item in ways if item["fits"]]
    if not fitting:
        return None, min(item["peak_bytes"] for item in ways)
    chosen = min(fitting, key=lambda item: item["relative_step"] or 1.0)
    return chosen["strategy"], chosen["peak_bytes"]


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
        fits = planned[0] is not None and planned[1] + NOISE_BYTES <= outcome.budget_bytes / MARGIN
        if fits and done.returncode == 3:
            outcome.faults.append(f"plan chooses {planned[0]}, adapt refuses: {_said(done, report)}")
        return
    _compare(outcome, report)
    if outcome.measured_bytes > outcome.budget_bytes:
        outcome.faults.append("its own count is over the budget")
    downs = report["stepped_down"]
    first = downs[0]["before"] if downs else report["strategy"]
    noise_bytes = NOISE_BYTES + 4 * sum(outcome.case.lengths)  # and the records, which adapting holds
    if planned[0] == first and abs(planned[1] - outcome.predicted_bytes) > noise_bytes:
        outcome.faults.append(f"plan says {planned[1] / MIB:.1f} MiB")


def _compare(outcome: Outcome, report: dict[str, Any]) -> None:
    """The predicted peak with the measured one: that of the run or, where it was refused, of the run in the
    named minimum."""
    memory, downs = report["memory"], report["stepped_down"]
    outcome.strategy, outcome.stepped_down = report["strategy"], len(downs)
    outcome.measured_bytes = memory["measured_peak_bytes"]
    outcome.predicted_bytes = (downs[0] if downs else memory)["predicted_peak_bytes"]
    if abs(outcome.predicted_bytes / outcome.measured_bytes - 1) > TOLERANCE:
        outcome.faults.append("the prediction is off by more than a tenth")
    if min(memory["predicted"].values()) < 0:
        outcome.faults.append("a part of the prediction is negative")


def _said(done: subprocess.CompletedProcess[str], report: dict[str, Any]) -> str:
    """The error of a command, in JSON or on standard error."""
    return str(report.get("error", {}).get("message") or done.stderr.strip()[-300:])


def _check_refusal(outcome: Outcome, required_bytes: int, adapt: Any) -> None:
    """What is named as enough is enough, and little less is not."""
    done, report = adapt(required_bytes)
    if done.returncode not in (0, 4):
        told = _said(done, report)
        outcome.faults.append(f"{required_bytes // MIB} MiB are named as enough, and then: {told}")
    else:
        _compare(outcome, report)
        if outcome.measured_bytes > required_bytes:
            outcome.faults.append("its own count is over the named minimum")
    done, _ = adapt(required_bytes - LESS_BYTES)
    if done.returncode != 3:
        outcome.faults.append(f"4 MiB below the named {required_bytes // MIB} MiB is not refused")


def summary(outcomes: list[Outcome]) -> str:
    """A line for every bundle: runs, refusals, the least, median and largest ratio, steps down, faults."""
    lines = ["bundle                runs  refused  predicted / measured  stepped down  faulty"]
    for bundle in dict.fromkeys(outcome.case.bundle for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.case.bundle == bundle]
        ratios = [item.predicted_bytes / item.measured_bytes for item in own if item.measured_bytes]
        middle = statistics.median(ratios) if ratios else 0.0
        ends = f"{min(ratios):.2f}, {middle:.2f}, {max(ratios):.2f}" if ratios else ""
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
    told = (
        f"{number}: {Path(case.bundle).name} {length} {case.options} {case.strategy} in {budget} MiB: exit "
    )
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
