"""`edgepeft plan`: what training would need, before anything is loaded for it."""

import contextlib
import dataclasses
import importlib
from typing import Any

import click

from ..devices import Device
from ..errors import BudgetError, BundleError, MissingExtraError, UsageError
from ..sizes import format_size
from .console import Console
from .options import (
    budget_option,
    bundle_argument,
    device_option,
    force_option,
    fresh_options,
    json_option,
    memory_options,
    table,
)


@click.command(short_help="Predict the memory of an update.")
@bundle_argument()
@budget_option()
@device_option()
@click.option(
    "--seq-len", type=int, help="Tokens of the longest text (128 unless given), or samples (160,000)."
)
@click.option("--batch-size", type=int, default=8, show_default=True, help="Records computed at once.")
@click.option("--adapter", help="Adapter to train; the bundle's first unless given.")
@force_option()
@fresh_options()
@memory_options()
@json_option()
@click.pass_obj
def plan(
    console: Console,
    /,
    bundle: str,
    budget: int | None,
    device: Device | None,
    seq_len: int | None,
    batch_size: int,
    adapter: str | None,
    force: bool,
    **switches: Any,
) -> None:
    """Predict the peak memory of adapting BUNDLE with every strategy it has, and the time of a step relative
    to the first one's; exit 3 if none fits the budget, or what one process may take of a device's memory.

    \b
    Example:
      edgepeft plan model.edge --budget 128MiB --seq-len 64 --batch-size 4
      edgepeft plan model.edge --device pi-zero-2w
    """
    from edgepeft.runtime.memory.planner import choose, judging_alone
    from edgepeft.runtime.preprocessing.images import LEFT_BYTES, load_decoders
    from edgepeft.runtime.tasks import task_for
    from edgepeft.runtime.training import examples
    from edgepeft.runtime.training.head.closed_form import trained_head
    from edgepeft.runtime.training.options import TrainingOptions
    from edgepeft.runtime.training.preparation import plans_now
    from edgepeft.runtime.training.sampling import batch_indices
    from edgepeft.runtime.training.starting import starting_adapter, trained_names
    from edgepeft.runtime.training.workload import own_tokens, workload

    from ..bundle.reader import open_bundle

    # What a process holds is a part of the figures, and adapting brings these libraries in.
    importlib.import_module("edgepeft.runtime.training.adapt")
    batch_indices(2, 1, 0, 0)
    if device is not None:
        if budget is not None:
            raise UsageError("--budget and --device are both given: give one of them")
        budget = device.budget_bytes
    if budget is None:
        raise UsageError("neither --budget nor --device is given: give one of them, such as --budget 256MiB")
    console.progress.stage("opening the bundle")
    opened = open_bundle(bundle, force=force)
    options = TrainingOptions(adapter=adapter, seq_len=seq_len, batch_size=batch_size, **switches)
    options.check(opened.manifest)
    start = starting_adapter(opened, options)
    names = trained_names(opened.manifest, start, options)
    task = task_for(opened)
    # So does reading texts, conversations and pictures.
    with contextlib.suppress(MissingExtraError, BundleError):
        if task.has_text:
            task.text.encode("text")
            if opened.manifest.task == "text-generation":
                assert task.chat
    later_bytes = examples.LEFT_BYTES
    if opened.manifest.image_preprocessing is not None:
        load_decoders()
        later_bytes += LEFT_BYTES
    task.release()
    rows = batch_size * task.rows_per_record
    sizes = workload(start, names, rows, own_tokens(opened.manifest, start, options), options)
    candidates = plans_now(opened, sizes, budget, later_bytes)
    head_alone = [] if trained_head(opened.manifest, names) is None else judging_alone(candidates)
    if options.trainable == "head":
        candidates, head_alone = judging_alone(candidates), []
    fits: str | None = None
    failure: BudgetError | None = None
    try:
        fits = choose(candidates, budget, head_alone).label
    except BudgetError as error:
        failure = error
    result = {
        "budget_bytes": budget,
        "device": None if device is None else dataclasses.asdict(device),
        "batch_size": batch_size,
        "seq_len": sizes.seq_len,
        "chosen": fits,
        "smallest_budget_bytes": min(item.smallest_budget_bytes for item in candidates if item.exact),
        "strategies": [
            {
                **dataclasses.asdict(item),
                "strategy": item.label,
                "peak_bytes": item.peak_bytes,
                "fits": item.fits(budget),
            }
            for item in candidates
        ],
    }
    console.show(result, _table)
    if failure is not None:
        raise failure


def _table(result: dict[str, Any]) -> str:
    columns = ("process", "session", "activation", "state", "evaluation", "peak")
    rows = [
        [
            item["strategy"],
            *(format_size(item[f"{column}_bytes"]) for column in columns),
            "" if item["relative_step"] is None else f"{item['relative_step']:.2f}",
            "fits" if item["fits"] else "does not fit",
        ]
        for item in result["strategies"]
    ]
    lines = [table(rows, ["strategy", *columns, "step", format_size(result["budget_bytes"])])]
    if (device := result["device"]) is not None:
        lines.append(f"{device['title']}: {device['rule']} ({device['source']})")
    return "\n".join(lines)
