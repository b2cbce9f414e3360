"""Tokens to text as they come: whole characters only, and nothing that a stop text begins with."""

from collections.abc import Callable, Sequence

_INCOMPLETE = "�"
"""What tokenizers decode the bytes of an unfinished character to."""


class Detokenizer:
    """Text of tokens that come one at a time.

    What a token reads depends on what stands before it (SentencePiece leaves out the space before a text's
    first word, and a character may be cut into several tokens). So the tokens since the last whole character
    are decoded together with the piece before them, and what is new of that is given out.

    Args:
        decode: the text of token ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._before: list[int] = []  # the tokens of the last piece
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes; empty where it completes none."""
        self._new.append(token)
        piece = self._piece()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._before, self._new = self._new, []
        return piece

    def finish(self) -> str:
        """What is left, without a character that will never be whole."""
        piece = self._piece()
        self._before, self._new = self._new, []
        return piece.rstrip(_INCOMPLETE)

    def _piece(self) -> str:
        before = self._decode(self._before)
        return self._decode(self._before + self._new)[len(before) :]


class StopTexts:
    """Holds back what may be the beginning of a stop text, and ends before the first one.

    Args:
        texts: not empty, each.

    Attributes:
        found: whether one was met.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """What of the text up to here may be given out; after a stop text, nothing."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._texts if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._texts), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back and turned out to be no stop text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
