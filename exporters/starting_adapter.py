"""A fresh adapter as PEFT makes it: the point from which a device starts to learn."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
import torch

from edgepeft.errors import UsageError

from .model_info import default_targets, saved_module_names
from .sources.loading import Source

#: PEFT's task types, which decide what an adapter saves beside its LoRA (a classification head). PEFT has
#: none for images and recordings.
TASK_TYPES = {
    "text-classification": peft.TaskType.SEQ_CLS,
    "token-classification": peft.TaskType.TOKEN_CLS,
    "feature-extraction": peft.TaskType.FEATURE_EXTRACTION,
    "text-generation": peft.TaskType.CAUSAL_LM,
    "text2text-generation": peft.TaskType.SEQ_2_SEQ_LM,
}


def write_starting_adapter(
    source: Source,
    folder: Path,
    *,
    rank: int,
    targets: Sequence[str] | None,
    lora_alpha: int | None,
    seed: int,
) -> None:
    """Write a LoRA with a random A and a zero B (and the model's own head, for a classifier) to `folder`.

    Args:
        targets: suffixes of module names; None: every linear but the output head.
        lora_alpha: twice the rank where None.

    Raises:
        UsageError: the rank is not positive, or the targets match nothing.
    """
    if rank < 1:
        raise UsageError(f"--rank must be at least 1, got {rank}")
    modules = list(targets) if targets is not None else default_targets(source)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type=TASK_TYPES.get(source.task),
        modules_to_save=None if source.task in TASK_TYPES else list(saved_module_names(source, ())),
        r=rank,
        lora_alpha=lora_alpha if lora_alpha is not None else 2 * rank,
        target_modules=modules,
        lora_dropout=0.0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.get_peft_model(source.model, config)
        except ValueError as error:
            raise UsageError(f"--targets {','.join(targets or [])}: {error}") from error
        # Not embeddings: an adapter does not train them, and asking the hub whether it should needs a
        # network.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        source.model = model.unload()
    source.model.requires_grad_(False)
