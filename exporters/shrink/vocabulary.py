"""A vocabulary trimmed to what texts need (`--keep-vocabulary`), and the proof that these are read as before.

Embedding and output layer have a row for every token of every language, which in a small model is most of it.
Rows of tokens that the texts of a device never have can go: nothing else of the model knows of them.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from edgepeft.adapters import BASE_LAYER, PREFIX, Adapter
from edgepeft.bundle.validation import TOKENLESS
from edgepeft.errors import AdapterError, UsageError, VerificationError
from edgepeft.runtime.records import Record, records

from ..calibration.records import reading_task
from ..options import ExportOptions
from ..sources.base import ModelSource
from ..sources.onnx_file import is_onnx_file
from ..sources.samples import run_once, sample_inputs
from ..sources.transformers_model import Source
from .kept_texts import Reading, readings
from .model_vocabulary import (
    PickedRows,
    named_tokens,
    pick_tokens,
    quantized_tables,
    table_names,
    token_rows,
)
from .tokenizer_vocabulary import CONFIG_FILE, TOKENIZER_FILE, TokenizerVocabulary, trimmed_files

#: Tokens that the model is run on, before and after.
_COMPARED = 32
#: Largest difference of an output, of the largest magnitude: the products of the output layer may be summed
#: in another order.
_TOLERANCE = 1e-5
_TEMPLATE_FILE = "chat_template.jinja"


def vocabulary_records(options: ExportOptions, model: Any) -> list[Record]:
    """The records whose tokens stay; none where nothing is to be trimmed.

    Raises:
        UsageError: the model is an ONNX file.
        DataError: the file cannot be read, or there is no record.
    """
    if options.keep_vocabulary is None:
        return []
    if is_onnx_file(model):
        raise UsageError(
            "--keep-vocabulary needs a transformers model: where the graph of an ONNX file knows its tokens "
            "cannot be told, so export the model that it was made of"
        )
    return list(records(options.keep_vocabulary))


def trim_vocabulary(
    source: ModelSource, kept_records: Sequence[Record], adapters: Mapping[str, Adapter], scratch: Path
) -> None:
    """Leave in `source` the tokens that `kept_records` need, and what makes other texts readable.

    Args:
        source: is changed: model, configurations, tokenizer and weights that are quantized already.
        kept_records: as the task reads them; lists of tokens are kept, too.
        adapters: by name.
        scratch: a folder for the tokenizer's files.

    Raises:
        UsageError: the model reads no texts, or has no tokenizer.
        ExportError: its tokenizer cannot lose tokens, or its quantized weights no rows.
        DataError: a record cannot be used.
        AdapterError: an adapter has rows of the vocabulary.
        VerificationError: a text is not read as before, or the model computes something else.
    """
    assert isinstance(source, Source)  # an ONNX file was refused
    _check(source, adapters)
    rows = token_rows(source.model)
    before = readings(reading_task(source, scratch / "before"), kept_records)
    kept = _kept(source, before, rows)
    new = {old: index for index, old in enumerate(kept)}
    probe = kept[:: max(1, len(kept) // _COMPARED)][: min(_COMPARED, source.max_length)]
    expected = _output(source, probe)
    if expected.shape[-1] >= rows:
        expected = expected[..., kept]
    _pick(source, kept)
    source.whole_vocab_size = rows
    _check_texts(before, readings(reading_task(source, scratch / "after"), kept_records), new)
    got = _output(source, [new[token] for token in probe])
    difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
    if not difference <= _TOLERANCE:
        raise VerificationError(
            f"--keep-vocabulary: with {len(kept)} of {rows} tokens {source.name} ({source.architecture}) "
            f"computes something else: its outputs differ by {difference:.1e} of their largest magnitude, at "
            f"most {_TOLERANCE:.0e} is allowed: it knows its tokens elsewhere, too, so export it with all of "
            "them"
        )


def _check(source: Source, adapters: Mapping[str, Adapter]) -> None:
    """
    Raises:
        UsageError: the model reads no texts, or has no tokenizer.
        AdapterError: an adapter has rows of the vocabulary.
    """
    if source.task in TOKENLESS:
        raise UsageError(
            f"--keep-vocabulary: a model for {source.task} reads no texts and has no vocabulary: leave it out"
        )
    if TOKENIZER_FILE not in source.tokenizer_files:
        raise UsageError(
            f"--keep-vocabulary: {source.name} comes without a {TOKENIZER_FILE}, and nothing else says which "
            "tokens a text has: give the model's folder with that in it"
        )
    tables = {name.rpartition(".")[0] for name in table_names(source.model)}
    for adapter in adapters.values():
        stored = (*adapter.saved_keys, *adapter.base_layer_keys)
        changed = {key.removeprefix(PREFIX).replace(BASE_LAYER, ".").rpartition(".")[0] for key in stored}
        if both := sorted(tables & {*changed, *(module for _, module in adapter.placed)}):
            raise AdapterError(
                f"{adapter.origin}: changes {both[0]}, which has a row for every token, and was made for all "
                f"{token_rows(source.model)} of them: leave --keep-vocabulary out, or train one without it"
            )


def _kept(source: Source, read: Sequence[Reading], rows: int) -> list[int]:
    """Tokens that stay, in the order of their new numbers.

    Raises:
        UsageError: a text has a token that the model has no row for.
    """
    vocabulary = TokenizerVocabulary(source.name, json.loads(source.tokenizer_files[TOKENIZER_FILE]))
    for reading in read:
        if (largest := max(reading.tokens, default=0)) >= rows:
            raise UsageError(
                f"--keep-vocabulary: {reading.where}: has token {largest}, and {source.name} has rows for "
                f"{rows}: leave it out"
            )
    settings = named_tokens(source.model, rows)
    used = {token for reading in read for token in reading.tokens} | settings
    known = vocabulary.tokens | vocabulary.added
    used |= {known[token] for token in _named(source, vocabulary.added) if token in known}
    kept = [token for token in vocabulary.in_order(vocabulary.needed(used)) if token < rows]
    return kept + sorted(settings - set(known.values()))  # rows that no text leads to


def _named(source: Source, added: Mapping[str, int]) -> Iterator[str]:
    """Tokens that the tokenizer's settings name, and added ones that its chat templates write."""
    config = json.loads(source.tokenizer_files.get(CONFIG_FILE) or b"{}")
    for key, value in config.items():
        if key.endswith("_token"):
            yield str(value["content"] if isinstance(value, dict) else value)
    declared = config.get("chat_template") or ""
    written = [item["template"] for item in declared] if isinstance(declared, list) else [declared]
    written.append(source.tokenizer_files.get(_TEMPLATE_FILE, b"").decode())
    yield from (token for token in added if any(token in template for template in written))


def _pick(source: Source, kept: Sequence[int]) -> None:
    """Take what is not in `kept` out of model and tokenizer."""
    if tables := quantized_tables(source.model, source.quantized):
        source.quantized = PickedRows(source.quantized, tables, kept)
    pick_tokens(source.model, kept)
    source.tokenizer_files = trimmed_files(source.name, source.tokenizer_files, kept)
    if source.tokenizer is not None:
        content = json.loads(source.tokenizer.backend_tokenizer.to_str())
        trimmed = TokenizerVocabulary(source.name, content).trimmed(kept)
        source.tokenizer = copy.copy(source.tokenizer)
        source.tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(trimmed))


def _check_texts(before: Sequence[Reading], after: Sequence[Reading], new: Mapping[int, int]) -> None:
    """
    Raises:
        VerificationError: a text is not read as before.
    """
    for old, got in zip(before, after, strict=True):
        if old.is_text and tuple(new[token] for token in old.tokens) != got.tokens:
            raise VerificationError(
                f"--keep-vocabulary: {old.where} is not read as before ({len(got.tokens)} tokens, "
                f"{len(old.tokens)} expected, or others): leave it out of the records"
            )


def _output(source: Source, tokens: Sequence[int]) -> torch.Tensor:
    """What the model makes of tokens, whatever they say."""
    ids = torch.tensor([list(tokens)])
    inputs = dict.fromkeys(sample_inputs(source, with_past=False).inputs, ids)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    made = run_once(source, inputs)
    return next(value for value in made.values() if isinstance(value, torch.Tensor))
