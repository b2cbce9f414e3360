"""Task names and model classes, as `optimum` knows them."""

from pathlib import Path

import transformers
from optimum.exporters.tasks import TasksManager
from transformers.models.auto import modeling_auto

from edgepeft.bundle.validation import TASKS
from edgepeft.errors import ExportError, UsageError

from .gguf import is_gguf_file
from .model_files import read_json
from .sentence_classifier import is_sentence_encoder

#: Tasks whose head is a classifier, with names for its classes.
CLASSIFICATION = (
    "text-classification",
    "token-classification",
    "image-classification",
    "audio-classification",
)


def resolve_task(task: str) -> str:
    """The canonical name of `task` (`sequence-classification` → `text-classification`).

    Raises:
        UsageError: edgepeft has no such task.
    """
    canonical: str = TasksManager.map_from_synonym(task)
    if canonical == "sentence-similarity":
        canonical = "feature-extraction"
    if canonical not in TASKS:
        raise UsageError(f"unknown task {task!r}: edgepeft exports {', '.join(TASKS)}")
    return canonical


def infer_task(model: str | transformers.PreTrainedModel) -> str:
    """The task of a model object, a local folder or a hub id.

    Raises:
        ExportError: the task cannot be told, or is not one that edgepeft exports.
    """
    if isinstance(model, transformers.PreTrainedModel):
        found = _task_of_class(type(model))
    elif is_gguf_file(model):
        found = "text-generation"
    elif Path(model).is_dir():
        found = _task_of_folder(Path(model))
    elif Path(model).is_file():
        raise ExportError(f"{model}: is a file, expected a model's folder, hub id, GGUF or ONNX file")
    else:
        try:
            found = TasksManager.infer_task_from_model(model)
        except Exception as error:  # optimum raises bare exceptions of several kinds, and requests' own
            reason = str(error).partition(". ")[0]
            raise ExportError(
                f"cannot tell the task of {model!r} ({reason}): there is no folder of that name; if it is a "
                "model on the hub, pass --task"
            ) from error
    try:
        return resolve_task(found)
    except UsageError as error:
        raise ExportError(f"{model!r} is a model for {found!r}: {error}") from error


def model_class(task: str, model_type: str) -> type:
    """transformers' auto class that loads a model of `model_type` for `task`."""
    cls: type = TasksManager.get_model_class_for_task(task, framework="pt", model_type=model_type)
    return cls


def _task_of_folder(folder: Path) -> str:
    if is_sentence_encoder(str(folder)):
        return "feature-extraction"
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.iterdir() if path.suffix in (".gguf", ".onnx"))
        hint = f": give a file in it ({', '.join(inside[:3])})" if inside else ""
        raise ExportError(f"{folder} is not a transformers model: it holds no config.json{hint}")
    named = read_json(str(folder), "config.json").get("architectures") or []
    architectures = named if isinstance(named, list) else [named]
    for name in architectures:
        if (cls := getattr(transformers, str(name), None)) is not None:
            return _task_of_class(cls)
    raise ExportError(f"cannot tell the task of {folder} from its architectures {architectures}: pass --task")


def _task_of_class(cls: type) -> str:
    # optimum does not know DeiT, and takes BART for a model that fills masks.
    for task, mapping in (
        ("image-classification", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("text2text-generation", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ):
        if any(
            cls.__name__ in (names if isinstance(names, tuple) else (names,)) for names in mapping.values()
        ):
            return task
    try:
        inferred: str = TasksManager.infer_task_from_model(cls)
    except ValueError:
        # A base model without a head (`BertModel`) is in no table of heads.
        return "feature-extraction"
    return inferred
