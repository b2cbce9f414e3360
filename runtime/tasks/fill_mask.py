"""Filling masks: `{"text"}` with the tokenizer's mask token in it, `{"labels"}` saying what belongs there.

Labels of a text are one token a mask, by name or number; labels of `input_ids` are as many as these, with
-100 where nothing is asked.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgepeft.errors import DataError

from ..inputs import IGNORED_LABEL
from ..records import Record
from .examples import Array, Example, NothingToLearnError, Outputs, Row, shown
from .targets import softmax
from .tokens import TokenTask

TOP_K = 5
"""Tokens that are proposed for a mask."""


class FillMask(TokenTask):
    """Masks to tokens."""

    output = "logits"

    def encode(self, record: Record, max_length: int, *, training: bool) -> Example:
        """See `Task.encode`; labels are kept where there are any, and required for training."""
        field = self.field if self.field in record.fields else "input_ids"
        if field not in record.fields:
            raise self.missing(record, '{"text", "labels"} (or "input_ids" instead of "text")')
        row, truncated = self.tokens(record, field, max_length)
        masks = np.flatnonzero(row.input_ids == self.manifest.model.mask_token_id)
        labels = None
        if "labels" in record.fields:
            whole = field == "input_ids"
            found = self._labels(record, None if whole else masks, row.input_ids, truncated=truncated)
            labels = found[:max_length]
        if training and labels is None:
            raise self.missing(record, '"labels" to learn, one a mask')
        if training and labels is not None and not (labels != IGNORED_LABEL).any():
            raise NothingToLearnError(f"{record.where}: its first {max_length} tokens hold no mask to fill")
        if not training and not masks.size:
            raise DataError(f"{record.where}: {field} holds no mask token in its first {max_length} tokens")
        return Example((Row(row.input_ids, row.type_ids, labels),), truncated=truncated)

    def items(self, batch: Mapping[str, Array]) -> int:
        """Labels that count."""
        return int((batch["labels"] != IGNORED_LABEL).sum())

    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """`{"masks"}`: for each mask the best tokens `{"token_str", "token", "score"}`, the best first."""
        ids = batch["input_ids"]
        masked = ids == self.manifest.model.mask_token_id
        found = []
        for logits, mask in zip(outputs[self.output], masked, strict=True):
            probabilities = softmax(logits[mask].astype(np.float64))
            best = np.argsort(-probabilities, axis=1)[:, :TOP_K]
            found.append(
                {
                    "masks": [
                        [
                            {"token_str": self._shown(token), "token": int(token), "score": float(row[token])}
                            for token in tokens
                        ]
                        for row, tokens in zip(probabilities, best, strict=True)
                    ]
                }
            )
        return found

    def finish(self, result: dict[str, Any], example: Example) -> dict[str, Any]:
        """With `expected`, the token of each mask, where the record has labels."""
        (row,) = example.rows
        if row.labels is not None:
            labels = row.labels[row.input_ids == self.manifest.model.mask_token_id].tolist()
            result["expected"] = [None if one == IGNORED_LABEL else self._shown(one) for one in labels]
        return result

    def correct(self, outputs: Outputs, batch: Mapping[str, Array]) -> int | None:
        """Labels that count and are the best token."""
        labels = batch["labels"]
        return int(((outputs[self.output].argmax(axis=2) == labels) & (labels != IGNORED_LABEL)).sum())

    def _shown(self, token: int) -> str:
        return self.text.token(token) if self.has_text else str(token)

    def _labels(self, record: Record, masks: Array | None, ids: Array, *, truncated: bool) -> np.ndarray:
        """Labels as long as the tokens, given for each of `masks` (and, where the text is cut, for those that
        were behind the cut) or, where None, for each token."""
        value = record.fields["labels"]
        value = value.tolist() if isinstance(value, np.ndarray) else value
        count = len(record.fields["input_ids"]) if masks is None else len(masks)
        cut = masks is not None and truncated
        if not isinstance(value, list | tuple) or len(value) < count or (len(value) > count and not cut):
            raise DataError(
                f"{record.where}: labels is {shown(value)}, expected a list of {count} tokens, one a "
                f"{'token (-100: nothing to learn)' if masks is None else 'mask'}"
            )
        numbers = np.array([self._number(record, item) for item in value[:count]], np.int32)
        if masks is None:
            return numbers
        labels = np.full(len(ids), IGNORED_LABEL, np.int32)
        labels[masks] = numbers
        return labels

    def _number(self, record: Record, value: object) -> int:
        limit = self.manifest.model.vocab_size
        if isinstance(value, str):
            ids = self.text.first(value, 2, special_tokens=False)
            if len(ids) == 1:
                return ids[0]
        elif type(value) is int and (value == IGNORED_LABEL or 0 <= value < limit):
            return value
        raise DataError(
            f"{record.where}: label {shown(value)} is not one token, by name or by number (0 to {limit - 1})"
        )
