"""What must be the same for an interrupted update to be continued bit for bit."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from edgepeft.adapters import Adapter
from edgepeft.bundle.reader import Bundle
from edgepeft.bundle.writer import MANIFEST_FILE, hash_file
from edgepeft.runtime.tasks import Example
from edgepeft.runtime.training.options import TrainingOptions

# Known by what they lead to: the adapter's content, the data's tokens, the number of steps; strategies with
# exact gradients may take turns.
_DERIVED = ("resume", "adapter", "seq_len", "steps", "epochs", "strategy")


def fingerprint(
    bundle: Bundle,
    options: TrainingOptions,
    adapter: Adapter,
    examples: Sequence[Example],
    total_steps: int,
    exact_gradients: bool,
) -> dict[str, Any]:
    """JSON values by names that people know, so that an error can say which of them differs.

    Args:
        bundle: known by its manifest, which holds the hashes of everything else.
        options: of the update.
        adapter: that it starts from.
        examples: all records, encoded.
        total_steps: optimizer steps.
        exact_gradients: whether they are computed or estimated.
    """
    chosen = {name: value for name, value in dataclasses.asdict(options).items() if name not in _DERIVED}
    return {
        "bundle": hash_file(bundle.path / MANIFEST_FILE).sha256,
        "data": _of_examples(examples),
        "adapter": _of_adapter(adapter),
        "steps": total_steps,
        "exact_gradients": exact_gradients,
        **chosen,
    }


def _of_examples(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for array in example.arrays:
            digest.update(b"-" if array is None else array.tobytes() + b"/")
        digest.update(str(example.label).encode())
    return digest.hexdigest()


def _of_adapter(adapter: Adapter) -> str:
    digest = hashlib.sha256(repr(sorted(adapter.config.items())).encode())
    for name in sorted(adapter.tensors):
        digest.update(name.encode())
        digest.update(adapter.tensors[name].tobytes())
    return digest.hexdigest()
