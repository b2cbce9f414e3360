"""Image classification: `{"pixel_values", "label"}`, the pixels as the image processor leaves them."""

from collections.abc import Sequence

import numpy as np

from edgepeft.bundle.reader import Bundle
from edgepeft.runtime.data import Record
from edgepeft.runtime.tasks.base import Array, Example
from edgepeft.runtime.tasks.classification import Classifier
from edgepeft.runtime.tasks.values import read_values

FIELD = "pixel_values"


class ImageClassification(Classifier):
    """Pixels float32 `[channels, height, width]`, as nested lists, an array or the path of a .npy file."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        spec = next(item for item in self.manifest.graphs["inference"].inputs if item.name == FIELD)
        self._shape = [size if isinstance(size, int) else None for size in spec.shape[1:]]

    def read(self, record: Record, max_length: int) -> Example:
        """See `Classifier.read`; every image has the size that the model was exported for."""
        del max_length
        if FIELD not in record.fields:
            raise self.missing(record, '{"pixel_values", "label"}')
        return Example(values=read_values(record, FIELD, self._shape))

    def batch(self, examples: Sequence[Example], *, training: bool) -> dict[str, Array]:
        """See `Task.batch`."""
        pixels = [example.values for example in examples if example.values is not None]
        batch: dict[str, Array] = {FIELD: np.stack(pixels)}
        return {**batch, "labels": self.targets.array(examples)} if training else batch
