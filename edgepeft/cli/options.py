"""Options and tables that several commands share."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..devices import DEVICES, Device
from ..devices import device as find_device
from ..errors import BudgetError, UsageError
from ..sizes import format_size, parse_size
from ..slots import LORA

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest

PROCESS_BYTES = 48 * 2**20
"""Python, numpy and onnxruntime: 44 MiB measured on x86-64, and what of edgepeft is beside them."""

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    del ctx
    if value is None:
        return None
    try:
        size_bytes = parse_size(value)
    except UsageError as error:
        raise UsageError(f"--{param.name}: {error}") from error
    if value.isdecimal() and size_bytes < 2**20:
        raise UsageError(f"--{param.name}: {value!r} is {size_bytes} bytes: write a unit, such as {value}MiB")
    return size_bytes


def bundle_argument() -> Decorator:
    """The bundle's folder."""
    return click.argument("bundle", type=click.Path())


def _json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    del param
    ctx.obj.as_json = value


def json_option(help: str = "Print one JSON document instead of a table, of a failure too.") -> Decorator:
    """`--json`, which the command's `Console` knows of."""
    return click.option("--json", is_flag=True, is_eager=True, expose_value=False, callback=_json, help=help)


def data_option(help: str) -> Decorator:
    """`--data FILE`."""
    return click.option("--data", required=True, type=click.Path(allow_dash=True), metavar="FILE", help=help)


def budget_option(*, required: bool = False) -> Decorator:
    """`--budget SIZE`."""
    return click.option(
        "--budget",
        callback=_size,
        required=required,
        metavar="SIZE",
        help="Limit on the whole process's resident memory, such as 128MiB or 0.5GB.",
    )


def check_floor(budget_bytes: int | None) -> None:
    """Refuse a budget that not even the libraries fit, before they are loaded: in a memory cgroup of that
    size the kernel would kill the process first.

    Raises:
        BudgetError: names the floor.
    """
    if budget_bytes is not None and budget_bytes < PROCESS_BYTES:
        raise BudgetError(
            f"a process with onnxruntime holds {format_size(PROCESS_BYTES)} without any model, the "
            f"budget is {format_size(budget_bytes)}: edgepeft plan says how much the bundle needs",
            budget_bytes=budget_bytes,
            required_bytes=PROCESS_BYTES,
        )


def all_of(options: Sequence[Decorator]) -> Decorator:
    """Several options as one decorator, in the order in which the help lists them."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def fresh_options() -> Decorator:
    """What of `TrainingOptions` says which fresh adapter to train."""
    options = (
        click.option("--rank", type=int, help="Train a fresh adapter of this rank on every slot instead."),
        click.option(
            "--method",
            help="Train a fresh adapter of this technique instead, such as ia3; the bundle has "
            "to have slots of it.",
        ),
    )
    return all_of(options)


def memory_options() -> Decorator:
    """What of `TrainingOptions` trades time or freedom for memory."""
    options = (
        click.option(
            "--trainable",
            default="all",
            show_default=True,
            help="all, lora, lora_B (LoRA-FA), modules_to_save or head (a classifier's, in closed form).",
        ),
        click.option(
            "--top-blocks",
            type=int,
            help="Train only the adapters of so many topmost blocks, and saved modules.",
        ),
        click.option(
            "--accumulate",
            "accumulation_steps",
            type=int,
            default=1,
            show_default=True,
            help="Batches whose gradients make one step.",
        ),
        click.option(
            "--optimizer-state",
            default="32bit",
            show_default=True,
            help="32bit or 8bit: how AdamW's moments are kept.",
        ),
        click.option(
            "--max-grad-norm",
            type=float,
            default=1.0,
            show_default=True,
            help="Clip gradients to this norm; 0: never, so that in stages they need not all be kept.",
        ),
    )
    return all_of(options)


def _device(ctx: click.Context, param: click.Parameter, value: str | None) -> Device | None:
    del param
    if value == "list":
        ctx.obj.show([dataclasses.asdict(item) for item in DEVICES.values()], _devices)
        ctx.obj.finish()
        ctx.exit()
    return None if value is None else find_device(value)


def _devices(devices: list[dict[str, Any]]) -> str:
    rows = [
        [
            item["name"],
            item["title"],
            format_size(item["ram_bytes"]),
            format_size(item["budget_bytes"]),
            item["rule"],
        ]
        for item in devices
    ]
    return table(rows, ["device", "", "RAM", "budget", "which is"])


def device_option() -> Decorator:
    """`--device NAME`, whose profile a command gets."""
    return click.option(
        "--device",
        callback=_device,
        is_eager=True,  # so that a list needs no bundle
        metavar="NAME",
        help="Instead of --budget: what a process may take of a device's memory; `list` prints the devices.",
    )


def adapters_option() -> Decorator:
    """`--adapter NAME[=WEIGHT]`, which may be repeated."""
    return click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME[=WEIGHT]",
        help="Adapter of the bundle, or a PEFT folder's path; repeat it to mix. None: the base alone.",
    )


def force_option() -> Decorator:
    """`--force`: take adapters of other bases."""
    return click.option(
        "--force", is_flag=True, help="Take an adapter that says it was trained on another base, too."
    )


def adapter_spec(values: Sequence[str]) -> str | dict[str, float] | None:
    """What `Model.forward` takes for the values of `--adapter`.

    Raises:
        UsageError: a weight is not a number, or a name is given twice.
    """
    if not values:
        return None
    weights: dict[str, float] = {}
    for value in values:
        name, separator, weight = value.rpartition("=")
        if not separator:
            name, weight = value, "1"
        try:
            number = float(weight)
        except ValueError as error:
            raise UsageError(f"--adapter {value}: {weight!r} is not a weight: write NAME=0.7") from error
        if not math.isfinite(number) or not name:
            raise UsageError(f"--adapter {value}: write NAME or NAME=0.7")
        if name in weights:
            raise UsageError(f"--adapter {name}: is given twice: give it once, with the sum of its weights")
        weights[name] = number
    return values[0] if len(values) == 1 and weights.get(values[0]) == 1.0 else weights


def table(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> str:
    """Columns aligned by their widest cell."""
    lines = [header, *rows] if header else rows
    return aligned(lines, column_widths(lines))


def slots_beside(manifest: "Manifest") -> dict[str, int]:
    """How many slots there are of techniques other than LoRA and parameters stored whole, by their titles."""
    from ..techniques import peft_slots

    found = [technique.title for slot, technique in peft_slots(manifest.slots) if slot.technique != LORA]
    return dict(Counter(found))


def calibrated_on(calibration: Mapping[str, Any]) -> str:
    """What a bundle was calibrated on, by its manifest."""
    if calibration["inputs"] == "records":
        return f"{calibration['records']} records"
    return f"{calibration['records']} texts of the model's own"


def trimmed_vocabulary(summary: Mapping[str, Any]) -> str | None:
    """Of how many tokens how many were kept at export; None where all were."""
    whole = summary["whole_vocab_size"]
    return None if whole is None else f"trimmed to {summary['vocab_size']:,} of {whole:,} tokens"


def pruned_by(pruning: Mapping[str, Any]) -> str:
    """What is gone of a bundle's model, by its manifest."""
    sizes = ", ".join(f"{name} {before} to {after}" for name, (before, after) in pruning["sizes"].items())
    return f"{pruning['share']:.1%} of the linears' weights ({sizes}), by {calibrated_on(pruning)}"


def missing_ways(missing: Mapping[str, str]) -> list[str]:
    """What a bundle cannot do, `NAME, NAME: REASON` for each reason of `Manifest.missing`."""
    reasons = dict.fromkeys(missing.values())
    return [
        f"{', '.join(name for name, why in missing.items() if why == reason)}: {reason}" for reason in reasons
    ]


def column_widths(lines: Sequence[Sequence[str]]) -> list[int]:
    """That of the widest cell of each column."""
    return [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]


def aligned(lines: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """Lines of cells, padded to the widths of their columns."""
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
