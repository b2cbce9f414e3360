"""A tokenizer with fewer tokens, which reads the texts that it was made for as before.

So that any text can be read, and every kept token is still made, more than the tokens of the texts stay:
bytes or single characters, and for BPE what the merges make on the way to a kept token. A merge is kept where
both its parts and its result are: at every step of a text of before, the first merge of the list that applies
is then the same one. A longest match (WordPiece) and a best sum (Unigram) stay what they are when others are
taken away.

Source: `tokenizer.json` of the package `tokenizers`, 0.20 and later.
"""

import itertools
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from edgepeft.errors import ExportError

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
#: Special tokens that stand for nothing yet, by the names that makers of models give them.
_RESERVED = re.compile(r"unused|reserved", re.IGNORECASE)
#: What stays of single characters where others can be made of bytes; `▁` is SentencePiece's blank.
_ASCII = frozenset(f"{string.printable}▁")


class TokenizerVocabulary:
    """The tokens of a `tokenizer.json`.

    Args:
        name: of the model, for messages.
        content: the file's.

    Attributes:
        content: the same.
        model: the part that makes tokens of words.
        tokens: its vocabulary, numbers by token.
        added: tokens that are looked for in a text first, numbers by token; some are in `tokens`, too.

    Raises:
        ExportError: the model is of a type that cannot lose tokens.
    """

    def __init__(self, name: str, content: Mapping[str, Any]) -> None:
        self.content = content
        self.model: Mapping[str, Any] = content["model"]
        kind = self.model.get("type")
        if kind not in ("BPE", "Unigram", "WordPiece"):
            raise ExportError(
                f"{name}: its tokenizer is a {kind}, which makes a word that it lacks of no others: "
                "--keep-vocabulary takes BPE, Unigram and WordPiece"
            )
        vocabulary = self.model["vocab"]
        self.tokens: dict[str, int] = (
            {token: index for index, (token, _) in enumerate(vocabulary)}
            if kind == "Unigram"
            else dict(vocabulary)
        )
        self.added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}

    def needed(self, used: Iterable[int]) -> set[int]:
        """`used` and what else has to stay, so that all of it is made and any text can be read."""
        found = set(used) | self._named() | self._alphabet()
        if self.model["type"] == "BPE":
            found |= self._on_the_way(found)
        if self.model["type"] == "Unigram" and self.tokens:
            # What is not known counts a little less than the least of all.
            scores = [score for _, score in self.model["vocab"]]
            found.add(scores.index(min(scores)))
        return found

    def in_order(self, needed: Iterable[int]) -> list[int]:
        """Numbers of tokens in the order that they get new ones in: `tokenizers` counts added ones, where
        they are not in the model's vocabulary, behind that."""
        own, wanted = set(self.tokens.values()), set(needed)
        return sorted(wanted & own) + sorted((wanted & set(self.added.values())) - own)

    def trimmed(self, kept: Sequence[int]) -> dict[str, Any]:
        """The file's content with the tokens `kept` alone, numbered by their places there."""
        new = {old: index for index, old in enumerate(kept)}
        content = dict(self.content)
        content["model"] = self._trimmed_model(new)
        content["added_tokens"] = [
            {**token, "id": new[token["id"]]}
            for token in sorted(content.get("added_tokens") or (), key=lambda one: new.get(one["id"], -1))
            if token["id"] in new
        ]
        content["post_processor"] = _renumbered(content.get("post_processor"), new)
        if content.get("padding"):
            padding = content["padding"]
            content["padding"] = {**padding, "pad_id": new.get(padding["pad_id"], 0)}
        return content

    def _trimmed_model(self, new: Mapping[int, int]) -> dict[str, Any]:
        model = dict(self.model)
        kept = sorted((new[old], token) for token, old in self.tokens.items() if old in new)
        if model["type"] == "Unigram":
            by_token = dict(model["vocab"])
            model["vocab"] = [[token, by_token[token]] for _, token in kept]
            model["unk_id"] = new.get(model.get("unk_id"))  # type: ignore[arg-type]
            return model
        model["vocab"] = {token: number for number, token in kept}
        if model["type"] == "BPE":
            vocabulary = model["vocab"]
            model["merges"] = [
                merge
                for merge in model["merges"]
                if all(part in vocabulary for part in (*_pair(merge), self._joined(*_pair(merge))))
            ]
        return model

    def _named(self) -> set[int]:
        """Special tokens, but those that are reserved, and tokens that the file itself names."""
        found = {
            token["id"]
            for token in self.content.get("added_tokens") or ()
            if token["special"] and not _RESERVED.search(token["content"])
        }
        found |= set(_numbers(self.content.get("post_processor")))
        if (padding := self.content.get("padding")) is not None:
            found.add(padding["pad_id"])
        unknown = self.model.get("unk_token")
        found |= {self.tokens[unknown]} if unknown in self.tokens else set()
        if self.model.get("unk_id") is not None:
            found.add(self.model["unk_id"])
        return found

    def _alphabet(self) -> set[int]:
        """Of what any text can be made: bytes where there are any, else single characters."""
        single = {token: number for token, number in self.tokens.items() if len(self._bare(token)) == 1}
        if _has_type(self.content, "ByteLevel"):
            letters = frozenset(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        elif self.model.get("byte_fallback"):
            letters = _ASCII
        else:
            return set(single.values())
        found = {number for token, number in single.items() if self._bare(token) in letters}
        return found | {number for token, number in self.tokens.items() if _BYTE.fullmatch(token)}

    def _bare(self, token: str) -> str:
        """A token without what marks it as the inside or the end of a word."""
        prefix = self.model.get("continuing_subword_prefix") or ""
        suffix = self.model.get("end_of_word_suffix") or ""
        return token.removeprefix(prefix).removesuffix(suffix) or token

    def _on_the_way(self, found: Iterable[int]) -> set[int]:
        """What BPE makes of the characters of tokens until it has made these."""
        ranks = {_pair(merge): rank for rank, merge in enumerate(self.model["merges"])}
        names = {number: token for token, number in self.tokens.items()}
        made: set[str] = set()
        for number in found:
            symbols = self._symbols(names[number]) if number in names else []
            made.update(symbols)
            while len(symbols) > 1:
                pairs = [ranks.get(pair, len(ranks)) for pair in itertools.pairwise(symbols)]
                place = min(range(len(pairs)), key=pairs.__getitem__)
                if pairs[place] == len(ranks):  # it is found whole, or by the added tokens
                    break
                symbols[place : place + 2] = [self._joined(symbols[place], symbols[place + 1])]
                made.add(symbols[place])
        return {self.tokens[token] for token in made if token in self.tokens}

    def _symbols(self, token: str) -> list[str]:
        """What a token's merges begin with."""
        prefix = self.model.get("continuing_subword_prefix") or ""
        suffix = self.model.get("end_of_word_suffix") or ""
        symbols = list(self._bare(token))
        inside = bool(prefix) and token.startswith(prefix)
        symbols = [f"{prefix}{part}" if inside or place else part for place, part in enumerate(symbols)]
        if suffix and token.endswith(suffix) and symbols:
            symbols[-1] += suffix
        return symbols

    def _joined(self, left: str, right: str) -> str:
        return left + right.removeprefix(self.model.get("continuing_subword_prefix") or "")


def trimmed_files(name: str, files: Mapping[str, bytes], kept: Sequence[int]) -> dict[str, bytes]:
    """A bundle's files of a tokenizer with the tokens `kept` alone.

    Args:
        name: of the model, for messages.
        files: by name; the others of them name tokens by what they are.
        kept: numbers of tokens, in the order of their new ones.
    """
    found = dict(files)
    vocabulary = TokenizerVocabulary(name, json.loads(files[TOKENIZER_FILE]))
    found[TOKENIZER_FILE] = json.dumps(vocabulary.trimmed(kept), ensure_ascii=False).encode()
    config = json.loads(files.get(CONFIG_FILE) or b"{}")
    if decoder := config.get("added_tokens_decoder"):
        new = {str(old): str(index) for index, old in enumerate(kept)}
        config["added_tokens_decoder"] = {new[old]: token for old, token in decoder.items() if old in new}
        found[CONFIG_FILE] = json.dumps(config, ensure_ascii=False, indent=1).encode()
    return found


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Both parts of a merge, which older files write as one text."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _has_type(part: Any, name: str) -> bool:
    """Whether a part of a `tokenizer.json` is, or has inside, one of a type."""
    if isinstance(part, list):
        return any(_has_type(item, name) for item in part)
    if not isinstance(part, Mapping):
        return False
    inside = (value for key, value in part.items() if key not in ("model", "added_tokens"))
    return part.get("type") == name or any(_has_type(value, name) for value in inside)


def _numbers(processor: Any) -> list[int]:
    """Numbers of tokens that a post-processor adds to a text."""
    if processor is None:
        return []
    found = [processor[key][1] for key in ("sep", "cls") if key in processor]
    for token in (processor.get("special_tokens") or {}).values():
        found += token["ids"]
    for part in processor.get("processors") or ():
        found += _numbers(part)
    return found


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with other numbers of tokens."""
    if processor is None:
        return None
    changed = dict(processor)
    for key in {"sep", "cls"} & changed.keys():
        token, number = changed[key]
        changed[key] = [token, new[number]]
    if "special_tokens" in changed:
        changed["special_tokens"] = {
            name: {**token, "ids": [new[number] for number in token["ids"]]}
            for name, token in changed["special_tokens"].items()
        }
    if "processors" in changed:
        changed["processors"] = [_renumbered(part, new) for part in changed["processors"]]
    return changed
