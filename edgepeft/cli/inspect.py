"""`edgepeft inspect`: what a bundle holds."""

import dataclasses
from typing import Any

import click

from ..bundle.manifest import RESIDENT
from ..sizes import format_size
from ..slots import LORA, WHOLE
from .console import Console
from .options import (
    bundle_argument,
    calibrated_on,
    json_option,
    missing_ways,
    pruned_by,
    slots_beside,
    table,
    trimmed_vocabulary,
)


@click.command(short_help="Show what a bundle holds.")
@bundle_argument()
@json_option()
@click.pass_obj
def inspect(console: Console, /, bundle: str) -> None:
    """Show what BUNDLE holds, after checking every file against its hash.

    \b
    Example:
      edgepeft inspect model.edge
    """
    from ..bundle.reader import open_bundle

    console.progress.stage("checking the files")
    console.show(_summary(open_bundle(bundle, force=True)), _table)


def _summary(bundle: Any) -> dict[str, Any]:
    manifest = bundle.manifest
    calibration = manifest.quantization.calibration
    adapters = {name: bundle.adapter(name) for name in bundle.adapter_names()}
    return {
        "path": str(bundle.path),
        "format_version": manifest.format_version,
        "written_by": manifest.edgepeft_version,
        "task": manifest.task,
        "model": manifest.model.name,
        "architecture": manifest.model.architecture,
        "base": manifest.base,
        "max_length": manifest.model.max_length,
        "vocab_size": manifest.model.vocab_size,
        "whole_vocab_size": manifest.model.whole_vocab_size,
        "problem_type": manifest.model.problem_type,
        "labels": list(manifest.model.labels),
        "bits": manifest.quantization.bits,
        "bits_a_weight": manifest.quantization.bits_a_weight,
        "calibration": None if calibration is None else dataclasses.asdict(calibration),
        "pruning": None if manifest.pruning is None else dataclasses.asdict(manifest.pruning),
        "bundle_bytes": sum(entry.nbytes for entry in manifest.files.values()),
        "weights_bytes": manifest.files[manifest.weights_file].nbytes,
        "graphs": {role: manifest.files[graph.file].nbytes for role, graph in manifest.graphs.items()},
        "lora_slots": len(manifest.slots_of(LORA)),
        "other_slots": slots_beside(manifest),
        "saved_modules": [
            f"{slot.module}.{tensor.name}" for slot in manifest.slots_of(WHOLE) for tensor in slot.tensors
        ],
        "adapters": {
            name: {
                "technique": adapter.technique.name,
                "rank": max((adapter.rank(module) for module in adapter.modules), default=0),
                "parameters": adapter.parameters,
                "modules": len(adapter.modules),
                "in_manifest": name in manifest.adapters,
                "base": adapter.base,
            }
            for name, adapter in adapters.items()
        },
        "strategies": [strategy.name for strategy in manifest.strategies],
        "missing": manifest.missing,
        "policy": {
            "trainable": len(manifest.policy.trainable),
            "max_steps": manifest.policy.max_steps,
            "max_relative_change": manifest.policy.max_relative_change,
        },
        "verification": manifest.verification,
    }


def _kind(adapter: dict[str, Any]) -> str:
    """An adapter's rank, or what else it is."""
    return f"rank {adapter['rank']}" if adapter["technique"] == LORA else str(adapter["technique"])


def _is_foreign(adapter: dict[str, Any], summary: dict[str, Any]) -> bool:
    """Whether an adapter says that it was trained on another base than the bundle's."""
    bases = {adapter["base"], summary["base"]} - {None}
    return len(bases) == 2


def _longest(summary: dict[str, Any]) -> str:
    """The longest input; images have one size."""
    if summary["task"] == "image-classification":
        return ""
    unit = "samples" if summary["task"] == "audio-classification" else "tokens"
    return f", at most {summary['max_length']} {unit}"


def _table(summary: dict[str, Any]) -> str:
    labels, calibration = summary["labels"], summary["calibration"]
    bits_a_weight = summary["bits_a_weight"]
    shown = ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")
    limits = {
        name: value for name, value in summary["policy"].items() if value is not None and name != "trainable"
    }
    rows = [
        [
            "bundle",
            f"{summary['path']}  {format_size(summary['bundle_bytes'])}, format {summary['format_version']}",
        ],
        ["model", f"{summary['model']} ({summary['architecture']})" + _longest(summary)],
        *(["vocabulary", line] for line in [trimmed_vocabulary(summary)] if line),
        ["base", (summary["base"] or "not known")[:12]],
        [
            "task",
            summary["task"]
            + (f", {summary['problem_type']}" if summary["problem_type"] else "")
            + (f", {len(labels)} labels: {shown}" if labels else ""),
        ],
        [
            "weights",
            f"{format_size(summary['weights_bytes'])} at {summary['bits']} bits"
            + (f", {bits_a_weight:.2f} a weight with scales" if bits_a_weight else "")
            + (f", calibrated on {calibrated_on(calibration)}" if calibration else ""),
        ],
        *([["pruned", pruned_by(summary["pruning"])]] if summary["pruning"] else []),
        ["graphs", ", ".join(f"{role} {format_size(size)}" for role, size in summary["graphs"].items())],
        [
            "slots",
            f"{summary['lora_slots']} linear modules; "
            + "".join(f"{count} of {title}; " for title, count in summary["other_slots"].items())
            + f"saved: {', '.join(summary['saved_modules']) or 'none'}",
        ],
        [
            "training",
            ", ".join(summary["strategies"])
            or ("none" if RESIDENT in summary["missing"] else "none (exported with --no-train)"),
        ],
        *(["without", line] for line in missing_ways(summary["missing"])),
        [
            "policy",
            f"{summary['policy']['trainable']} tensors may train"
            + "".join(f", {k} {v}" for k, v in limits.items()),
        ],
    ]
    for name, adapter in summary["adapters"].items():
        rows.append(
            [
                "adapter",
                f"{name}: {_kind(adapter)} on {adapter['modules']} modules, {adapter['parameters']:,} "
                "parameters" + (", trained on another base" if _is_foreign(adapter, summary) else ""),
            ]
        )
    return table(rows)
