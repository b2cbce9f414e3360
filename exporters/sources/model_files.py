"""The files that a model ships beside its weights: its tokenizer, the settings of sentence-transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from edgepeft.errors import ExportError

from .base import Pooling
from .settings import SENTENCES, check_refused

#: Files that a bundle holds as they are.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
#: Ways to pool, by sentence-transformers' older names of their switches.
_SWITCHES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


def read_file(model: str, name: str) -> bytes | None:
    """A file of a folder or hub id; None where there is no such file."""
    folder = Path(model)
    if folder.is_dir():
        return (folder / name).read_bytes() if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(model, name)).read_bytes()
    except (EntryNotFoundError, LocalEntryNotFoundError):  # the latter: offline, and not among what was kept
        return None


def read_copied_files(model: str) -> dict[str, bytes]:
    """Those of `COPIED` that a folder or hub id has, by name."""
    found = {name: read_file(model, name) for name in COPIED}
    return {name: data for name, data in found.items() if data is not None}


def read_json(model: str, name: str, expected: type = dict) -> Any:
    """A JSON file of a folder or hub id, which holds an object, or a list where one is `expected`; None where
    there is no such file.

    Raises:
        ExportError: it is not JSON, or holds something else.
    """
    data = read_file(model, name)
    if data is None:
        return None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{model}: {name} is not JSON ({error})") from error
    if not isinstance(content, expected):
        wanted = "an object" if expected is dict else "a list"
        raise ExportError(f"{model}: {name} holds a {type(content).__name__}, expected {wanted}")
    return content


def read_pooling(model: str | None) -> Pooling:
    """sentence-transformers' own settings where a model has them, else its default: mean, normalized.

    Raises:
        ExportError: it pools in another way, or has modules that edgepeft does not export.
    """
    modules = None if model is None else read_json(model, "modules.json", list)
    if model is None or modules is None:
        return Pooling()
    try:
        kinds = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
        settings = read_json(model, f"{kinds['Pooling']}/config.json") or {}
        named = read_json(model, "config_sentence_transformers.json") or {}
        prompts = {str(name): str(text) for name, text in (named.get("prompts") or {}).items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{model}: cannot read the sentence-transformers modules: {error!r}") from error
    check_refused(model, SENTENCES, (read_json(model, SENTENCES) or {}).items())
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ExportError(f"{model}: sentence-transformers module {sorted(unknown)[0]!r} is not supported")
    if not settings.get("include_prompt", True) and any(prompts.values()):
        raise ExportError(
            f"{model}: leaves prompts out of its pooling (include_prompt), which is not supported"
        )
    default = named.get("default_prompt_name")
    return Pooling(
        _mode(model, settings), "Normalize" in kinds, prompts, default if default in prompts else None
    )


def read_max_seq_length(model: str) -> int | None:
    """Tokens that sentence-transformers cuts texts to; None where it does not say."""
    declared = (read_json(model, "sentence_bert_config.json") or {}).get("max_seq_length")
    return declared if isinstance(declared, int) and declared > 0 else None


def _mode(model: str, settings: dict[str, Any]) -> str:
    active = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    mode = settings.get("pooling_mode", [_SWITCHES.get(name, name) for name in active])
    modes = [mode] if isinstance(mode, str) else mode
    if len(modes) != 1 or modes[0] not in _SWITCHES.values():
        raise ExportError(f"{model}: pooling {modes} is not supported: mean, CLS or max")
    return str(modes[0])


def mask_token_id(files: Mapping[str, bytes]) -> int | None:
    """The token that stands for what is to be filled in; None where the tokenizer has none."""
    if not {"tokenizer.json", "tokenizer_config.json"} <= files.keys():
        return None
    token = json.loads(files["tokenizer_config.json"]).get("mask_token")
    token = token.get("content") if isinstance(token, dict) else token
    tokenizer = json.loads(files["tokenizer.json"])
    added = {item["content"]: item["id"] for item in tokenizer.get("added_tokens") or ()}
    vocabulary = tokenizer.get("model", {}).get("vocab")
    known = added | (vocabulary if isinstance(vocabulary, dict) else {})
    return known.get(token)
