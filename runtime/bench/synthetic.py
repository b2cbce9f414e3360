"""Records and adapters to measure with: random, since time and memory do not depend on the values."""

import dataclasses
from typing import Any

import numpy as np

from edgepeft.adapters import Adapter
from edgepeft.bundle.manifest import Manifest
from edgepeft.bundle.reader import Bundle

from ..tasks import audio_classification, image_classification
from ..training.options import TrainingOptions
from ..training.starting import starting_adapter

DEFAULT_RANK = 8
_NOISE = 0.01


def synthetic_records(manifest: Manifest, count: int, length: int, seed: int = 0) -> list[dict[str, Any]]:
    """Labelled records of a bundle's task, as `Task.encode_all` takes them.

    Args:
        manifest: the bundle's manifest.
        count: records.
        length: tokens or samples of each; images have the size that the model was exported for.
        seed: of the values.
    """
    generator = np.random.default_rng(seed)
    return [_record(manifest, length, generator) for _ in range(count)]


def prompt_ids(manifest: Manifest, length: int) -> list[int]:
    """Random token ids."""
    return _tokens(manifest, length, np.random.default_rng(0))


def synthetic_adapter(bundle: Bundle, seed: int) -> Adapter:
    """An adapter that changes what the model answers: of the shape of the bundle's first, or, where it has
    none, a fresh one of rank 8 on every slot."""
    rank = None if bundle.manifest.adapters else DEFAULT_RANK
    start = starting_adapter(bundle, TrainingOptions(rank=rank, seed=seed))
    tensors = start.technique.stirred(start.tensors, np.random.default_rng(seed), _NOISE)
    return dataclasses.replace(start, tensors=tensors)


def _record(manifest: Manifest, length: int, generator: np.random.Generator) -> dict[str, Any]:
    match manifest.task:
        case "text-generation":
            return {"input_ids": _tokens(manifest, length, generator)}
        case "text2text-generation":
            return {
                "input_ids": _tokens(manifest, length, generator),
                "labels": _tokens(manifest, length, generator),
            }
        case "feature-extraction":
            fields = ("anchor", "positive", "negative")
            return {field: _tokens(manifest, length, generator) for field in fields}
        case "token-classification":
            labels = generator.integers(len(manifest.model.labels), size=length)
            return {"input_ids": _tokens(manifest, length, generator), "labels": labels.tolist()}
        case "fill-mask":
            ids = _tokens(manifest, length, generator)
            return {"input_ids": ids, "labels": ids}
        case "text-classification":
            return {"input_ids": _tokens(manifest, length, generator), "label": _label(manifest, generator)}
        case "image-classification":
            field = image_classification.FIELD
            spec = next(item for item in manifest.graphs["inference"].inputs if item.name == field)
            values = generator.random([int(size) for size in spec.shape[1:]], np.float32)
        case _:
            field = audio_classification.FIELD
            values = generator.random(length, np.float32)
    return {field: values, "label": _label(manifest, generator)}


def _tokens(manifest: Manifest, length: int, generator: np.random.Generator) -> list[int]:
    ids: list[int] = generator.integers(manifest.model.vocab_size, size=length).tolist()
    return ids


def _label(manifest: Manifest, generator: np.random.Generator) -> int | list[float]:
    count = len(manifest.model.labels)
    if (manifest.model.problem_type or "single_label_classification") == "single_label_classification":
        return int(generator.integers(count))
    values: list[float] = generator.integers(2, size=count).astype(float).tolist()
    return values
