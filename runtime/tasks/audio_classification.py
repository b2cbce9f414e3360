"""Audio classification: `{"input_values", "label"}`, the waveform as the feature extractor leaves it."""

from collections.abc import Sequence

import numpy as np

from edgepeft.errors import DataError
from edgepeft.runtime.data import Record
from edgepeft.runtime.tasks.base import Array, Example
from edgepeft.runtime.tasks.classification import Classifier
from edgepeft.runtime.tasks.values import read_values

FIELD = "input_values"


class AudioClassification(Classifier):
    """Samples float32 `[samples]`, as a list, an array or the path of a .npy file.

    Shorter recordings of a batch are padded with zeros, without a mask: what wav2vec2-base and its like were
    trained on. Where that matters, give batches of one length (or a batch size of 1).
    """

    def read(self, record: Record, max_length: int) -> Example:
        """See `Classifier.read`."""
        if FIELD not in record.fields:
            raise self.missing(record, '{"input_values", "label"}')
        values = read_values(record, FIELD, [None])
        least = self.manifest.model.min_length
        if min(len(values), max_length) < least:
            raise DataError(
                f"{record.where}: {FIELD} has {len(values)} samples, cut to {max_length}: the model needs at "
                f"least {least}"
            )
        return Example(values=values[:max_length], truncated=len(values) > max_length)

    def batch(self, examples: Sequence[Example], *, training: bool) -> dict[str, Array]:
        """See `Task.batch`."""
        waves = [example.values for example in examples if example.values is not None]
        padded = np.zeros((len(waves), max(map(len, waves))), np.float32)
        for row, wave in zip(padded, waves, strict=True):
            row[: len(wave)] = wave
        batch: dict[str, Array] = {FIELD: padded}
        return {**batch, "labels": self.targets.array(examples)} if training else batch
