"""Models without a key/value cache: every token reads the whole text again."""

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np

from edgepeft.bundle.manifest import Manifest
from edgepeft.errors import UsageError

from ...session import GraphSession
from ...streamed_model import StreamedModel
from .base import Array, FloatArray
from .rows import RowByRow


class WholeTextDecoder(RowByRow):
    """See `Decoder`.

    Args:
        run: the logits behind the last of some tokens, float32 `[vocab]`.
        rows: sequences at once.
    """

    def __init__(self, run: Callable[[list[int]], FloatArray], rows: int) -> None:
        super().__init__(rows)
        self._run = run
        self._texts: list[list[int]] = [[] for _ in range(rows)]

    def read(self, row: int, ids: Sequence[int]) -> FloatArray:
        """See `Decoder.read`."""
        self._texts[row] += ids
        self.lengths[row] = len(self._texts[row])
        return self._run(self._texts[row])

    def truncate(self, row: int, length: int) -> None:
        """See `Decoder.truncate`."""
        del self._texts[row][length:]
        self.lengths[row] = len(self._texts[row])

    def snapshot(self, row: int) -> dict[str, Array]:
        """Refused: there are no keys and values."""
        del row
        _refuse_cache()

    def restore(self, row: int, state: Mapping[str, Array]) -> None:
        """Refused: there are no keys and values."""
        del row, state
        _refuse_cache()

    def close(self) -> None:
        """See `Decoder.close`."""
        self._texts.clear()


class EncoderDecoder(WholeTextDecoder):
    """An encoder-decoder: what a row reads first is for the encoder, everything after it is the answer so
    far.

    Args:
        session: the inference graph with bindings of its own, an adapter's inputs among them.
        manifest: of a text2text-generation bundle.
        rows: sequences at once.
    """

    def __init__(self, session: GraphSession, manifest: Manifest, rows: int) -> None:
        super().__init__(self._answer, rows)
        self._session = session
        assert manifest.model.decoder_start_token_id is not None  # checked with the manifest
        self._start = manifest.model.decoder_start_token_id
        self._prompt_lengths = [0] * rows

    def read(self, row: int, ids: Sequence[int]) -> FloatArray:
        """See `Decoder.read`."""
        if not self._texts[row]:
            self._prompt_lengths[row] = len(ids)
        self._row = row
        return super().read(row, ids)

    def _answer(self, text: list[int]) -> FloatArray:
        prompt = np.array([text[: self._prompt_lengths[self._row]]], np.int64)
        answer = np.array([[self._start, *text[prompt.size :]]], np.int64)
        feeds = {"input_ids": prompt, "attention_mask": np.ones_like(prompt), "decoder_input_ids": answer}
        return _last_logits(self._session, feeds)


def whole_text(session: GraphSession | StreamedModel, manifest: Manifest, rows: int) -> WholeTextDecoder:
    """The decoder of a language model without a cache, its graph whole or its weights streamed."""
    names = {spec.name for spec in manifest.graphs["inference"].inputs}

    def run(ids: list[int]) -> FloatArray:
        array = np.array([ids], np.int64)
        feeds: dict[str, Array] = {"input_ids": array, "attention_mask": np.ones_like(array)}
        feeds = {name: value for name, value in feeds.items() if name in names}
        if isinstance(session, StreamedModel):
            logits: FloatArray = session.next_logits(feeds, None)[0]
            return logits
        return _last_logits(session, feeds)

    return WholeTextDecoder(run, rows)


def _last_logits(session: GraphSession, feeds: Mapping[str, Array]) -> FloatArray:
    session.bind({name: value for name, value in feeds.items() if name in session.inputs})
    logits: FloatArray = session.run_for(["logits"])["logits"].numpy()[0, -1]
    return logits


def _refuse_cache() -> NoReturn:
    raise UsageError("the model has no key/value cache, so nothing of a prompt can be kept")
