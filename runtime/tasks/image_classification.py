"""Image classification: `{"image", "label"}`, or `{"pixel_values", "label"}` as the model's own image
processor leaves them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import DataError

from ..preprocessing.images import preprocess, read_image
from ..records import Record
from .classification import Classifier
from .examples import Array, Example
from .values import read_values

FIELD = "pixel_values"


class ImageClassification(Classifier):
    """An image uint8 `[height, width, channels]`, as an array or the path of a PNG, PPM, JPEG or .npy file;
    or pixels float32 `[channels, height, width]`, as nested lists, an array or the path of a .npy file."""

    field = "image"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        spec = next(item for item in self.manifest.graphs["inference"].inputs if item.name == FIELD)
        self._shape = [size if isinstance(size, int) else None for size in spec.shape[1:]]

    def read(self, record: Record, max_length: int) -> Example:
        """See `Classifier.read`; every image has the size that the model was exported for."""
        del max_length
        if self.field in record.fields:
            return Example(values=self._pixels(record))
        if FIELD not in record.fields:
            raise self.missing(record, '{"image", "label"} (or "pixel_values" instead of "image")')
        return Example(values=read_values(record, FIELD, self._shape))

    def _pixels(self, record: Record) -> npt.NDArray[np.float32]:
        settings = self.manifest.image_preprocessing
        if settings is None:
            raise DataError(
                f"{record.where}: the bundle does not know how its model's images are prepared: give "
                "pixel_values, or export a folder with a preprocessor_config.json"
            )
        try:
            edge = settings.shortest_edge or max(settings.height or 0, settings.width or 0) or None
            return preprocess(read_image(record.located(self.field), len(settings.mean), edge), settings)
        except DataError as error:
            raise DataError(f"{record.where}: image: {error}") from error

    def batch(self, examples: Sequence[Example], *, training: bool) -> dict[str, Array]:
        """See `Task.batch`."""
        pixels = [example.values for example in examples if example.values is not None]
        batch: dict[str, Array] = {FIELD: np.stack(pixels)}
        return {**batch, "labels": self.targets.array(examples)} if training else batch
