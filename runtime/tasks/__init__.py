"""Tasks: what records mean to a model, and what its outputs mean to people."""

from edgepeft.bundle.reader import Bundle
from edgepeft.runtime.tasks.base import Example, Task

__all__ = ["Example", "Task", "task_for"]


def task_for(bundle: Bundle) -> Task:
    """The task a bundle was exported for. A process has one as a rule, so the modules of the others, and of
    the preprocessing that they bring, are not loaded."""
    match bundle.manifest.task:
        case "text-classification":
            from edgepeft.runtime.tasks.classification import TextClassification

            return TextClassification(bundle)
        case "token-classification":
            from edgepeft.runtime.tasks.token_classification import TokenClassification

            return TokenClassification(bundle)
        case "feature-extraction":
            from edgepeft.runtime.tasks.embedding import Embedding

            return Embedding(bundle)
        case "fill-mask":
            from edgepeft.runtime.tasks.fill_mask import FillMask

            return FillMask(bundle)
        case "text-generation":
            from edgepeft.runtime.tasks.causal_lm import CausalLM

            return CausalLM(bundle)
        case "text2text-generation":
            from edgepeft.runtime.tasks.text2text import Text2Text

            return Text2Text(bundle)
        case "image-classification":
            from edgepeft.runtime.tasks.image_classification import ImageClassification

            return ImageClassification(bundle)
        case task:
            assert task == "audio-classification"  # the manifest's validation knows no other
            from edgepeft.runtime.tasks.audio_classification import AudioClassification

            return AudioClassification(bundle)
