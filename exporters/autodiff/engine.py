"""Reverse mode: walks the graph from the loss to the requested values and appends the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgepeft.errors import ExportError, UnsupportedOperatorError

from ..graph import is_detached
from . import rules as _rules  # noqa: F401  (fills the table)
from .context import RuleContext
from .emitter import Emitter
from .registry import RULES, Cotangent, NonDifferentiable, Refused, Registry, Rule, operator_version
from .scatter import accumulate

# The reductions that the rules emit take their axes as an input from this opset on.
_OLDEST_OPSET = 18
_SCOPE_KEYS = ("namespace", "pkg.torch.onnx.name_scopes")


def differentiate(
    graph: ir.Graph,
    loss: ir.Value,
    wrt: Sequence[ir.Value],
    opset_imports: Mapping[str, int] | None = None,
    registry: Registry = RULES,
    cotangent: ir.Value | None = None,
) -> dict[ir.Value, ir.Value]:
    """Appends the backward pass of a scalar loss, or of any value with a given cotangent, to the graph.

    Only nodes between `wrt` and the loss get cotangents, and only the requested ones are computed. The graph
    must be topologically sorted, as ONNX demands. Missing rules are found before anything is emitted.

    Args:
        graph: the forward graph; nodes and constants are appended to it.
        loss: a floating-point value in the graph, of rank 0 where no cotangent is given.
        wrt: graph inputs, initializers or intermediate values.
        opset_imports: opsets by domain; the graph's own where absent.
        registry: the table of rules.
        cotangent: that of `loss`, of its shape and type; 1 where absent.

    Returns:
        The cotangent of each of `wrt`, with the shape and the element type of its primal.

    Raises:
        UnsupportedOperatorError: naming every node on a differentiable path that has no rule.
        ExportError: when a `wrt` value does not influence the loss, or the loss is not a scalar.
    """
    opsets = dict(graph.opset_imports if opset_imports is None else opset_imports)
    _check_request(loss, opsets, cotangent)
    paths = _Paths(graph, loss, wrt, opsets, registry)
    emit = Emitter(graph)
    pending: dict[ir.Value, list[Cotangent]] = {loss: [cotangent or emit.scalar(1.0, loss)]}
    total: dict[ir.Value, ir.Value] = {}

    def settle(value: ir.Value) -> ir.Value | None:
        if value not in total and value in pending:
            total[value] = accumulate(emit, value, pending.pop(value))
        return total.get(value)

    for node, rule in reversed(paths.nodes):
        emit.metadata_props = _backward_metadata(node)
        cotangents = [settle(output) for output in node.outputs]
        if all(cotangent is None for cotangent in cotangents):
            continue
        wanted = tuple(value is not None and value in paths.active for value in node.inputs)
        if rule.differentiable is not None:
            wanted = tuple(want and i in rule.differentiable for i, want in enumerate(wanted))
        results = rule.function(RuleContext(emit, node, cotangents, wanted))
        for want, primal, result in zip(wanted, node.inputs, results, strict=False):
            if not want or primal is None or result is None:
                continue
            part = result() if callable(result) else result
            if part is None:
                continue
            if rule.broadcasts and isinstance(part, ir.Value):
                part = emit.unbroadcast(part, primal)
            pending.setdefault(primal, []).append(part)
    emit.metadata_props = {}
    gradients = {value: settle(value) for value in wrt}
    by_primal = {
        value: emit.zeros_like(value) if gradient is None else gradient
        for value, gradient in gradients.items()
    }
    emit.remove_unused(keep=by_primal.values())
    return by_primal


def _check_request(loss: ir.Value, opsets: Mapping[str, int], cotangent: ir.Value | None) -> None:
    if cotangent is None and (
        loss.shape is None
        or loss.shape.rank() != 0
        or loss.dtype is None
        or not loss.dtype.is_floating_point()
    ):
        raise ExportError(
            f"the loss {loss.name!r} must be a floating-point scalar, shape [], got {loss.dtype} {loss.shape}"
        )
    opset = opsets.get("", 0)
    if opset < _OLDEST_OPSET:
        raise ExportError(
            f"the graph uses opset {opset}; gradients need opset {_OLDEST_OPSET} or newer: export with a "
            "newer opset or run onnx.version_converter"
        )


class _Paths:
    """The nodes through which the loss depends on the requested values.

    Attributes:
        nodes: those nodes with their rules, in the graph's order.
        active: values that depend on a requested value and that the loss depends on.
    """

    def __init__(
        self,
        graph: ir.Graph,
        loss: ir.Value,
        wrt: Sequence[ir.Value],
        opsets: Mapping[str, int],
        registry: Registry,
    ) -> None:
        reached = set(wrt)
        candidates: list[tuple[ir.Node, Rule | str]] = []
        for node in graph:
            verdict = _judge(node, reached, opsets, registry)
            if verdict is not None:
                candidates.append((node, verdict))
                reached.update(output for output in node.outputs if _carries_gradient(output))

        needed = {loss}
        self.nodes: list[tuple[ir.Node, Rule]] = []
        problems: list[str] = []
        for node, verdict in reversed(candidates):
            if needed.isdisjoint(node.outputs):
                continue
            if isinstance(verdict, str):
                problems.append(_describe(node, opsets, verdict))
                needed.update(_differentiable_inputs(node, None))
            else:
                self.nodes.append((node, verdict))
                needed.update(_differentiable_inputs(node, verdict))
        self.nodes.reverse()
        self.active = reached & needed
        if problems:
            problems.reverse()
            raise UnsupportedOperatorError(
                f"{len(problems)} node(s) between trainable values and the loss cannot be differentiated:\n"
                + "\n".join(f"  {line}" for line in problems)
                + "\nexport without training, train only modules above them, or add rules in "
                "exporters/autodiff/rules"
            )
        for value in wrt:
            if value not in self.active:
                raise ExportError(
                    f"{value.name!r} does not influence the loss {loss.name!r} through differentiable "
                    "operators, so it cannot be trained: leave it out, or check that the graph uses it"
                )


def _judge(
    node: ir.Node, reached: set[ir.Value], opsets: Mapping[str, int], registry: Registry
) -> Rule | str | None:
    """The rule for a node, the reason why there is none, or None when no gradient flows through it."""
    if is_detached(node):
        return None
    used = [i for i, value in enumerate(node.inputs) if value is not None and value in reached]
    captured = any(
        value in reached
        for attribute in node.attributes.values()
        for subgraph in _subgraphs(attribute)
        for inner in subgraph.all_nodes()
        for value in inner.inputs
        if value is not None
    )
    if not used and not captured:
        return None
    if not any(_carries_gradient(output) for output in node.outputs):
        return None
    version = _version(node, opsets)
    entry = registry.find(node.domain, node.op_type, version)
    if isinstance(entry, NonDifferentiable):
        return None
    if isinstance(entry, Refused):
        return f"refused because {entry.because}"
    if entry is None:
        known = registry.known_versions(node.domain, node.op_type)
        if known:
            ranges = ", ".join(f"{since}-{until}" for since, until in known)
            return f"no rule for this version of the operator (known: {ranges})"
        return "no rule"
    if entry.differentiable is not None:
        for i in used:
            if i not in entry.differentiable:
                return f"refused because the rule has no cotangent for input {i} ({_name(node.inputs[i])})"
    reason = entry.refuses(node) if entry.refuses else None
    return entry if reason is None else f"refused because {reason}"


def _subgraphs(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    if attribute.type == ir.AttributeType.GRAPHS:
        return attribute.as_graphs()
    return []


def _carries_gradient(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _differentiable_inputs(node: ir.Node, rule: Rule | None) -> list[ir.Value]:
    positions = None if rule is None else rule.differentiable
    return [
        value
        for i, value in enumerate(node.inputs)
        if value is not None and (positions is None or i in positions)
    ]


def _version(node: ir.Node, opsets: Mapping[str, int]) -> int:
    return operator_version(node.domain, node.op_type, node.version or opsets.get(node.domain, 1))


def _name(value: ir.Value | None) -> str:
    return "absent" if value is None else repr(value.name)


def _describe(node: ir.Node, opsets: Mapping[str, int], reason: str) -> str:
    scope = next((node.metadata_props[key] for key in _SCOPE_KEYS if key in node.metadata_props), None)
    where = f" in {scope}" if scope else ""
    operator = f"{node.domain or 'ai.onnx'}::{node.op_type} version {_version(node, opsets)}"
    return f"{operator}, node {node.name!r}{where}: {reason}"


def _backward_metadata(node: ir.Node) -> dict[str, str]:
    """Module scopes of the forward node, so that later passes can find the block a node belongs to."""
    metadata = {key: node.metadata_props[key] for key in _SCOPE_KEYS if key in node.metadata_props}
    metadata["edgepeft.backward_of"] = node.name or ""
    return metadata
