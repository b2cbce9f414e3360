"""The workstation side: transformers models and PEFT adapters in, a verified bundle out.

Needs the `export` extra. `sources/` loads and traces, `passes/` rewrites, `autodiff/` differentiates,
`losses/` and `training/` make the training graphs, `writer` and `pipeline` close the bundle, `verify`
compares it with PyTorch.
"""

from typing import TYPE_CHECKING, Any

from edgepeft.errors import MissingExtraError

if TYPE_CHECKING:
    from .pipeline import export as export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    # Late, so that `edgepeft.exporters.training.probe` measures a process without torch.
    if name != "export":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .pipeline import export
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export", "exporting a model") from error
    return export
