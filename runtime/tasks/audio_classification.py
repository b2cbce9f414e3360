"""Audio classification: `{"audio", "label"}`, or `{"input_values", "label"}`, the waveform as the model's own
feature extractor leaves it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgepeft.errors import DataError

from ..preprocessing.audio import preprocess, read_audio
from ..records import Record
from .classification import Classifier
from .examples import Array, Example
from .values import read_values

FIELD = "input_values"


class AudioClassification(Classifier):
    """A recording as an array or the path of a .wav or .npy file; or samples float32 `[samples]`, as a list,
    an array or the path of a .npy file.

    Shorter recordings of a batch are padded with zeros, without a mask: what wav2vec2-base and its like were
    trained on. Where that matters, give batches of one length (or a batch size of 1).
    """

    field = "audio"

    def read(self, record: Record, max_length: int) -> Example:
        """See `Classifier.read`."""
        if self.field in record.fields:
            values, truncated = self._prepared(record, max_length)
        elif FIELD in record.fields:
            read = read_values(record, FIELD, [None], max_length + 1)
            values, truncated = read[:max_length], len(read) > max_length
        else:
            raise self.missing(record, '{"audio", "label"} (or "input_values" instead of "audio")')
        least = self.manifest.model.min_length
        if len(values) < least:
            raise DataError(
                f"{record.where}: the recording has {len(values)} samples (of at most {max_length}), the "
                f"model needs at least {least}"
            )
        return Example(values=values, truncated=truncated)

    def _prepared(self, record: Record, max_length: int) -> tuple[npt.NDArray[np.float32], bool]:
        """Samples, and whether they were cut, which is done before they are normalized."""
        settings = self.manifest.audio_preprocessing
        if settings is None:
            raise DataError(
                f"{record.where}: the bundle does not know how its model's recordings are prepared: give "
                "input_values, or export a folder with a preprocessor_config.json"
            )
        try:
            samples = read_audio(record.located(self.field), settings, max_length + 1)
            return preprocess(samples[:max_length], settings), len(samples) > max_length
        except DataError as error:
            raise DataError(f"{record.where}: audio: {error}") from error

    def batch(self, examples: Sequence[Example], *, training: bool) -> dict[str, Array]:
        """See `Task.batch`."""
        waves = [example.values for example in examples if example.values is not None]
        padded = np.zeros((len(waves), max(map(len, waves))), np.float32)
        for row, wave in zip(padded, waves, strict=True):
            row[: len(wave)] = wave
        batch: dict[str, Array] = {FIELD: padded}
        return {**batch, "labels": self.targets.array(examples)} if training else batch
