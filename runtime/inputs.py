"""Checking the arrays that a caller feeds to a graph, before onnxruntime sees them."""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.manifest import Manifest, TensorSpec
from edgepeft.errors import UsageError

Array = npt.NDArray[np.generic]
IGNORED_LABEL = -100


def adapter_input_names(manifest: Manifest) -> set[str]:
    """Names of the graph inputs that an adapter fills."""
    names = {saved.input for saved in manifest.saved_modules}
    for slot in manifest.lora_slots:
        names.update((slot.a_input, slot.b_input, slot.scaling_input))
    return names


def model_inputs(manifest: Manifest, specs: Iterable[TensorSpec]) -> dict[str, TensorSpec]:
    """The inputs that come from the caller: the transformers model's keyword arguments, and `labels`."""
    filled = adapter_input_names(manifest)
    return {
        spec.name: spec
        for spec in specs
        if spec.name not in filled and not spec.name.startswith("past_key_values.")
    }


def check_batch(
    manifest: Manifest, specs: Mapping[str, TensorSpec], batch: Mapping[str, object]
) -> dict[str, Array]:
    """The batch as contiguous arrays of the graph's dtypes.

    `attention_mask` defaults to ones and `token_type_ids` to zeros, as in transformers.

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
    arrays = {name: _convert(specs[name], value) for name, value in batch.items()}
    ids = arrays.get("input_ids")
    if ids is not None:
        _check_tokens(manifest, ids)
        for name, fill in (("attention_mask", 1), ("token_type_ids", 0)):
            if name in specs and name not in arrays:
                arrays[name] = np.full(ids.shape, fill, np.int64)
    missing = sorted(set(specs) - set(arrays))
    if missing:
        raise UsageError(
            f"the batch lacks the input {missing[0]!r}: the model takes {', '.join(sorted(specs))}"
        )
    _check_shapes(arrays)
    if "labels" in arrays:
        _check_labels(manifest, arrays["labels"])
    return arrays


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


def _check_tokens(manifest: Manifest, ids: Array) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= manifest.model.vocab_size:
        raise UsageError(
            f"input 'input_ids': holds token {low if low < 0 else high}, the vocabulary has "
            f"{manifest.model.vocab_size} tokens (0 to {manifest.model.vocab_size - 1})"
        )
    if ids.shape[1] > manifest.model.max_length:
        raise UsageError(
            f"input 'input_ids': has {ids.shape[1]} tokens a row, the model takes at most "
            f"{manifest.model.max_length}"
        )


def _check_shapes(arrays: Mapping[str, Array]) -> None:
    ids = arrays.get("input_ids")
    if ids is None:
        return
    for name, array in arrays.items():
        if array.shape[0] != ids.shape[0] or (array.ndim == 2 and array.shape[1] != ids.shape[1]):
            raise UsageError(
                f"input {name!r}: has shape {list(array.shape)}, 'input_ids' has {list(ids.shape)}: they "
                "must agree"
            )


def _check_labels(manifest: Manifest, labels: Array) -> None:
    if manifest.task == "text-classification":
        count, kind = len(manifest.model.labels), "labels"
        used = labels
    else:
        count, kind = manifest.model.vocab_size, "tokens"
        used = labels[labels != IGNORED_LABEL]
    if used.size and (int(used.min()) < 0 or int(used.max()) >= count):
        worst = int(used.min()) if int(used.min()) < 0 else int(used.max())
        raise UsageError(f"input 'labels': holds {worst}, the model has {count} {kind} (0 to {count - 1})")
    if manifest.task == "text-generation" and not (labels[:, 1:] != IGNORED_LABEL).any():
        raise UsageError(
            "input 'labels': every label after the first is -100, so there is no loss to compute"
        )
