"""Export quantized models with PEFT adapters to ONNX; run and adapt them on a device inside a memory budget.

`load` needs the base install only; `export` needs `edgepeft[export]`. Both are imported when they are called,
so that importing `edgepeft` costs numpy at most.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from .errors import (
    AdapterError,
    BudgetError,
    BundleError,
    ContextError,
    DataError,
    EdgePeftError,
    ExportError,
    MissingExtraError,
    UnsupportedOperatorError,
    UpdateRejectedError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from edgepeft.exporters import export as export
    from edgepeft.runtime import load as load

# onnxruntime's wheels report to their maker since 1.32, and a device's owner was not asked. It looks once,
# when it is imported, which is after this. Who has set it decides.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Asking the installation's metadata for it costs a process 3 MiB.
__version__ = "0.1.0"
__all__ = [
    "AdapterError",
    "BudgetError",
    "BundleError",
    "ContextError",
    "DataError",
    "EdgePeftError",
    "ExportError",
    "MissingExtraError",
    "UnsupportedOperatorError",
    "UpdateRejectedError",
    "UsageError",
    "VerificationError",
    "__version__",
    "export",
    "load",
]

_LAZY = {"export": "edgepeft.exporters", "load": "edgepeft.runtime"}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'edgepeft' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
