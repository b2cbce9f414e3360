"""Writes `docs/operators.md`: `python -m tests.gradcheck.operator_table`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from edgepeft.exporters.autodiff.registry import (
    ALL_VERSIONS,
    RULES,
    NonDifferentiable,
    Refused,
    Registration,
    Rule,
)

from .cases import all_cases
from .harness import Case
from .standard import COUNTS
from .standard_check import AS_EXPORTED, AS_IS, FAULTS, REFUSED, RIGHT, UNPROVEN

PATH = Path(__file__).parents[2] / "docs" / "operators.md"

HEADER = """# Operators of the gradient compiler

Generated from the table of rules and the cases of `tests/gradcheck/` by
`python -m tests.gradcheck.operator_table`; a test compares it. Versions are operator versions (the opset in
which the operator last changed), not opsets. An operator that is in none of the tables below stops the export
with an error that names it, its version and its module.

A bar over a name is its cotangent: the gradient of the loss with respect to it. Σ sums over broadcast axes
where nothing else is said. Every case runs with all subsets of wanted inputs, with static and with unknown
dimensions, in float32 in onnxruntime against PyTorch; the column says what else it is compared with.

{standard}

## Rules

| operator | versions | cotangents | cases | proven by |
|---|---|---|---|---|
"""


STANDARD = """
The standard's own node tests, those {tests} of onnx {version} with a floating-point tensor among their inputs
and their outputs, go the way of a file that somebody else wrote: a bundle's opset, the exporter's shapes, the
gradients of all inputs in onnxruntime, compared with differences in float64 (`python -m
tests.gradcheck.standard`, some minutes; CI runs a sample). *Refused* are those that the compiler declines by
name; *unproven* those that onnxruntime does not run or computes otherwise than the standard, and those that
nothing computes in float64; *faults* are wrong gradients, graphs that do not run, shapes that are not the
declared ones and errors of other kinds than the project's.

| form | right | refused | unproven | faults |
|---|---|---|---|---|
{rows}
"""


def render() -> str:
    """The document."""
    cases: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in all_cases():
        cases[case.domain, case.op_type].append(case)
    registrations = sorted(RULES, key=lambda r: (r.domain, r.op_type, r.since))
    lines = [HEADER.replace("{standard}", _standard()).rstrip("\n")]
    for registration in registrations:
        if isinstance(registration.entry, Rule):
            lines.append(_rule_row(registration, registration.entry, cases))
    lines += ["", "## No gradient", "", "Piecewise constant or facts about shapes: cotangents stop here.", ""]
    stops = [r for r in registrations if isinstance(r.entry, NonDifferentiable)]
    lines.append(", ".join(map(_name, stops)))
    lines += ["", "## Refused", "", "| operator | versions | because |", "|---|---|---|"]
    for registration in registrations:
        if isinstance(registration.entry, Refused):
            row = (_name(registration), _versions(registration), registration.entry.because)
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _standard() -> str:
    """What came of the standard's own tests."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    tests = sum(counts[AS_IS].values())
    rows = []
    for form in (AS_IS, AS_EXPORTED):
        told = [counts[form].get(outcome, 0) for outcome in (RIGHT, REFUSED, UNPROVEN)]
        told.append(sum(counts[form].get(fault, 0) for fault in FAULTS))
        rows.append(f"| {form} | {' | '.join(map(str, told))} |")
    return STANDARD.format(version=counts["onnx"], tests=tests, rows="\n".join(rows)).strip()


def _rule_row(registration: Registration, rule: Rule, cases: dict[tuple[str, str], list[Case]]) -> str:
    formula = " ".join((rule.function.__doc__ or "").split()).replace("|", "\\|")
    own = cases[registration.domain, registration.op_type]
    if any(case.float64 for case in own):
        proof = "PyTorch and central differences in float64"
    elif any(case.linear for case in own):
        proof = "exact differences (linear) in float32"
    else:
        proof = "central differences in float32"
    row = (_name(registration), _versions(registration), formula, str(len(own)), proof)
    return f"| {' | '.join(row)} |"


def _name(registration: Registration) -> str:
    return f"{registration.domain}::{registration.op_type}" if registration.domain else registration.op_type


def _versions(registration: Registration) -> str:
    if (registration.since, registration.until) == ALL_VERSIONS:
        return "all"
    if registration.since == registration.until:
        return str(registration.since)
    return f"{registration.since}-{registration.until}"


if __name__ == "__main__":
    PATH.write_text(render(), encoding="utf-8")
