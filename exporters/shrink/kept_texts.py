"""The tokens of the texts that a vocabulary is trimmed to, read as the device reads them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from edgepeft.errors import BundleError, DataError, MissingExtraError, UsageError
from edgepeft.runtime.inputs import IGNORED_LABEL
from edgepeft.runtime.records import Record
from edgepeft.runtime.tasks import Task
from edgepeft.runtime.tasks.causal_lm import CausalLM
from edgepeft.runtime.tasks.embedding import Embedding
from edgepeft.runtime.tasks.examples import Row
from edgepeft.runtime.tasks.fill_mask import FillMask
from edgepeft.runtime.tasks.text2text import Text2Text
from edgepeft.runtime.tasks.tokens import TokenTask

#: Records are read whole, however long.
_WHOLE = 2**30
#: Fields that may hold tokens in the place of a text.
_MAY_BE_TOKENS = ("input_ids", "prompt", "completion")
#: What a sentence encoder embeds or learns from.
_EMBEDDED = ("text", "anchor", "positive", "negative")
_USER = {"role": "user", "content": "Hello"}
_ANSWERED = [_USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Really?"}]
#: Whatever the records are, a device may put what its user says into the model's chat template.
_CONVERSATIONS = ([_USER], _ANSWERED, [{"role": "system", "content": "Be brief."}, *_ANSWERED])
_TOOLS = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]


@dataclass(frozen=True)
class Reading:
    """The tokens of one text, or of all of a record.

    Attributes:
        where: the text is from.
        tokens: that are read and learned.
        is_text: whether a tokenizer has read it; if not, it came as tokens.
    """

    where: str
    tokens: tuple[int, ...]
    is_text: bool = True


def readings(task: Task, kept: Iterable[Record]) -> list[Reading]:
    """What the task makes of records, whole, and of the model's chat template.

    Raises:
        DataError: a record cannot be used.
    """
    assert isinstance(task, TokenTask)  # others have no texts
    found = list(_conversations(task))
    for record in kept:
        is_text = not any(isinstance(record.fields.get(name), list | np.ndarray) for name in _MAY_BE_TOKENS)
        try:
            rows = list(_rows(task, record))
        except UsageError as error:
            raise DataError(f"{record.where}: {error}") from error
        found += [Reading(record.where, tuple(_tokens(task, row)), is_text) for row in rows]
    return found


def _rows(task: TokenTask, record: Record) -> Iterator[Row]:
    if isinstance(task, Embedding):
        yield from _embedded(task, record)
    elif isinstance(task, FillMask) and "labels" not in record.fields:  # also texts without a mask
        field = task.field if task.field in record.fields else "input_ids"
        yield task.tokens(record, field, _WHOLE)[0]
    else:
        training = isinstance(task, FillMask)
        (example,) = task.encode_all([record], _WHOLE, training=training)
        yield from example.rows


def _embedded(task: Embedding, record: Record) -> Iterator[Row]:
    """Every text of a record, alone and behind each prompt that the model has."""
    texts = [record.fields[name] for name in _EMBEDDED if isinstance(record.fields.get(name), str)]
    for prompt in ("", *task.manifest.model.prompts.values()):
        for text in texts:
            yield task.tokens(Record(record.where, {"text": prompt + text}), "text", _WHOLE)[0]
    if not texts:
        yield from task.encode(record, _WHOLE, training=False).rows


def _tokens(task: TokenTask, row: Row) -> Iterator[int]:
    yield from row.input_ids.tolist()
    if row.labels is not None and isinstance(task, CausalLM | Text2Text | FillMask):
        yield from (label for label in row.labels.tolist() if label != IGNORED_LABEL)


def _conversations(task: TokenTask) -> Iterator[Reading]:
    """Conversations, with and without tools, as far as the template takes them."""
    if not isinstance(task, CausalLM):
        return
    for messages in _CONVERSATIONS:
        for beside in ({}, {"tools": _TOOLS}):
            try:
                text = task.chat.prompt(messages, "a conversation", beside)
            except (DataError, BundleError, MissingExtraError):
                continue
            tokens, _ = task.text.encode(text, special_tokens=False)
            yield Reading("a conversation in the model's chat template", tuple(tokens))
