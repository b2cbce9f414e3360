"""Checking the arrays that a caller feeds to a graph, before onnxruntime sees them."""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import Manifest, ModelInfo, TensorSpec
from edgepeft.bundle.wiring import DROPOUT
from edgepeft.errors import UsageError

Array = npt.NDArray[np.generic]
IGNORED_LABEL = -100
BASE_LOGITS, DRIFT_WEIGHT = "base_logits", "drift_weight"


def dropout_inputs(manifest: Manifest) -> list[str]:
    """The training graph's inputs that say what is dropped, int32 `[5]` each: a threshold and seeds."""
    graph = manifest.graphs.get("train")
    return [] if graph is None else [spec.name for spec in graph.inputs if spec.name.startswith(DROPOUT)]


def nothing_dropped(manifest: Manifest) -> dict[str, Array]:
    """Those inputs where nothing is dropped: no number of int32 is below the least."""
    nothing = np.array([np.iinfo(np.int32).min, 0, 0, 0, 0], np.int32)
    return dict.fromkeys(dropout_inputs(manifest), nothing)


def has_drift_penalty(manifest: Manifest) -> bool:
    """Whether the training graph takes the base model's logits, to penalize drifting from them."""
    graph = manifest.graphs.get("train")
    return graph is not None and any(spec.name == BASE_LOGITS for spec in graph.inputs)


def model_inputs(manifest: Manifest, specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """The inputs that come from the caller: the transformers model's keyword arguments, and `labels`."""
    filled = manifest.adapter_inputs
    return {
        spec.name: spec
        for spec in specs
        if spec.name not in filled and not spec.name.startswith(("past_key_values.", DROPOUT))
    }


def check_batch(
    manifest: Manifest, specs: Mapping[str, TensorSpec], batch: Mapping[str, object]
) -> dict[str, Array]:
    """The batch as contiguous arrays of the graph's dtypes.

    `attention_mask` defaults to ones, `token_type_ids` to zeros and `decoder_input_ids` to the labels shifted
    right, as in transformers; labels of a regression with one value may be `[batch]`.

    Args:
        manifest: the bundle's manifest.
        specs: the graph's inputs that the caller fills, by name.
        batch: arrays (or nested lists) by the transformers model's argument names.

    Raises:
        UsageError: an input is missing, unknown, or has a dtype, shape or value that the model cannot take.
    """
    unknown = sorted(set(batch) - set(specs))
    if unknown:
        raise UsageError(f"the model takes no input {unknown[0]!r}: it takes {', '.join(sorted(specs))}")
    arrays = {
        name: _convert(specs[name], _column(manifest, specs[name], value)) for name, value in batch.items()
    }
    for name in ("input_ids", "decoder_input_ids"):
        if name in arrays:
            _check_tokens(manifest, name, arrays[name])
    ids = arrays.get("input_ids")
    if ids is not None:
        for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
            if name in specs and name not in arrays:
                arrays[name] = np.full(ids.shape, fill, np.int64)
    if "labels" in arrays and "decoder_input_ids" in specs and "decoder_input_ids" not in arrays:
        arrays["decoder_input_ids"] = shifted_right(manifest.model, arrays["labels"])
    missing = sorted(set(specs) - set(arrays))
    if missing:
        raise UsageError(
            f"the batch lacks the input {missing[0]!r}: the model takes {', '.join(sorted(specs))}"
        )
    _check_shapes(specs, arrays)
    _check_values(manifest, arrays)
    if "labels" in arrays:
        _check_labels(manifest, arrays["labels"])
    return arrays


def shifted_right(model: ModelInfo, labels: Array) -> Array:
    """What a decoder reads to say `labels` int64 `[batch, sequence]`: its start token and all labels but the
    last, with padding where a label does not count. transformers' models shift their labels like this."""
    start = model.decoder_start_token_id
    assert start is not None  # checked with the manifest
    shifted = np.empty_like(labels)
    shifted[:, 0] = start
    shifted[:, 1:] = labels[:, :-1]
    shifted[shifted == IGNORED_LABEL] = model.pad_token_id or 0
    return shifted


def batch_shape(specs: Mapping[str, TensorSpec], arrays: Mapping[str, Array]) -> tuple[int, int]:
    """Rows of a batch and the longest of its sequences (1 where there is none, as with images)."""
    sequences = [size for axis, size in axis_sizes(specs, arrays).items() if axis.endswith("sequence")]
    return len(next(iter(arrays.values()))), max(sequences, default=1)


def axis_sizes(specs: Mapping[str, TensorSpec], arrays: Mapping[str, Array]) -> dict[str, int]:
    """Sizes of a checked batch's axes, by the names that the graph has for them."""
    return {
        axis: size
        for name, array in arrays.items()
        for axis, size in zip(specs[name].shape, array.shape, strict=True)
        if isinstance(axis, str)
    }


def _convert(spec: TensorSpec, value: object) -> Array:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UsageError(f"input {spec.name!r}: rows of different lengths: pad them to one length") from error
    wanted = np.dtype(spec.dtype)
    convertible = (array.dtype.kind in "iub" and wanted.kind in "iubf") or (
        array.dtype.kind == "f" and wanted.kind == "f"
    )
    if not convertible:
        raise UsageError(f"input {spec.name!r}: is of dtype {array.dtype}, expected {spec.dtype}")
    if array.ndim != len(spec.shape):
        raise UsageError(f"input {spec.name!r}: has shape {list(array.shape)}, expected {list(spec.shape)}")
    for size, expected in zip(array.shape, spec.shape, strict=True):
        if isinstance(expected, int) and size != expected:
            raise UsageError(
                f"input {spec.name!r}: has shape {list(array.shape)}, expected {list(spec.shape)}"
            )
    if array.size == 0:
        raise UsageError(f"input {spec.name!r}: has shape {list(array.shape)}, so it is empty")
    return np.ascontiguousarray(array, dtype=wanted)


def _column(manifest: Manifest, spec: TensorSpec, value: object) -> object:
    """Labels `[batch]` of a regression with one value as `[batch, 1]`; anything else as it is."""
    if spec.name == "labels" and manifest.model.problem_type == "regression" and spec.shape[1:] == (1,):
        array = np.asarray(value)
        return array[:, None] if array.ndim == 1 else value
    return value


def _check_tokens(manifest: Manifest, name: str, ids: Array) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= manifest.model.vocab_size:
        raise UsageError(
            f"input {name!r}: holds token {low if low < 0 else high}, the vocabulary has "
            f"{manifest.model.vocab_size} tokens (0 to {manifest.model.vocab_size - 1})"
        )
    if ids.shape[1] > manifest.model.max_length:
        raise UsageError(
            f"input {name!r}: has {ids.shape[1]} tokens a row, the model takes at most "
            f"{manifest.model.max_length}"
        )


def _check_values(manifest: Manifest, arrays: Mapping[str, Array]) -> None:
    """Pixels and samples are numbers; a recording has a length that the model takes."""
    for name in ("pixel_values", "input_values"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            raise UsageError(f"input {name!r}: holds a value that is no finite number")
    values = arrays.get("input_values")
    model = manifest.model
    if values is not None and not model.min_length <= values.shape[1] <= model.max_length:
        raise UsageError(
            f"input 'input_values': has {values.shape[1]} samples a row, the model takes {model.min_length} "
            f"to {model.max_length}"
        )


def _check_shapes(specs: Mapping[str, TensorSpec], arrays: Mapping[str, Array]) -> None:
    """Axes of one name are of one size; the inputs are named by the first that has the axis."""
    first: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for name in sorted(arrays, key=lambda name: (name == "labels", not name.startswith("input"), name)):
        for dim, size in zip(specs[name].shape, arrays[name].shape, strict=True):
            if not isinstance(dim, str):
                continue
            axis = "sequence" if dim == "total_sequence" else dim  # the cache is empty
            other = first.setdefault(axis, name)
            if sizes.setdefault(axis, size) != size:
                raise UsageError(
                    f"input {name!r}: has shape {list(arrays[name].shape)}, {other!r} has "
                    f"{list(arrays[other].shape)}: they must agree"
                )


def _check_labels(manifest: Manifest, labels: Array) -> None:
    model = manifest.model
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise UsageError("input 'labels': holds a value that is no finite number")
        return
    count, kind = len(model.labels), "labels"
    if not model.labels:
        count, kind = model.vocab_size, "tokens"
    ignores = labels.ndim == 2
    used = labels[labels != IGNORED_LABEL] if ignores else labels
    if used.size and (int(used.min()) < 0 or int(used.max()) >= count):
        worst = int(used.min()) if int(used.min()) < 0 else int(used.max())
        raise UsageError(f"input 'labels': holds {worst}, the model has {count} {kind} (0 to {count - 1})")
    if manifest.task == "text-generation" and not (labels[:, 1:] != IGNORED_LABEL).any():
        raise UsageError(
            "input 'labels': every label after the first is -100, so there is no loss to compute"
        )
    if ignores and not used.size:
        raise UsageError("input 'labels': every label is -100, so there is no loss to compute")
