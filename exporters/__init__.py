"""The workstation side: transformers models and PEFT adapters in, a verified bundle out.

Needs the `export` extra. `sources/` loads and traces, `passes/` rewrites, `autodiff/` differentiates,
`losses/` and `training/` make the training graphs, `writer` and `pipeline` close the bundle, `verify`
compares it with PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from edgepeft.errors import MissingExtraError

if TYPE_CHECKING:
    from .pipeline import export as export
    from .shrink.pruning import prune as prune
    from .sources.sentence_classifier import load_sentence_classifier as load_sentence_classifier

_HOMES = {
    "export": ".pipeline",
    "load_sentence_classifier": ".sources.sentence_classifier",
    "prune": ".shrink.pruning",
}
__all__ = ["export", "load_sentence_classifier", "prune"]


def __getattr__(name: str) -> Any:
    # Late, so that `edgepeft.exporters.measure.probe` measures a process without torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export", "exporting a model") from error
