"""What both sides of a verification are given: random rows, padded on either side, and their labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import Manifest, ModelInfo
from edgepeft.bundle.reader import Bundle
from edgepeft.runtime.inputs import IGNORED_LABEL, nothing_dropped, shifted_right

from ..sources.base import ModelSource

BATCH, SEQUENCE, TARGET = 6, 12, 9  # pairs and triplets
PADDED = 1  # a row that is padded on the right
LEFT = 3  # the first row that is padded on the left
#: Of the longest row: tokens at most, and operations.
LONGEST, AFFORDABLE = 1024, 1e11
#: Deviation of what is put into a fresh adapter.
NOISE = 0.05

Arrays = dict[str, np.ndarray]


def model_feeds(bundle: Bundle, role: str, batch: Arrays) -> Arrays:
    """What of `batch` a graph takes, with an empty cache; nothing is dropped."""
    feeds = {}
    batch = {**batch, **nothing_dropped(bundle.manifest)}
    rows = len(next(iter(batch.values())))
    for item in bundle.manifest.graphs[role].inputs:
        if item.name in batch:
            feeds[item.name] = batch[item.name]
        elif item.name.startswith("past_key_values"):
            shape = [rows if dim == "batch" else 0 if isinstance(dim, str) else dim for dim in item.shape]
            feeds[item.name] = np.zeros(shape, item.dtype)
    return feeds


def stirred(adapter: Adapter) -> Adapter:
    """A fresh adapter with small random numbers where it holds nothing yet, so that it has an effect."""
    tensors = adapter.technique.stirred(adapter.tensors, np.random.default_rng(1), NOISE)
    return adapter.with_tensors(tensors, adapter.origin)


def unpadded(batch: Arrays, row: int) -> Arrays:
    """One row of tokens without its padding."""
    filled = batch["attention_mask"][row] == 1
    tokens = ("input_ids", "attention_mask", "token_type_ids")
    return {name: batch[name][[row]][:, filled] for name in tokens if name in batch}


def relative_difference(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest one, of the largest magnitude that is expected where that is above 1."""
    return float(np.abs(got - expected).max()) / max(1.0, float(np.abs(expected).max()))


def sample_batch(bundle: Bundle, source: ModelSource) -> Arrays:
    """Random inputs and labels; tokens are right-padded to different lengths."""
    manifest = bundle.manifest
    rng = np.random.default_rng(0)
    specs = {item.name: item for item in manifest.graphs["inference"].inputs}
    batch: Arrays = {}
    if "pixel_values" in specs:
        shape = [BATCH, *(size for size in specs["pixel_values"].shape if isinstance(size, int))]
        batch["pixel_values"] = rng.standard_normal(shape).astype(np.float32)
    elif "input_values" in specs:
        samples = source.min_length + SEQUENCE * source.length_unit + source.length_unit // 2
        batch["input_values"] = rng.standard_normal((BATCH, samples)).astype(np.float32)
    else:
        sequence = min(SEQUENCE, manifest.model.max_length)
        ids, mask = _sample_tokens(rng, manifest.model, sequence)
        # Half of the rows are padded on the left.
        ids[LEFT:], mask[LEFT:] = ids[LEFT:, ::-1].copy(), mask[LEFT:, ::-1].copy()
        batch = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in specs:
            batch["token_type_ids"] = rng.integers(0, 2, ids.shape) * mask
    return {**batch, **_sample_labels(manifest, batch, rng)}


def with_tokens(batch: Arrays, tokens: Sequence[int]) -> Arrays:
    """The batch with these tokens, as many as there is room for, in the place of every other one that counts:
    an adapter which replaces their rows has an effect then."""
    if not tokens or "input_ids" not in batch:
        return batch
    ids = batch["input_ids"].copy()
    places = np.flatnonzero(batch["attention_mask"])[::2]
    ids.reshape(-1)[places] = np.resize(tokens, len(places))
    return {**batch, "input_ids": ids}


def _sample_tokens(
    rng: np.random.Generator, model: ModelInfo, sequence: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, the vocabulary's last among them, and their mask, int64 `[batch, sequence]`, padded on the
    right."""
    ids = rng.integers(0, model.vocab_size, (BATCH, sequence))
    ids[0, 0] = model.vocab_size - 1
    lengths = np.maximum(sequence - 2 * np.arange(BATCH), 2)
    mask = (np.arange(sequence)[None, :] < lengths[:, None]).astype(np.int64)
    if model.pad_token_id is not None:
        ids[mask == 0] = model.pad_token_id
    return ids, mask


def _sample_labels(manifest: Manifest, batch: Arrays, rng: np.random.Generator) -> Arrays:
    """`labels` as transformers has them, and what the runtime makes of them; none where the task has none."""
    model = manifest.model
    classes = len(model.labels)
    if manifest.task == "feature-extraction":
        return {}
    if manifest.task == "text-generation":
        # What padding on the left says of the first token is nothing to learn.
        mask = batch["attention_mask"]
        learned = np.concatenate([mask[:, :1], mask[:, 1:] * mask[:, :-1]], axis=1)
        return {"labels": np.where(learned == 1, batch["input_ids"], IGNORED_LABEL)}
    if manifest.task in ("token-classification", "fill-mask"):
        labels = rng.integers(0, classes or model.vocab_size, batch["input_ids"].shape)
        return {"labels": np.where(batch["attention_mask"] == 1, labels, IGNORED_LABEL)}
    if manifest.task == "text2text-generation":
        ids, mask = _sample_tokens(rng, model, min(TARGET, model.max_length))
        labels = np.where(mask == 1, ids, IGNORED_LABEL)
        return {"labels": labels, "decoder_input_ids": shifted_right(model, labels)}
    if model.problem_type == "regression":
        return {"labels": rng.standard_normal((BATCH, classes)).astype(np.float32)}
    if model.problem_type == "multi_label_classification":
        return {"labels": rng.integers(0, 2, (BATCH, classes)).astype(np.float32)}
    return {"labels": rng.integers(0, classes, BATCH)}


def affordable(model: Any, max_length: int) -> int:
    """Tokens of the longest row that is compared: the model's own length where that takes little time."""
    matrices = sum(
        part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear | Conv1D)
    )
    return max(1, min(max_length, LONGEST, int(AFFORDABLE / (2 * max(matrices, 1)))))
