"""Load what is to be exported: a transformers model, its pooling and its tokenizer files."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub import snapshot_download

from edgepeft.bundle.validation import TOKENLESS
from edgepeft.errors import EdgePeftError, ExportError, UsageError

from ..quantize.table_weight import StoredWeight
from .context import keep_angles, usable_positions
from .generation_settings import generation_settings
from .gguf import is_gguf_file, load_gguf
from .last_token import pool_by_mask
from .model_files import read_json, read_max_seq_length, read_pooling
from .parameters import has_rounded_buffers, stored_dtype, to_float32, with_own_parameters
from .peft_model import AdapterFolder, is_adapter_folder, merged
from .quantized.checkpoint import is_quantized, load_quantized
from .quiet import quiet
from .sentence_classifier import is_sentence_encoder, load_sentence_classifier
from .tasks import CLASSIFICATION, infer_task, model_class, resolve_task
from .tokenizer import TokenizerFiles
from .transformers_model import Source, read_text

#: Longest input of a model that does not name one.
DEFAULT_MAX_LENGTH = 2048
#: Longest recording in samples, half a minute at 16 kHz: models of waveforms name none.
MAX_SAMPLES = 30 * 16_000
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
#: Files of a hub id whose weights are quantized.
_QUANTIZED = ["*.json", "*.safetensors"]


def load_source(
    model: Any, *, task: str | None = None, labels: Sequence[str] | None = None, seed: int = 0
) -> Source:
    """Load `model`: a transformers model object, of which a copy is made, a folder, a hub id or a GGUF file.

    A PEFT model or the folder of an adapter is loaded as what it computes.

    Args:
        task: one of `TASKS` or a synonym; inferred from the model where None.
        labels: names of the classes of a new classification head (of the tasks that have one); the weights of
            a head that the checkpoint does not have are drawn with `seed`.

    Raises:
        UsageError: unknown task, or labels for a task that has none.
        ExportError: the model cannot be loaded or is of a type that edgepeft does not export.
    """
    if is_adapter_folder(model):
        return _load_adapted(AdapterFolder(Path(model)), task, labels, seed)
    if isinstance(model, peft.PeftModel):
        model = merged(model)
    elif isinstance(model, transformers.PreTrainedModel):
        model = with_own_parameters(model)
    resolved = resolve_task(task) if task else infer_task(model)
    if is_gguf_file(model) and resolved != "text-generation":
        raise UsageError(f"{model}: a GGUF file is exported for text-generation, not for {resolved}")
    if labels is not None and resolved not in CLASSIFICATION:
        raise UsageError(f"--labels goes with {', '.join(CLASSIFICATION)}, not with {resolved}")
    if labels is not None and (len(labels) < 2 or len(set(labels)) != len(labels)):
        raise UsageError(f"labels must be two or more different names, got {list(labels)}")
    torch.manual_seed(seed)
    text = TokenizerFiles()
    quantized: Mapping[str, StoredWeight] = {}
    if isinstance(model, transformers.PreTrainedModel):
        module, shipped, name = model, None, model.config.name_or_path or type(model).__name__
    elif is_gguf_file(model):
        module, text, quantized = load_gguf(Path(model))
        shipped, name = None, Path(model).stem
    else:
        module, quantized = _load_pretrained(str(model), resolved, labels)
        shipped, name = str(model), _name(Path(model))
        if resolved not in TOKENLESS:
            text = read_text(shipped, resolved, module)
    if resolved != "feature-extraction" and "labels" not in inspect.signature(module.forward).parameters:
        raise ExportError(
            f"{type(module).__name__} takes no labels and computes no loss, so its gradients cannot be "
            f"compared: edgepeft exports models that do, for {resolved}"
        )
    if resolved == "text2text-generation":
        _check_start(module, name)
    module = to_float32(module).eval().requires_grad_(False)
    if resolved == "text-classification":
        pool_by_mask(module)
    lengths = [read_max_length(resolved, module.config, shipped)]
    if resolved not in TOKENLESS:
        lengths += [length for length in (usable_positions(module), keep_angles(module)) if length]
    source = Source(
        model=module,
        task=resolved,
        name=name,
        pooling=read_pooling(shipped) if resolved == "feature-extraction" else None,
        tokenizer_files=text.files,
        text_settings=text.settings,
        tokenizer=text.tokenizer,
        max_length=min(lengths),
        shipped=shipped,
        quantized=quantized,
    )
    generation_settings(source)  # which refuses what the runtime does not do, before any work is done
    return source


def _check_start(model: Any, name: str) -> None:
    """Refuse models whose answers begin with something else than the one token that the runtime begins with.

    Raises:
        ExportError: it is one.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    declared = model.config.decoder_start_token_id
    if shift is None or declared is None:
        return
    if shift(torch.tensor([[5, 6, 7]]))[0, 0].item() != declared:
        raise ExportError(
            f"{name}: begins an answer with the last token of what it is to learn (the language, as mBART), "
            f"edgepeft with decoder_start_token_id, {declared}: take a T5, a BART or a Pegasus"
        )


def _load_adapted(
    adapter: AdapterFolder, task: str | None, labels: Sequence[str] | None, seed: int
) -> Source:
    """The base of an adapter with that merged into it; the tokenizer is the adapter's where it has one."""
    task = task or adapter.task
    if labels is None and adapter.classes is not None and task in CLASSIFICATION:
        try:
            config = transformers.AutoConfig.from_pretrained(adapter.base)
        except Exception as error:  # as in _load_pretrained
            raise ExportError(
                f"{adapter.path}: cannot read the configuration of its base: {error}"
            ) from error
        if config.num_labels != adapter.classes:
            labels = [f"LABEL_{number}" for number in range(adapter.classes)]
    source = load_source(adapter.base, task=task, labels=labels, seed=seed)
    if source.quantized:
        raise ExportError(
            f"{adapter.path}: its base {adapter.base} is quantized already, and merging would round that "
            "again: export the base with --adapter NAME=DIR"
        )
    source.model = adapter.merge_into(source.model).eval().requires_grad_(False)
    source.name = _name(adapter.path)
    if (adapter.path / "tokenizer.json").is_file():
        source.use_tokenizer(str(adapter.path))
    return source


def _name(model: Path) -> str:
    """A folder's name as it was given (a link's, not its target's), or a hub id."""
    return os.path.basename(os.path.abspath(model)) if model.is_dir() else str(model)  # noqa: PTH100, PTH119


def _load_pretrained(
    model: str, task: str, labels: Sequence[str] | None
) -> tuple[Any, Mapping[str, StoredWeight]]:
    """A folder's or hub id's model, and its weights that are quantized already."""
    heads: dict[str, Any] = {}
    if labels is not None and task == "text-classification" and is_sentence_encoder(model):
        if is_quantized(read_json(model, "config.json") or {}):
            raise ExportError(
                f"{model}: a new classifier goes with sentence encoders of floats, and its weights are "
                "quantized already: export the float model that it was made of"
            )
        with quiet():
            return load_sentence_classifier(model, labels), {}
    if labels is not None:
        heads = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }
    folder = Path(model)
    if folder.is_dir() and not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise ExportError(f"{model}: holds no weights (model.safetensors): copy all files of the model")
    try:
        if is_quantized(read_json(model, "config.json") or {}):
            files = folder
            if not folder.is_dir():
                files = Path(snapshot_download(model, allow_patterns=_QUANTIZED, ignore_patterns="*/*"))
            return load_quantized(files, task, heads)
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        cls: Any = model_class(task, config.model_type)
        with quiet():
            # In the file's own type its pages are mapped, not read; each weight is converted by itself.
            loaded = cls.from_pretrained(model, dtype=stored_dtype(model), trust_remote_code=False, **heads)
            if has_rounded_buffers(loaded):
                loaded = cls.from_pretrained(model, dtype=torch.float32, trust_remote_code=False, **heads)
            return loaded, {}
    except EdgePeftError:
        raise
    except Exception as error:  # readers of checkpoints, and packages that they want, raise what they like
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"cannot load {model!r} for {task}: {reason}") from error


def read_max_length(task: str, config: Any, model: str | None) -> int:
    """Longest input: the model's positions, or fewer where its files say so; 1 for images."""
    if task in TOKENLESS:
        return 1 if task == "image-classification" else MAX_SAMPLES
    said = (
        getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")
    )  # MPT's, DBRX's
    limit = int(next((length for length in said if length), DEFAULT_MAX_LENGTH))
    if model is None:
        return limit
    declared = [(read_json(model, "tokenizer_config.json") or {}).get("model_max_length")]
    if task == "feature-extraction":
        declared.append(read_max_seq_length(model))
    return min([limit, *(length for length in declared if isinstance(length, int) and length > 0)])
