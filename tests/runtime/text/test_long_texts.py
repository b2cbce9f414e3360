"""Texts of which only some tokens are wanted, against `tokenizers` on the whole text."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from edgepeft.bundle.manifest import TextSettings
from edgepeft.bundle.reader import open_bundle
from edgepeft.errors import UsageError
from edgepeft.runtime.memory.process import PeakMemory, read_memory, release_freed_memory
from edgepeft.runtime.text.tokenizer import MOST_CHARACTERS, Text

from .. import tiny

LINES = [
    line
    for pages in ("decisions/*.md", "memory.md", "troubleshooting.md")
    for page in sorted((Path(__file__).parents[3] / "docs").glob(pages))
    for line in page.read_text("utf-8").splitlines()
]


def word_piece() -> tokenizers.Tokenizer:
    """BERT's: lower case, no accents, a character each of Chinese, `[CLS]` and `[SEP]` around it."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=1500, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's, with a chat's special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*LINES, "a" * 100, " " * 100], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """T5's: the likeliest pieces, and `</s>` at the end."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1000, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


MAKERS = (word_piece, byte_level, unigram)


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tokenizers.Tokenizer, Text]:
    """A tokenizer, and that of a bundle with it."""
    make: Callable[[], tokenizers.Tokenizer] = request.param
    tokenizer = make()
    folder = tmp_path_factory.mktemp("bundle") / "b"
    tiny.write_bundle(folder, tokenizer=json.loads(tokenizer.to_str()))
    return tokenizer, Text(open_bundle(folder))


def prose(count: int) -> str:
    words = " ".join(LINES).split(" ")
    return " ".join(random.Random(0).choices(words, k=count))


TEXTS = {
    "prose": prose(4_000),
    "Chinese": "北京是中华人民共和国的首都。上海很大。" * 1000,
    "Chinese without an end": "北京是中华人民共和国的首都" * 1500,
    "emoji": "👩‍👩‍👧‍👦🙂🏳️‍🌈" * 2000,
    "an endless word": "a" * 20_000,
    "an endless word of many letters": "".join(random.Random(1).choices("abcdefghij", k=20_000)),
    "digits": "31415926535 " * 2000,
    "spaces": " " * 20_000,
    "spaces and words": ("a" + " " * 100) * 300,
    "accents apart from their letters": "e\u0301te\u0301 " * 4_000,
    "special tokens": "<|im_start|>user\nwhat is <|im_end|>\n" * 1000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_cut_gives_the_tokens_of_the_whole(
    both: tuple[tokenizers.Tokenizer, Text], name: str
) -> None:
    """Its first, its last, and those that a truncated encoding has, with their characters."""
    tokenizer, text = both
    content = TEXTS[name]
    for part in (content, content[:1500], content[:50], content[:1]):
        tokenizer.no_truncation()
        whole = tokenizer.encode(part)
        for count in (2, 7, 128):
            assert text.first(part, count) == whole.ids[:count]
            if not (isinstance(tokenizer.model, models.Unigram) and name.startswith("an endless word")):
                # The likeliest pieces of an endless word depend on both of its ends.
                assert text.last(part, count) == whole.ids[-count:]
            ids, type_ids, spans, truncated = text.cut(part, count)
            tokenizer.enable_truncation(count)
            want = tokenizer.encode(part)
            tokenizer.no_truncation()
            assert (ids, type_ids) == (want.ids, want.type_ids)
            # A word that is too long to be read ends where reading does, or a character before.
            assert [(start, min(end, MOST_CHARACTERS - 1)) for start, end in spans] == [
                (0, 0) if special else (start, min(end, MOST_CHARACTERS - 1))
                for (start, end), special in zip(want.offsets, want.special_tokens_mask, strict=True)
            ]
            assert truncated == bool(want.overflowing) or len(part) > MOST_CHARACTERS


@pytest.mark.parametrize("words", [["a"] * 2000, ["unaffordable", "", " ", "北京"] * 500, ["a" * 20_000]])
def test_words_that_are_cut_give_the_tokens_of_all(
    both: tuple[tokenizers.Tokenizer, Text], words: list[str]
) -> None:
    """And the words that they are of."""
    tokenizer, text = both
    tokenizer.no_truncation()
    for part in (words, words[:2]):
        tokenizer.enable_truncation(40)
        whole = tokenizer.encode(part, is_pretokenized=True)
        ids, type_ids, owners, truncated = text.encode_words(part, 40)
        assert (ids, type_ids, owners) == (whole.ids, whole.type_ids, whole.word_ids)
        assert truncated == bool(whole.overflowing) or sum(map(len, part)) > MOST_CHARACTERS


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_cut_on_the_left_gives_the_tokens_of_the_whole(
    both: tuple[tokenizers.Tokenizer, Text], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So do words, and the second of two texts."""
    tokenizer, text = both
    if isinstance(tokenizer.model, models.Unigram) and name.startswith("an endless word"):
        pytest.skip("the likeliest pieces of an endless word depend on both of its ends")
    monkeypatch.setattr(text, "_settings", TextSettings(truncation_side="left"))
    content = TEXTS[name]
    words = content[:4000].split(" ")
    for count in (7, 128):
        tokenizer.enable_truncation(count, direction="left")
        want = tokenizer.encode(content)
        ids, type_ids, spans, truncated = text.cut(content, count)
        assert (ids, type_ids) == (want.ids, want.type_ids)
        assert truncated == bool(want.overflowing) or len(content) > MOST_CHARACTERS
        kept = [
            span
            for span, special in zip(want.offsets, want.special_tokens_mask, strict=True)
            if not special and span[0] > len(content) - MOST_CHARACTERS + 256
        ]
        assert spans[len(spans) - len(kept) :] == kept or spans[-1 - len(kept) : -1] == kept
        pair = tokenizer.encode(LINES[0], content)
        assert text.cut(LINES[0], count, content)[:2] == (pair.ids, pair.type_ids)
        want = tokenizer.encode(words, is_pretokenized=True)
        ids, type_ids, owners, _ = text.encode_words(words, count)
        assert (ids, type_ids, owners) == (want.ids, want.type_ids, want.word_ids)


def test_a_text_of_a_megabyte_takes_no_memory(both: tuple[tokenizers.Tokenizer, Text]) -> None:
    """Given whole, it takes about a hundred."""
    _, text = both
    for content in ("a" * 2**20, " " * 2**20, prose(2**17)):
        text.cut(content, 128)
        release_freed_memory()
        before_bytes = read_memory().resident_bytes
        peak = PeakMemory()
        text.cut(content, 128)
        text.first(content, 128)
        text.last(content, 128)
        text.encode_words([content, content], 128)
        assert peak.nbytes - before_bytes < 20 * 2**20


def test_what_is_cut_off_may_be_anything(both: tuple[tokenizers.Tokenizer, Text]) -> None:
    """What is read may not."""
    _, text = both
    assert text.cut("a b " * 1000 + "\ud800", 4).truncated
    with pytest.raises(UsageError, match="not valid Unicode"):
        text.cut("a b \ud800", 4)
