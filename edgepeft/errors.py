"""Every error edgepeft raises on purpose.

    EdgePeftError
    ├── UsageError            an argument is wrong (exit 2); also a ValueError
    │   └── ContextError      prompt and answer do not fit the model's context
    ├── MissingExtraError     an optional dependency is not installed; also an ImportError
    ├── BundleError           a bundle is missing, damaged, too new or unsafe
    ├── AdapterError          an adapter does not fit, or has no effect
    ├── DataError             a record cannot be used
    ├── ExportError           a model cannot be exported
    │   ├── UnsupportedOperatorError   the backward pass needs rules that do not exist
    │   └── VerificationError          the bundle disagrees with PyTorch, or with the ONNX file
    ├── CgroupError           the system gives no memory cgroup
    ├── BudgetError           the memory budget cannot be met (exit 3)
    └── UpdateRejectedError   the gate rejected the adapted adapter (exit 4)

A message says what failed and where, what was got against what was expected (with units), and the remedy.
"""

from typing import Any


class EdgePeftError(Exception):
    """Base of all errors raised by edgepeft on purpose."""

    exit_code = 1


class UsageError(EdgePeftError, ValueError):
    """An argument has a value that cannot be used."""

    exit_code = 2


class ContextError(UsageError):
    """Prompt and answer do not fit the model's context; a conversation may leave out its beginning."""


class MissingExtraError(EdgePeftError, ImportError):
    """An optional dependency is not installed; the message carries the `pip install` line."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs the package {package}: pip install "edgepeft[{extra}]"')


class BundleError(EdgePeftError):
    """A bundle is missing, damaged, written by a newer edgepeft, or reaches outside its folder."""


class AdapterError(EdgePeftError):
    """An adapter does not fit the base model, is damaged, or has no effect."""


class DataError(EdgePeftError):
    """A data file or one of its records cannot be used; the message names the line."""


class ExportError(EdgePeftError):
    """A model cannot be exported."""


class UnsupportedOperatorError(ExportError):
    """Operators on a differentiable path have no gradient rule; the message lists all of them."""


class VerificationError(ExportError):
    """The exported graphs disagree with PyTorch, or with the ONNX file, by more than the stated tolerance."""


class CgroupError(EdgePeftError):
    """The system has no memory cgroups, or the user may make none; the message says why."""


class BudgetError(EdgePeftError):
    """The memory budget cannot be met.

    Attributes:
        budget_bytes: the budget that was asked for, bytes.
        required_bytes: the smallest budget that would do, bytes.
    """

    exit_code = 3

    def __init__(self, message: str, *, budget_bytes: int, required_bytes: int) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.required_bytes = required_bytes


class UpdateRejectedError(EdgePeftError):
    """The adapted adapter is worse on the held-out records, so the old one stays.

    Attributes:
        report: the update's report as JSON values, the same that a kept update gets; None if there is none.
    """

    exit_code = 4

    def __init__(self, message: str, report: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.report = report
