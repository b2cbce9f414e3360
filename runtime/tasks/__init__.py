"""Tasks: what records mean to a model, and what its outputs mean to people."""

from edgepeft.bundle.reader import Bundle
from edgepeft.runtime.tasks.audio_classification import AudioClassification
from edgepeft.runtime.tasks.base import Example, Task
from edgepeft.runtime.tasks.causal_lm import CausalLM
from edgepeft.runtime.tasks.classification import TextClassification
from edgepeft.runtime.tasks.embedding import Embedding
from edgepeft.runtime.tasks.fill_mask import FillMask
from edgepeft.runtime.tasks.image_classification import ImageClassification
from edgepeft.runtime.tasks.text2text import Text2Text
from edgepeft.runtime.tasks.token_classification import TokenClassification

_TASKS: dict[str, type[Task]] = {
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "feature-extraction": Embedding,
    "fill-mask": FillMask,
    "text-generation": CausalLM,
    "text2text-generation": Text2Text,
    "image-classification": ImageClassification,
    "audio-classification": AudioClassification,
}

__all__ = ["Example", "Task", "task_for"]


def task_for(bundle: Bundle) -> Task:
    """The task a bundle was exported for."""
    return _TASKS[bundle.manifest.task](bundle)
