"""Trimmed tokenizers, run by the package `tokenizers`, against whole ones."""

import json
from typing import Any

import pytest
import tokenizers

from edgepeft.errors import ExportError
from edgepeft.exporters.shrink.tokenizer_vocabulary import TokenizerVocabulary, trimmed_files

from .tokenizer_kinds import KINDS, OTHERS, kept, texts

Pair = tuple[tokenizers.Tokenizer, tokenizers.Tokenizer, list[int]]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    """A tokenizer, the same trimmed to what `kept` needs, and old numbers of tokens by new ones."""
    whole = KINDS[request.param]()
    used = {token for text in kept() for token in whole.encode(text).ids}
    files = {"tokenizer.json": whole.to_str().encode()}
    vocabulary = TokenizerVocabulary("tiny", json.loads(files["tokenizer.json"]))
    numbers = vocabulary.in_order(vocabulary.needed(used))
    trimmed = trimmed_files("tiny", files, numbers)["tokenizer.json"]
    return whole, tokenizers.Tokenizer.from_str(trimmed.decode()), numbers


def test_kept_texts_are_read_and_written_as_before(pair: Pair) -> None:
    whole, trimmed, numbers = pair
    for text in kept():
        expected, got = whole.encode(text), trimmed.encode(text)
        assert got.tokens == expected.tokens
        assert [numbers[token] for token in got.ids] == expected.ids
        assert got.offsets == expected.offsets
        for skip in (True, False):
            assert trimmed.decode(got.ids, skip_special_tokens=skip) == whole.decode(
                expected.ids, skip_special_tokens=skip
            )
    first, second = kept()[:2]
    assert trimmed.encode(first, second).tokens == whole.encode(first, second).tokens


def test_numbers_are_dense_and_the_tokens_are_the_same(pair: Pair) -> None:
    whole, trimmed, numbers = pair
    assert trimmed.get_vocab_size() == len(numbers) < 0.75 * whole.get_vocab_size()
    assert [trimmed.id_to_token(new) for new in range(len(numbers))] == [
        whole.id_to_token(old) for old in numbers
    ]
    again = tokenizers.Tokenizer.from_str(trimmed.to_str())
    assert again.get_vocab() == trimmed.get_vocab()
    special = {token.content for token in whole.get_added_tokens_decoder().values()}
    dropped = special - set(trimmed.get_vocab())
    assert all("unused" in token or "reserved" in token for token in dropped)


def test_other_texts_can_be_read(pair: Pair) -> None:
    """What the whole tokenizer gets back of a text, the trimmed one gets back."""
    whole, trimmed, _ = pair
    unknown = json.loads(whole.to_str())["model"].get("unk_token") or "<unk>"
    for text in (*OTHERS, *texts("zipfile", "string", "heapq")):
        expected, got = whole.encode(text), trimmed.encode(text)
        assert trimmed.decode(got.ids) == whole.decode(expected.ids)
        if unknown not in expected.tokens:
            assert unknown not in got.tokens


def test_a_merge_that_makes_a_kept_token_stays_with_what_it_is_made_of() -> None:
    """`abcd` by `ab` and `cd`; `bc` is a token that no text has, and a merge that never comes first."""
    content: dict[str, Any] = {
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "cd": 5, "abcd": 6, "bc": 7, "e": 8, "de": 9},
            "merges": ["a b", "c d", ["ab", "cd"], "b c", "d e"],
            "byte_fallback": False,
        },
    }
    vocabulary = TokenizerVocabulary("tiny", content)
    numbers = vocabulary.in_order(vocabulary.needed([6]))
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 8]  # `e`, of which any text may be
    model = vocabulary.trimmed(numbers)["model"]
    assert model["merges"] == ["a b", "c d", ["ab", "cd"]]
    assert model["vocab"]["e"] == 7


def test_the_least_of_unigram_stays_since_what_is_unknown_counts_less() -> None:
    """Without it an unknown `x` and `zab` would be better than `xz` and `ab`."""
    pieces = [("<unk>", 0.0), ("xz", -14.0), ("ab", -14.0), ("zab", -1.0), ("rare", -30.0)]
    whole = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    assert whole.encode("xzab").tokens == ["xz", "ab"]
    assert whole.encode("zab").tokens == ["zab"]
    vocabulary = TokenizerVocabulary("tiny", json.loads(whole.to_str()))
    numbers = vocabulary.in_order(vocabulary.needed([1, 2, 3]))
    assert numbers == [0, 1, 2, 3, 4]
    without = tokenizers.Tokenizer.from_str(json.dumps(vocabulary.trimmed(numbers[:-1])))
    assert without.encode("xzab").tokens == ["x", "zab"]


def test_added_tokens_of_the_configuration_are_numbered_anew() -> None:
    whole = KINDS["words whole"]()
    vocabulary = TokenizerVocabulary("tiny", json.loads(whole.to_str()))
    decoder = {
        str(number): {"content": str(token)} for number, token in whole.get_added_tokens_decoder().items()
    }
    files = {
        "tokenizer.json": whole.to_str().encode(),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": decoder, "bos_token": "<s>"}).encode(),
        "chat_template.jinja": b"{{ messages }}",
    }
    numbers = vocabulary.in_order(vocabulary.needed([]))
    got = trimmed_files("tiny", files, numbers)
    assert got["chat_template.jinja"] == files["chat_template.jinja"]
    config = json.loads(got["tokenizer_config.json"])
    trimmed = tokenizers.Tokenizer.from_str(got["tokenizer.json"].decode())
    assert config["bos_token"] == "<s>"
    assert {int(number): token["content"] for number, token in config["added_tokens_decoder"].items()} == {
        number: str(token) for number, token in trimmed.get_added_tokens_decoder().items()
    }


def test_whole_words_are_refused() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ExportError, match=r"tiny: its tokenizer is a WordLevel.*BPE, Unigram and WordPiece"):
        TokenizerVocabulary("tiny", json.loads(words.to_str()))
