"""Pieces of text against the text decoded whole, and stop texts against a search in it."""

import itertools
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from edgepeft.runtime.generation.detokenizer import Detokenizer, StopTexts


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's way: a token is bytes, so a character may be cut into several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """Llama 2's way: a word brings its space, a text's first space is left out, other bytes are tokens."""
    words = ["▁", "▁the", "▁a", "cat", "▁cat", "s", ".", "é", "▁▁"]
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    vocabulary |= {word: 257 + index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """BERT's way: words are joined with spaces."""
    vocabulary = {"[UNK]": 0, "run": 1, "##ning": 2, "fast": 3, "##er": 4, "ö": 5}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


TOKENIZERS = {make.__name__: make() for make in (byte_level, sentencepiece, word_piece)}


def pieces(name: str, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZERS[name].decode)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_text_decoded_whole(name: str, data: st.DataObject) -> None:
    """Characters of one to four bytes, any words, special tokens, bytes that are no text; only a character
    that is never finished is missing at the end."""
    tokenizer = TOKENIZERS[name]
    # What stands for bytes that are no text depends on how many are decoded at once, where they are tokens.
    first = 257 if name == "sentencepiece" else 0
    tokens = st.lists(st.integers(first, tokenizer.get_vocab_size() - 1), max_size=3)
    text = st.text(max_size=6).map(lambda text: tokenizer.encode(text).ids)
    if name == "word_piece":
        text = tokens
    ids = data.draw(st.lists(text | tokens, max_size=5).map(lambda parts: [*itertools.chain(*parts)]))
    assert "".join(pieces(name, ids)) == tokenizer.decode(ids).rstrip("�")
    cut = ids[: data.draw(st.integers(0, len(ids)))]
    if name == "byte_level":
        assert "".join(pieces(name, cut)) == tokenizer.decode(cut).rstrip("�")


def test_a_character_comes_whole() -> None:
    """With the token that ends it, not before."""
    ids = TOKENIZERS["byte_level"].encode("aé€🙂").ids
    assert pieces("byte_level", ids) == ["a", "", "é", "", "", "€", "", "", "", "🙂", ""]
    assert pieces("byte_level", ids[:-1])[-1] == ""


def test_spaces_stand_where_they_belong() -> None:
    """A first word has none before it, later ones have."""
    ids = [TOKENIZERS["sentencepiece"].token_to_id(word) for word in ("▁the", "▁cat", "s", "▁a", "cat", ".")]
    assert pieces("sentencepiece", ids) == ["the", " cat", "s", " a", "cat", ".", ""]


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.text("ab\n", max_size=3), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_nothing_of_a_stop_text_is_given_out(parts: list[str], stops: list[str]) -> None:
    """Wherever the pieces are cut: the text before the stop text that is whole first, and at the latest when
    the text ends, all of it."""
    whole = "".join(parts)
    matcher = StopTexts(stops)
    given_out = ""
    for index, part in enumerate(parts):
        given_out += matcher.add(part)
        so_far = "".join(parts[: index + 1])
        assert so_far.startswith(given_out)
        assert not any(stop in given_out for stop in stops)
        if matcher.found:
            places = [so_far.find(stop) for stop in stops if stop in so_far]
            assert given_out == so_far[: min(places)]
            assert not any(stop in "".join(parts[:index]) for stop in stops)
            assert matcher.add("more") == matcher.finish() == ""
            return
    given_out += matcher.finish()
    assert given_out == whole
    assert not any(stop in whole for stop in stops)
