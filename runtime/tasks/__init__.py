"""Tasks: what records mean to a model, and what its outputs mean to people."""

from edgepeft.bundle.reader import Bundle
from edgepeft.runtime.tasks.base import Example, Task
from edgepeft.runtime.tasks.causal_lm import CausalLM
from edgepeft.runtime.tasks.classification import Classification
from edgepeft.runtime.tasks.embedding import Embedding

_TASKS: dict[str, type[Task]] = {
    "text-classification": Classification,
    "feature-extraction": Embedding,
    "text-generation": CausalLM,
}

__all__ = ["Example", "Task", "task_for"]


def task_for(bundle: Bundle) -> Task:
    """The task a bundle was exported for."""
    return _TASKS[bundle.manifest.task](bundle)
