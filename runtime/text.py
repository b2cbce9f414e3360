"""Text to tokens and back, with the tokenizer the base model shipped (the `text` extra)."""

from typing import Any

from edgepeft.bundle.reader import Bundle
from edgepeft.errors import BundleError, MissingExtraError, UsageError

TOKENIZER_FILE = "tokenizer.json"


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
        path = bundle.file(TOKENIZER_FILE)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises nothing more specific
            raise BundleError(
                f"{path}: tokenizers {tokenizers.__version__} cannot read it ({error})"
            ) from error
        # Sentence encoders ship with both switched on, at lengths of their own.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(
        self, text: str, max_length: int | None = None, special_tokens: bool = True
    ) -> tuple[list[int], list[int]]:
        """Token ids and token type ids of a text, special tokens included, cut to `max_length` tokens.

        Raises:
            UsageError: the text is not valid Unicode.
        """
        encoding = self._encoding(text, max_length, special_tokens)
        return list(encoding.ids), list(encoding.type_ids)

    def _encoding(self, text: str, max_length: int | None, special_tokens: bool) -> Any:
        if max_length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(max_length)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not valid Unicode ({error.reason} at character {error.start})"
            ) from error
        return self._tokenizer.encode(text, add_special_tokens=special_tokens)

    def encode_words(self, words: list[str]) -> tuple[list[int], list[int], list[int | None]]:
        """Token ids, token type ids and the number of each token's word (None: a special token) of a text in
        words.

        Raises:
            UsageError: a word is not valid Unicode.
        """
        self._tokenizer.no_truncation()
        try:
            "".join(words).encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not valid Unicode ({error.reason})") from error
        encoding = self._tokenizer.encode(words, is_pretokenized=True)
        return list(encoding.ids), list(encoding.type_ids), list(encoding.word_ids)

    def token(self, token: int) -> str:
        """The text of a single token, special or not."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def encode_with_offsets(
        self, text: str, max_length: int
    ) -> tuple[list[int], list[int], list[tuple[int, int]], bool]:
        """As `encode`, with the characters `[first, last)` of the text that each token is ((0, 0): a special
        token), and whether the text was cut.

        Raises:
            UsageError: the text is not valid Unicode.
        """
        encoding = self._encoding(text, max_length, special_tokens=True)
        spans = [
            (0, 0) if special else span
            for span, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        ]
        return list(encoding.ids), list(encoding.type_ids), spans, bool(encoding.overflowing)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
