"""`edgepeft export`."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ..bundle.validation import TASKS
from ..bundle.writer import MANIFEST_FILE
from ..errors import UsageError
from ..files import check_replaceable
from ..sizes import format_size
from ..slots import LORA
from .console import Console
from .options import (
    calibrated_on,
    force_option,
    json_option,
    missing_ways,
    pruned_by,
    slots_beside,
    trimmed_vocabulary,
)

#: Models that are one file.
FILES = (".gguf", ".onnx")


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
              help="Bits of a frozen weight. [default: 4; what is quantized already "
                   "keeps its own]")  # fmt: skip
@click.option("--quick", is_flag=True,
              help="Round each weight to the nearest. [default: at 4 bits a language model is calibrated on "
                   "text that it writes itself, which takes minutes]")  # fmt: skip
@click.option("--size", metavar="SIZE",
              help="Bytes of the quantized weights, such as 100MB: the weights that matter most have 8 bits, "
                   "the others 4. [default: 5 bits a weight, scales included]")  # fmt: skip
@click.option(
    "--block-size", type=int, default=32, show_default=True, help="Weights that share a scale (4 and 8 bits)."
)
@click.option("--adapter", "adapters", multiple=True, callback=_adapters, metavar="NAME=DIR",
              help="A PEFT adapter to take along; may be repeated.")  # fmt: skip
@click.option("--rank", type=int, help="Make a fresh adapter named 'default' of this rank.")
@click.option("--alpha", type=int, help="lora_alpha of the fresh adapter. [default: twice the rank]")
@click.option("--dropout", type=float, default=0.0, show_default=True,
              help="lora_dropout of the fresh adapter, which training applies.")  # fmt: skip
@click.option("--targets", callback=_names, metavar="A,B,…",
              help="Linear modules that take a LoRA, besides those of the adapters; of an ONNX "
                   "file also names of nodes or initializers. Empty: no others. "
                   "[default: the adapters', or every linear but the output head]")  # fmt: skip
@click.option("--method", default=LORA, show_default=True,
              help="The technique of those modules' slots, by PEFT's name, such as ia3; without --targets at "
                   "the modules that PEFT takes for it.")  # fmt: skip
@click.option("--labels", callback=_names, metavar="A,B,…", help="Classes of a new classification head.")
@click.option("--loss", help="triplet (feature-extraction: anchors, positives and negatives). "
                             "[default: the task's own]")  # fmt: skip
@click.option("--drift-penalty", is_flag=True,
              help="Let training also count how far the logits drift from the base model's.")  # fmt: skip
@click.option("--calibration", metavar="FILE.jsonl",
              help="Records like those the model will read, some hundred: 4- and 8-bit weights are then "
                   "rounded to suit them (GPTQ); - reads them from standard input.")  # fmt: skip
@click.option("--prune", metavar="SHARE",
              help="Remove this share of the linears' weights first, such as 25%: channels of the "
                   "feed-forward layers, those that matter least to the records of --calibration, or to "
                   "text that the model writes itself.")  # fmt: skip
@click.option("--max-length", type=click.IntRange(min=1),
              help="Tokens that the bundle reads at most, prompt and answer together: a shorter context "
                   "makes a smaller file. [default: the model's]")  # fmt: skip
@click.option("--keep-vocabulary", metavar="FILE.jsonl",
              help="Records like those the model will read and write: tokens that these do not need are "
                   "taken out of tokenizer, embedding and output layer. [default: all stay]")  # fmt: skip
@click.option("--no-train", is_flag=True, help="Leave the training graphs out.")
@click.option("--no-verify", is_flag=True, help="Do not compare outputs with PyTorch or the ONNX file.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws a new head and a fresh adapter.")
@force_option()
@json_option("Print what was written and measured, or why nothing was, as one JSON document.")
@click.pass_obj
def export(
    console: Console,
    /,
    model: str,
    output: Path,
    task: str | None,
    bits: str | None,
    quick: bool,
    size: str | None,
    block_size: int,
    adapters: dict[str, str],
    rank: int | None,
    alpha: int | None,
    dropout: float,
    targets: list[str] | None,
    method: str,
    labels: list[str] | None,
    loss: str | None,
    drift_penalty: bool,
    calibration: str | None,
    prune: str | None,
    max_length: int | None,
    keep_vocabulary: str | None,
    no_train: bool,
    no_verify: bool,
    seed: int,
    force: bool,
) -> None:
    """Export MODEL (a transformers folder, a hub id, a GGUF or an ONNX file) and its adapters as one bundle.

    An adapter's folder as MODEL is merged into the base that it names; give the base and --adapter to keep
    the two apart.

    The bundle is compared with PyTorch before it is put in place: outputs with and without each adapter, the
    loss and every gradient. Of an ONNX file that somebody else exported, quantized or not, the outputs are
    compared with the file's and the gradients with finite differences. Needs the `export` extra.

    \b
    edgepeft export ./all-MiniLM-L6-v2 -o topics.edge --task text-classification \\
        --labels sport,science --rank 8 --targets query,key,value,dense
    edgepeft export ./all-MiniLM-L6-v2 -o embeddings.edge --calibration texts.jsonl --no-train
    edgepeft export SmolLM2-135M-Instruct.Q4_1.gguf -o chat.edge
    edgepeft export ./llama-int4/model.onnx -o llama.edge --rank 8 --targets o_proj,down_proj
    """
    _check_early(model, output)
    progress = console.progress
    progress.stage("importing torch and transformers")
    from .. import export as run_export

    manifest = run_export(
        model,
        output,
        task=task,
        bits=None if bits is None else int(bits),
        quick=quick,
        size=size,
        block_size=block_size,
        adapters=adapters,
        labels=labels,
        rank=rank,
        targets=targets,
        method=method,
        lora_alpha=alpha,
        lora_dropout=dropout,
        loss=loss,
        drift_penalty=drift_penalty,
        calibration=calibration,
        prune=prune,
        max_length=max_length,
        keep_vocabulary=keep_vocabulary,
        train=not no_train,
        verify=not no_verify,
        seed=seed,
        force=force,
        report=lambda stage: progress.stage(stage, at_once=True),
        progress=lambda done, total: progress.update(done, total, "weights"),
    )
    calibrated = manifest.quantization.calibration
    summary = {
        "bundle": str(output),
        "task": manifest.task,
        "bits": manifest.quantization.bits,
        "bits_a_weight": manifest.quantization.bits_a_weight,
        "calibration": None if calibrated is None else dataclasses.asdict(calibrated),
        "pruning": None if manifest.pruning is None else dataclasses.asdict(manifest.pruning),
        "bundle_bytes": sum(entry.nbytes for entry in manifest.files.values()),
        "vocab_size": manifest.model.vocab_size,
        "whole_vocab_size": manifest.model.whole_vocab_size,
        "adapters": list(manifest.adapters),
        "lora_slots": len(manifest.slots_of(LORA)),
        "other_slots": slots_beside(manifest),
        "strategies": [strategy.name for strategy in manifest.strategies],
        "missing": manifest.missing,
        "verification": manifest.verification,
    }
    console.show(summary, _text)


def _check_early(model: str, output: Path) -> None:
    """Refuse what can be told to be wrong before torch is imported, which takes seconds.

    Raises:
        UsageError: the output is taken, or there is no model at that path.
    """
    check_replaceable(output, MANIFEST_FILE)
    path = Path(model)
    if path.is_dir():
        if (path / MANIFEST_FILE).exists() and not (path / "config.json").exists():
            raise UsageError(
                f"{model}: is a bundle already, expected a model's folder, hub id, GGUF or ONNX file"
            )
    elif path.exists() and path.suffix not in FILES:
        raise UsageError(
            f"{model}: is a file, expected a model's folder, hub id, GGUF or ONNX file ({', '.join(FILES)})"
        )
    elif not path.exists() and (path.suffix in FILES or model.startswith((".", "/", "~"))):
        raise UsageError(f"{model}: no such model's folder or file")


def _text(summary: dict[str, Any]) -> str:
    calibrated, verification = summary["calibration"], summary["verification"]
    lines = [
        f"{summary['bundle']}: {summary['task']}, {summary['bits']} bits, "
        f"{format_size(summary['bundle_bytes'])}, {summary['lora_slots']} LoRA slots, "
        + "".join(f"{count} of {title}, " for title, count in summary["other_slots"].items())
        + f"adapters: {', '.join(summary['adapters']) or 'none'}"
    ]
    if summary["strategies"]:
        lines.append(f"training: {', '.join(summary['strategies'])}")
    lines += [f"without {line}" for line in missing_ways(summary["missing"])]
    if trimmed := trimmed_vocabulary(summary):
        lines.append(f"vocabulary {trimmed}")
    if summary["pruning"] is not None:
        lines.append(f"pruned: {pruned_by(summary['pruning'])}")
    if calibrated is not None:
        lines.append(
            f"calibrated on {calibrated_on(calibrated)}, {summary['bits_a_weight']:.2f} bits a weight; "
            f"rounded to the nearest: {', '.join(calibrated['rounded']) or 'none'}"
        )
    if verification:
        worst = max(verification["outputs"].values())
        lines.append(
            f"verified against {verification['against']}: outputs differ by at most {worst:.1e} of their "
            "largest magnitude"
        )
    return "\n".join(lines)
