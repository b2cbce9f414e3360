"""Compare the decoder graph with the logits that the inference graph was found to have."""

import numpy as np

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import VerificationError
from edgepeft.runtime.adapters.graph_inputs import inputs_taken
from edgepeft.runtime.generation.decoders.base import Decoder
from edgepeft.runtime.generation.decoders.growing import GrowingDecoder
from edgepeft.runtime.generation.decoders.in_place import InPlaceDecoder
from edgepeft.runtime.generation.prefix import begin_row, prefix_cache
from edgepeft.runtime.session import GraphSession
from edgepeft.techniques import of_slot
from edgepeft.techniques.base import FloatArray

from .batch import relative_difference

#: Tokens that are read one at a time at the end of a long row.
GROWN = 4
#: Of the largest logit, what rounding activations to 8 bits may change: 0.02 to 0.05 of models that were
#: trained; what multiplies wrongly changes all of it.
ROUNDED_TOLERANCE = 0.3


def verify_growth(
    bundle: Bundle,
    adapter_inputs: dict[str, FloatArray],
    ids: list[int],
    expected: np.ndarray,
    tolerance: float,
) -> float:
    """Read a long row but its last tokens, and then these one at a time, in each way in which a cache grows.

    Args:
        bundle: a language model's, with a cache.
        adapter_inputs: see `graph_inputs`.
        ids: the row's tokens.
        expected: the inference graph's logits float32 `[tokens, vocab]`.
        tolerance: of the largest magnitude.

    Returns:
        The largest difference by that magnitude.

    Raises:
        VerificationError: it is above the tolerance.
    """
    manifest = bundle.manifest
    session = GraphSession(bundle, "inference")
    session.bind(adapter_inputs)
    decoders: list[Decoder] = [GrowingDecoder(session, 1)]
    if manifest.decoder is not None:
        plain = GraphSession(bundle, manifest.decoder.plain_graph)
        plain.bind(inputs_taken(manifest, manifest.decoder.plain_graph, adapter_inputs))
        decoders.append(InPlaceDecoder(plain, manifest, 1, len(ids), max(1, len(ids) // 2)))
    scale, worst = max(1.0, float(np.abs(expected).max())), 0.0
    for decoder in decoders:
        # Two chunks, so that what changes with the length of a text changes in between.
        begun = (len(ids) - GROWN) // 4
        for chunk in (ids[:begun], ids[begun:-GROWN]):
            if chunk:
                decoder.read(0, chunk)
        for place in range(len(ids) - GROWN, len(ids)):
            logits = decoder.step([ids[place]])[0]
            worst = max(worst, float(np.abs(logits - expected[place]).max()) / scale)
        decoder.close()
    if not worst <= tolerance:
        raise VerificationError(
            f"logits behind {len(ids)} tokens differ by {worst:.2e} of their largest magnitude when they are "
            f"read one at a time, tolerance {tolerance:.0e}: nothing was written"
        )
    return worst


def verify_decoder(
    bundle: Bundle,
    batch: dict[str, np.ndarray],
    adapter_inputs: dict[str, FloatArray],
    expected: np.ndarray,
    tolerance: float,
) -> float:
    """Read each row of a batch but its last token, in two chunks, then the last tokens of all rows at once.

    The graph is the one that generating would choose for the adapter.

    Args:
        bundle: a language model's, with a decoder graph.
        batch: `input_ids` and `attention_mask` int64 `[rows, tokens]`; rows that are padded on the left are
            left out.
        adapter_inputs: see `graph_inputs`; changed as `group_inputs` says.
        expected: the inference graph's logits float32 `[rows, tokens, vocab]`.
        tolerance: of the largest magnitude.

    Returns:
        The largest difference by that magnitude.

    Raises:
        VerificationError: it is above the tolerance.
    """
    mask = batch.get("attention_mask", np.ones_like(batch["input_ids"]))
    lengths = mask.sum(axis=1).tolist()
    texts = [row[:length].tolist() for row, length in zip(batch["input_ids"], lengths, strict=True)]
    # Padding on the left moves positions.
    right = [row for row, length in enumerate(lengths) if mask[row, :length].all()]
    texts, lengths, expected = [texts[row] for row in right], [lengths[row] for row in right], expected[right]
    decoder_graph = bundle.manifest.decoder
    assert decoder_graph is not None
    prefix = prefix_cache(bundle.manifest, adapter_inputs, {})
    adapted = any(of_slot(slot).size(slot, adapter_inputs) for slot in bundle.manifest.slots)
    rows = [row for row, text in enumerate(texts) if len(text) > 1]
    wanted = expected[rows, [lengths[row] - 1 for row in rows]]

    def difference(role: str) -> float:
        session = GraphSession(bundle, role)
        session.bind(inputs_taken(bundle.manifest, role, adapter_inputs))
        chunk = max(1, max(lengths) // 2)
        decoder = InPlaceDecoder(session, bundle.manifest, len(texts), max(lengths), chunk)
        for row in rows:
            begin_row(decoder, row, texts[row][:-1], prefix)
        got = decoder.step([text[-1] for text in texts])
        session.close()
        return relative_difference(got[rows], wanted)

    differs = difference(decoder_graph.graph if adapted else decoder_graph.plain_graph)
    if not differs <= tolerance:
        raise VerificationError(
            f"logits of the decoder graph differ from the inference graph's by {differs:.2e} of their "
            f"largest magnitude, tolerance {tolerance:.0e}: nothing was written"
        )
    rounded = decoder_graph.int8_graph if adapted else decoder_graph.int8_plain_graph
    if rounded is not None and not (rounded_differs := difference(rounded)) <= ROUNDED_TOLERANCE:
        raise VerificationError(
            f"logits with activations of 8 bits differ from exact ones by {rounded_differs:.2e} of their "
            f"largest magnitude, tolerance {ROUNDED_TOLERANCE:.0e}: nothing was written"
        )
    return differs
