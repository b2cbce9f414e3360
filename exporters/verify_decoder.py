"""Compare the decoder graph with the logits that the inference graph was found to have."""

import numpy as np

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import VerificationError
from edgepeft.runtime.activation import FloatArray, inputs_taken
from edgepeft.runtime.decoding.in_place import InPlaceDecoder
from edgepeft.runtime.session import GraphSession


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
        batch: `input_ids` and `attention_mask` int64 `[rows, tokens]`, padded on the right.
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
    decoder_graph = bundle.manifest.decoder
    assert decoder_graph is not None
    adapted = any(adapter_inputs[slot.scaling_input].size for slot in bundle.manifest.lora_slots)
    role = decoder_graph.graph if adapted else decoder_graph.plain_graph
    session = GraphSession(bundle, role)
    session.bind(inputs_taken(bundle.manifest, role, adapter_inputs))
    chunk = max(1, max(lengths) // 2)
    decoder = InPlaceDecoder(session, bundle.manifest, len(texts), max(lengths), chunk)
    for row, text in enumerate(texts):
        if len(text) > 1:
            decoder.read(row, text[:-1])
    got = decoder.step([text[-1] for text in texts])
    rows = [row for row, text in enumerate(texts) if len(text) > 1]
    wanted = expected[rows, [lengths[row] - 1 for row in rows]]
    difference = float(np.abs(got[rows] - wanted).max()) / max(1.0, float(np.abs(wanted).max()))
    session.close()
    if not difference <= tolerance:
        raise VerificationError(
            f"logits of the decoder graph differ from the inference graph's by {difference:.2e} of their "
            f"largest magnitude, tolerance {tolerance:.0e}: nothing was written"
        )
    return difference
