"""Token classification: `{"tokens", "labels"}` word by word, `{"input_ids", "labels"}` token by token, or
`{"text"}` to find entities in.

A word is labelled at its first token; its other tokens do not count (-100), as the field does it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import DataError

from ..inputs import IGNORED_LABEL
from ..records import Record
from .examples import Array, Example, NothingToLearnError, Outputs, Row, shown
from .targets import Targets, softmax
from .tokens import TokenTask

NAMES = ("labels", "ner_tags", "tags")
"""Fields that the labels may be in."""
NO_ENTITY = "O"


class TokenClassification(TokenTask):
    """Tokens to classes."""

    output = "logits"

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.targets: Targets = Targets(self.manifest, balanced=False)

    def encode(self, record: Record, max_length: int, *, training: bool) -> Example:
        """See `Task.encode`; labels are kept where there are any, and required for training."""
        if self.field in record.fields and not training:
            row, truncated = self._text_row(record, max_length)
        elif "tokens" in record.fields:
            row, truncated = self._words(record, max_length)
        elif "input_ids" in record.fields:
            row, truncated = self.tokens(record, "input_ids", max_length)
            given = self._given(record, len(record.fields["input_ids"]))
            row = Row(row.input_ids, row.type_ids, None if given is None else given[:max_length])
        else:
            raise self.missing(record, '{"tokens", "labels"} (or "input_ids" instead of "tokens")')
        if training and row.labels is None:
            raise self.missing(record, '"labels" to learn, one a token')
        if training and row.labels is not None and not (row.labels != IGNORED_LABEL).any():
            raise NothingToLearnError(f"{record.where}: all labels of its first {max_length} tokens are -100")
        return Example((row,), truncated=truncated)

    def labelled(
        self, values: npt.NDArray[np.float32], batch: Mapping[str, Array]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """The tokens whose label counts."""
        counted = batch["labels"] != IGNORED_LABEL
        return values[counted], self.targets.encoded(batch["labels"][counted])

    def label_count(self, examples: Sequence[Example]) -> int:
        """Tokens whose label counts."""
        rows = (example.rows[0].labels for example in examples)
        return sum(int((labels != IGNORED_LABEL).sum()) for labels in rows if labels is not None)

    def items(self, batch: Mapping[str, Array]) -> int:
        """Labels that count."""
        return int((batch["labels"] != IGNORED_LABEL).sum())

    def results(self, outputs: Outputs, batch: Mapping[str, Array]) -> list[dict[str, Any]]:
        """`{"labels", "scores"}`: the best label of each token that is no padding, and its probability."""
        mask = batch.get("attention_mask", np.ones_like(batch["input_ids"]))
        lengths = mask.sum(axis=1).astype(int).tolist()
        probabilities = softmax(outputs[self.output].astype(np.float64))
        return [
            {
                "labels": [self.targets.names[index] for index in row.argmax(axis=1)],
                "scores": row.max(axis=1).tolist(),
            }
            for row in (row[:length] for row, length in zip(probabilities, lengths, strict=True))
        ]

    def finish(self, result: dict[str, Any], example: Example) -> dict[str, Any]:
        """Entities, where the record is a text; word by word, where it came in words; with `expected` (None
        where -100), where it has labels."""
        (row,) = example.rows
        if row.spans is not None:
            return {"entities": entities(result["labels"], result["scores"], row.spans.tolist(), row.text)}
        kept = range(len(row.input_ids)) if row.words is None else row.words.tolist()
        result = {name: [values[index] for index in kept] for name, values in result.items()}
        if row.labels is not None:
            labels = row.labels[list(kept)].tolist()
            result["expected"] = [None if one == IGNORED_LABEL else self.targets.names[one] for one in labels]
        return result

    def correct(self, outputs: Outputs, batch: Mapping[str, Array]) -> int | None:
        """Labels that count and are the best class of their token."""
        labels = batch["labels"]
        return int(((outputs[self.output].argmax(axis=2) == labels) & (labels != IGNORED_LABEL)).sum())

    def _text_row(self, record: Record, max_length: int) -> tuple[Row, bool]:
        text = record.fields[self.field]
        if not isinstance(text, str) or not text:
            raise DataError(f"{record.where}: text is {shown(text)}, expected a text")
        ids, types, spans, truncated = self.text.cut(text, max_length)
        read = text[: max((end for _, end in spans), default=0)]
        row = Row(
            np.array(ids, np.int32), np.array(types, np.int32), spans=np.array(spans, np.int32), text=read
        )
        return row, truncated

    def _words(self, record: Record, max_length: int) -> tuple[Row, bool]:
        words = record.fields["tokens"]
        if (
            not isinstance(words, list | tuple)
            or not words
            or not all(isinstance(item, str) for item in words)
        ):
            raise DataError(f"{record.where}: tokens is {shown(words)}, expected a list of words")
        ids, types, owners, truncated = self.text.encode_words(list(words), max_length)
        first = {owner: index for index, owner in reversed(list(enumerate(owners))) if owner is not None}
        given = self._given(record, len(words))
        labels = None
        if given is not None:
            labels = np.full(len(ids), IGNORED_LABEL, np.int32)
            for owner, index in first.items():
                labels[index] = given[owner]
        positions = np.array(sorted(first.values()), np.int32)
        return Row(np.array(ids, np.int32), np.array(types, np.int32), labels, positions), truncated

    def _given(self, record: Record, count: int) -> np.ndarray | None:
        field = next((name for name in NAMES if name in record.fields), None)
        if field is None:
            return None
        value = record.fields[field]
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list | tuple) or len(value) != count:
            raise DataError(
                f"{record.where}: {field} is {shown(value)}, expected a list of {count} labels, by name or "
                "number"
            )
        numbers = [item if item == IGNORED_LABEL else self.targets.number(record, item) for item in value]
        return np.array(numbers, np.int32)


def entities(
    labels: Sequence[str], scores: Sequence[float], spans: Sequence[Sequence[int]], text: str
) -> list[dict[str, Any]]:
    """Entities of a text: neighbouring tokens of one label, `B-` beginning a new one and `O` being none.

    Args:
        labels: the label of each token.
        scores: its probability.
        spans: the characters `[first, last)` of each token; (0, 0) leaves it out.
        text: the text.

    Returns:
        `{"label", "score", "start", "end", "text"}` of each, the score being the mean of its tokens'.

    Source: `aggregation_strategy="simple"` of transformers' TokenClassificationPipeline.
    """
    groups: list[tuple[str, list[int]]] = []
    last = None
    for index, label in enumerate(labels):
        if spans[index][0] == spans[index][1]:
            continue
        begins, kind = label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label
        if kind == last and not begins:
            groups[-1][1].append(index)
        else:
            groups.append((kind, [index]))
        last = kind
    found = []
    for kind, tokens in groups:
        if kind != NO_ENTITY:
            start, end = spans[tokens[0]][0], spans[tokens[-1]][1]
            score = float(np.mean([scores[index] for index in tokens]))
            found.append({"label": kind, "score": score, "start": start, "end": end, "text": text[start:end]})
    return found
