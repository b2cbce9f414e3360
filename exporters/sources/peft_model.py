"""A PEFT model, or the folder of an adapter, as what it computes: the base with the adapter merged into it.

To keep the two apart, give the base and the adapter beside it.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open

from edgepeft.adapters import BASE_LAYER, CONFIG_FILE, PREFIX, TASK_TYPES, TENSOR_FILE
from edgepeft.errors import ExportError
from edgepeft.initialization import OPTION, REPEATABLE, check_initialization

from .peft_patterns import check_patterns
from .tied_weights import untie, vocabulary_tables

_APART = "to keep them apart, export the base with --adapter NAME=DIR"


def is_adapter_folder(model: object) -> bool:
    """Whether `model` is the path of an adapter's folder, with no model in it."""
    if not isinstance(model, str | Path) or not (Path(model) / CONFIG_FILE).is_file():
        return False
    return not (Path(model) / "config.json").is_file()


class AdapterFolder:
    """An adapter's folder as a model to export.

    Attributes:
        base: folder or hub id of the base that it names.
        task: of `TASKS`, where PEFT noted one.
        classes: rows of the classifier's head that it holds; None where it holds none.

    Raises:
        ExportError: it cannot be read, or names no base.
        AdapterError: its initialization changed the base, and PEFT would load it onto another.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            config = json.loads((path / CONFIG_FILE).read_text("utf-8"))
            base = config.get("base_model_name_or_path")
            noted = config.get("task_type")
            with safe_open(path / TENSOR_FILE, "np") as file:
                self._shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
        except (OSError, ValueError, RecursionError, AttributeError, SafetensorError) as error:
            raise ExportError(f"{path}: cannot be read as a PEFT adapter ({error})") from error
        if not isinstance(base, str) or not base or Path(base).resolve() == path.resolve():
            raise ExportError(
                f"{path}: is an adapter that names no base: export that with --adapter NAME=DIR"
            )
        # PEFT notes a path as it was given, which may have been from the adapter's folder.
        beside = (path / base / "config.json").is_file() and not (Path(base) / "config.json").is_file()
        self.base = str(path / base) if beside else base
        if self.base.startswith((".", "/", "~")) and not Path(self.base).is_dir():
            raise ExportError(
                f"{path}: is an adapter of {base}, which is not there: export that with --adapter NAME=DIR"
            )
        if config.get(OPTION) not in REPEATABLE:  # of which PEFT takes the same part of the base again
            check_initialization(config, str(path))
        self.task = next((task for task, name in TASK_TYPES.items() if name == noted), None)
        heads = [
            shape[0]
            for key, shape in self._shapes.items()
            if key.endswith((".score.weight", ".classifier.weight", ".classifier.out_proj.weight"))
        ]
        self.classes = heads[0] if heads else None

    def merge_into(self, base: Any) -> Any:
        """`base`, a transformers model, with the adapter in its weights; its vocabulary is resized to the
        adapter's.

        Raises:
            ExportError: PEFT cannot read, fit or merge the adapter.
        """
        tables = {id(table): len(table) for table in vocabulary_tables(base)}
        parameters = dict(base.named_parameters(remove_duplicate=False))
        for key, shape in self._shapes.items():
            own = parameters.get(key.removeprefix(PREFIX).replace(BASE_LAYER, "."))
            if tables.get(id(own), shape[0]) != shape[0]:
                base.resize_token_embeddings(shape[0], mean_resizing=False)
                break
        check_patterns(self.path, base)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _merged(peft.PeftModel.from_pretrained(base, str(self.path)))
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise ExportError(
                f"{self.path}: PEFT cannot load it onto {self.base} ({str(error).splitlines()[0]})"
            ) from error


def merged(model: peft.PeftModel) -> Any:
    """A copy of the base of `model` with its active adapters in the weights; `model` stays as it is.

    Raises:
        ExportError: the adapter is of a kind that does not become weights.
    """
    return _merged(copy.deepcopy(model))


def _merged(model: peft.PeftModel) -> Any:
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = model.active_peft_config.peft_type
        raise ExportError(
            f"a PEFT model of type {getattr(kind, 'value', kind)} cannot be merged into its base, and "
            "edgepeft runs none of its type: see docs/methods.md"
        )
    # A LoRA on a tied output layer is not one on the embedding.
    changed = [
        name
        for name, part in model.named_modules()
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    untie(model, changed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.merge_and_unload()
    except (ValueError, NotImplementedError) as error:
        raise ExportError(f"PEFT cannot merge the adapter into its base ({error}); {_APART}") from error
