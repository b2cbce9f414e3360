"""What must be the same for an interrupted update to be continued bit for bit."""

import dataclasses
import hashlib
from typing import Any

from edgepeft.adapters import Adapter
from edgepeft.bundle.reader import Bundle
from edgepeft.bundle.writer import MANIFEST_FILE, hash_file

from ..options import TrainingOptions

# Known by what they lead to: the adapter's content, the data's tokens, the number of steps; strategies with
# exact gradients may take turns.
_DERIVED = ("resume", "adapter", "seq_len", "steps", "epochs", "strategy")


def fingerprint(
    bundle: Bundle,
    options: TrainingOptions,
    adapter: Adapter,
    data: str,
    total_steps: int,
    exact_gradients: bool,
) -> dict[str, Any]:
    """JSON values by names that people know, so that an error can say which of them differs.

    Args:
        bundle: known by its manifest, which holds the hashes of everything else.
        options: of the update.
        adapter: that it starts from.
        data: the digest of all records, encoded.
        total_steps: optimizer steps.
        exact_gradients: whether they are computed or estimated.
    """
    chosen = {name: value for name, value in dataclasses.asdict(options).items() if name not in _DERIVED}
    chosen["add_labels"] = list(options.add_labels)  # as JSON has it
    return {
        "bundle": hash_file(bundle.path / MANIFEST_FILE).sha256,
        "data": data,
        "adapter": _of_adapter(adapter),
        "steps": total_steps,
        "exact_gradients": exact_gradients,
        **chosen,
    }


def _of_adapter(adapter: Adapter) -> str:
    digest = hashlib.sha256(repr(sorted(adapter.config.items())).encode())
    for name in sorted(adapter.tensors):
        digest.update(name.encode())
        digest.update(adapter.tensors[name].tobytes())
    return digest.hexdigest()
