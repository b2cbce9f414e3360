"""PEFT adapters: a folder with `adapter_config.json` and `adapter_model.safetensors`, read and written as is.

Keys are PEFT's state-dict keys: those of the adapter's technique (`edgepeft.techniques`) and whole parameters
of `modules_to_save` such as `base_model.model.classifier.weight`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .errors import AdapterError
from .files import atomic_folder, atomic_write
from .foreign_adapters import foreign_format
from .slots import PREFIX as PREFIX
from .slots import TRAINABLE_TOKENS
from .techniques import of_config, technique
from .techniques.base import PeftTechnique
from .tensor_files import read_metadata, read_tensors, write_tensors
from .token_rows import modules_with_rows

StoredDtype: TypeAlias = Literal["float16", "float32"]
"""What tensors are written as; read are all floats, as float32."""

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
BASE_KEY = "edgepeft_base"
"""Where the tensors' file has the base, in its metadata: PEFT ignores what it does not know there, and warns
of what it does not know in the configuration."""

LABELS_KEY = "edgepeft_labels"
"""Where it has the labels of a classifier that learned more than the base has, as a JSON list."""

BASE_LAYER = ".base_layer."
"""In the key of what lies below a LoRA: PEFT stores it of an output layer, frozen as it is."""

_LAYER_BIAS = ".base_layer.bias"
"""How the key of a linear's bias ends that PEFT trains beside the LoRA on it."""

NO_TARGETS = "dummy-target-modules"
"""What PEFT calls the target modules of an adapter that only replaces saved ones: it refuses none at all."""

TASK_TYPES = {
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "feature-extraction": "FEATURE_EXTRACTION",
    "text-generation": "CAUSAL_LM",
    "text2text-generation": "SEQ_2_SEQ_LM",
}
"""PEFT's task types, which decide what an adapter saves beside its LoRA (a classification head). PEFT has
none for images and recordings."""

# What PEFT's wrapper of a saved module holds besides, where all of an embedding is stored: the base's own,
# and the adapter's once more.
_WRAPPED = (".original_module.", ".modules_to_save.")
_MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        config: `adapter_config.json` as PEFT wrote it, unknown keys included.
        tensors: float32 arrays by PEFT's state-dict key, in PEFT's layout; a bias below a LoRA that trains
            with it has the key of any other bias, and PEFT's own (`…base_layer.bias`) only in the file.
        origin: where it came from, for messages.
        base: fingerprint of the base it was trained on (`Manifest.base`); None where that is not recorded.
        labels: of a classifier with more of them than the base; None: the base's own.
        technique: what the configuration says that it is of.
    """

    config: dict[str, Any]
    tensors: dict[str, npt.NDArray[np.float32]]
    origin: str = "adapter"
    base: str | None = None
    labels: tuple[str, ...] | None = None
    technique: PeftTechnique = field(init=False, repr=False, compare=False)
    _scalings: dict[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        technique = of_config(self.config, self.origin)
        object.__setattr__(self, "technique", technique)
        _check_tensors(self)
        scalings = technique.check(self.config, self.tensors, self.origin)
        object.__setattr__(self, "_scalings", scalings)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that it is applied to, without PEFT's `base_model.model.` prefix."""
        return self.technique.modules(self.tensors)

    @property
    def placed(self) -> list[tuple[PeftTechnique, str]]:
        """What it has something on: modules, each with the technique of its slot, which is the adapter's own,
        or that of rows of the embedding which go with it."""
        found = [(self.technique, module) for module in self.modules]
        if self.technique.name == TRAINABLE_TOKENS:
            return found
        of_rows = technique(TRAINABLE_TOKENS)
        assert isinstance(of_rows, PeftTechnique)
        return [*found, *((of_rows, module) for module in modules_with_rows(self.tensors))]

    @property
    def saved_keys(self) -> tuple[str, ...]:
        """Keys of the parameters that the adapter replaces whole (`modules_to_save`)."""
        return tuple(key for key in self.tensors if not self.technique.owns(key) and BASE_LAYER not in key)

    @property
    def bias_keys(self) -> tuple[str, ...]:
        """Of `saved_keys`, those of biases that are replaced and not all of their module (PEFT's `bias`)."""
        saved = tuple(self.config.get("modules_to_save") or ())
        return tuple(
            key
            for key in (self.saved_keys if trains_biases(self.config) else ())
            if key.endswith(".bias") and not key.removesuffix(".bias").endswith(saved)
        )

    @property
    def base_layer_keys(self) -> tuple[str, ...]:
        """Keys of what the base has below a LoRA, which the adapter does not change."""
        return tuple(key for key in self.tensors if BASE_LAYER in key)

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def rank(self, module: str) -> int:
        """Rank of the adapter on `module` (0 where it has none)."""
        return self.technique.rank(self.tensors, module)

    def scaling(self, module: str) -> float:
        """The factor that the configuration gives `module`, such as LoRA's `lora_alpha / r`."""
        return self._scalings[module]

    def has_effect(self, defaults: Mapping[str, npt.NDArray[np.float32]] | None = None) -> bool:
        """Whether the adapter can change the model's output: by its technique's tensors, or a saved module.

        Args:
            defaults: the base's own by key, of what adapters replace; what equals its default does not count.
        """
        replaced = {*self.saved_keys, *(defaults or {})} & self.tensors.keys()
        for key in replaced:
            default = (defaults or {}).get(key)
            if default is None or not np.array_equal(default, self.tensors[key]):
                return True
        return self.technique.has_effect(self)

    def with_tensors(self, tensors: dict[str, npt.NDArray[np.float32]], origin: str) -> "Adapter":
        """The same configuration over other tensors."""
        return replace(self, tensors=tensors, origin=origin)


def _check_tensors(adapter: Adapter) -> None:
    for key, tensor in adapter.tensors.items():
        if not key.startswith(PREFIX) and key not in adapter.technique.shared:
            raise AdapterError(
                f"{adapter.origin}: tensor {key} does not begin with {PREFIX!r} as PEFT's keys do"
            )
        if not np.isfinite(tensor).all():
            raise AdapterError(f"{adapter.origin}: tensor {key} holds NaN or infinity")


def trains_biases(config: Mapping[str, Any]) -> bool:
    """Whether PEFT trains the base's own biases with such an adapter, and stores them in its file."""
    return config.get("bias") not in (None, "none")


def load_adapter(folder: Path | str) -> Adapter:
    """Read a PEFT adapter folder.

    Raises:
        AdapterError: the folder is missing or damaged, or the adapter is of a kind that cannot be run; the
            message names the option or the tensor.
    """
    folder = Path(folder)
    if (foreign := foreign_format(folder)) is not None:
        raise AdapterError(f"{folder}: {foreign}")
    if not folder.is_dir():
        raise AdapterError(
            f"{folder}: no such folder; a PEFT adapter is a folder with {CONFIG_FILE} and {TENSOR_FILE}"
        )
    config_path = folder / CONFIG_FILE
    if not config_path.exists():
        raise AdapterError(
            f"{folder}: holds no {CONFIG_FILE}; a PEFT adapter is a folder with that and {TENSOR_FILE}"
        )
    try:
        with config_path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterError(f"{config_path}: cannot be read ({error.strerror or error})") from error
    if len(text) > _MAX_CONFIG_BYTES:
        raise AdapterError(
            f"{config_path}: is larger than {_MAX_CONFIG_BYTES:,} B, this is no adapter configuration"
        )
    try:
        config = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{config_path}: is not JSON ({error})") from error
    own = of_config(config, str(folder))
    if not (folder / TENSOR_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise AdapterError(
            f"{folder}: holds a pickle (adapter_model.bin), which is never opened: save it again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    tensors = read_tensors(folder / TENSOR_FILE)
    tensors = {key: value for key, value in tensors.items() if not any(part in key for part in _WRAPPED)}
    tensors = own.from_file(config, tensors, str(folder))
    if trains_biases(config):
        tensors = {
            key.removesuffix(_LAYER_BIAS) + ".bias" if key.endswith(_LAYER_BIAS) else key: value
            for key, value in tensors.items()
        }
    metadata = read_metadata(folder / TENSOR_FILE)
    labels = _labels(metadata, folder / TENSOR_FILE)
    return Adapter(
        config=config, tensors=tensors, origin=str(folder), base=metadata.get(BASE_KEY), labels=labels
    )


def read_labels(folder: Path) -> tuple[str, ...] | None:
    """The labels that an adapter's file says it knows; None where it says nothing of them.

    Raises:
        AdapterError: they are no list of different texts.
    """
    return _labels(read_metadata(folder / TENSOR_FILE), folder / TENSOR_FILE)


def _labels(metadata: Mapping[str, str], file: Path) -> tuple[str, ...] | None:
    text = metadata.get(LABELS_KEY)
    if text is None:
        return None
    try:
        labels = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: its labels are not JSON ({error})") from error
    if (
        not isinstance(labels, list)
        or not all(isinstance(label, str) for label in labels)
        or len(set(labels)) != len(labels)
    ):
        raise AdapterError(f"{file}: its labels are no list of different texts")
    return tuple(labels)


def rounded(adapter: Adapter, dtype: StoredDtype) -> Adapter:
    """The adapter with the values that a file of this dtype holds.

    Raises:
        AdapterError: a value is out of its range.
    """
    tensors = {}
    for key, tensor in adapter.tensors.items():
        with np.errstate(over="ignore"):
            tensors[key] = tensor.astype(dtype).astype(np.float32)
        if not np.isfinite(tensors[key]).all():
            raise AdapterError(
                f"{adapter.origin}: tensor {key} has values up to {np.abs(tensor).max():g}, {dtype} holds "
                f"{np.finfo(dtype).max:g}: keep it in float32"
            )
    return adapter.with_tensors(tensors, adapter.origin)


def write_adapter(adapter: Adapter, folder: Path, dtype: StoredDtype = "float32") -> None:
    """Write the adapter's two files into an existing folder, its tensors in this dtype."""
    config = json.dumps(adapter.config, indent=2, sort_keys=True).encode()
    atomic_write(folder / CONFIG_FILE, config)
    below = (
        {f"{PREFIX}{module}.bias" for module in adapter.modules} if trains_biases(adapter.config) else set()
    )
    stored = {
        key.removesuffix(".bias") + _LAYER_BIAS if key in below else key: tensor.astype(dtype, copy=False)
        for key, tensor in adapter.technique.to_file(adapter.tensors).items()
    }
    metadata = {"format": "pt"} | ({} if adapter.base is None else {BASE_KEY: adapter.base})
    if adapter.labels is not None:
        metadata[LABELS_KEY] = json.dumps(adapter.labels)
    write_tensors(folder / TENSOR_FILE, stored, metadata)


def save_adapter(adapter: Adapter, folder: Path | str) -> None:
    """Write a PEFT adapter folder, replacing an adapter that is there; `PeftModel.from_pretrained` opens it.

    Raises:
        UsageError: something that is not an adapter stands at `folder`.
        EdgePeftError: the folder cannot be written; what was there is kept.
    """
    with atomic_folder(Path(folder), CONFIG_FILE) as temporary:
        write_adapter(adapter, temporary)
