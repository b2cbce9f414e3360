"""Text to tokens and back, with the tokenizer the base model shipped (the `text` extra).

`tokenizers` takes about a hundred bytes for each character that it is given, and cuts afterwards. So a text
of which only some tokens are wanted is cut before: to a part that is lengthened until the tokens that are
wanted are those of the whole text.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import BundleError, MissingExtraError, UsageError

TOKENIZER_FILE = "tokenizer.json"

MOST_CHARACTERS = 2**14
"""Characters of a text, at least, after which no more tokens are looked for: nobody's words, nor the spaces
between them, are that long."""
_PER_TOKEN = 8
"""Characters that are read for each token at first: more than those of most languages have."""
_FIRST = 2**10
_LARGEST = 2**31 - 1
"""What examples have room for; whether the model has such a token is looked at later."""
_MARGIN = 256
"""Characters at a cut whose tokens the cut may have changed: more than any special token has."""


class Cut(NamedTuple):
    """A text's token ids, special ones included, their types, the characters `[first, last)` that each of
    them is ((0, 0): a special token), and whether the text was cut."""

    ids: list[int]
    type_ids: list[int]
    spans: list[tuple[int, int]]
    truncated: bool


class Text:
    """The bundle's tokenizer.

    Raises:
        MissingExtraError: the package `tokenizers` is not installed.
        BundleError: the bundle carries no tokenizer, or a damaged one.
    """

    def __init__(self, bundle: Bundle) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingExtraError("tokenizers", "text", "reading text (instead of input_ids)") from error
        if TOKENIZER_FILE not in bundle.manifest.files:
            raise BundleError(f"{bundle.path}: holds no {TOKENIZER_FILE}: give input_ids instead of text")
        self._path = path = bundle.file(TOKENIZER_FILE)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise BundleError(
                f"{path}: tokenizers {tokenizers.__version__} cannot read it ({error})"
            ) from error
        # Sentence encoders ship with both switched on, at lengths of their own.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._settings = bundle.manifest.model.text
        self._tokenizer.encode_special_tokens = self._settings.split_special_tokens

    def encode(self, text: str, *, special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """Token ids and token type ids of a whole text, special tokens included.

        Raises:
            UsageError: the text is not valid Unicode.
        """
        encoding = self._encoding(text, special_tokens=special_tokens)
        return list(encoding.ids), self._types(encoding)

    def cut(self, text: str, max_length: int, pair: str | None = None) -> Cut:
        """The tokens of a text, or of two as one input, of which those on the tokenizer's truncation side are
        left out where there are more than `max_length`, the longer text's first; special tokens stay.

        Raises:
            UsageError: what is read of a text is not valid Unicode, or special tokens take all the room.
        """
        read, start, shortened = self._enough(text, max_length)
        other, shortened_too = None, False
        if pair is not None:
            other, _, shortened_too = self._enough(pair, max_length)
        encoding = self._truncated(read, max_length, other)
        spans = [
            (0, 0) if special else (start + span[0], start + span[1])
            for span, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        ]
        truncated = shortened or shortened_too or bool(encoding.overflowing)
        return Cut(list(encoding.ids), self._types(encoding), spans, truncated)

    def _enough(self, text: str, count: int) -> tuple[str, int, bool]:
        """The part of a text that has its first `count` tokens (its last, where texts are cut on the left),
        where it begins, and whether it is not the whole text."""
        *tries, most = _sizes(len(text), count)
        if self._settings.truncation_side == "left":
            found = (size for size in tries if _settled_behind(self._encoding(text[-size:])) > count)
            start = len(text) - next(found, most)
            return text[start:], start, start > 0
        found = (size for size in tries if _settled(self._encoding(text[:size]), size) > count)
        size = next(found, most)
        return text[:size], 0, size < len(text)

    def _truncated(self, text: str | list[str], max_length: int, pair: str | None = None) -> Any:
        """The encoding with no more than `max_length` tokens."""
        try:
            self._tokenizer.enable_truncation(max_length, direction=self._settings.truncation_side)
            return self._encoding(text, pair)
        except (BundleError, UsageError):
            raise
        except Exception as error:  # the package raises nothing more specific
            raise UsageError(f"a text cannot be cut to {max_length} tokens ({error}): allow more") from error
        finally:
            self._tokenizer.no_truncation()

    def _types(self, encoding: Any) -> list[int]:
        return list(encoding.type_ids) if self._settings.token_types else [0] * len(encoding.ids)

    def first(self, text: str, count: int, *, special_tokens: bool = True) -> list[int]:
        """The first `count` of a text's token ids.

        Raises:
            UsageError: what is read of the text is not valid Unicode.
        """
        *tries, most = _sizes(len(text), count)
        found = (size for size in tries if _settled(self._encoding(text[:size]), size) >= count)
        return self.encode(text[: next(found, most)], special_tokens=special_tokens)[0][:count]

    def last(self, text: str, count: int, *, special_tokens: bool = True) -> list[int]:
        """The last `count` of a text's token ids, `count` being at least 1.

        Raises:
            UsageError: what is read of the text is not valid Unicode.
        """
        *tries, most = _sizes(len(text), count)
        found = (size for size in tries if _settled_behind(self._encoding(text[-size:])) >= count)
        return self.encode(text[-next(found, most) :], special_tokens=special_tokens)[0][-count:]

    def encode_words(
        self, words: list[str], max_length: int
    ) -> tuple[list[int], list[int], list[int | None], bool]:
        """Token ids, token type ids and the number of each token's word (None: a special token) of a text in
        words, `max_length` tokens at most; and whether it was cut.

        Raises:
            UsageError: what is read of a word is not valid Unicode.
        """
        characters = sum(map(len, words))
        backwards = self._settings.truncation_side == "left"
        for size in _sizes(characters, max_length):
            read = _last_characters(words, size) if backwards else _first_characters(words, size)
            inside = range(1, len(read)) if backwards else range(len(read) - 1)
            # Words know nothing of each other, so all but the cut one are what they are in the whole text.
            if sum(word in inside for word in self._encoding(read).word_ids) > max_length:
                break
        encoding = self._truncated(read, max_length)
        truncated = size < characters or bool(encoding.overflowing)
        before = len(words) - len(read) if backwards else 0
        owners = [None if word is None else before + word for word in encoding.word_ids]
        return list(encoding.ids), self._types(encoding), owners, truncated

    def _encoding(
        self, text: str | list[str], pair: str | None = None, *, special_tokens: bool = True
    ) -> Any:
        try:
            ("".join(text) if isinstance(text, list) else text + (pair or "")).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not valid Unicode ({error.reason} at character {error.start})"
            ) from error
        try:
            encoding = self._tokenizer.encode(
                text, pair, is_pretokenized=isinstance(text, list), add_special_tokens=special_tokens
            )
        except Exception as error:  # as above: a vocabulary without its own unknown token, for one
            raise self._damaged(error) from error
        largest = max(max(encoding.ids, default=0), max(encoding.type_ids, default=0))
        if largest > _LARGEST:
            raise self._damaged(f"it gives {largest} for a token or its type")
        return encoding

    def _damaged(self, error: object) -> BundleError:
        return BundleError(f"{self._path}: the tokenizer fails ({error}): copy the bundle again")

    def token(self, token: int) -> str:
        """The text of a single token, special or not."""
        return self._decoded([token], skip_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._decoded(ids, skip_special_tokens=True)

    def _decoded(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        try:
            return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
        except Exception as error:
            raise self._damaged(error) from error


def _sizes(characters: int, tokens: int) -> Iterator[int]:
    """How many characters to read of a text in search of so many tokens: more and more, up to the most."""
    most = min(characters, max(MOST_CHARACTERS, 4 * _PER_TOKEN * tokens))
    size = max(_FIRST, _PER_TOKEN * tokens)
    while size < most:
        yield size
        size *= 2
    yield most


def _settled(encoding: Any, size: int) -> int:
    """Tokens that are the same whatever follows the `size` characters: not those of the last two words, as
    tokenizers split a text, nor those near the end."""
    words = encoding.word_ids
    last = max((word for word in words if word is not None), default=0)
    return sum(
        word is not None and word < last - 1 and end <= size - _MARGIN
        for word, (_, end) in zip(words, encoding.offsets, strict=True)
    )


def _settled_behind(encoding: Any) -> int:
    """Tokens that are the same whatever stands before the text: see `_settled`."""
    return sum(
        word is not None and word > 1 and start >= _MARGIN
        for word, (start, _) in zip(encoding.word_ids, encoding.offsets, strict=True)
    )


def _first_characters(words: list[str], size: int) -> list[str]:
    """The first words of a text, `size` characters together; of the last one maybe a part."""
    read = []
    for word in words:
        read.append(word[:size])
        size -= len(word)
        if size <= 0:
            break
    return read


def _last_characters(words: list[str], size: int) -> list[str]:
    """The last words of a text, `size` characters together; of the first one maybe a part."""
    return [
        word[::-1] for word in reversed(_first_characters([word[::-1] for word in reversed(words)], size))
    ]
