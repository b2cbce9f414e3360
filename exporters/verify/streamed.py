"""Compare a bundle's streamed inference with outputs that are known to be right."""

from collections.abc import Mapping

import numpy as np

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import VerificationError
from edgepeft.runtime.inputs import model_inputs
from edgepeft.runtime.streamed_model import StreamedModel


def verify_streamed(
    bundle: Bundle,
    batch: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    expected: np.ndarray,
    tolerance: float,
) -> float:
    """The largest difference of an output, relative to the outputs' largest magnitude where that is above 1.

    A model with a cache also reads the batch in two chunks, for the logits behind the last token.

    Args:
        bundle: with streamed inference.
        batch: at least the model's inputs; its first row has no padding.
        inputs: all adapter inputs.
        expected: the inference graph's first output for both.
        tolerance: the difference that is allowed.

    Raises:
        VerificationError: it is above the tolerance.
    """
    names = model_inputs(bundle.manifest, bundle.manifest.graphs["inference"].inputs)
    feeds = {name: batch[name] for name in names}
    counted = feeds["attention_mask"] == 1 if expected.ndim == 3 and "attention_mask" in feeds else ...
    model = StreamedModel(bundle)
    model.bind(inputs)
    scale = max(1.0, float(np.abs(expected[counted]).max()))
    worst = float(np.abs(model.forward(feeds) - expected)[counted].max()) / scale
    rows, length = next(iter(feeds.values())).shape[:2]
    cache = model.new_cache(rows, length)
    if cache is not None and length > 1:
        read = length // 2
        # A mask covers what was read before, too.
        chunks = [
            {
                name: value[:, (0 if name == "attention_mask" else first) : last]
                for name, value in feeds.items()
            }
            for first, last in ((0, read), (read, length))
        ]
        first, second = (
            {name: np.ascontiguousarray(value) for name, value in chunk.items()} for chunk in chunks
        )
        model.read(first, cache)
        logits = model.next_logits(second, cache)
        worst = max(worst, float(np.abs(logits[0] - expected[0, -1]).max()) / scale)
    model.close()
    if not worst <= tolerance:
        raise VerificationError(
            f"streamed inference differs by {worst:.2e} of the outputs' largest magnitude, tolerance "
            f"{tolerance:.0e}: nothing was written"
        )
    return worst
