"""The prefix of an adapter as what a cache begins with."""

from collections.abc import Mapping, Sequence

import numpy as np

from edgepeft.bundle.manifest import Manifest
from edgepeft.techniques.base import FloatArray
from edgepeft.virtual_tokens import token_ids

from ..adapters.virtual_tokens import virtual_slots
from ..key_value_cache import cache_specs
from .decoders.base import Decoder
from .prompt_cache import PromptCache


def prefix_cache(
    manifest: Manifest, inputs: Mapping[str, FloatArray], made_by: Mapping[str, str]
) -> PromptCache | None:
    """Keys and values that the adapter with these inputs puts in front; None where it has none."""
    specs, state, ids = cache_specs(manifest), {}, list[int]()
    for slot, technique in virtual_slots(manifest):
        if own := technique.cache(slot, inputs):
            state.update(own)
            ids = token_ids(slot, 0, technique.size(slot, inputs)).tolist()
    if not ids:
        return None
    return PromptCache.of(
        ids, made_by, {name: value.astype(np.dtype(specs[name].dtype)) for name, value in state.items()}
    )


def begin_row(decoder: Decoder, row: int, ids: Sequence[int], prefix: PromptCache | None) -> None:
    """Have a row of a decoder read tokens, the first of which a prefix may stand for."""
    known = 0 if prefix is None else prefix.common_prefix(ids)
    if prefix is not None and known:
        decoder.restore(row, prefix.state(known))
    decoder.read(row, ids[known:])
