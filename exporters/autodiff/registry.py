"""The table of gradient rules: what the compiler knows about every operator.

An operator version is in exactly one of three states, and being absent from the table is a fourth one:

- `Rule`: a function that emits the vector-Jacobian product;
- `NonDifferentiable`: the derivative is zero wherever it exists, so cotangents stop here;
- `Refused`: a gradient exists but is deliberately not given; the entry says why.

Ranges are ranges of *operator versions* (a schema's `since_version`), not of opsets: `Add` of opset 23 is
operator version 14. An operator that changes in a later opset is therefore unknown until somebody has read
the change, instead of being differentiated by yesterday's formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx.defs
import onnx_ir as ir

from .scatter import Scatter

if TYPE_CHECKING:
    from .context import RuleContext

ALL_VERSIONS = (1, 2**31 - 1)

Cotangent = ir.Value | Scatter
Lazy = Callable[[], Cotangent | None]
RuleResult = Sequence[Cotangent | Lazy | None]
RuleFunction = Callable[["RuleContext"], RuleResult]
RefusalCheck = Callable[[ir.Node], str | None]


@dataclass(frozen=True)
class Rule:
    """A vector-Jacobian product.

    Attributes:
        function: emits the product. It returns one item per input: a cotangent, a function without
            arguments that emits it (called only when that cotangent is wanted), or None.
        differentiable: positions of the inputs that have a cotangent; None stands for all. A path that
            reaches the loss through any other floating-point input is refused.
        broadcasts: the operator broadcasts its inputs, so the engine sums each cotangent back to the
            shape of its primal.
        refuses: looks at a node's attributes and inputs and says why the rule does not cover them, or None.
    """

    function: RuleFunction
    differentiable: tuple[int, ...] | None
    broadcasts: bool
    refuses: RefusalCheck | None


@dataclass(frozen=True)
class NonDifferentiable:
    """The derivative is zero wherever it exists: no cotangent flows through the operator."""


@dataclass(frozen=True)
class Refused:
    """A gradient is deliberately not given."""

    because: str


Entry = Rule | NonDifferentiable | Refused


@dataclass(frozen=True)
class Registration:
    """One line of the table: an entry for the operator versions `since` to `until`, both included."""

    domain: str
    op_type: str
    since: int
    until: int
    entry: Entry


class Registry:
    """Entries keyed by domain, operator and range of operator versions."""

    def __init__(self) -> None:
        self._registrations: dict[tuple[str, str], list[Registration]] = {}

    def __iter__(self) -> Iterator[Registration]:
        for registrations in self._registrations.values():
            yield from registrations

    def add(self, registration: Registration) -> None:
        """Adds one line.

        Raises:
            ValueError: when another line already covers one of the operator versions.
        """
        key = (registration.domain, registration.op_type)
        for other in self._registrations.get(key, ()):
            if registration.since <= other.until and other.since <= registration.until:
                name = f"{registration.domain or 'ai.onnx'}::{registration.op_type}"
                raise ValueError(
                    f"{name} has two entries, for operator versions "
                    f"{registration.since}-{registration.until} and {other.since}-{other.until}: "
                    "remove one of them or make their ranges disjoint"
                )
        self._registrations.setdefault(key, []).append(registration)

    def rule(
        self,
        op_type: str,
        *,
        since: int = 1,
        until: int = 1,
        domain: str = "",
        differentiable: tuple[int, ...] | None = None,
        broadcasts: bool = False,
        refuses: RefusalCheck | None = None,
    ) -> Callable[[RuleFunction], RuleFunction]:
        """Registers the decorated function as the rule of operator versions `since` to `until`."""

        def register(function: RuleFunction) -> RuleFunction:
            rule = Rule(function, differentiable, broadcasts, refuses)
            self.add(Registration(domain, op_type, since, until, rule))
            return function

        return register

    def non_differentiable(self, *op_types: str, domain: str = "") -> None:
        """Registers operators whose derivative is zero wherever it exists, in all their versions."""
        for op_type in op_types:
            self.add(Registration(domain, op_type, *ALL_VERSIONS, NonDifferentiable()))

    def refuse(self, *op_types: str, because: str, domain: str = "") -> None:
        """Registers operators whose gradient is deliberately not given, in all their versions."""
        for op_type in op_types:
            self.add(Registration(domain, op_type, *ALL_VERSIONS, Refused(because)))

    def find(self, domain: str, op_type: str, version: int) -> Entry | None:
        """Looks up the entry of one operator version; None when there is none."""
        for registration in self._registrations.get((domain, op_type), ()):
            if registration.since <= version <= registration.until:
                return registration.entry
        return None

    def known_versions(self, domain: str, op_type: str) -> list[tuple[int, int]]:
        """Ranges of operator versions that have an entry."""
        return [(r.since, r.until) for r in self._registrations.get((domain, op_type), ())]


def operator_version(domain: str, op_type: str, opset: int) -> int:
    """The version of an operator that an opset contains; 1 where onnx has no schema for it."""
    try:
        return onnx.defs.get_schema(op_type, opset, domain).since_version
    except onnx.defs.SchemaError:
        return 1


RULES = Registry()
