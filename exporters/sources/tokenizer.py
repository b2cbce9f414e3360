"""The tokenizer of a model's folder, as transformers reads it of all files together.

A device has `tokenizer.json` and little else. What transformers changes in it (a class's arguments, tokens
that are added at either end, sentence-transformers' lower-casing) is written into the bundle's copy.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import tokenizers
import transformers

from edgepeft.bundle.manifest import TextSettings

from .model_files import read_copied_files, read_json
from .quiet import quiet
from .settings import SENTENCES, TOKENIZER, check_refused

_FILE = "tokenizer.json"
_TEMPLATE_FILE = "chat_template.jinja"


@dataclass
class TokenizerFiles:
    """What a bundle holds of a tokenizer.

    Attributes:
        files: by name.
        settings: how it is asked.
        tokenizer: transformers' own, to compare with; None where there is none that it reads.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    settings: TextSettings = field(default_factory=TextSettings)
    tokenizer: Any = None


def read_tokenizer(model: str, *, embeds: bool = False, writes: bool = False) -> TokenizerFiles:
    """The tokenizer of a folder or hub id.

    Args:
        embeds: whether sentence-transformers' settings hold.
        writes: whether texts are made of tokens.

    Raises:
        ExportError: something is set that the runtime does not do.
    """
    files = read_copied_files(model)
    tokenizer = _load(model) if _FILE in files or read_json(model, TOKENIZER) is not None else None
    if tokenizer is None:
        return TokenizerFiles(files)
    return described(model, tokenizer, files, writes=writes, lower=embeds and lowers(model))


def described(
    name: str, tokenizer: Any, files: dict[str, bytes], *, writes: bool = False, lower: bool = False
) -> TokenizerFiles:
    """`files` as `tokenizer` says that they should be, and its settings; those that say so already stay as
    they are.

    Raises:
        ExportError: something is set that the runtime does not do.
    """
    backend = tokenizer.backend_tokenizer
    if writes:
        cleans = "clean_up_tokenization_spaces"
        # transformers does it to no BPE tokenizer, unless it is told so by the other, longer name.
        forced = f"{cleans}_for_bpe_even_though_it_will_corrupt_output"
        if not isinstance(backend.model, tokenizers.models.BPE) or getattr(tokenizer, forced, False):
            check_refused(name, TOKENIZER, [(cleans, getattr(tokenizer, cleans, False))])
    if lower:
        backend = tokenizers.Tokenizer.from_str(backend.to_str())  # transformers' own stays as it is
        lower_case(backend)
    files = {**files, _FILE: _unless_equal(files.get(_FILE), backend.to_str())}
    config = json.loads(files.get(TOKENIZER) or b"{}")
    said = {**config, **_special_tokens(tokenizer, config)}
    if isinstance(tokenizer.chat_template, dict):
        said["chat_template"] = [
            {"name": name, "template": template} for name, template in tokenizer.chat_template.items()
        ]
        files.pop(_TEMPLATE_FILE, None)
    if said != config:
        files[TOKENIZER] = json.dumps(said, ensure_ascii=False, indent=1).encode()
    settings = TextSettings(
        truncation_side=tokenizer.truncation_side,
        token_types="token_type_ids" in tokenizer.model_input_names,
        split_special_tokens=bool(tokenizer.split_special_tokens),
    )
    return TokenizerFiles(files, settings, tokenizer)


def lowers(model: str) -> bool:
    """Whether sentence-transformers lowers the case of what a model reads."""
    return bool((read_json(model, SENTENCES) or {}).get("do_lower_case"))


def lower_case(tokenizer: Any) -> None:
    """Have a tokenizer of the package `tokenizers` lower the case of a text before anything else, as
    sentence-transformers does it."""
    lower = tokenizers.normalizers.Lowercase()
    before = [lower] if tokenizer.normalizer is None else [lower, tokenizer.normalizer]
    tokenizer.normalizer = tokenizers.normalizers.Sequence(before)


def _load(model: str) -> Any:
    """transformers' tokenizer; None where it makes none that the package `tokenizers` runs.

    A class that was guessed may be of another vocabulary and read no text at all: then that of the file is
    taken, which may have no token for what it does not know, and read not every text, either.
    """
    for maker in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        try:
            with quiet():
                found = maker.from_pretrained(model, trust_remote_code=False)
                if maker is transformers.AutoTokenizer:
                    found("a 北")
        except Exception:  # whatever the tokenizer's own code raises
            continue
        if getattr(found, "backend_tokenizer", None) is not None:
            return found
    return None


def _unless_equal(data: bytes | None, text: str) -> bytes:
    """`data`, if it says what `text` does; padding and truncation are the caller's. Without the spaces that
    make a file legible, and twice as large."""
    said = json.loads(text if data is None or _content(data) != _content(text) else data)
    return json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()


def _content(text: str | bytes) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(text)
    return {key: value for key, value in content.items() if key not in ("padding", "truncation")}


def _special_tokens(tokenizer: Any, config: dict[str, Any]) -> dict[str, str]:
    """The tokens that chat templates are given and `config` does not name, or names otherwise."""

    def said(name: str) -> Any:
        value = config.get(name)
        return value.get("content") if isinstance(value, dict) else value

    return {name: token for name, token in tokenizer.special_tokens_map.items() if said(name) != token}
