"""The model card of an adapter that was trained here: `README.md` beside it, as a hub reads it.

Front matter: https://huggingface.co/docs/hub/model-cards.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepeft.adapters import Adapter
from edgepeft.sizes import format_size

from ..memory.plan import suggested_budget
from .options import TrainingOptions
from .report import AdaptReport

CARD_FILE = "README.md"

#: Options of `edgepeft adapt` that are not called like those of `TrainingOptions`.
_FLAGS = {"learning_rate": "lr", "accumulation_steps": "accumulate", "lora_plus_ratio": "lora-plus"}


def model_card(report: AdaptReport, adapter: Adapter) -> str:
    """A function of the report and the adapter's configuration; no path of the device is in it.

    Args:
        report: of the update that the adapter came from.
        adapter: its configuration; tensors are not looked at.
    """
    base = str(adapter.config.get("base_model_name_or_path") or report.model)
    name = Path(report.output).name
    front = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": report.task,
        "tags": [f"base_model:adapter:{base}", adapter.technique.name, "edgepeft"],
    }
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---",
        f"# {name}",
        f"An adapter ({adapter.technique.title}) of {base} for {report.task}, trained by edgepeft "
        f"{report.edgepeft_version} on the device whose records it learned from.",
        "## Use",
        "PEFT opens this folder with `PeftModel.from_pretrained`, a bundle of the base takes it with "
        f"`edgepeft adapter add BUNDLE NAME=./{name}`.",
        "## Training",
        _table(("", ""), _training(report, adapter)),
        "## Evaluation",
        f"On {report.judged_by}, before and after; chosen: {report.chosen}.",
        _table(("", "before", "after"), _held_out(report)),
        *_certainty(report),
        "## Memory",
        _memory(report),
        "## Command",
        f"```sh\n{command(report)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def command(report: AdaptReport) -> str:
    """The `edgepeft adapt` that does the same, with `BUNDLE` and `RECORDS.jsonl` for what the device had."""
    memory = report.memory
    budget_bytes = memory.budget_bytes or suggested_budget(memory.measured_peak_bytes)
    words = ["edgepeft", "adapt", "BUNDLE", "--data", "RECORDS.jsonl"]
    words += ["--budget", f"{budget_bytes // 2**20}MiB", "--output", Path(report.output).name]
    defaults = vars(TrainingOptions()) | {"resume": report.options["resume"]}
    for option, value in (report.options | {"add_labels": tuple(report.options["add_labels"])}).items():
        if value is None or value == defaults[option] or (option == "epochs" and report.options["steps"]):
            continue
        if option == "adapter":
            value = Path(value).name
        if option == "add_labels":
            words += [word for label in value for word in ("--add-label", label)]
        else:
            flag = _FLAGS.get(option, option.replace("_", "-"))
            words += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def _training(report: AdaptReport, adapter: Adapter) -> list[tuple[str, ...]]:
    options, records = report.options, report.records
    config: Mapping[str, Any] = adapter.config
    sizes = [f"{key} {config[key]}" for key in ("r", "lora_alpha", "alpha") if key in config]
    counts = [f"{count} {kind.replace('_', ' ')}" for kind, count in records.items() if count]
    rows: list[tuple[str, ...]] = [
        ("method", ", ".join([adapter.technique.title, *sizes])),
        ("trained values", f"{report.trained_values:,} in {report.trained_tensors} tensors"),
        ("records", ", ".join(counts)),
        ("steps", f"{report.steps} ({report.strategy})"),
    ]
    if not report.steps:
        return rows
    batch = options["batch_size"] * options["accumulation_steps"]
    rate = f"{options['learning_rate']:g}, {options['schedule']}, {options['warmup_steps']} steps of warm-up"
    rows += [("batch", f"{batch} records"), ("learning rate", rate)]
    if report.dropout.applied:
        rows.append(("dropout", f"{report.dropout.rate:g}"))
    rows.append(("loss", f"{report.losses[0]:.4f} to {report.losses[-1]:.4f}"))
    return rows


def _held_out(report: AdaptReport) -> list[tuple[str, ...]]:
    before, after = report.held_out_before, report.held_out_after
    rows: list[tuple[str, ...]] = [("loss", f"{before.loss:.4f}", f"{after.loss:.4f}")]
    if before.accuracy is not None and after.accuracy is not None:
        rows.append(("accuracy", f"{before.accuracy:.4f}", f"{after.accuracy:.4f}"))
    return rows


def _certainty(report: AdaptReport) -> list[str]:
    """Of a classifier: how sure its accuracy is, and what always saying the same would give."""
    said = []
    if report.accuracy_interval is not None:
        low, high = report.accuracy_interval
        said.append(f"accuracy {low:.2f} to {high:.2f} with 95 % confidence")
    if report.trivial is not None and report.trivial.accuracy is not None:
        said.append(f"{report.trivial.accuracy:.2f} by always saying the same")
    return [f"{'; '.join(said).capitalize()}."] if said else []


def _memory(report: AdaptReport) -> str:
    memory = report.memory
    budget = "none" if memory.budget_bytes is None else format_size(memory.budget_bytes)
    return (
        f"The process peaked at {format_size(memory.measured_peak_bytes)}; predicted "
        f"{format_size(memory.predicted_peak_bytes)}, budget {budget}."
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
