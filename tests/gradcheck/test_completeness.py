"""The table and the cases cover each other."""

from __future__ import annotations

import unicodedata

import onnx.defs
import pytest

from edgepeft.exporters.autodiff.registry import (
    RULES,
    NonDifferentiable,
    Registration,
    Registry,
    Rule,
    operator_version,
)

from .cases import all_cases
from .operator_table import PATH, render

TESTED = {
    (case.domain, case.op_type, operator_version(case.domain, case.op_type, 1 if case.domain else case.opset))
    for case in all_cases()
}


@pytest.mark.parametrize("registration", list(RULES), ids=lambda r: f"{r.domain}::{r.op_type}-{r.since}")
def test_every_rule_has_a_case_and_a_formula(registration: Registration) -> None:
    if not isinstance(registration.entry, Rule):
        return
    versions = {v for domain, op, v in TESTED if (domain, op) == (registration.domain, registration.op_type)}
    in_range = [version for version in versions if registration.since <= version <= registration.until]
    assert in_range, "no case exercises this rule"
    formula = unicodedata.normalize("NFD", registration.entry.function.__doc__ or "")
    assert "\N{COMBINING MACRON}" in formula, "the docstring is the rule's formula"


@pytest.mark.parametrize("registration", list(RULES), ids=lambda r: f"{r.domain}::{r.op_type}-{r.since}")
def test_ranges_end_at_versions_that_exist(registration: Registration) -> None:
    """A rule claims versions that somebody has read, not those to come."""
    versions = {
        schema.since_version
        for schema in onnx.defs.get_all_schemas_with_history()
        if (schema.domain, schema.name) == (registration.domain, registration.op_type)
    } or {1}
    if isinstance(registration.entry, Rule):
        assert registration.since in versions
        assert registration.until in versions or registration.until > onnx.defs.onnx_opset_version()


def test_the_same_operator_version_cannot_be_registered_twice() -> None:
    registry = Registry()
    registry.add(Registration("", "Add", 7, 13, NonDifferentiable()))
    registry.add(Registration("", "Add", 14, 14, NonDifferentiable()))
    with pytest.raises(
        ValueError, match=r"ai.onnx::Add has two entries, for operator versions 13-14 and 7-13"
    ):
        registry.add(Registration("", "Add", 13, 14, NonDifferentiable()))


def test_lookup_is_by_operator_version() -> None:
    registry = Registry()
    registry.add(Registration("", "Add", 7, 13, NonDifferentiable()))
    assert registry.find("", "Add", 13) is not None
    assert registry.find("", "Add", 14) is None
    assert registry.find("com.microsoft", "Add", 13) is None
    assert operator_version("", "Add", 23) == 14
    assert operator_version("com.microsoft", "MatMulNBits", 1) == 1


def test_the_operator_table_is_up_to_date() -> None:
    assert PATH.read_text(encoding="utf-8") == render(), "run python -m tests.gradcheck.operator_table"
