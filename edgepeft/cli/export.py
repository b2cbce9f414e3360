"""`edgepeft export`."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from edgepeft.bundle.validation import TASKS
from edgepeft.errors import UsageError
from edgepeft.sizes import format_size


def _names(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def _adapters(_context: click.Context, _parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    adapters: dict[str, str] = {}
    for item in value:
        name, separator, folder = item.partition("=")
        if not separator or not name or not folder:
            raise UsageError(f"--adapter takes NAME=DIR, got {item!r}")
        if name in adapters:
            raise UsageError(f"--adapter names {name!r} twice")
        adapters[name] = folder
    return adapters


@click.command()
@click.argument("model")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new bundle."
)
@click.option("--task", help=f"{', '.join(TASKS)}. [default: the model's]")
@click.option("--bits", type=click.Choice(["4", "8", "16", "32"]),
              help="Bits of a frozen weight. [default: 4; a quantized ONNX file keeps its own]")  # fmt: skip
@click.option(
    "--block-size", type=int, default=32, show_default=True, help="Weights that share a scale (4 and 8 bits)."
)
@click.option("--adapter", "adapters", multiple=True, callback=_adapters, metavar="NAME=DIR",
              help="A PEFT adapter to take along; may be repeated.")  # fmt: skip
@click.option("--rank", type=int, help="Make a fresh adapter named 'default' of this rank.")
@click.option("--alpha", type=int, help="lora_alpha of the fresh adapter. [default: twice the rank]")
@click.option("--targets", callback=_names, metavar="A,B,…",
              help="Linear modules that take a LoRA, besides those of the adapters; of an ONNX "
                   "file also names of nodes or initializers. "
                   "[default: the adapters', or every linear but the output head]")  # fmt: skip
@click.option("--labels", callback=_names, metavar="A,B,…", help="Classes of a new classification head.")
@click.option("--loss", help="triplet (feature-extraction: anchors, positives and negatives). "
                             "[default: the task's own]")  # fmt: skip
@click.option("--drift-penalty", is_flag=True,
              help="Let training also count how far the logits drift from the base model's.")  # fmt: skip
@click.option("--calibration", metavar="FILE.jsonl",
              help="Records like those the model will read, some hundred: 4- and 8-bit weights are then "
                   "rounded to suit them (GPTQ), which takes minutes.")  # fmt: skip
@click.option("--no-train", is_flag=True, help="Leave the training graphs out.")
@click.option("--no-verify", is_flag=True, help="Do not compare the bundle with PyTorch or the ONNX file.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws a new head and a fresh adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written and measured as JSON.")
def export(
    model: str,
    output: Path,
    task: str | None,
    bits: str | None,
    block_size: int,
    adapters: dict[str, str],
    rank: int | None,
    alpha: int | None,
    targets: list[str] | None,
    labels: list[str] | None,
    loss: str | None,
    drift_penalty: bool,
    calibration: str | None,
    no_train: bool,
    no_verify: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Export MODEL (a transformers folder, a hub id or an ONNX file) and its adapters as one bundle.

    The bundle is compared with PyTorch before it is put in place: outputs with and without each adapter, the
    loss and every gradient. Of an ONNX file that somebody else exported, quantized or not, the outputs are
    compared with the file's and the gradients with finite differences. Needs the `export` extra.

    \b
    edgepeft export ./all-MiniLM-L6-v2 -o topics.edge --task text-classification \\
        --labels sport,science --rank 8 --targets query,key,value,dense
    edgepeft export ./all-MiniLM-L6-v2 -o embeddings.edge --calibration texts.jsonl --no-train
    edgepeft export ./llama-int4/model.onnx -o llama.edge --rank 8 --targets o_proj,down_proj
    """
    from edgepeft import export as run_export

    stages = _Stages()
    manifest = run_export(
        model,
        output,
        task=task,
        bits=None if bits is None else int(bits),
        block_size=block_size,
        adapters=adapters,
        labels=labels,
        rank=rank,
        targets=targets,
        lora_alpha=alpha,
        loss=loss,
        drift_penalty=drift_penalty,
        calibration=calibration,
        train=not no_train,
        verify=not no_verify,
        seed=seed,
        report=stages,
        progress=stages.progress,
    )
    stages.finish()
    bundle_bytes = sum(entry.nbytes for entry in manifest.files.values())
    calibrated = manifest.quantization.calibration
    if as_json:
        summary = {
            "bundle": str(output),
            "task": manifest.task,
            "bits": manifest.quantization.bits,
            "calibration": None if calibrated is None else dataclasses.asdict(calibrated),
            "bundle_bytes": bundle_bytes,
            "adapters": list(manifest.adapters),
            "lora_slots": len(manifest.lora_slots),
            "verification": manifest.verification,
        }
        click.echo(json.dumps(summary, indent=2))
        return
    click.echo(
        f"{output}: {manifest.task}, {manifest.quantization.bits} bits, {format_size(bundle_bytes)}, "
        f"{len(manifest.lora_slots)} LoRA slots, adapters: {', '.join(manifest.adapters) or 'none'}"
    )
    if calibrated is not None:
        click.echo(
            f"calibrated on {calibrated.records} records; rounded to the nearest: "
            f"{', '.join(calibrated.rounded) or 'none'}"
        )
    if manifest.verification:
        worst = max(manifest.verification["outputs"].values())
        click.echo(
            f"verified against {manifest.verification['against']}: outputs differ by at most {worst:.1e} of "
            "their largest magnitude"
        )


class _Stages:
    """Prints each stage on standard error, with the seconds it took once it is over, and a bar in the long
    one."""

    def __init__(self) -> None:
        self._started_s: float | None = None
        self._bar: Any = None

    def progress(self, done: int, total: int) -> None:
        """Show how many weights are calibrated."""
        if self._bar is None:
            self._bar = click.progressbar(length=total, label="calibrating", file=sys.stderr)
        self._bar.update(done - self._bar.pos)
        if done == total:
            self._bar.render_finish()

    def __call__(self, stage: str) -> None:
        self.finish()
        click.echo(f"{stage} …", err=True, nl=not sys.stderr.isatty())
        self._started_s = time.perf_counter()

    def finish(self) -> None:
        if self._started_s is not None and sys.stderr.isatty():
            click.echo(f" {time.perf_counter() - self._started_s:.1f} s", err=True)
        self._started_s = None
