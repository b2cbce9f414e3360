"""Techniques have two halves: one of the graph, one of an adapter's tensors."""

from edgepeft.exporters.techniques import graph_technique
from edgepeft.techniques import MODULES


def test_every_technique_has_both_halves() -> None:
    assert all(graph_technique(name).name == name for name in MODULES)
