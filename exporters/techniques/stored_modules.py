"""What adapters store whole, compared with the base, and a base that lets it be replaced.

PEFT stores a module whole where `modules_to_save` names it, and embeddings also unasked: where one was
resized or has a LoRA. What was named stands beside the base's own; loading what was not overwrites that.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from edgepeft.adapters import BASE_LAYER, PREFIX, Adapter
from edgepeft.errors import AdapterError
from edgepeft.slots import Slot

from ..sources.base import ModelSource
from ..sources.model_info import matches_saved
from ..sources.onnx_file import OnnxFile
from ..sources.tied_weights import canonical_names, untie, vocabulary_tables
from ..sources.transformers_model import Source

Report = Callable[[str], None]
_HALVES = (torch.float32, torch.bfloat16, torch.float16)


def prepare_stored(
    adapters: Mapping[str, Adapter], source: ModelSource, report: Report
) -> dict[str, Adapter]:
    """Make `source` ready to have replaced what `adapters` store whole.

    Its vocabulary gets the size that they have, and a module that one saves parameters of its own where it
    shares them with others. Embeddings that were stored unasked and are the base's are left out.

    Returns:
        The adapters, each parameter by the name that it has in the source.

    Raises:
        AdapterError: a parameter is not the model's, or the adapters were made for vocabularies of several
            sizes.
    """
    for adapter in adapters.values():
        for key in (*adapter.saved_keys, *adapter.base_layer_keys):
            if (name := _parameter(key)) not in source.parameter_names():
                raise AdapterError(f"{adapter.origin}: {_not_there(name, source)}")
            if isinstance(source, OnnxFile) and source.is_tied(name):
                raise AdapterError(
                    f"{adapter.origin}: {name} is saved in the adapter, and in {source.name} it is the "
                    "embedding and the output layer at once, of which PEFT replaces one: export the "
                    "transformers model with this adapter"
                )
    if not isinstance(source, Source):
        return dict(adapters)
    adapters = {name: _apart(adapter) for name, adapter in adapters.items()}
    _resize_vocabulary(adapters, source, report)
    before = canonical_names(source.model)
    untie(source.model, [module for adapter in adapters.values() for module in _asked(adapter, source)])
    return {
        name: _renamed(_without_copies(adapter, source), source, before) for name, adapter in adapters.items()
    }


def without_unused(adapter: Adapter, slots: tuple[Slot, ...], report: Report) -> Adapter:
    """An adapter without the whole parameters that the graph does not read: PyTorch does not, either."""
    inputs = {name for slot in slots for name in slot.inputs}
    unused = [key for key in adapter.saved_keys if key not in inputs]
    if unused:
        names = ", ".join(_parameter(key) for key in unused)
        report(f"{adapter.origin}: left out what the model never reads: {names}")
    return _without(adapter, unused)


def _resize_vocabulary(adapters: Mapping[str, Adapter], source: Source, report: Report) -> None:
    """Give the model as many tokens as the embeddings of the adapters have rows.

    The first adapter's rows are those of the tokens that are new, if it stored them unasked: these are the
    base's that it was trained on. The tokenizer beside it knows what they stand for.
    """
    tables = set(vocabulary_tables(source.model))
    parameters = dict(source.model.named_parameters(remove_duplicate=False))
    stored = [
        (adapter, key)
        for adapter in adapters.values()
        for key in (*adapter.saved_keys, *adapter.base_layer_keys)
        if parameters[_parameter(key)] in tables
    ]
    sizes = {adapter.tensors[key].shape[0]: adapter for adapter, key in stored}
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise AdapterError(
            f"{second.origin}: has a vocabulary of {other} tokens, {first.origin} one of {one}: export each "
            "with the base in a bundle of its own"
        )
    old = len(next(iter(tables))) if stored else 0
    if not stored or old in sizes:
        return
    adapter = stored[0][0]
    (new,) = sizes
    report(f"the vocabulary of {adapter.origin} has {new} tokens, the model's {old}: resizing")
    source.model.resize_token_embeddings(new, mean_resizing=False)
    source.model.requires_grad_(False)
    parameters = dict(source.model.named_parameters(remove_duplicate=False))
    asked = _asked(adapter, source)
    with torch.no_grad():
        for owner, key in stored:
            name = _parameter(key)
            if owner is adapter and name.rpartition(".")[0] not in asked:
                parameters[name][old:] = torch.from_numpy(adapter.tensors[key][old:])
    folder = Path(adapter.origin)
    if (folder / "tokenizer.json").is_file():
        source.use_tokenizer(str(folder))


def _apart(adapter: Adapter) -> Adapter:
    """An adapter whose saved modules, or LoRA on tied ones, PEFT keeps equal (`ensure_weight_tying`), as one
    that has each of them.

    In a bundle they train apart.
    """
    if not adapter.config.get("ensure_weight_tying"):
        return adapter
    modules = sorted({_parameter(key).rpartition(".")[0] for key in adapter.saved_keys})
    settings = {"ensure_weight_tying": False, "modules_to_save": modules or None}
    if adapter.modules:  # of the tied ones PEFT names one
        settings |= {"target_modules": sorted(adapter.modules)}
    return dataclasses.replace(adapter, config=adapter.config | settings)


def _asked(adapter: Adapter, source: ModelSource) -> list[str]:
    """The modules that the adapter's configuration says are saved."""
    return [name for name in source.module_names() if matches_saved(name, adapter)]


def _asked_prefixes(adapter: Adapter, source: ModelSource) -> tuple[str, ...]:
    """How the names of the parameters begin that the configuration says are stored: biases, too."""
    return (*(f"{module}." for module in _asked(adapter, source)), *map(_parameter, adapter.bias_keys))


def _without_copies(adapter: Adapter, source: Source) -> Adapter:
    """An adapter without the base's own parameters that PEFT stored unasked.

    Raises:
        AdapterError: the base below a LoRA was another.
    """
    asked = _asked_prefixes(adapter, source)
    parameters = dict(source.model.named_parameters(remove_duplicate=False))
    copies = list(adapter.base_layer_keys)
    for key in (*adapter.saved_keys, *adapter.base_layer_keys):
        name = _parameter(key)
        if name.startswith(asked):
            continue
        if _is_copy(adapter.tensors[key], parameters[name]):
            copies.append(key)
        elif key in adapter.base_layer_keys:
            raise AdapterError(
                f"{adapter.origin}: was trained over another {name} than that of {source.name} (it holds a "
                f"copy, {key}): export the base that it was trained on"
            )
    return _without(adapter, copies)


def _is_copy(stored: npt.NDArray[np.float32], parameter: torch.Tensor) -> bool:
    """Whether `stored` is the parameter, or what one of the shorter floats keeps of it."""
    value = torch.from_numpy(stored)
    return value.shape == parameter.shape and any(
        torch.equal(value, parameter.to(dtype).float()) for dtype in _HALVES
    )


def _renamed(adapter: Adapter, source: Source, before: Mapping[str, str]) -> Adapter:
    """An adapter with every whole parameter by its canonical name, once.

    What it overwrites of a shared one, it overwrites for all that shared it `before` some were untied.
    """
    now = canonical_names(source.model)
    asked = _asked_prefixes(adapter, source)
    tensors = {key: value for key, value in adapter.tensors.items() if key not in adapter.saved_keys}
    own = {key: _parameter(key) for key in adapter.saved_keys}
    for key, name in own.items():
        if not name.startswith(asked):
            same = [other for other, first in before.items() if first == before[name]]
            tensors |= {f"{PREFIX}{now[other]}": adapter.tensors[key] for other in same}
    for key, name in own.items():
        if name.startswith(asked):
            tensors[f"{PREFIX}{now[name]}"] = adapter.tensors[key]
    return adapter.with_tensors(tensors, adapter.origin)


def _without(adapter: Adapter, keys: list[str]) -> Adapter:
    kept = {key: value for key, value in adapter.tensors.items() if key not in keys}
    return dataclasses.replace(adapter, tensors=kept)


def _parameter(key: str) -> str:
    """The parameter of the model that a key of PEFT's is for."""
    return key.removeprefix(PREFIX).replace(BASE_LAYER, ".")


def _not_there(name: str, source: ModelSource) -> str:
    if isinstance(source, OnnxFile):
        return (
            f"{name} is saved in the adapter, but {source.name} holds no float weight of that name that "
            "could be replaced: export the transformers model with this adapter"
        )
    return (
        f"{name} is saved in the adapter, but {source.name} has none: the adapter was made for another base"
    )
