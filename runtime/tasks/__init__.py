"""Tasks: what records mean to a model, and what its outputs mean to people."""

from edgepeft.bundle.reader import Bundle

from .base import Task
from .examples import Example

__all__ = ["Example", "Task", "task_for"]


def task_for(bundle: Bundle) -> Task:
    """The task a bundle was exported for. A process has one as a rule, so the modules of the others, and of
    the preprocessing that they bring, are not loaded."""
    match bundle.manifest.task:
        case "text-classification":
            from .classification import TextClassification

            return TextClassification(bundle)
        case "token-classification":
            from .token_classification import TokenClassification

            return TokenClassification(bundle)
        case "feature-extraction":
            from .embedding import Embedding

            return Embedding(bundle)
        case "fill-mask":
            from .fill_mask import FillMask

            return FillMask(bundle)
        case "text-generation":
            from .causal_lm import CausalLM

            return CausalLM(bundle)
        case "text2text-generation":
            from .text2text import Text2Text

            return Text2Text(bundle)
        case "image-classification":
            from .image_classification import ImageClassification

            return ImageClassification(bundle)
        case task:
            assert task == "audio-classification"  # the manifest's validation knows no other
            from .audio_classification import AudioClassification

            return AudioClassification(bundle)
